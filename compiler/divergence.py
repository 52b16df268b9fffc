# SPDX-License-Identifier: Apache-2.0
"""Find the first kernel that computes something other than its definition, by running both on the
same inputs.

Every kernel call of a variant is intercepted; its definition, the fused PrimFunc before
scheduling, is compiled without any schedule and run on the arguments of that very call, so that
errors of earlier kernels do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from compiler.arrays import ALIGNMENT
from compiler.artifact import KernelCall
from compiler.comparison import AMPLIFICATION, SLACK, UNIT, difference, magnitude
from compiler.float_steps import moved
from compiler.runtime import LoadedModel
from schedules.fused import leaf_blocks
from schedules.target import detect_host

# Steps may differ by one where the value before rounding lies at a tie: a share of about 255 * 2^-23 per operation.
_TIES = 1e-3
# Evaluations nearby, and how many elements at a threshold none of them moves, for each that one does: at most 1 in 7, of
# which a kernel moves half.
_EVALUATIONS = 3
_UNSEEN = 1 / 8


@dataclass(frozen=True)
class Divergence:
    """A kernel call (`index` in call order) whose output `output` differs from its definition's."""

    index: int
    function: str
    layers: tuple[str, ...]
    loops: str
    output: int
    max_abs: float
    tolerance: float

    def __str__(self) -> str:
        layers = ", ".join(self.layers) or "no layer"
        return (
            f"first diverging kernel {self.function} ({layers}; call {self.index}, {self.loops}; "
            f"difference {self.max_abs:.3g}, tolerance {self.tolerance:.3g})"
        )


def find_first_divergence(
    model: LoadedModel,
    unscheduled: tvm.IRModule,
    inputs: Sequence[np.ndarray],
    flips: float = 0.0,
) -> Divergence | None:
    """The first kernel of `model` on `inputs` that differs from its definition in `unscheduled`;
    None if none does. A share `flips` of the elements of a tensor may."""
    definitions = _Definitions(unscheduled, flips)
    found: list[Divergence] = []
    position = [0]

    given: dict[int, tvm.runtime.Tensor] = {}  # what the kernel will write over

    def watch(_function, name, before, _result, *arguments):
        if found or name not in model.kernel_names:
            return 0
        if before:
            given.clear()
            given.update(_written_over(arguments))
            return 0
        arguments = [given.get(i, a) for i, a in enumerate(arguments)]
        index = position[0]
        position[0] += 1
        if name in definitions:
            call = model.kernels[index] if index < len(model.kernels) else None
            found.extend(definitions.differ(index, name, call, arguments))
        return 0

    tensors = model.bind(inputs)
    with model.instrumented(watch):
        model.invoke(tensors)
    return found[0] if found else None


def _written_over(arguments: Sequence) -> dict[int, tvm.runtime.Tensor]:
    """Copies of those arguments that are the last one, a kernel's output, too; by position."""
    *read, output = arguments
    same = [
        i
        for i, a in enumerate(read)
        if isinstance(a, tvm.runtime.Tensor) and a.data_ptr() == output.data_ptr()
    ]
    return {i: tvm.runtime.tensor(read[i].numpy().copy()) for i in same}


