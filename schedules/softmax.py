# SPDX-License-Identifier: Apache-2.0
"""Softmax and log-softmax along any axis: definition and kernel.

    y = exp(x - max) / sum exp(x - max)          log: y = x - max - log(sum exp(x - max))

The last axis is read as vectors of a row; any other axis is walked in steps, one vector of neighbouring columns at a
time. A column whose greatest value is -inf gives NaN, as in torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

from schedules import vector_math
from schedules.annotated import Annotated
from schedules.emission import (
    Row,
    emitting,
    local_buffer,
    loop,
    ramp,
    runs_parallel,
    splat,
    unravel,
    workspace,
)
from schedules.fused import Fused, annotations
from schedules.lanes import broadcast
from schedules.target import CpuTarget

LOOPS = "softmax"


@dataclass(frozen=True)
class Point(Annotated):
    """Parameters of the kernel: the axis (not negative), whether the logarithm is wanted, accumulators of a row."""

    axis: int
    log: bool = False
    unroll: int = 4


def define_softmax(x, point: Point):
    """te: softmax of x (float32) along `point.axis`, or its logarithm."""
    axis, shape = point.axis, list(x.shape)
    outer = shape[:axis] + shape[axis + 1 :]

    def column(*i):
        return (*i[:axis], *i[axis + 1 :])

    def reduced(reducer, element, name):
        k = te.reduce_axis((0, shape[axis]), name="k")
        return te.compute(
            outer, lambda *i: reducer(element(*i[:axis], k, *i[axis:]), axis=k), name=name
        )

    greatest = reduced(te.max, lambda *i: x(*i), "greatest")
    exponential = te.compute(
        shape, lambda *i: vector_math.exp_nonpositive(x(*i) - greatest(*column(*i))), name="exp"
    )
    total = reduced(te.sum, lambda *i: exponential(*i), "total")
    if point.log:

        def result(*i):
            return x(*i) - greatest(*column(*i)) - vector_math.log(total(*column(*i)))
    else:

        def result(*i):
            return exponential(*i) / total(*column(*i))

    return te.compute(shape, result, name="softmax", attrs=annotations(LOOPS, **point.to_dict()))


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel for a fused softmax or log-softmax."""
    point, shape = Point.from_dict(fused.point), fused.shape
    columns, inner = shape[: point.axis], shape[point.axis + 1 :]
    outer_size = math.prod(columns)
    work = math.prod(shape) * 20
    with emitting(fused, 4) as (kernel, (x, *_)):
        if not inner:
            row = Row(shape[point.axis], target.lanes)
            with loop(outer_size, parallel=runs_parallel(target, outer_size, work)) as r:
                _emit_row(kernel, point, row, x, unravel(r, columns))
        else:
            # A vector may not wrap from one index of the second last axis to the next: columns of the last axis only.
            row = Row(inner[-1], target.lanes)
            bundles = outer_size * math.prod(inner[:-1])
            with loop(bundles, parallel=runs_parallel(target, bundles, work)) as r:
                at = unravel(r, (*columns, *inner[:-1]))
                row.each(lambda base, _slot, _fresh: _emit_column(
                    kernel, point, shape[point.axis], x, at[: point.axis], at[point.axis :], ramp(base, row.lanes), row.lanes
                ), 1)  # fmt: skip
    return kernel.func


def _emit_row(kernel, point: Point, row: Row, x, at: tuple) -> None:
    lanes = row.lanes
    scratch = local_buffer(point.unroll * lanes)
    statistics = local_buffer(2)
    exponentials = None if point.log else workspace(row.extent)

    def load(base):
        return x[(*at, ramp(base, lanes))]

    def exponential(base):
        value = T.bind(load(base) - broadcast(statistics[0], lanes))
        value = T.bind(vector_math.exp_nonpositive(value))
        if exponentials is not None:
            T.buffer_store(exponentials, value, [ramp(base, lanes)])
        return value

    T.buffer_store(statistics, row.reduce(scratch, load, tirx.max, -math.inf, point.unroll), [0])
    T.buffer_store(
        statistics, row.reduce(scratch, exponential, lambda a, b: a + b, 0.0, point.unroll), [1]
    )
    T.buffer_store(
        statistics,
        vector_math.log(statistics[1]) if point.log else splat(1.0, 1) / statistics[1],
        [1],
    )

    def write(base, _slot, _fresh):
        factor = broadcast(statistics[1], lanes)
        if point.log:
            result = load(base) - broadcast(statistics[0], lanes) - factor
        else:
            result = exponentials[ramp(base, lanes)] * factor
        kernel.store(T.bind(result), [*at, ramp(base, lanes)])

    row.each(write, point.unroll)


def _emit_column(
    kernel, point: Point, extent: int, x, before: tuple, after: tuple, lane, lanes: int
) -> None:
    state = local_buffer(2 * lanes)
    greatest, total = (ramp(k * lanes, lanes) for k in range(2))
    exponentials = None if point.log else workspace(extent, lanes)

    def load(k):
        return x[(*before, k, *after, lane)]

    T.buffer_store(state, splat(-math.inf, lanes), [greatest])
    with T.serial(0, extent) as k:
        T.buffer_store(state, tirx.max(state[greatest], load(k)), [greatest])
    T.buffer_store(state, splat(0.0, lanes), [total])
    with T.serial(0, extent) as k:
        value = T.bind(load(k) - state[greatest])
        value = T.bind(vector_math.exp_nonpositive(value))
        if exponentials is not None:
            T.buffer_store(exponentials, value, [k, ramp(0, lanes)])
        T.buffer_store(state, state[total] + value, [total])
    T.buffer_store(
        state,
        vector_math.log(state[total]) if point.log else splat(1.0, lanes) / state[total],
        [total],
    )
    with T.serial(0, extent) as k:
        if point.log:
            result = load(k) - state[greatest] - state[total]
        else:
            result = exponentials[k, ramp(0, lanes)] * state[total]
        kernel.store(T.bind(result), [*before, k, *after, lane])
