# SPDX-License-Identifier: Apache-2.0
"""Build a small graph from Relax calls, lower, fuse, schedule and run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest


@dataclass(frozen=True)
class Ran:
    """Outputs of one run, and the loop structures of the kernels by function name."""

    output: np.ndarray
    loops: dict[str, str]


def run_graph(build: Callable, inputs: list[np.ndarray], lowerings: Mapping, target) -> Ran:
    """`build(bb, *vars)` emits the graph and returns its result; every call in `lowerings` is lowered by it."""
    import tvm
    from tvm import relax
    from tvm.relax.backend.cpu_generic import pipeline

    from passes.lower import lower_operators
    from schedules.dispatch import schedule_module

    bb = relax.BlockBuilder()
    args = [
        relax.Var(f"x{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(inputs)
    ]
    with bb.function("main", args):
        with bb.dataflow():
            result = bb.emit_output(bb.emit(build(bb, *args)))
        bb.emit_func_output(result)
    mod = lower_operators(bb.finalize(), lowerings, target).mod
    fuse = [
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    mod = tvm.transform.Sequential([*fuse, relax.transform.DeadCodeElimination()])(mod)
    mod, kernels = schedule_module(mod, target)
    with target.tvm() as tvm_target:
        passes = pipeline.dataflow_lower_passes(tvm_target) + pipeline.finalize_passes(tvm_target)
        mod = tvm.transform.Sequential(passes)(mod)
    executable = tvm.compile(mod, target.tvm(), relax_pipeline=tvm.transform.Sequential([]))
    vm = relax.VirtualMachine(executable, tvm.cpu())
    output = vm["main"](*[tvm.runtime.tensor(a) for a in inputs]).numpy()
    return Ran(output, {k.function: k.loops for k in kernels.values()})


@pytest.fixture(scope="session")
def run():
    return run_graph
