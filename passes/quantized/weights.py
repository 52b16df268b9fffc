# SPDX-License-Identifier: Apache-2.0
"""Weights as signed bytes: symmetric, with one scale per output channel or one for all."""

from __future__ import annotations

import math

import numpy as np

LARGEST = 127  # -128 is left out, so that a weight and its negative are both there


def quantize_weight(
    weight: np.ndarray, *, per_channel: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [O, ...], float32 scales [O]) for a float32 weight [O, ...]; zeros stay zeros.

    A channel of zeros has the largest scale of the others: its bias is rounded as finely as theirs, and its sums are no
    reason to expect large ones. Raises ValueError, to be shown as a reason, for weights that have no scale.
    """
    if not np.isfinite(weight).all():
        raise ValueError("weights that are not finite")
    rows = np.abs(weight.reshape(weight.shape[0], -1).astype("float64")).max(axis=1)
    if not rows.any():
        raise ValueError("every weight is zero, so there is no scale")
    if not per_channel:
        rows = np.full_like(rows, rows.max())
    scale = (rows / LARGEST).astype("float32")
    # Channels that float32 cannot scale: their weights are as good as zero.
    zero = scale < np.finfo("float32").tiny
    scale[zero] = 1.0 if zero.all() else scale.max()
    shape = (-1,) + (1,) * (weight.ndim - 1)
    q = np.rint(weight.astype("float64") / scale.astype("float64").reshape(shape))
    return np.clip(q, -LARGEST, LARGEST).astype("int8"), scale


def overflows(weight_shape: tuple[int, ...]) -> bool:
    """Whether a sum of products of bytes could leave 32 bits: |x - zero point| <= 255, |w| <= 127."""
    return math.prod(weight_shape[1:]) * 255 * LARGEST >= 2**31
