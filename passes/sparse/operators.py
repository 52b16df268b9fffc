# SPDX-License-Identifier: Apache-2.0
"""The sparse layer operators.

`kerf.sparse_conv2d(x, w)`         as `kerf.conv2d`, attribute `grain` more; with a second input, `(x, w, beside)`, the
                                   convolution of both joined along their channels: of several layers, attribute `layers`
`kerf.sparse_dense(x, w)`          as `kerf.dense`, attribute `grain` more
`kerf.sparse_pooled_conv2d(x, w)`  the first, and the maxima over windows of it (`passes/max_pooling.py`)

The weight stays dense, zeros included, until it is lowered: it is the definition, and packing depends on the kernel.

Between such operators activations may lie in planes [N, C, H * W] ([1, C, rows] of a matrix product), one per channel
(`passes/sparse/keep_planes.py`): attributes `planes_in` and `planes_out` say which of x and y do, `image` what x is
channels last: [N, H, W], or the leading axes of a matrix. A plane ends with a whole cache line, in which it repeats
its last pixel, so that every vector of it is loaded from one line; those of matrices never lie a multiple of 8 lines
apart, where parts of many planes compete for few sets of the caches. The planes of integer layers are of quads of
channels, [N, C / 4, H * W, 4], and end with the image.

`kerf.transpose(x)`        y[0, j, i] = x[min(i, I - 1), j], [1, `rows`, `columns`]: rows made planes, or planes rows
`kerf.mean_of_planes(x)`   the mean of the first `pixels` of each plane, [N, C, 1]
"""

from __future__ import annotations

import functools
import math

import tvm
from tvm import relax

from passes.layers import (
    attrs_of,
    infer_conv2d,
    infer_dense,
    operator_call,
    register_operator,
    result_hw,
    shape_of,
)
from passes.sparse.format import block_of
from schedules.windows import LINE_WORDS

SPARSE_CONV2D = "kerf.sparse_conv2d"
SPARSE_DENSE = "kerf.sparse_dense"
SPARSE_POOLED_CONV2D = "kerf.sparse_pooled_conv2d"
MEAN_OF_PLANES = "kerf.mean_of_planes"
TRANSPOSE = "kerf.transpose"

# Attribute of operators, see `hold_together`.
_TOGETHER = "kerf.together"
# Lines from one plane of a matrix to the next whose multiples are avoided.
_CROWDED = 8


@functools.cache
def register() -> None:
    """Register the sparse operators; idempotent."""
    register_operator(SPARSE_CONV2D, infer_conv2d_in_planes)
    register_operator(SPARSE_POOLED_CONV2D, infer_conv2d_in_planes)
    register_operator(SPARSE_DENSE, infer_dense_in_planes)
    register_operator(MEAN_OF_PLANES, _infer_mean_of_planes)
    register_operator(TRANSPOSE, _infer_transpose)


def hold_together(name: str, channels: int) -> None:
    """Say of a registered operator that an element of the planes which it may read and write holds so many neighbouring
    channels, and not one."""
    tvm.ir.register_op_attr(name, _TOGETHER, channels)


def together_of(value) -> int:
    """The channels that `hold_together` was told of a value's operator."""
    op = value.op if isinstance(value, relax.Call) else None
    said = op.get_attr(_TOGETHER) if isinstance(op, tvm.ir.Op) and op.has_attr(_TOGETHER) else None
    return int(said or 1)  # of an operator that was told nothing TVM may have the attribute, None


def sparse_call(call: relax.Call, grain: str) -> relax.Call:
    """The sparse operator of a dense named layer. Raises ValueError for an unknown grain."""
    register()
    block_of(grain)
    name = SPARSE_CONV2D if call.op.name.endswith("conv2d") else SPARSE_DENSE
    return operator_call(name, list(call.args), **attrs_of(call), grain=grain)