class _Definitions:
    """Unscheduled PrimFuncs, compiled when first needed."""

    def __init__(self, mod: tvm.IRModule, flips: float):
        self.flips = flips
        self.functions = {
            gv.name_hint: f for gv, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)
        }
        self.compiled: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.functions

    def differ(
        self, index: int, name: str, call: KernelCall | None, arguments: Sequence
    ) -> list[Divergence]:
        tensors = [_aligned(a) for a in arguments if isinstance(a, tvm.runtime.Tensor)]
        written = written_parameters(self.functions[name])
        outputs = [i for i, w in enumerate(written) if w]
        copies = [tvm.runtime.empty(t.shape, t.dtype) if w else t for t, w in zip(tensors, written)]
        self._run(name)(*copies)
        loops = call.loops if call else "generic"
        for number, i in enumerate(outputs):
            wanted, got = copies[i].numpy(), tensors[i].numpy()
            error, limit = difference(got, wanted), self._tolerance(call, wanted, loops)
            if wanted.dtype == np.uint8 and np.mean(got != wanted) <= _TIES:
                limit = 1.0
            if not error <= limit and self._too_many(name, tensors, written, i, limit):
                layers = tuple(call.layers) if call else ()
                return [Divergence(index, name, layers, loops, number, error, limit)]
        return []

    def _too_many(
        self, name: str, tensors: Sequence, written: Sequence[bool], output: int, limit: float
    ) -> bool:
        """Whether more elements lie beyond `limit` than may lie on the other side of a threshold.

        Beside a share `flips` these are the ones that the definition itself moves there on inputs nearby. Sums of signs
        are often at a threshold exactly; an evaluation nearby moves half of these, so a few are not seen to move.
        """
        got = tensors[output].numpy()
        if not self.flips:
            return True
        evaluations = [
            self._evaluate(name, tensors, written, output, seed) for seed in range(_EVALUATIONS + 1)
        ]
        wanted, nearby = evaluations[0], evaluations[1:]
        moves = np.logical_or.reduce([_beyond(other, wanted, limit) for other in nearby])
        left = _beyond(got, wanted, limit) & ~moves
        return bool(left.mean() > self.flips + _UNSEEN * moves.mean())

    def _evaluate(
        self, name: str, tensors: Sequence, written: Sequence[bool], output: int, seed: int
    ) -> np.ndarray:
        """The output of a definition; with a `seed` other than 0 on floats moved by a few units in the last place."""
        rng = np.random.default_rng(seed)

        def argument(tensor: tvm.runtime.Tensor, is_output: bool) -> tvm.runtime.Tensor:
            if is_output:
                return tvm.runtime.empty(tensor.shape, tensor.dtype)
            if not seed or str(tensor.dtype) != "float32":
                return tensor
            return tvm.runtime.tensor(moved(tensor.numpy(), rng))

        arguments = [argument(t, w) for t, w in zip(tensors, written)]
        self._run(name)(*arguments)
        return arguments[output].numpy()

    def _run(self, name: str):
        if name not in self.compiled:
            mod = tvm.IRModule({name: self.functions[name].with_attr("global_symbol", name)})
            self.compiled[name] = tvm.compile(mod, _target())[name]
        return self.compiled[name]

    @staticmethod
    def _tolerance(call: KernelCall | None, wanted: np.ndarray, loops: str) -> float:
        """As in compiler.comparison, for one layer: sums of K terms in another order. Both sides
        round."""
        if wanted.dtype.kind != "f":
            return 0.0
        length = max((call.flops if call else 0) / (2 * max(wanted.size, 1)), 16.0)
        return SLACK * AMPLIFICATION.get(loops, 1.0) * magnitude(wanted) * UNIT * math.sqrt(length)


def _target() -> tvm.target.Target:
    """This CPU's. For one without AVX nothing is optimized: LLVM would have SSE round floats where they lie in memory,
    which faults unless they lie on 16 bytes."""
    host = detect_host()
    if host.arch == "x86_64" and host.tier == "generic":
        return tvm.target.Target({"kind": "llvm", "opt-level": 0})
    return host.tvm()


def _aligned(tensor: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
    """The tensor, or a copy where a definition may read it: a model's inputs lie where the caller has them."""
    if tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tvm.runtime.tensor(tensor.numpy())


def _beyond(got: np.ndarray, wanted: np.ndarray, limit: float) -> np.ndarray:
    """bool: which elements differ by more than `limit`, or in being finite; of words of signs, which bits."""
    if got.dtype == np.uint32:
        got, wanted = (np.unpackbits(a.view(np.uint8)) for a in (got, wanted))
    same = np.abs(got.astype("float64") - wanted.astype("float64")) <= limit
    return ~(same | (got == wanted) | (np.isnan(got) & np.isnan(wanted)))


def written_parameters(func: tirx.PrimFunc) -> list[bool]:
    """Which parameters of a PrimFunc its blocks write."""
    written = [region.source for block in leaf_blocks(func.body) for region in block.writes]
    return [any(b.same_as(w) for w in written) for b in func.params]
