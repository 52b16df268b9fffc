# SPDX-License-Identifier: Apache-2.0
"""A convolution and the maximum over windows of its result as one operator: what such operators have in common.

Their attributes are the convolution's, and `pool_size`, `pool_strides`, `pool_dilation`, `pool_padding` (top, left, bottom,
right; it takes no part in a maximum), and `flops`, the convolution's own.
"""

from __future__ import annotations

import numpy as np
from tvm import relax, te, tirx

from passes.layers import attrs_of, conv2d_output_hw
from schedules import pooling
from schedules.windows import Problem


def pool_windows(attrs: dict, images: int, height: int, width: int, channels: int) -> Problem:
    """The windows over the convolution's result, [images, height, width, channels] channels last."""
    strides, padding, dilation = (
        tuple(attrs[f"pool_{key}"]) for key in ("strides", "padding", "dilation")
    )
    return Problem(
        images, height, width, channels, channels, *attrs["pool_size"], strides, padding, dilation, channels,
    )  # fmt: skip


def pool_of(call: relax.Call, image: tuple[int, ...]) -> Problem:
    """The windows of a pooled convolution of an `image` [N, H, W]."""
    attrs, w = attrs_of(call), [int(d) for d in call.args[1].ty.shape]
    conv = conv2d_output_hw(attrs, *image[1:], w[2:])
    return pool_windows(attrs, image[0], *conv, w[0])


def windowed(problem: Problem, x, outside):
    """x [N, H, W, C] with `outside` around it, and the value a reduction over (r, s) sees at output (n, i, j, c)."""
    (sh, sw), (dh, dw), (top, left, bottom, right) = (
        problem.stride,
        problem.dilation,
        problem.padding,
    )
    shape = (problem.n, problem.h + top + bottom, problem.w + left + right, problem.c)

    def inside(i, j):
        return tirx.all(i >= top, i < problem.h + top, j >= left, j < problem.w + left)

    padded = te.compute(
        shape,
        lambda n, i, j, c: te.if_then_else(inside(i, j), x[n, i - top, j - left, c], outside),
        name="pad",
    )
    return lambda n, i, j, c, r, s: padded[n, i * sh + r * dh, j * sw + s * dw, c]


def largest_of(problem: Problem, x, notes: dict, plane: int = 0, together: int = 1):
    """te tensor of the maxima over windows of x [N, H, W, C]: channels last, or, of a `plane` given, [N, C, plane], which
    repeats the last one behind its pixels, or [N, C / together, plane, together]."""
    largest = te.comm_reducer(pooling.larger, pooling.lowest, name="max")
    value = windowed(problem, x, pooling.lowest(str(x.dtype)))
    r, s = te.reduce_axis((0, problem.r), "r"), te.reduce_axis((0, problem.s), "s")

    def at(n, i, j, c):
        return largest(value(n, i, j, c, r, s), axis=[r, s])

    def of_plane(n, p, q, *rest):
        pixel = tirx.min(q, problem.oh * problem.ow - 1)
        c = p * together + rest[0] if rest else p
        return at(n, pixel // problem.ow, pixel % problem.ow, c)

    shape = (problem.n, problem.oh, problem.ow, problem.c)
    if plane:
        shape = (problem.n, problem.c // together, plane, *([together] if together > 1 else []))
    return te.compute(shape, of_plane if plane else at, name="max_pool", attrs=notes)


def largest_reference(attrs: dict, y: np.ndarray) -> np.ndarray:
    """The maxima over windows of a convolution's result y, in attrs["layout"]; NaN where a window has one."""
    last = attrs["layout"] == "NHWC"
    y = y if last else y.transpose(0, 2, 3, 1)
    p = pool_windows(attrs, *y.shape)
    top, left, bottom, right = p.padding
    least = -np.inf if y.dtype.kind == "f" else np.iinfo(y.dtype).min
    padded = np.pad(y, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=least)
    found = np.full((p.n, p.oh, p.ow, p.c), least, y.dtype)
    for r in range(p.r):
        for s in range(p.s):
            first, left = r * p.dilation[0], s * p.dilation[1]
            rows = slice(first, first + (p.oh - 1) * p.stride[0] + 1, p.stride[0])
            columns = slice(left, left + (p.ow - 1) * p.stride[1] + 1, p.stride[1])
            found = np.maximum(found, padded[:, rows, columns])
    return found if last else found.transpose(0, 3, 1, 2)
