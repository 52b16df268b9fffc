# SPDX-License-Identifier: Apache-2.0
"""Layer norm and RMS norm over the last axis: definition and kernel.

    y = (x - mean) / sqrt(variance + eps) * gamma + beta          layer norm, variance about the mean (two passes)
    y = x / sqrt(mean of x^2 + eps) * gamma                       RMS norm

Rows are divided among threads; a row is read three times from the nearest cache and written once, through the epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

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
)
from schedules.fused import Fused, annotations
from schedules.lanes import broadcast
from schedules.target import CpuTarget

LOOPS = "layer_norm"


@dataclass(frozen=True)
class Point(Annotated):
    """Parameters of the kernel: vectors per step of a reduction, each with an accumulator of its own."""

    unroll: int = 4
    epsilon: float = 1e-5
    centered: bool = True


def define_layer_norm(x, gamma, beta, point: Point):
    """te: x [..., D], gamma [D], beta [D] -> [..., D], float32."""
    mean = _mean(x.shape, lambda *i: x(*i), "mean")
    variance = _mean(
        x.shape, lambda *i: (x(*i) - mean(*i[:-1])) * (x(*i) - mean(*i[:-1])), "variance"
    )
    return te.compute(
        x.shape,
        lambda *i: (x(*i) - mean(*i[:-1])) * _inverse_root(variance(*i[:-1]), point) * gamma(i[-1]) + beta(i[-1]),
        name="layer_norm", attrs=annotations(LOOPS, **point.to_dict()),
    )  # fmt: skip


def define_rms_norm(x, gamma, point: Point):
    """te: x [..., D], gamma [D] -> [..., D], float32."""
    square = _mean(x.shape, lambda *i: x(*i) * x(*i), "mean_square")
    return te.compute(
        x.shape, lambda *i: x(*i) * _inverse_root(square(*i[:-1]), point) * gamma(i[-1]),
        name="rms_norm", attrs=annotations(LOOPS, **point.to_dict()),
    )  # fmt: skip


def _mean(shape, element, name: str):
    extent = int(shape[-1])
    k = te.reduce_axis((0, extent), name="k")
    total = te.compute(shape[:-1], lambda *i: te.sum(element(*i, k), axis=k), name=f"{name}_sum")
    return te.compute(
        shape[:-1], lambda *i: total(*i) * tirx.const(1.0 / extent, "float32"), name=name
    )


def _inverse_root(variance, point: Point):
    return tirx.const(1.0, "float32") / tirx.sqrt(variance + tirx.const(point.epsilon, "float32"))


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel for a fused layer norm or RMS norm."""
    point = Point.from_dict(fused.point)
    shape = fused.shape
    row = Row(shape[-1], target.lanes)
    rows = 1
    for extent in shape[:-1]:
        rows *= extent
    with emitting(fused, 5 if point.centered else 3) as (kernel, loaded):
        x, *scale = loaded[-3:] if point.centered else loaded[-2:]
        with loop(rows, parallel=runs_parallel(target, rows, rows * shape[-1] * 8)) as r:
            _emit_row(kernel, point, row, x, scale, unravel(r, shape[:-1]))
    return kernel.func


def _emit_row(kernel, point: Point, row: Row, x, scale: list, at: tuple) -> None:
    lanes = row.lanes
    scratch = local_buffer(point.unroll * lanes)
    statistics = local_buffer(2)

    def load(base):
        return x[(*at, ramp(base, lanes))]

    def centered(base):
        return load(base) - broadcast(statistics[0], lanes) if point.centered else load(base)

    def mean_of(element):
        total = row.reduce(scratch, element, lambda a, b: a + b, 0.0, point.unroll)
        return total * splat(1.0 / row.extent, 1)

    if point.centered:
        T.buffer_store(statistics, mean_of(load), [0])
    variance = mean_of(lambda base: centered(base) * centered(base))
    T.buffer_store(statistics, splat(1.0, 1) / tirx.sqrt(variance + splat(point.epsilon, 1)), [1])

    def write(base, _slot, _fresh):
        lane = ramp(base, lanes)
        result = centered(base) * broadcast(statistics[1], lanes) * scale[0][lane]
        result = result + scale[1][lane] if len(scale) > 1 else result
        kernel.store(T.bind(result), [*at, lane])

    row.each(write, point.unroll)
