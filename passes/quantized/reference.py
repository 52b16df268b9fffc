# SPDX-License-Identifier: Apache-2.0
"""What the integer operators mean, in numpy. Integer results are exact; floats are computed in the dtype they come in."""

from __future__ import annotations

import numpy as np

from passes.max_pooling import largest_reference
from passes.numpy_images import conv2d


def int8_conv2d(attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The sum of (x - zero_point) * w as int32. float64 holds every sum (below 2^53) exactly, and has a matrix product."""
    centred = x.astype(np.float64) - attrs["zero_point"]
    return conv2d(attrs, centred, w.astype(np.float64)).astype(np.int32)


def int8_pooled_conv2d(attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The maxima over windows of `int8_conv2d`."""
    return largest_reference(attrs, int8_conv2d(attrs, x, w))


def int8_dense(attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x [..., K], w [O, K] -> int32 [..., O]; see `int8_conv2d`."""
    centred = x.astype(np.float64) - attrs["zero_point"]
    return (centred @ w.astype(np.float64).T).astype(np.int32)


def int8_average_pool(attrs: dict, x: np.ndarray) -> np.ndarray:
    """An integer sum times float32(1 / count), in float32."""
    last = attrs["layout"] == "NHWC"
    x = x if last else x.transpose(0, 2, 3, 1)
    top, left, bottom, right = attrs["padding"]
    (r, s), (sh, sw) = attrs["pool_size"], attrs["strides"]
    edges = ((0, 0), (top, bottom), (left, right), (0, 0))
    values = np.pad(x.astype(np.int32) - attrs["zero_point"], edges)
    inside = np.pad(np.ones((1, *x.shape[1:3], 1), np.int32), edges)
    view = np.lib.stride_tricks.sliding_window_view
    total = view(values, (r, s), (1, 2))[:, ::sh, ::sw].sum(axis=(-1, -2), dtype=np.int32)
    count = view(inside, (r, s), (1, 2))[:, ::sh, ::sw].sum(axis=(-1, -2))
    if attrs["count_include_pad"]:
        count[...] = r * s
    y = total.astype(np.float32) * (1 / np.maximum(count, 1)).astype(np.float32)
    return y if last else y.transpose(0, 3, 1, 2)


def quantize(attrs: dict, x: np.ndarray) -> np.ndarray:
    """Nearest step, ties to even; saturated; NaN counts as 0, which is the zero point."""
    zero_point = attrs["zero_point"]
    steps = x * x.dtype.type(np.float32(1 / attrs["scale"]))
    steps = np.clip(
        np.nan_to_num(steps, nan=0, posinf=512, neginf=-512), -zero_point, 255 - zero_point
    )
    return (np.rint(steps).astype(np.int32) + zero_point).astype(np.uint8)


def dequantize(attrs: dict, x: np.ndarray) -> np.ndarray:
    """float32 (x - zero_point) * scale."""
    return (x.astype(np.int32) - attrs["zero_point"]).astype(np.float32) * np.float32(
        attrs["scale"]
    )


def quantize_dynamic(_attrs: dict, x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray):
    """As `quantize`, by division."""
    steps = np.nan_to_num(x / scale, nan=0, posinf=512, neginf=-512)
    steps = np.clip(steps, -zero_point, 255 - zero_point)
    return (np.rint(steps) + zero_point).astype(np.uint8)


def steps(_attrs: dict, x: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    return x.astype(zero_point.dtype) - zero_point


def dequantize_add(attrs: dict, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """y + (x - zero_point) * scale, rounded once for float32."""
    steps = (x.astype(np.int32) - attrs["zero_point"]).astype(y.dtype)
    scale = y.dtype.type(np.float32(attrs["scale"]))
    return fused_multiply_add(steps, scale, y) if y.dtype == np.float32 else y + steps * scale


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c with one rounding.

    The product is exact in float64. Its sum with c is rounded to odd there (the last bit set if anything is lost), so
    that rounding it again, to float32, gives what one rounding would.
    """
    product, addend = np.float64(a) * np.float64(b), np.float64(c)
    total = product + addend
    part = total - product
    lost = (product - (total - part)) + (addend - part)  # what the sum has rounded away, exactly
    bits = np.ascontiguousarray(total).view(np.int64)
    even = (bits & 1) == 0
    away = np.where(
        (lost > 0) == (total > 0), 1, -1
    )  # towards the exact value, in units of the last place
    odd = np.where((lost != 0) & even & np.isfinite(total), bits + away, bits)
    return odd.view(np.float64).astype(np.float32)
