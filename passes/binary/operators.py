# SPDX-License-Identifier: Apache-2.0
"""The operators of binary layers. Signs travel as bits, 32 channels in a uint32, channel 0 of a group in bit 0; 1 is +1.

`kerf.binary_pack(x, t, f)`            bit c = (x[c] >= t[c]) xor f[c]; x float32 [N, C, H, W] or [..., C],
                                       or the bytes that stand for it, and t in bytes
`kerf.binary_max_pool2d(x[, f])`       the largest sign of each window, the smallest where f; nothing beyond the border
`kerf.binary_conv2d(x, w)`             int32 sums of products of signs; padding counts as `pad_value`: 0, 1 or -1
`kerf.binary_conv2d_bits(x, w, t, f)`  bit o = (sum[o] >= t[o]) xor f[o] of these sums
`kerf.binary_dense(x, w)`, `kerf.binary_dense_bits(x, w, t, f)`   the same for the last axis

`kerf.sign_conv2d(x, w)`, `kerf.sign_dense(x, w)`   float32 sums of float32 x times signs; padding counts as 0

w is an int8 constant of +-1, [O, C/groups, R, S] or [O, K]; t a threshold per channel (float32, for sums int32), f uint32
words. x as bits is [N, words, H, W] (`layout="NCHW"`), [N, H, W, words] ("NHWC") or [..., words]; each group of channels
begins with a word of its own, and the bits behind its last channel are 0. `name` and `flops` are the dense layer's; packing
and pooling belong to no layer.
"""

from __future__ import annotations

import functools

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
from schedules.bit_words import words_for

BINARY_PACK = "kerf.binary_pack"
BINARY_MAX_POOL2D = "kerf.binary_max_pool2d"
BINARY_CONV2D = "kerf.binary_conv2d"
BINARY_CONV2D_BITS = "kerf.binary_conv2d_bits"
BINARY_DENSE = "kerf.binary_dense"
BINARY_DENSE_BITS = "kerf.binary_dense_bits"
SIGN_CONV2D = "kerf.sign_conv2d"
SIGN_DENSE = "kerf.sign_dense"


def channel_axis(attrs: dict, rank: int) -> int:
    """Which axis holds the channels, or their words."""
    return 1 if attrs.get("layout") == "NCHW" else rank - 1


def image_axes(attrs: dict) -> tuple[int, int]:
    """The axes of rows and columns of a 4-D tensor."""
    return (2, 3) if attrs["layout"] == "NCHW" else (1, 2)


def _with_axis(shape, axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _infer_pack(call: relax.Call) -> relax.TensorType:
    attrs, x = attrs_of(call), shape_of(call.args[0])
    axis = channel_axis(attrs, len(x))
    words = attrs["groups"] * words_for(x[axis] // attrs["groups"])
    return relax.TensorType(_with_axis(x, axis, words), "uint32")


def _infer_max_pool2d(call: relax.Call) -> relax.TensorType:
    attrs, shape = attrs_of(call), list(shape_of(call.args[0]))
    rows, columns = image_axes(attrs)
    shape[rows], shape[columns] = conv2d_output_hw(
        attrs, shape[rows], shape[columns], tuple(attrs["window"])
    )
    return relax.TensorType(shape, "uint32")


def _infer_conv2d(call: relax.Call, packs: bool) -> relax.TensorType:
    attrs = attrs_of(call)
    x, w = list(shape_of(call.args[0])), shape_of(call.args[1])
    rows, columns = image_axes(attrs)
    x[rows], x[columns] = conv2d_output_hw(attrs, x[rows], x[columns], w[2:])
    x[channel_axis(attrs, 4)] = words_for(w[0]) if packs else w[0]
    return relax.TensorType(x, "uint32" if packs else "int32")


def _infer_dense(call: relax.Call, packs: bool) -> relax.TensorType:
    x, w = shape_of(call.args[0]), shape_of(call.args[1])
    return relax.TensorType(
        (*x[:-1], words_for(w[0]) if packs else w[0]), "uint32" if packs else "int32"
    )


@functools.cache
def register() -> None:
    """Register the binary operators; idempotent."""
    register_operator(BINARY_PACK, _infer_pack)
    register_operator(BINARY_MAX_POOL2D, _infer_max_pool2d)
    register_operator(BINARY_CONV2D, functools.partial(_infer_conv2d, packs=False))
    register_operator(BINARY_CONV2D_BITS, functools.partial(_infer_conv2d, packs=True))
    register_operator(BINARY_DENSE, functools.partial(_infer_dense, packs=False))
    register_operator(BINARY_DENSE_BITS, functools.partial(_infer_dense, packs=True))
    register_operator(SIGN_CONV2D, infer_conv2d)
    register_operator(SIGN_DENSE, infer_dense)


def binary_call(operator: str, args, **attrs) -> relax.Call:
    """A call of one of the operators above."""
    register()
    return operator_call(operator, args, **attrs)
