# SPDX-License-Identifier: Apache-2.0
"""Winograd convolution F(m x m, taps x taps): definition and kernel for no dilation and one group.

    y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A       per (m+taps-1)^2 input tile d and m^2 output tile

3x3 of stride 1 as it is; larger kernels of stride 2 over few channels as an image of four times the channels and half
the taps: 7x7 as 4x4.

The image is cut into tiles; a block of tiles is transformed into (m+2)^2 matrices [tiles, C], each multiplied by its
[C, O] matrix of transformed weights, in panels of output channels, and transformed back into the epilogue. A block's
matrices stay in the second-level cache, or each is multiplied by all panels while it is near. Weights are packed
transformed, or, where few tiles share them, plain: a row of their transform is then made in registers for each channel,
and multiplied there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from tvm import te, tirx

from schedules import windows
from schedules.emission import emitting
from schedules.fused import Fused, annotations
from schedules.preparation import Source
from schedules.target import CpuTarget
from schedules.winograd_emitter import Emitter
from schedules.winograd_matrices import SIZES, matrices
from schedules.winograd_points import (
    Point,
    Problem,
    cost,
    default_point,
    direct_cost,
    transformed_point,
    transforming_point,
)
from schedules.winograd_pooled import PooledEmitter

__all__ = [
    "LOOPS", "SIZES", "Emitter", "Point", "Problem", "cost", "default_point", "define_stages", "define_winograd", "direct_cost", "pack_weights", "packed_rows", "schedule", "stages", "transformed_point", "transforming_point", "weight_source",
]  # fmt: skip

LOOPS = "winograd"


def stages(point: Point) -> int:
    """Blocks of the definition."""
    return 8 if point.chunk else 6


def packed_rows(problem: Problem, point: Point) -> int:
    """Extent of the second axis of packed weights: the matrices, or, of plain weights, the input channels."""
    return problem.c if point.chunk else problem.size(point.m) ** 2


def pack_weights(weight: np.ndarray, point: Point, stride: int = 1) -> np.ndarray:
    """[O, C, R, R] -> float32 [panels, matrices, depth, panel], transformed in float64; if `point.chunk`, as they are,
    [panels, C, 9, panel]. Zeros in the last panel's rest."""
    return weight_source([weight], point, stride).prepared()


def weight_source(weights: Sequence[np.ndarray], point: Point, stride: int = 1) -> Source:
    """What the packed weights of one kernel, or of several one after the other on their second axis, are made of."""
    phases = [_phases(w, stride) for w in weights]
    panels = [_weight_panels(w, point) for w in phases]
    if point.chunk:
        return Source(np.concatenate([p.transpose(0, 2, 1, 3) for p in panels], axis=1))
    return Source(
        np.concatenate(panels, axis=1), "winograd", {"m": point.m, "taps": phases[0].shape[2]}
    )


