# SPDX-License-Identifier: Apache-2.0
"""Tensors made of elements of others, in a constant order: nearest interpolation, padding with a tensor's own values, values
written into a tensor, patches joined to an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from tvm import relax
from tvm.relax import op

from compiler.frontend.support import Refused, constant
from passes.layers import shape_of


class Converting(Protocol):
    """What is needed of a converter."""

    def emit(self, expr: relax.Expr) -> relax.Expr: ...


def pick(c: Converting, x: relax.Expr, axis: int, source: np.ndarray) -> relax.Expr:
    """The slices `source` [N] of x along an axis."""
    size = shape_of(x)[axis]
    factor = len(source) // size
    if np.array_equal(source, np.repeat(np.arange(size), factor)):
        return x if factor == 1 else c.emit(op.repeat(x, factor, axis))
    return c.emit(op.take(x, constant(source.astype("int64")), axis=axis, mode="clip"))


def pad_with_own(
    c: Converting, x: relax.Expr, axis: int, widths: tuple[int, int], mode: str
) -> relax.Expr:
    """x with so many slices before and behind, as `numpy.pad` makes them in the modes "reflect", "edge" and "wrap"."""
    return pick(c, x, axis, np.pad(np.arange(shape_of(x)[axis]), widths, mode))


def written_into(
    c: Converting, x: relax.Expr, values: relax.Expr, places: np.ndarray
) -> relax.Expr:
    """x with `values` at the flat positions `places`, one for each of them. Raises Refused where two are the same."""
    if len(np.unique(places)) != places.size:
        raise Refused("several values for one element")
    size = math.prod(shape_of(x))
    source = np.arange(size)
    source[places.reshape(-1)] = size + np.arange(places.size)
    flat = [c.emit(op.reshape(t, (-1,))) for t in (x, values)]
    found = pick(c, c.emit(op.concat(flat, 0)), 0, source)
    return op.reshape(found, shape_of(x))


def join_patches(
    c: Converting, x: relax.Expr, size: Sequence[int], kernel: Sequence[int], *placed: Sequence[int]
) -> relax.Expr:
    """[N, C, *size] of patches [N, C * height * width, patches]; the inverse of `cut_patches`."""
    n, rows, _ = shape_of(x)
    down, along = _patches(size, kernel, *placed)
    channels = rows // math.prod(kernel)
    split = c.emit(op.reshape(x, (n, channels, *kernel, down, along)))
    moved = c.emit(op.permute_dims(split, [0, 1, 4, 2, 5, 3]))
    return op.reshape(moved, (n, channels, *size))


def cut_patches(
    c: Converting, x: relax.Expr, kernel: Sequence[int], *placed: Sequence[int]
) -> relax.Expr:
    """[N, C * height * width, patches] of the patches of [N, C, H, W] that lie side by side, row by row; `placed` are their
    strides, padding and dilation. Raises Refused for others, which overlap or lie apart."""
    n, channels, *size = shape_of(x)
    down, along = _patches(size, kernel, *placed)
    split = c.emit(op.reshape(x, (n, channels, down, kernel[0], along, kernel[1])))
    moved = c.emit(op.permute_dims(split, [0, 1, 3, 5, 2, 4]))
    return op.reshape(moved, (n, channels * math.prod(kernel), down * along))


def _patches(
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """How many patches there are down and along."""
    whole = all(extent % step == 0 for extent, step in zip(size, kernel))
    if not whole or list(strides) != list(kernel) or any(padding) or any(d != 1 for d in dilation):
        raise Refused("patches that overlap, lie apart or reach over the border")
    return size[0] // kernel[0], size[1] // kernel[1]
