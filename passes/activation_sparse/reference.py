# SPDX-License-Identifier: Apache-2.0
"""What the activation-sparse operators mean, in numpy: one row at a time, its non-zeros only. Any float dtype."""

from __future__ import annotations

import numpy as np


def sparse_dense(attrs: dict, h: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y[..., o] = sum of h[..., k] w[o, k] over the non-zeros of h; NaN is one."""
    rows = h.reshape(-1, h.shape[-1])
    y = np.zeros((rows.shape[0], w.shape[0]), h.dtype)
    for row, out in zip(rows, y):
        used = row != 0
        out[:] = w[:, used].astype(h.dtype) @ row[used]
    return y.reshape(*h.shape[:-1], w.shape[0])


def sparse_gated(
    attrs: dict,
    x: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    down: np.ndarray,
) -> np.ndarray:
    """(gate * (x up^T * scale + bias)) down^T, with every product where x is not finite: 0 * inf is NaN."""
    row = x.reshape(-1)
    values = gate.reshape(-1)
    used = values != 0 if np.isfinite(row).all() else np.ones(values.shape, bool)
    hidden = values[used] * (up[used].astype(x.dtype) @ row * scale[used] + bias[used])
    return (down[:, used].astype(x.dtype) @ hidden).reshape(*gate.shape[:-1], -1)


def cut(attrs: dict, x: np.ndarray) -> np.ndarray:
    """x where |x| > threshold, else 0; NaN stays."""
    return np.where(np.abs(x) <= attrs["threshold"], x.dtype.type(0), x)