def _phases(weight: np.ndarray, stride: int) -> np.ndarray:
    """[O, C, R, R] -> [O, stride^2 C, taps, taps]: every stride-th tap from each of the first ones on."""
    outputs, inputs, kernel, _ = weight.shape
    taps = -(-kernel // stride)
    full = np.zeros((outputs, inputs, taps * stride, taps * stride), np.float32)
    full[:, :, :kernel, :kernel] = weight
    split = full.reshape(outputs, inputs, taps, stride, taps, stride)
    return split.transpose(0, 3, 5, 1, 2, 4).reshape(outputs, -1, taps, taps)


def _weight_panels(weight: np.ndarray, point: Point) -> np.ndarray:
    """[O, C, T, T] -> [panels, T^2, C, panel], zeros in the last panel's rest."""
    outputs, inputs, taps, _ = weight.shape
    panels = -(-outputs // point.panel)
    full = np.zeros((taps**2, inputs, panels * point.panel), np.float32)
    full[..., :outputs] = weight.reshape(outputs, inputs, taps**2).transpose(2, 1, 0)
    split = full.reshape(taps**2, inputs, panels, point.panel)
    return np.ascontiguousarray(split.transpose(2, 0, 1, 3))


def define_winograd(x, u, problem: Problem, point: Point):
    """te: x [N, H, W, C], or [N, C, H, W] if strided, u from `pack_weights` -> [N, OH, OW, O]."""
    notes = annotations(LOOPS, problem=problem.to_dict(), point=point.to_dict())
    return define_stages(x, u, problem, point, "winograd", notes)


def define_stages(
    x, u, problem: Problem, point: Point, name: str, notes: dict | None = None, first: int = 0
):
    """The definition's blocks, the last called `name`; this branch's weights begin at `first` on u's second axis."""
    m, size, stride = point.m, problem.size(point.m), problem.stride
    bt, g, at = matrices(m, bool(point.chunk), problem.taps)
    (n, rows, columns), (height, width) = problem.tiles(m), problem.output_hw
    top, left = problem.padding[:2]

    def pad(b, i, j, k):
        # Channel k of all phases: channel c of the pixels at (p, q) of every square of them.
        (p, q, c) = (
            (0, 0, k)
            if stride == 1
            else (k // (stride * problem.c), k // problem.c % stride, k % problem.c)
        )
        y, z = i * stride + p - top, j * stride + q - left
        inside = tirx.all(y >= 0, y < problem.h, z >= 0, z < problem.w)
        pixel = x(b, y, z, c) if stride == 1 else x(b, c, y, z)
        return te.if_then_else(inside, pixel, tirx.const(0.0, "float32"))

    def combine(matrix, row, element: Callable):
        """sum over q of matrix[row, q] * element(q) for a symbolic row."""
        result = tirx.const(0.0, "float32")
        for index, coefficients in enumerate(matrix):
            terms = [
                element(q) * tirx.const(float(c), "float32")
                for q, c in enumerate(coefficients)
                if c
            ]
            result = tirx.Select(row == index, functools.reduce(lambda a, b: a + b, terms), result)
        return result

    padded = te.compute(
        (n, rows * m + size - m, columns * m + size - m, problem.depth), pad, name="pad"
    )
    tile = (n, rows, columns, size, size)
    half = te.compute(
        (*tile, problem.depth),
        lambda b, r, s, i, j, c: combine(bt, i, lambda q: padded(b, r * m + q, s * m + j, c)),
        name="input_rows",
    )
    v = te.compute(
        (*tile, problem.depth),
        lambda b, r, s, i, j, c: combine(bt, j, lambda q: half(b, r, s, i, q, c)),
        name="input",
    )

    def packed(i, j, k, o):
        return u(o // point.panel, first + i * size + j, k, o % point.panel)

    def transformed():
        """The weights' transform as two blocks."""

        def plain(q, t, k, o):
            return u(o // point.panel, first + k, q * 3 + t, o % point.panel)

        rows = te.compute(
            (size, 3, problem.c, problem.o),
            lambda i, t, k, o: combine(g, i, lambda q: plain(q, t, k, o)), name="weight_rows",
        )  # fmt: skip
        return te.compute(
            (size, size, problem.c, problem.o),
            lambda i, j, k, o: combine(g, j, lambda t: rows(i, t, k, o)), name="weight",
        )  # fmt: skip

    weight = transformed() if point.chunk else packed
    k = te.reduce_axis((0, problem.depth), "k")
    product = te.compute(
        (*tile, problem.o),
        lambda b, r, s, i, j, o: te.sum(v(b, r, s, i, j, k) * weight(i, j, k, o), axis=k),
        name="product",
    )
    inverse = te.compute(
        (n, rows, columns, m, size, problem.o),
        lambda b, r, s, i, j, o: combine(at, i, lambda q: product(b, r, s, q, j, o)), name="output_rows",
    )  # fmt: skip
    return te.compute(
        (n, height, width, problem.o),
        lambda b, i, j, o: combine(at, j % m, lambda q: inverse(b, i // m, j // m, i % m, q, o)),
        name=name, attrs=notes or {},
    )  # fmt: skip


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel for a fused Winograd convolution, or one whose maxima over the windows `pool` are taken."""
    problem, point = (
        Problem.from_dict(fused.point["problem"]),
        Point.from_dict(fused.point["point"]),
    )
    pool = fused.point.get("pool")
    with emitting(fused, stages(point) + (2 if pool else 0)) as (kernel, _):
        given = (kernel, problem, point, target, *kernel.inputs)
        if pool:
            PooledEmitter(*given, windows.Problem.from_dict(pool)).emit()
        else:
            Emitter(*given).emit()
    return kernel.func
