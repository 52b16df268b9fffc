# SPDX-License-Identifier: Apache-2.0
"""The integer operators. Activations are uint8 with a scale and a zero point, weights int8 and symmetric.

`kerf.int8_conv2d(x, w)`        uint8 image, int8 constant [O, C/groups, R, S] -> int32, attributes of `kerf.conv2d` and
                                `zero_point`: the sum of (x - zero_point) * w, exactly; pixels outside the image count 0
`kerf.int8_pooled_conv2d(x, w)` the maxima over windows of the former's sums (`passes/max_pooling.py`), with a `grain`
`kerf.int8_dense(x, w)`         uint8 [..., K], int8 constant [O, K] -> int32, attributes `name` and `zero_point`
`kerf.int8_average_pool(x)`     uint8 image -> float32: the mean of (x - zero_point) over each window
`kerf.quantize(x)`              float32 -> uint8: round(x / scale) + zero_point, saturated; ties to even, NaN -> zero_point
`kerf.dequantize(x)`            uint8 -> float32: (x - zero_point) * scale
`kerf.quantize_dynamic(x, s, z)` float32, scale and zero point computed at run time, float32 scalars -> uint8:
                                round(x / s) + z, saturated; ties to even, NaN -> z
`kerf.steps(x, z)`              uint8, float32 scalar -> float32: x - z, exact; x lies in memory
`kerf.dequantize_add(y, x)`     float32, uint8 of one shape -> float32: y + (x - zero_point) * scale, rounded once

All layer operators take an attribute `grain` ("in:4", "block:4x4", "block:8x4"): their kernel then skips what is zero of
the weight at that grain, and their activations may lie in planes of quads (`passes/sparse/operators.py`); an average pool
with an attribute `image`, [N, H, W], takes the mean of such planes. What turns a sum into the next layer's input is made of ordinary Relax operators and those above:

    kerf.quantize(relu(astype(int8_conv2d(x, w) + bias, "float32") * multiplier), scale=1.0, zero_point=z)

with an int32 bias and a float32 multiplier per output channel. In that form every rounding happens in one place, so a
kernel and the numpy reference (`reference.py`) agree bit for bit; a float bias may differ in the last bit before rounding.
"""

from __future__ import annotations

import functools

import numpy as np
from tvm import relax

from passes.layers import (
    attrs_of,
    const_array,
    is_const,
    operator_call,
    register_operator,
    shape_of,
)
from passes.sparse.operators import (
    hold_together,
    infer_conv2d_in_planes,
    infer_dense_in_planes,
)
from schedules.errors import KerfError

INT8_CONV2D = "kerf.int8_conv2d"
INT8_POOLED_CONV2D = "kerf.int8_pooled_conv2d"
INT8_DENSE = "kerf.int8_dense"
INT8_AVERAGE_POOL = "kerf.int8_average_pool"
QUANTIZE = "kerf.quantize"
DEQUANTIZE = "kerf.dequantize"
QUANTIZE_DYNAMIC = "kerf.quantize_dynamic"
STEPS = "kerf.steps"
DEQUANTIZE_ADD = "kerf.dequantize_add"

# Grains whose zeros kernels skip, of quads of input channels, and the output channels that share a pattern.
GRAINS = {"in:4": 1, "block:4x4": 4, "block:8x4": 8}
QUAD = 4  # neighbouring channels that one dot product adds up, and that planes hold side by side


def _typed(dtype: str, infer=None):
    """The type of the first argument (or what `infer` says) with another element type."""

    def typed(call: relax.Call) -> relax.TensorType:
        ty = call.args[0].ty if infer is None else infer(call)
        return relax.TensorType(ty.shape, dtype)

    return typed


def _infer_floats_of_bytes(call: relax.Call) -> relax.TensorType:
    """float32, of uint8 (the last argument) only: who looks at a call may count on 256 values. Raises KerfError."""
    x = call.args[-1].ty
    if str(x.dtype) != "uint8":
        raise KerfError(
            "reads bytes", where=call.op.name, found=f"a tensor of {x.dtype}", wanted="uint8"
        )
    return relax.TensorType(x.shape, "float32")


def _infer_average_pool(call: relax.Call) -> relax.TensorType:
    attrs, x = attrs_of(call), shape_of(call.args[0])
    if "image" in attrs:  # the mean of whole planes
        return relax.TensorType((x[0], 1, 1, x[1] * x[3]), "float32")
    n, h, w, c = x if attrs["layout"] == "NHWC" else (x[0], x[2], x[3], x[1])
    top, left, bottom, right = attrs["padding"]
    oh = (h + top + bottom - attrs["pool_size"][0]) // attrs["strides"][0] + 1
    ow = (w + left + right - attrs["pool_size"][1]) // attrs["strides"][1] + 1
    shape = (n, oh, ow, c) if attrs["layout"] == "NHWC" else (n, c, oh, ow)
    return relax.TensorType(shape, "float32")


@functools.cache
def register() -> None:
    """Register the integer operators; idempotent."""
    layers = {
        INT8_CONV2D: infer_conv2d_in_planes,
        INT8_POOLED_CONV2D: infer_conv2d_in_planes,
        INT8_DENSE: infer_dense_in_planes,
    }
    for name, infer in layers.items():
        register_operator(name, _typed("int32", functools.partial(infer, together=QUAD)))
    register_operator(INT8_AVERAGE_POOL, _infer_average_pool)
    for name in (*layers, INT8_AVERAGE_POOL):
        hold_together(name, QUAD)
    register_operator(QUANTIZE, _typed("uint8"), elementwise=True)
    register_operator(DEQUANTIZE, _infer_floats_of_bytes, elementwise=True)
    register_operator(QUANTIZE_DYNAMIC, _typed("uint8"), elementwise=True)
    register_operator(STEPS, _typed("float32"), elementwise=True)
    register_operator(DEQUANTIZE_ADD, _infer_floats_of_bytes, elementwise=True)


