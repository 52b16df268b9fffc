# SPDX-License-Identifier: Apache-2.0
"""Layer norm and RMS norm over the last axis, or over planes: definition and kernel.

    y = (x - mean) / sqrt(variance + eps) * gamma + beta          layer norm, variance about the mean (two passes)
    y = x / sqrt(mean of x^2 + eps) * gamma                       RMS norm

Rows are divided among threads; a row is read three times from the nearest cache and written once, through the epilogue.
Of planes [N, D, P], normalised over D, a vector holds pixels, and planes are read twice, one after another: means and sums
of squares of all pixels grow together.
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
    widest_lanes,
)
from schedules.fused import Fused, annotations
from schedules.lanes import broadcast
from schedules.target import CpuTarget

LOOPS = "layer_norm"
_PLANES = 8  # of a block that has a mean of its own
_OTHERS = 6  # vector registers besides the mean and the root of each vector of a tile


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
    lanes = widest_lanes(pixels, target.lanes)
    total = -(-pixels // lanes)
    most = min((target.registers - _OTHERS) // 2, -(-images * total // target.threads))
    tiles = -(-total // most)
    vectors = -(-total // tiles)
    parallel = runs_parallel(target, images * tiles, images * extent * pixels * 8)
    with loop(images * tiles, parallel=parallel) as t:
        n, tile = unravel(t, (images, tiles))
        first = T.bind(
            tirx.min(tile * (vectors * lanes), max(0, pixels - vectors * lanes)).astype("int32")
        )

        def pixels_of(v, first=first):
            return ramp(tirx.min(first + v * lanes, pixels - lanes), lanes)

        _PlanesTile(kernel, point, x, scale, n, pixels_of, vectors, lanes).emit()


@dataclass
class _PlanesTile:
    """`vectors` vectors of all planes of image `n`, number v of pixels `pixels_of(v)`."""

    kernel: object
    point: Point
    x: object
    scale: list
    n: object
    pixels_of: Callable
    vectors: int
    lanes: int

    def emit(self) -> None:
        lanes, vectors = self.lanes, self.vectors
        extent = self.kernel.fused.shape[1]
        means, squares = local_buffer(vectors * lanes), local_buffer(vectors * lanes)
        for v in range(vectors):
            T.buffer_store(means, splat(0.0, lanes), [self._place(v)])
            T.buffer_store(squares, splat(0.0, lanes), [self._place(v)])
        whole, rest = divmod(extent, _PLANES)
        if whole:
            with T.serial(0, whole) as block, T.serial(0, vectors) as v:
                share = splat(1.0, 1) / (block + 1).astype("float32")
                counts = share, share * block.astype("float32") * splat(_PLANES, 1)
                self._add(means, squares, v, block * _PLANES, _PLANES, counts)
        if rest:
            counts = splat(rest / extent, 1), splat(rest * (extent - rest) / extent, 1)
            with T.serial(0, vectors) as v:
                self._add(means, squares, v, T.int32(extent - rest), rest, counts)
        for v in range(vectors):
            variance = squares[self._place(v)] * splat(1.0 / extent, lanes)
            root = tirx.sqrt(variance + splat(self.point.epsilon, lanes))
            T.buffer_store(squares, splat(1.0, lanes) / root, [self._place(v)])
        self._write(means, squares)

    def _place(self, v):
        return ramp(v * self.lanes, self.lanes)

    def _add(self, means, squares, v, first, planes: int, counts: tuple) -> None:
        """Those of `planes` planes from number `first` on to the means, and to the sums of squares about them, of vector v.

        Each block has a mean of its own, and its squares are about that (Chan, Golub and LeVeque): one pass, whatever the
        mean. `counts`: the share of the block's planes among all so far, and that of their difference squared.
        """
        lanes, place, pixels = self.lanes, self._place(v), self.pixels_of(v)
        values = [T.bind(self.x[self.n, first + i, pixels]) for i in range(planes)]
        if not self.point.centered:
            total = _sum([value * value for value in values])
            T.buffer_store(squares, squares[place] + total, [place])
            return
        share, apart = (T.bind(T.broadcast(c, lanes)) if lanes > 1 else c for c in counts)
        mean = T.bind(_sum(values) * splat(1.0 / planes, lanes))
        about = [T.bind(value - mean) for value in values]
        moved = T.bind(mean - means[place])
        total = _sum([*(d * d for d in about), moved * moved * apart])
        T.buffer_store(squares, squares[place] + total, [place])
        T.buffer_store(means, means[place] + moved * share, [place])

    def _write(self, means, roots) -> None:
        scale, lanes = self.scale, self.lanes
        with T.serial(0, self.kernel.fused.shape[1]) as d:
            for v in range(self.vectors):
                place, pixels = self._place(v), self.pixels_of(v)
                value = self.x[self.n, d, pixels]
                value = value - means[place] if self.point.centered else value
                result = value * roots[place] * broadcast(scale[0][d], lanes)
                result = result + broadcast(scale[1][d], lanes) if len(scale) > 1 else result
                self.kernel.store(T.bind(result), [self.n, d, pixels])


def _sum(terms: list):
    """Their sum in pairs: fewer steps that wait for one another, and round."""
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    return terms[0]