def in_planes(call: relax.Call, x: relax.Expr, planes_in: bool, planes_out: bool) -> relax.Call:
    """A channels-last sparse call on `x`, its first operand in the layout that `planes_in` says."""
    image = list(shape_of(call.args[0])[:-1])
    attrs = attrs_of(call) | {
        "image": image, "planes_in": int(planes_in), "planes_out": int(planes_out)
    }  # fmt: skip
    return operator_call(call.op.name, [x, *list(call.args)[1:]], **attrs)


def inputs_of(call: relax.Call) -> list[relax.Expr]:
    """The activations that a sparse layer operator reads, as many as it has."""
    return [arg for i, arg in enumerate(call.args) if i != 1]


def image_of(call: relax.Call) -> tuple[int, ...]:
    """[N, H, W] of a convolution's input, or the leading axes of a matrix product's, whatever its layout."""
    attrs = attrs_of(call)
    return tuple(attrs["image"]) if "image" in attrs else shape_of(call.args[0])[:-1]


def planes_shape(images: int, channels: int, pixels: int, together: int = 1) -> tuple[int, ...]:
    """The shape of planes of `together` neighbouring channels each."""
    if together == 1:
        return (images, channels, pixels)
    return (images, channels // together, pixels, together)


def plane_of(image: tuple[int, ...], together: int) -> int:
    """Pixels of a plane of an image [N, H, W] or of the rows of a matrix, with what lies behind them."""
    of_image = len(image) == 3
    pixels = math.prod(image[1:] if of_image else image)
    if together > 1:
        return pixels
    lines = -(-pixels // LINE_WORDS)
    return (lines + (not of_image and lines % _CROWDED == 0)) * LINE_WORDS


def infer_conv2d_in_planes(call: relax.Call, together: int = 1) -> relax.TensorType:
    """`infer_conv2d`, of a call that may read or write planes of `together` channels."""
    attrs = attrs_of(call)
    if "image" not in attrs:
        return infer_conv2d(call)
    w, (n, height, width) = shape_of(call.args[1]), attrs["image"]
    oh, ow = result_hw(attrs, height, width, w[2:])
    planes = planes_shape(n, w[0], plane_of((n, oh, ow), together), together)
    shape = planes if attrs["planes_out"] else (n, oh, ow, w[0])
    return relax.TensorType(shape, call.args[0].ty.dtype)


def infer_dense_in_planes(call: relax.Call, together: int = 1) -> relax.TensorType:
    """`infer_dense`, of a call that may read or write planes of `together` channels."""
    attrs, w = attrs_of(call), shape_of(call.args[1])
    if "image" not in attrs:
        return infer_dense(call)
    rows = attrs["image"]
    planes = planes_shape(1, w[0], plane_of(tuple(rows), together), together)
    shape = planes if attrs["planes_out"] else (*rows, w[0])
    return relax.TensorType(shape, call.args[0].ty.dtype)


def mean_of_planes(x: relax.Expr, pixels: int) -> relax.Call:
    """The mean of the first `pixels` elements of each plane, [N, C, 1]."""
    register()
    return operator_call(MEAN_OF_PLANES, [x], pixels=pixels)


def rows_to_planes(x: relax.Expr) -> relax.Call:
    """Rows [..., C] as planes [1, C, plane]."""
    register()
    *image, channels = shape_of(x)
    return operator_call(TRANSPOSE, [x], rows=channels, columns=plane_of((math.prod(image),), 1))


def planes_to_rows(x: relax.Expr, shape: tuple[int, ...]) -> relax.Call:
    """Planes [1, C, plane] as rows of that shape."""
    register()
    rows = operator_call(TRANSPOSE, [x], rows=math.prod(shape[:-1]), columns=shape[-1])
    return relax.op.reshape(rows, shape)


def _infer_transpose(call: relax.Call) -> relax.TensorType:
    attrs = attrs_of(call)
    return relax.TensorType((1, attrs["rows"], attrs["columns"]), call.args[0].ty.dtype)


def _infer_mean_of_planes(call: relax.Call) -> relax.TensorType:
    return relax.TensorType((*shape_of(call.args[0])[:-1], 1), call.args[0].ty.dtype)
