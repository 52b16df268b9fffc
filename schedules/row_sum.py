# SPDX-License-Identifier: Apache-2.0
"""Sums and means along the last axis: vectors of a row, added lane by lane and then across."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated
from schedules.emission import Row, emitting, local_buffer, loop, ramp, runs_parallel, unravel
from schedules.fused import Fused, annotations
from schedules.target import CpuTarget

LOOPS = "row_sum"
_UNROLL = 4


@dataclass(frozen=True)
class Point(Annotated):
    """What is computed: the mean or the sum, of shape [..., 1] or [...]; of the first `count` elements, 0 for all."""

    mean: bool
    keepdims: bool
    count: int = 0


def define_row_sum(x, point: Point):
    """te: x [..., K] of float32 -> its sums or means."""
    *outer, extent = (int(d) for d in x.shape)
    extent = point.count or extent
    shape = (*outer, 1) if point.keepdims else tuple(outer)
    k = te.reduce_axis((0, extent), "k")
    total = te.compute(shape, lambda *i: te.sum(x(*i[: len(outer)], k), axis=k), name="row_total")
    count = tirx.const(float(extent) if point.mean else 1.0, "float32")
    return te.compute(
        shape, lambda *i: total(*i) / count, name=LOOPS, attrs=annotations(LOOPS, **point.to_dict())
    )


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused sum or mean."""
    point = Point.from_dict(fused.point)
    with emitting(fused, 2) as (kernel, (x,)):
        *outer, extent = (int(d) for d in x.shape)
        extent = point.count or extent
        rows, row = math.prod(outer), Row(extent, target.lanes)
        count = tirx.const(float(extent) if point.mean else 1.0, "float32")
        with loop(rows, parallel=runs_parallel(target, rows, rows * extent)) as r:
            at = unravel(r, outer)
            scratch = local_buffer(_UNROLL * row.lanes)
            total = row.reduce(
                scratch,
                lambda base: x[(*at, ramp(base, row.lanes))],
                lambda a, b: a + b,
                0.0,
                _UNROLL,
            )
            kernel.store(T.bind(total / count), [*at, 0] if point.keepdims else list(at))
    return kernel.func
