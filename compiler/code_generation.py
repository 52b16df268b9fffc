# SPDX-License-Identifier: Apache-2.0
"""Machine code of scheduled kernels, generated side by side.

Kernels call nothing of each other, so each is a module of its own, and TVM and LLVM let other threads run meanwhile. What is
generated here is linked both into what verification and timing run and into the artifact.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import tvm
import tvm_ffi
from tvm import tirx

from compiler.disk import CODE_BYTES, check_space
from schedules.target import usable_cores

# Kernels allocate what they need: nothing to shrink, and trying takes half the time of compiling large ones.
_NEEDLESS_PASSES = ["s_tir.CompactBufferAllocation"]
# Nor do kernels look at their arguments again: the program checks the model's inputs, and calls kernels with tensors that it
# made itself and constants whose size loading checked. Their own checks were half of a small network's code.
_CONFIG = {"tirx.disable_assert": True}

_SILENCE = 10.0  # seconds without a word


class GeneratedCode:
    """Code of functions that was generated before, by name and target: the variants of a network, and what observes it, have
    many kernels in common."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], list[tuple[tirx.PrimFunc, tvm.runtime.Module]]] = {}

    def find(
        self, name: str, function: tirx.PrimFunc, target: tvm.target.Target
    ) -> tvm.runtime.Module | None:
        """The code of the same function under the same name, if there is any."""
        for known, code in self._known.get((name, str(target)), ()):
            if tvm_ffi.structural_equal(known, function):
                return code
        return None

    def add(
        self,
        name: str,
        function: tirx.PrimFunc,
        target: tvm.target.Target,
        code: tvm.runtime.Module,
    ) -> None:
        self._known.setdefault((name, str(target)), []).append((function, code))


def generate_code(
    functions: Mapping[str, tirx.PrimFunc],
    target: tvm.target.Target,
    progress: Callable[[str], None] | None = None,
    known: GeneratedCode | None = None,
) -> list[tvm.runtime.Module]:
    """One static library for each function, in their order; whatever the number of threads, the same code.

    Functions that `known` holds are not compiled again, others are added to it. `progress` hears every few seconds how many
    there are. Raises UserError if there is no room for object files in the directory for temporary ones.
    """
    known = GeneratedCode() if known is None else known
    missing = {n: f for n, f in functions.items() if known.find(n, f, target) is None}
    for (name, function), code in zip(missing.items(), _generate(missing, target, progress)):
        known.add(name, function, target, code)
    return [known.find(name, function, target) for name, function in functions.items()]


def _generate(
    functions: Mapping[str, tirx.PrimFunc],
    target: tvm.target.Target,
    progress: Callable[[str], None] | None,
) -> list[tvm.runtime.Module]:
    with tempfile.TemporaryDirectory(prefix="kerf-") as directory:
        check_space(Path(directory), CODE_BYTES)
        pool = ThreadPoolExecutor(usable_cores())
        try:
            work = [
                pool.submit(_compile, name, function, target, Path(directory) / f"{index}.o")
                for index, (name, function) in enumerate(functions.items())
            ]
            pending = set(work)
            while pending:
                finished, pending = wait(pending, _SILENCE, FIRST_EXCEPTION)
                for done in finished:
                    done.result()  # raises what it raised
                if pending and progress is not None:
                    progress(f"{len(work) - len(pending)} of {len(work)} kernels compiled")
            return [done.result() for done in work]
        finally:  # after an error, or Ctrl-C, nothing more is begun
            pool.shutdown(cancel_futures=True)


def _compile(
    name: str, function: tirx.PrimFunc, target: tvm.target.Target, path: Path
) -> tvm.runtime.Module:
    # What passes are left out is known to a thread, not to the process.
    with tvm.transform.PassContext(config=_CONFIG, disabled_pass=_NEEDLESS_PASSES):
        module = tvm.tirx.build(tvm.IRModule({name: function}), target=target)
    module.write_to_file(str(path))
    return tvm.runtime.load_static_library(str(path), [name])