def largest_sum(weight: np.ndarray, zero_point: int) -> int:
    """The largest magnitude that a sum of (x - zero_point) * w can have, over all uint8 x and all output channels."""
    w = weight.reshape(len(weight), -1).astype(np.int64)
    positive, negative = np.maximum(w, 0).sum(axis=1), np.maximum(-w, 0).sum(axis=1)
    high, low = 255 - zero_point, zero_point
    return int(np.maximum(positive * high + negative * low, positive * low + negative * high).max())


def _call(operator: str, args: list, /, **attrs) -> relax.Call:
    register()
    return operator_call(operator, args, **attrs)


def _checked(x, w, name: str, zero_point: int, grain: str | None) -> dict:
    """Attributes shared by both layer operators. Raises KerfError for operands no kernel computes exactly."""
    dtypes = (str(x.ty.dtype), str(w.ty.dtype))
    if dtypes != ("uint8", "int8") or not is_const(w):
        raise KerfError(
            "integer layer of other operands", where=name, found=f"{dtypes}", wanted="uint8 and a constant int8"
        )  # fmt: skip
    if not 0 <= zero_point <= 255:
        raise KerfError("zero point outside uint8", where=name, found=str(zero_point))
    if largest_sum(const_array(w), zero_point) >= 1 << 31:
        raise KerfError("a sum may not fit int32", where=name, todo="Keep this layer in float32")
    if grain is not None and grain not in GRAINS:
        raise KerfError("unknown grain", where=name, found=grain, wanted=" or ".join(GRAINS))
    attrs = {"name": name, "zero_point": int(zero_point)}
    return attrs if grain is None else {**attrs, "grain": grain}


def int8_conv2d(
    x, w, *, name: str, zero_point: int, strides=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1),
    groups: int = 1, layout: str = "NCHW", grain: str | None = None,
) -> relax.Call:  # fmt: skip
    """`kerf.int8_conv2d`; padding is (top, left, bottom, right). Depthwise where groups is the number of channels."""
    return _call(
        INT8_CONV2D, [x, w], **_checked(x, w, name, zero_point, grain), strides=[int(v) for v in strides],
        padding=[int(v) for v in padding], dilation=[int(v) for v in dilation], groups=int(groups), layout=layout,
    )  # fmt: skip


def int8_dense(x, w, *, name: str, zero_point: int, grain: str | None = None) -> relax.Call:
    """`kerf.int8_dense`: the last axis of x against the rows of w."""
    return _call(INT8_DENSE, [x, w], **_checked(x, w, name, zero_point, grain))


def int8_average_pool(
    x, *, pool_size, zero_point: int, strides=(1, 1), padding=(0, 0, 0, 0),
    count_include_pad: bool = False, layout: str = "NCHW",
) -> relax.Call:  # fmt: skip
    """`kerf.int8_average_pool`; a mean over the image is a window of its size. Values outside the image count 0, and
    count at all only with `count_include_pad`."""
    return _call(
        INT8_AVERAGE_POOL, [x], pool_size=[int(v) for v in pool_size], zero_point=int(zero_point),
        strides=[int(v) for v in strides], padding=[int(v) for v in padding],
        count_include_pad=int(count_include_pad), layout=layout,
    )  # fmt: skip


def quantize(
    x, *, scale: float, zero_point: int, step: float | None = None, of: str = "", bounded: bool = False
) -> relax.Call:  # fmt: skip
    """`kerf.quantize`. The division is a multiplication by float32(1 / scale), left out where that is 1.

    For those who compare: `step` is what one step of the result stands for in the network, where x is not in its units
    (by default `scale`), `of` the variable of the float graph that the result stands for.

    `bounded` promises that x is a number, and |x / scale| below 2^30, so that kernels may bound it after rounding.
    """
    if not (np.isfinite(scale) and scale > 0) or np.float32(1 / scale) == 0:
        raise KerfError("a scale is not a positive number", where=QUANTIZE, found=str(scale))
    return _call(
        QUANTIZE, [x], scale=float(scale), zero_point=int(zero_point),
        step=float(scale if step is None else step), of=of, **({"bounded": 1} if bounded else {}),
    )  # fmt: skip


def dequantize(x, *, scale: float, zero_point: int) -> relax.Call:
    """`kerf.dequantize`."""
    return _call(DEQUANTIZE, [x], scale=float(scale), zero_point=int(zero_point))


def quantize_dynamic(x, scale, zero_point) -> relax.Call:
    """`kerf.quantize_dynamic`."""
    return _call(QUANTIZE_DYNAMIC, [x, scale, zero_point])


def steps(x, zero_point) -> relax.Call:
    """`kerf.steps`."""
    return _call(STEPS, [x, zero_point])


def dequantize_add(y, x, *, scale: float, zero_point: int) -> relax.Call:
    """`kerf.dequantize_add`: how a residual joins the float32 values of a layer without being stored as float32."""
    return _call(DEQUANTIZE_ADD, [y, x], scale=float(scale), zero_point=int(zero_point))
