# SPDX-License-Identifier: Apache-2.0
"""Layer norm and RMS norm over the last axis, or over planes: definition and kernel.

    y = (x - mean) / sqrt(variance + eps) * gamma + beta          layer norm, variance about the mean (two passes)
    y = x / sqrt(mean of x^2 + eps) * gamma                       RMS norm

Rows are divided among threads; a row is read three times from the nearest cache and written once, through the epilogue.
Of planes [N, D, P], normalised over D, a vector holds pixels, and a tile of them is what a row is above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
_VECTORS = 2  # of pixels of a tile of planes, which is to stay in the first-level cache


@dataclass(frozen=True)
class Point(Annotated):
    """Parameters of the kernel: vectors per step of a reduction, each with an accumulator of its own; `axis` is the one that
    is normalised over, -1, or 1 of three."""

    unroll: int = 4
    epsilon: float = 1e-5
    centered: bool = True
    axis: int = -1


def define_layer_norm(x, gamma, beta, point: Point):
    """te: x [..., D], gamma [D], beta [D] -> [..., D], float32; or x [N, D, P]."""
    mean = _mean(x.shape, lambda *i: x(*i), "mean", point)
    variance = _mean(
        x.shape,
        lambda *i: (x(*i) - mean(*_others(i, point))) * (x(*i) - mean(*_others(i, point))),
        "variance",
        point,
    )

    def element(*i):
        others, d = _others(i, point), i[point.axis]
        scale = _inverse_root(variance(*others), point)
        return (x(*i) - mean(*others)) * scale * gamma(d) + beta(d)

    notes = annotations(LOOPS, **point.to_dict())
    return te.compute(x.shape, element, name="layer_norm", attrs=notes)


def define_rms_norm(x, gamma, point: Point):
    """te: x [..., D], gamma [D] -> [..., D], float32; or x [N, D, P]."""
    square = _mean(x.shape, lambda *i: x(*i) * x(*i), "mean_square", point)

    def element(*i):
        return x(*i) * _inverse_root(square(*_others(i, point)), point) * gamma(i[point.axis])

    notes = annotations(LOOPS, **point.to_dict())
    return te.compute(x.shape, element, name="rms_norm", attrs=notes)


def _others(indices, point: Point) -> tuple:
    """The indices, or extents, of the axes that are not normalised over."""
    axis = point.axis % len(indices)
    return (*indices[:axis], *indices[axis + 1 :])


def _mean(shape, element, name: str, point: Point):
    axis = point.axis % len(shape)
    extent = int(shape[axis])
    k = te.reduce_axis((0, extent), name="k")
    others = _others(shape, point)
    total = te.compute(
        others, lambda *i: te.sum(element(*i[:axis], k, *i[axis:]), axis=k), name=f"{name}_sum"
    )
    return te.compute(others, lambda *i: total(*i) * tirx.const(1.0 / extent, "float32"), name=name)


def _inverse_root(variance, point: Point):
    return tirx.const(1.0, "float32") / tirx.sqrt(variance + tirx.const(point.epsilon, "float32"))


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel for a fused layer norm or RMS norm."""
    point = Point.from_dict(fused.point)
    shape = fused.shape
    row = Row(shape[-1], target.lanes)
    rows = math.prod(shape[:-1])
    with emitting(fused, 5 if point.centered else 3) as (kernel, loaded):
        x, *scale = loaded[-3:] if point.centered else loaded[-2:]
        if point.axis == 1:
            _emit_planes(kernel, point, target, x, scale)
        else:
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


def _emit_planes(kernel, point: Point, target: CpuTarget, x, scale: list) -> None:
    images, extent, pixels = kernel.fused.shape
    plane = Row(pixels, target.lanes)
    vectors = -(-pixels // plane.lanes)
    tiles = -(-vectors // _VECTORS)
    parallel = runs_parallel(target, images * tiles, images * extent * pixels * 8)
    with loop(images * tiles, parallel=parallel) as t:
        n, tile = unravel(t, (images, tiles))
        first = [(tile * _VECTORS + v) * plane.lanes for v in range(min(_VECTORS, vectors))]
        at = [T.bind(tirx.min(i, pixels - plane.lanes).astype("int32")) for i in first]
        _emit_tile(kernel, point, x, scale, n, [ramp(i, plane.lanes) for i in at], plane.lanes)


def _emit_tile(kernel, point: Point, x, scale: list, n, pixels: list, lanes: int) -> None:
    """The vectors `pixels` of all planes of image n; those past its last repeat that."""
    extent = kernel.fused.shape[1]
    places = [ramp(v * lanes, lanes) for v in range(len(pixels))]
    means, roots = local_buffer(len(pixels) * lanes), local_buffer(len(pixels) * lanes)

    def centered(d, v):
        value = x[n, d, pixels[v]]
        return value - means[places[v]] if point.centered else value

    def square(d, v):
        value = T.bind(centered(d, v))
        return value * value

    def mean_into(sums, element: Callable) -> None:
        """Of `unroll` planes at a time: fewer steps that wait for one another, and round."""

        def add(first, planes: int) -> None:
            for v, place in enumerate(places):
                terms = [element(first + d, v) for d in range(planes)]
                while len(terms) > 1:
                    terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
                T.buffer_store(sums, sums[place] + terms[0], [place])

        for place in places:
            T.buffer_store(sums, splat(0.0, lanes), [place])
        whole = extent // point.unroll
        with T.serial(0, whole) as step:
            add(step * point.unroll, point.unroll)
        if rest := extent % point.unroll:
            add(tirx.const(extent - rest, "int32"), rest)
        for place in places:
            T.buffer_store(sums, sums[place] * splat(1.0 / extent, lanes), [place])

    if point.centered:
        mean_into(means, lambda d, v: x[n, d, pixels[v]])
    mean_into(roots, square)
    for place in places:
        root = tirx.sqrt(roots[place] + splat(point.epsilon, lanes))
        T.buffer_store(roots, splat(1.0, lanes) / root, [place])
    with T.serial(0, extent) as d:
        for v, place in enumerate(places):
            result = centered(d, v) * roots[place] * broadcast(scale[0][d], lanes)
            result = result + broadcast(scale[1][d], lanes) if len(scale) > 1 else result
            kernel.store(T.bind(result), [n, d, pixels[v]])
