# SPDX-License-Identifier: Apache-2.0
"""The sparse layer operators.

`kerf.sparse_conv2d(x, w)`   as `kerf.conv2d`, attribute `grain` more
`kerf.sparse_dense(x, w)`    as `kerf.dense`, attribute `grain` more

The weight stays dense, zeros included, until it is lowered: it is the definition, and packing depends on the kernel.

Between such operators activations may lie in planes [N, C, H * W] ([1, C, rows] of a matrix product), one per channel
(`passes/sparse/keep_planes.py`): attributes `planes_in` and `planes_out` say which of x and y do, `image` what x is
channels last: [N, H, W], or the leading axes of a matrix. The planes of integer layers are of quads of channels:
[N, C / 4, H * W, 4].
"""

from __future__ import annotations

import functools
import math

from tvm import relax

from passes.layers import (
    attrs_of,
    conv2d_output_hw,
    infer_conv2d,
    infer_dense,
    operator_call,
    register_operator,
    shape_of,
)
from passes.sparse.format import block_of

SPARSE_CONV2D = "kerf.sparse_conv2d"
SPARSE_DENSE = "kerf.sparse_dense"


@functools.cache
def register() -> None:
    """Register the sparse operators; idempotent."""
    register_operator(SPARSE_CONV2D, infer_conv2d_in_planes)
    register_operator(SPARSE_DENSE, infer_dense_in_planes)


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


def image_of(call: relax.Call) -> tuple[int, ...]:
    """[N, H, W] of a convolution's input, or the leading axes of a matrix product's, whatever its layout."""
    attrs = attrs_of(call)
    return tuple(attrs["image"]) if "image" in attrs else shape_of(call.args[0])[:-1]


def planes_shape(images: int, channels: int, pixels: int, together: int = 1) -> tuple[int, ...]:
    """The shape of planes of `together` neighbouring channels each."""
    if together == 1:
        return (images, channels, pixels)
    return (images, channels // together, pixels, together)


def infer_conv2d_in_planes(call: relax.Call, together: int = 1) -> relax.TensorType:
    """`infer_conv2d`, of a call that may read or write planes of `together` channels."""
    attrs = attrs_of(call)
    if "image" not in attrs:
        return infer_conv2d(call)
    w, (n, height, width) = shape_of(call.args[1]), attrs["image"]
    oh, ow = conv2d_output_hw(attrs, height, width, w[2:])
    planes = planes_shape(n, w[0], oh * ow, together)
    shape = planes if attrs["planes_out"] else (n, oh, ow, w[0])
    return relax.TensorType(shape, call.args[0].ty.dtype)


def infer_dense_in_planes(call: relax.Call, together: int = 1) -> relax.TensorType:
    """`infer_dense`, of a call that may read or write planes of `together` channels."""
    attrs, w = attrs_of(call), shape_of(call.args[1])
    if "image" not in attrs:
        return infer_dense(call)
    rows = attrs["image"]
    planes = planes_shape(1, w[0], math.prod(rows), together)
    shape = planes if attrs["planes_out"] else (*rows, w[0])
    return relax.TensorType(shape, call.args[0].ty.dtype)
