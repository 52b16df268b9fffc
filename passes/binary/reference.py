# SPDX-License-Identifier: Apache-2.0
"""What the binary operators mean, in numpy: products of signs, multiplied and added. Slow."""

from __future__ import annotations

import numpy as np

from passes.binary.bits import pack_bits, unpack_bits
from passes.binary.operators import channel_axis, image_axes
from passes.evaluate import LAYER_REFERENCES
from schedules.bit_words import words_for


def _along(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
    shape = [1] * rank
    shape[axis] = -1
    return np.asarray(values).reshape(shape)


def binary_pack(attrs: dict, x: np.ndarray, threshold: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Words of (x >= threshold) xor flip. Thresholds are float32 numbers: x is compared as what it is."""
    axis = channel_axis(attrs, x.ndim)
    reached = x >= _along(threshold, axis, x.ndim)
    return pack_bits(reached, axis, attrs["groups"]) ^ _along(flips, axis, x.ndim)


def binary_max_pool2d(attrs: dict, x: np.ndarray, flips: np.ndarray | None = None) -> np.ndarray:
    """The or of each window, the and of channels with a flip; beyond the border counts nothing."""
    if flips is not None:
        opposite = _along(flips, channel_axis(attrs, 4), 4)
        return binary_max_pool2d(attrs, x ^ opposite) ^ opposite
    axis, (rows, columns) = channel_axis(attrs, 4), image_axes(attrs)
    x = np.moveaxis(x, (rows, columns, axis), (1, 2, 3))
    top, left, bottom, right = attrs["padding"]
    (sh, sw), (dh, dw), (r, s) = attrs["strides"], attrs["dilation"], attrs["window"]
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    oh = (padded.shape[1] - dh * (r - 1) - 1) // sh + 1
    ow = (padded.shape[2] - dw * (s - 1) - 1) // sw + 1
    out = np.zeros((x.shape[0], oh, ow, x.shape[3]), np.uint32)
    for i in range(r):
        for j in range(s):
            out |= padded[:, i * dh :: sh, j * dw :: sw][:, :oh, :ow]
    return np.moveaxis(out, (1, 2, 3), (rows, columns, axis))


def binary_conv2d(attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """int32 sums of products; w +-1 [O, C/groups, R, S]."""
    groups, axis = attrs["groups"], channel_axis(attrs, 4)
    channels = w.shape[1] * groups
    signs = unpack_bits(x, axis, channels, groups).astype(np.float64) * 2 - 1
    signs = np.moveaxis(signs, axis, -1)
    top, left, bottom, right = attrs["padding"]
    (sh, sw), (dh, dw) = attrs["strides"], attrs["dilation"]
    margins = ((0, 0), (top, bottom), (left, right), (0, 0))
    padded = np.pad(signs, margins, constant_values=attrs["pad_value"])
    oh = (padded.shape[1] - dh * (w.shape[2] - 1) - 1) // sh + 1
    ow = (padded.shape[2] - dw * (w.shape[3] - 1) - 1) // sw + 1
    out = np.zeros((x.shape[0], oh, ow, w.shape[0]))
    outputs = w.shape[0] // groups
    for g in range(groups):
        part = padded[..., g * w.shape[1] : (g + 1) * w.shape[1]]
        mine = slice(g * outputs, (g + 1) * outputs)
        for r in range(w.shape[2]):
            for s in range(w.shape[3]):
                window = part[:, r * dh :: sh, s * dw :: sw][:, :oh, :ow]
                out[..., mine] += window @ w[mine, :, r, s].T.astype(np.float64)
    return np.moveaxis(out, -1, axis).astype(np.int32)


def binary_dense(attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    signs = unpack_bits(x, x.ndim - 1, w.shape[1]).astype(np.float64) * 2 - 1
    return (signs @ w.T.astype(np.float64)).astype(np.int32)


def _thresholded(attrs: dict, sums: np.ndarray, thresholds: np.ndarray, flips: np.ndarray):
    axis = channel_axis(attrs, sums.ndim)
    bits = pack_bits(sums >= _along(thresholds, axis, sums.ndim), axis)
    assert bits.shape[axis] == words_for(sums.shape[axis])
    return bits ^ _along(flips, axis, sums.ndim)


def binary_conv2d_bits(attrs: dict, x, w, thresholds, flips) -> np.ndarray:
    return _thresholded(attrs, binary_conv2d(attrs, x, w), thresholds, flips)


def binary_dense_bits(attrs: dict, x, w, thresholds, flips) -> np.ndarray:
    return _thresholded(attrs, binary_dense(attrs, x, w), thresholds, flips)


def sign_layer(operator: str, attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The dense layer `operator` with weights that are signs."""
    return LAYER_REFERENCES[operator](attrs, x, w.astype(x.dtype))
