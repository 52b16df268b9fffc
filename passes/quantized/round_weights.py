# SPDX-License-Identifier: Apache-2.0
"""Round weights up or down so that a layer's outputs, not its weights, change least.

    minimize  sum over outputs of  e G e^T,   e = w - scale * q,   q = floor(w / scale) or ceil(w / scale)

with G = sum of x x^T over what the layer saw: the objective of AdaRound (Nagel et al., "Up or Down? Adaptive Rounding for
Post-Training Quantization"), which solves a relaxation of it by gradient descent. Here it is descended coordinate by
coordinate, for all outputs at once, from the nearest rounding and from one that feeds errors back weight by weight (as in
Frantar et al., "GPTQ"); the better end is kept. So the result is never worse than the nearest rounding, needs no learning
rate, and is the same every time.
"""

from __future__ import annotations

import numpy as np

from passes.family import Layer
from passes.layers import CONV2D
from passes.quantized.weights import LARGEST

_SWEEPS = 12
# Rows of the input used per sample: more only make the same estimate slower.
_LARGEST_ROWS = 4096
_DAMPING = 1e-4  # of the mean diagonal: inputs that never vary have no inverse
_LEAST = 1e-30
_SMALLEST_GAIN = 1e-12


def gram_matrix(layer: Layer, x: np.ndarray) -> np.ndarray:
    """x^T x of the layer's input windows, [groups, K, K] in float64, for x [N, C, H, W] or [N, K]."""
    if layer.operator != CONV2D:
        x = x.astype("float64")
        return (x.T @ x)[None]
    groups = layer.attrs["groups"]
    windows = _windows(layer, x)
    step = -(-windows.shape[0] // _LARGEST_ROWS)
    rows = windows[::step].reshape(-1, groups, windows.shape[1] // groups).astype("float64")
    return rows.transpose(1, 2, 0) @ rows.transpose(1, 0, 2) * step


def _windows(layer: Layer, x: np.ndarray) -> np.ndarray:
    """One row per output pixel, [N * OH * OW, C * R * S], channels outermost."""
    attrs, (kernel_h, kernel_w) = layer.attrs, layer.weight.shape[2:]
    top, left, bottom, right = attrs["padding"]
    (stride_h, stride_w), (dilate_h, dilate_w) = attrs["strides"], attrs["dilation"]
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    span = ((kernel_h - 1) * dilate_h + 1, (kernel_w - 1) * dilate_w + 1)
    view = np.lib.stride_tricks.sliding_window_view(padded, span, axis=(2, 3))
    view = view[:, :, ::stride_h, ::stride_w, ::dilate_h, ::dilate_w]
    return view.transpose(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1] * kernel_h * kernel_w)


def round_weight(
    weight: np.ndarray, scale: np.ndarray, gram: np.ndarray, groups: int = 1
) -> np.ndarray:
    """int8 [O, ...] for float weights [O, ...], scales [O] and the groups' Gram matrices [groups, K, K]."""
    rows = weight.reshape(groups, len(weight) // groups, -1).astype("float64")
    steps = rows / scale.astype("float64").reshape(groups, -1, 1)
    rounded = [_round_rows(w, g) for w, g in zip(steps, gram)]
    return np.stack(rounded).reshape(weight.shape).astype("int8")


def _round_rows(w: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """q [O, K] next to w [O, K], both in steps; each row has its own scale, which does not matter to its minimum."""
    low = np.clip(np.floor(w), -LARGEST, LARGEST)
    high = np.clip(np.ceil(w), -LARGEST, LARGEST)
    order = np.argsort(-np.diag(gram), kind="stable")  # what weighs most first
    starts = (np.clip(np.rint(w), -LARGEST, LARGEST), _feed_back(w, low, high, gram, order))
    ends = [_descend(q, w, low, high, gram, order) for q in starts]
    costs = [np.einsum("oi,oi->o", (q - w) @ gram, q - w) for q in ends]
    return np.where((costs[1] < costs[0])[:, None], ends[1], ends[0])


def _feed_back(w, low, high, gram, order) -> np.ndarray:
    """One weight after the other, each making up for the errors of those before as well as all later ones can."""
    damped = gram[np.ix_(order, order)]
    damped = damped + np.eye(len(damped)) * max(_DAMPING * np.diag(gram).mean(), _LEAST)
    # Column i: how the best values of all later weights answer to an error of weight i, once those before are fixed.
    answer = np.linalg.cholesky(np.linalg.inv(damped))
    target, q = w[:, order].copy(), np.empty_like(w)
    for i, k in enumerate(order):
        up = np.abs(high[:, k] - target[:, i]) < np.abs(low[:, k] - target[:, i])
        q[:, k] = np.where(up, high[:, k], low[:, k])
        error = (target[:, i] - q[:, k]) / answer[i, i]
        target[:, i + 1 :] -= error[:, None] * answer[i + 1 :, i]
    return q


def _descend(q, w, low, high, gram, order) -> np.ndarray:
    """`q` with single weights rounded the other way for as long as that lowers the objective."""
    q = q.copy()
    slope = (q - w) @ gram  # half the gradient
    for _ in range(_SWEEPS):
        changed = 0
        for k in order:
            change = np.where(q[:, k] == low[:, k], high[:, k], low[:, k]) - q[:, k]
            gain = change * (2 * slope[:, k] + change * gram[k, k])
            (rows,) = np.nonzero(gain < -_SMALLEST_GAIN * gram[k, k])
            if len(rows):
                q[rows, k] += change[rows]
                slope[rows] += change[rows, None] * gram[k]
                changed += len(rows)
        if not changed:
            break
    return q
