# SPDX-License-Identifier: Apache-2.0
"""Run a graph on calibration data and see the values inside it.

The graph is compiled with the wanted variables as further outputs, by the same dense kernels that the product runs on,
so that calibrating a real network on hundreds of samples takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tvm
from tvm import relax

from compiler.calibration import Calibration
from passes.layers import shape_of
from passes.rewriting import bindings_of, with_result
from schedules.errors import KerfError
from schedules.target import CpuTarget, detect_host


class Observer:
    """`Context.observe`: callable on (graph, names); yields per sample the values of these variables or inputs.

    Values are in the graph's own layout. Raises KerfError for a name that the graph does not have.
    """

    def __init__(self, calibration: Calibration, target: CpuTarget):
        self.calibration = calibration
        # What another machine will run is observed with this one's kernels.
        self.target = detect_host() if target.missing_on_host() else target

    def __call__(
        self, mod: tvm.IRModule, names: Sequence[str]
    ) -> Iterator[Mapping[str, np.ndarray]]:
        from compiler import pipeline
        from compiler.frontend import TensorSpec
        from compiler.runtime import from_variant

        main = mod["main"]
        inputs = [TensorSpec(p.name, shape_of(p), str(p.ty.dtype)) for p in main.params]
        wanted = [n for n in dict.fromkeys(names) if n not in {p.name for p in main.params}]
        tapped = tap(mod, wanted)
        outputs = [
            TensorSpec(n, shape_of(v), str(v.ty.dtype))
            for n, v in zip(wanted, tapped["main"].body.body.fields)
        ]
        variant = pipeline.compile_graph(
            "observed", pipeline.fuse_graph(pipeline.lay_out(tapped), self.target), self.target
        )
        model = from_variant(variant, inputs, outputs, self.target)
        for sample in self.calibration.samples():
            given = {spec.name: array for spec, array in zip(inputs, sample)}
            yield {**{n: given[n] for n in names if n in given}, **model.run(given)}


def tap(mod: tvm.IRModule, names: Sequence[str]) -> tvm.IRModule:
    """`mod` with the tuple of these variables as its result. Raises KerfError for an unknown name."""
    known = {b.var.name: b.var for b in bindings_of(mod["main"])}
    if unknown := [n for n in names if n not in known]:
        raise KerfError("no such variable to observe", found=", ".join(unknown))
    result = relax.Tuple([known[n] for n in names])
    tapped = tvm.IRModule({"main": with_result(mod["main"], result)}, attrs=mod.attrs)
    return relax.transform.DeadCodeElimination()(tapped)
