# SPDX-License-Identifier: Apache-2.0
"""Tensors made of elements of others, in a constant order: nearest interpolation, padding with a tensor's own values, values
written into a tensor."""

from __future__ import annotations

import math
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
