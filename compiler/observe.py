# SPDX-License-Identifier: Apache-2.0
"""Run a graph on calibration data and see the values inside it.

The graph is compiled with the wanted variables as further outputs, by the same dense kernels that the product runs on,
so that calibrating a real network on hundreds of samples takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tvm
from tvm import relax

from compiler.calibration import Calibration
from passes.layers import shape_of
from passes.rewriting import bindings_of, with_result
from schedules.errors import KerfError
from schedules.target import CpuTarget, detect_host

if TYPE_CHECKING:
    from compiler.artifact import CompiledVariant
    from compiler.code_generation import GeneratedCode
    from compiler.runtime import LoadedModel


class Observer:
    """`Context.observe`: callable on (graph, names[, further]); yields per sample the values of these variables or inputs.

    `further` are values, by name, of inputs that the graph has and the model does not. Values are in the graph's own
    layout. What was compiled is kept: a graph that differs in constants only, observed at some of the same variables, runs
    on the same code, and others share kernels with whatever is compiled with the same `code`. Raises KerfError for a name
    that the graph does not have.
    """

    def __init__(
        self, calibration: Calibration, target: CpuTarget, code: GeneratedCode | None = None
    ):
        self.calibration, self.code = calibration, code
        # What another machine will run is observed with this one's kernels.
        self.target = detect_host() if target.missing_on_host() else target
        self._kept: list[tuple[list[str], CompiledVariant]] = []
        self._last: tuple[tvm.IRModule, list[str], LoadedModel] | None = None

    def __call__(
        self,
        mod: tvm.IRModule,
        names: Sequence[str],
        further: Mapping[str, np.ndarray] | None = None,
    ) -> Iterator[Mapping[str, np.ndarray]]:
        params = [p.name for p in mod["main"].params]
        wanted = [n for n in dict.fromkeys(names) if n not in params]
        model = self._compiled(mod, wanted) if wanted else None
        for sample in self.calibration.samples():
            given = {**dict(zip(params, sample)), **(further or {})}
            found = model.run(given) if model is not None else {}
            yield {n: given[n] if n in given else found[n] for n in names}

    def _compiled(self, mod: tvm.IRModule, names: Sequence[str]) -> LoadedModel:
        from compiler.frontend import TensorSpec
        from compiler.runtime import from_variant

        if (
            self._last is not None
            and self._last[0].same_as(mod)
            and set(names) <= set(self._last[1])
        ):
            return self._last[2]
        names, variant = self._program(mod, names)
        inputs = [TensorSpec(p.name, shape_of(p), str(p.ty.dtype)) for p in mod["main"].params]
        outputs = [
            TensorSpec(n, shape_of(v), str(v.ty.dtype))
            for n, v in zip(names, tap(mod, names)["main"].body.body.fields)
        ]
        model = from_variant(variant, inputs, outputs, self.target)
        self._last = (mod, names, model)
        return model

    def _program(
        self, mod: tvm.IRModule, names: Sequence[str]
    ) -> tuple[list[str], CompiledVariant]:
        """The graph compiled with these variables as outputs, or with more, and the names of its outputs."""
        from compiler import pipeline

        known = {b.var.name for b in bindings_of(mod["main"])}
        fitting = [kept for kept in self._kept if set(names) <= set(kept[0]) <= known]
        of, earlier = min(fitting, key=lambda kept: len(kept[0]), default=(list(names), None))
        fused = pipeline.fuse_graph(pipeline.lay_out(tap(mod, of)), self.target)
        found = pipeline.compile_graph("observed", fused, self.target, earlier, code=self.code)
        if earlier is None or found.executable is not earlier.executable:
            self._kept.append((of, found))
        return of, found


def tap(mod: tvm.IRModule, names: Sequence[str]) -> tvm.IRModule:
    """`mod` with the tuple of these variables as its result. Raises KerfError for an unknown name."""
    known = {b.var.name: b.var for b in bindings_of(mod["main"])}
    if unknown := [n for n in names if n not in known]:
        raise KerfError("no such variable to observe", found=", ".join(unknown))
    result = relax.Tuple([known[n] for n in names])
    tapped = tvm.IRModule({"main": with_result(mod["main"], result)}, attrs=mod.attrs)
    return relax.transform.DeadCodeElimination()(tapped)
