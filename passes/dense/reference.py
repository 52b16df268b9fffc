# SPDX-License-Identifier: Apache-2.0
"""Slow, obviously right numpy definitions of the named layer operators, in the dtype of their arguments."""

from __future__ import annotations

import numpy as np

from passes.layers import conv2d_output_hw


def conv2d(attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`kerf.conv2d`: x [N, C, H, W] or [N, H, W, C] by `attrs["layout"]`, w [O, C/groups, R, S]."""
    last = attrs["layout"] == "NHWC"
    image = x if last else np.moveaxis(x, 1, -1)
    top, left, bottom, right = attrs["padding"]
    padded = np.pad(image, ((0, 0), (top, bottom), (left, right), (0, 0)))
    outputs, inputs, height, width = w.shape
    oh, ow = conv2d_output_hw(attrs, image.shape[1], image.shape[2], (height, width))
    groups, (sh, sw), (dh, dw) = attrs["groups"], attrs["strides"], attrs["dilation"]
    weight = w.reshape(groups, outputs // groups, inputs, height, width)
    result = np.zeros((image.shape[0], oh, ow, groups, outputs // groups), np.result_type(x, w))
    for r in range(height):
        for s in range(width):
            tap = padded[
                :,
                r * dh : r * dh + (oh - 1) * sh + 1 : sh,
                s * dw : s * dw + (ow - 1) * sw + 1 : sw,
            ]
            pixels = tap.reshape(*tap.shape[:3], groups, inputs)
            result += np.einsum("nhwgc,goc->nhwgo", pixels, weight[..., r, s], optimize=True)
    result = result.reshape(*result.shape[:3], outputs)
    return result if last else np.ascontiguousarray(np.moveaxis(result, -1, 1))


def dense(_attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`kerf.dense`: x [..., K], w [O, K] -> [..., O]."""
    return x @ w.T
