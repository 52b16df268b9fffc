# SPDX-License-Identifier: Apache-2.0
"""What the sparse operators mean, in numpy: a sum over the non-zeros, one at a time. Slow, any float dtype."""

from __future__ import annotations

import numpy as np


def sparse_dense(attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y[..., o] = sum of w[o, k] * x[..., k] over the non-zeros of w [O, K]."""
    y = np.zeros((*x.shape[:-1], w.shape[0]), dtype=x.dtype)
    for o, k in zip(*np.nonzero(w)):
        y[..., o] += x.dtype.type(w[o, k]) * x[..., k]
    return y


def sparse_conv2d(attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The convolution of x (attrs["layout"]) with w [O, C/groups, R, S], over the non-zeros of w only."""
    channels_last = attrs["layout"] == "NHWC"
    if not channels_last:
        x = x.transpose(0, 2, 3, 1)
    top, left, bottom, right = attrs["padding"]
    (sh, sw), (dh, dw) = attrs["strides"], attrs["dilation"]
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    out_h = (padded.shape[1] - dh * (w.shape[2] - 1) - 1) // sh + 1
    out_w = (padded.shape[2] - dw * (w.shape[3] - 1) - 1) // sw + 1
    y = np.zeros((x.shape[0], out_h, out_w, w.shape[0]), dtype=x.dtype)
    per_group = w.shape[0] // attrs["groups"]
    for o, i, r, s in zip(*np.nonzero(w)):
        c = o // per_group * w.shape[1] + i
        window = padded[:, r * dh :: sh, s * dw :: sw, c][:, :out_h, :out_w]
        y[..., o] += x.dtype.type(w[o, i, r, s]) * window
    return y if channels_last else y.transpose(0, 3, 1, 2)
