# SPDX-License-Identifier: Apache-2.0
"""Relax's neural-network operators in numpy: normalisation, activation, attention, and those on
images.

Entries of `NN_OPERATORS` are `(numeric, attributes, *arguments) -> array`; `dense` is the reference
of `kerf.dense`,
`(attributes, x, w) -> array`.
"""

from __future__ import annotations

import math

import numpy as np

from passes.numpy_images import IMAGE_OPERATORS
from passes.numpy_operators import erf, sigmoid
from passes.rewriting import axes_of


def dense(_attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Reference of `kerf.dense`: x [..., K], w [O, K] -> [..., O]."""
    return x @ w.T


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    shifted = np.exp(x - x.max(axis, keepdims=True))
    return shifted / shifted.sum(axis, keepdims=True)


def _log_softmax(_n, attrs, x):
    shifted = x - x.max(int(attrs.axis), keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(int(attrs.axis), keepdims=True))


def _standardise(x, axes, epsilon):
    mean = x.mean(axes, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + epsilon)


def _along(values, rank: int, axes: list[int]):
    """Values over `axes` (in that order) shaped to broadcast against a tensor of that rank."""
    shape = [1] * rank
    for axis, size in zip(axes, values.shape):
        shape[axis] = size
    return values.reshape(shape)


def _affine(attrs, y, gamma, beta, axes):
    if getattr(attrs, "scale", True):
        y = y * _along(gamma, y.ndim, axes)
    return y + _along(beta, y.ndim, axes) if getattr(attrs, "center", True) else y


def _layer_norm(_n, attrs, x, gamma, beta):
    axes = axes_of(attrs.axes, x.ndim)
    return _affine(attrs, _standardise(x, tuple(axes), float(attrs.epsilon)), gamma, beta, axes)


def _rms_norm(_n, attrs, x, weight):
    axes = axes_of(attrs.axes, x.ndim)
    scale = np.sqrt((x * x).mean(tuple(axes), keepdims=True) + float(attrs.epsilon))
    return x / scale * _along(weight, x.ndim, axes)


def _batch_norm(_n, attrs, x, gamma, beta, mean, variance):
    axis = int(attrs.axis) % x.ndim
    over = tuple(a for a in range(x.ndim) if a != axis)
    if attrs.training:
        batch_mean, batch_variance = x.mean(over), x.var(over)
        momentum, count = float(attrs.momentum), x.size // x.shape[axis]
        unbiased = batch_variance * count / max(1, count - 1)
        moved = (
            (1 - momentum) * mean + momentum * batch_mean,
            (1 - momentum) * variance + momentum * unbiased,
        )
    else:
        batch_mean, batch_variance, moved = mean, variance, (mean, variance)
    y = (x - _along(batch_mean, x.ndim, [axis])) / np.sqrt(
        _along(batch_variance, x.ndim, [axis]) + float(attrs.epsilon)
    )
    return (_affine(attrs, y, gamma, beta, [axis]), *moved)


def _instance_norm(_n, attrs, x, gamma, beta):
    return _affine(
        attrs,
        _standardise(x, tuple(axes_of(attrs.axes, x.ndim)), float(attrs.epsilon)),
        gamma,
        beta,
        [int(attrs.channel_axis) % x.ndim],
    )


def _group_norm(_n, attrs, x, gamma, beta):
    channel, groups = int(attrs.channel_axis) % x.ndim, int(attrs.num_groups)
    split = x.reshape(
        *x.shape[:channel], groups, x.shape[channel] // groups, *x.shape[channel + 1 :]
    )
    over = tuple(a + (a > channel) for a in axes_of(attrs.axes, x.ndim) if a != channel)
    y = _standardise(split, (channel + 1, *over), float(attrs.epsilon)).reshape(x.shape)
    return _affine(attrs, y, gamma, beta, [channel])


def attention(q, k, v, bias=None, scale=None, causal=None) -> np.ndarray:
    """q [B, S, H, D], k and v [B, T, H, D], bias broadcastable to [B, H, S, T] -> [B, S, H, Dv]."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = np.matmul(q.transpose(0, 2, 1, 3), k.transpose(0, 2, 3, 1)) * scale
    if bias is not None:
        scores = scores + bias
    if causal is not None:
        s, t = scores.shape[-2:]
        allowed = np.tril(np.ones((s, t), bool), t - s if causal == "BottomRight" else 0)
        scores = np.where(allowed, scores, -np.inf)
    return np.matmul(softmax(scores, -1), v.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def _relax_attention(_n, attrs, q, k, v, bias=None):
    scale = None if attrs.scale is None else float(attrs.scale)
    causal = None if attrs.causal_mask is None else str(attrs.causal_mask)
    return attention(q, k, v, bias, scale, causal)


def _gelu(_n, _a, x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def _gelu_tanh(_n, _a, x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _softplus(_n, attrs, x):
    beta, threshold = float(attrs.beta), float(attrs.threshold)
    return np.where(x * beta > threshold, x, np.logaddexp(0, beta * x) / beta)


def _selu(_n, _a, x):
    return 1.0507009873554804934193349852946 * np.where(
        x > 0, x, 1.6732632423543772848170429916717 * np.expm1(np.minimum(x, 0))
    )


def _prelu(_n, attrs, x, slope):
    axis = int(attrs.axis) % x.ndim
    slope = slope if slope.size == 1 else _along(slope.reshape(-1), x.ndim, [axis])
    return np.where(x > 0, x, x * slope)


NN_OPERATORS = {
    **IMAGE_OPERATORS,
    "relax.nn.softmax": lambda _n, a, x: softmax(x, int(a.axis)),
    "relax.nn.log_softmax": _log_softmax,
    "relax.nn.layer_norm": _layer_norm,
    "relax.nn.rms_norm": _rms_norm,
    "relax.nn.batch_norm": _batch_norm,
    "relax.nn.instance_norm": _instance_norm,
    "relax.nn.group_norm": _group_norm,
    "relax.nn.attention": _relax_attention,
    "relax.nn.attention_bias": _relax_attention,
    "relax.nn.relu": lambda _n, _a, x: np.maximum(x, 0),
    "relax.nn.leakyrelu": lambda _n, a, x: np.where(x > 0, x, x * float(a.alpha)),
    "relax.nn.prelu": _prelu,
    "relax.nn.selu": _selu,
    "relax.nn.gelu": _gelu,
    "relax.nn.gelu_tanh": _gelu_tanh,
    "relax.nn.silu": lambda _n, _a, x: x * sigmoid(x),
    "relax.nn.softplus": _softplus,
    "relax.nn.dropout": lambda _n, _a, x: (x, np.ones_like(x)),
}
