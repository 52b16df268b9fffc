# SPDX-License-Identifier: Apache-2.0
"""What the quadratic operators mean, in numpy, one layer after the other. Any float dtype."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from passes import numpy_images, numpy_nn


def quadratic_dense(attrs: dict, x: np.ndarray, *operands: np.ndarray) -> np.ndarray:
    """x [..., K], weights [O, K], shifts [2, O] -> [..., O]."""
    return _neuron(attrs["form"], x, operands, lambda v, w: numpy_nn.dense(attrs, v, w), -1)


def quadratic_conv2d(attrs: dict, x: np.ndarray, *operands: np.ndarray) -> np.ndarray:
    """x in attrs["layout"], weights [O, C/groups, R, S], shifts [2, O]."""
    axis = 3 if attrs["layout"] == "NHWC" else 1
    return _neuron(attrs["form"], x, operands, lambda v, w: numpy_images.conv2d(attrs, v, w), axis)


def _neuron(form: str, x: np.ndarray, operands, apply: Callable, axis: int) -> np.ndarray:
    weights, total = dict(zip(form, operands)), 0
    if "r" in weights:
        shape = [1] * x.ndim
        shape[axis] = -1
        factors = []
        for branch, shift in zip("rg", operands[-1]):
            factors.append(apply(x, weights[branch]) + shift.reshape(shape))
        total = factors[0] * factors[1]
    if "b" in weights:
        total = total + apply(x * x, weights["b"])
    if "l" in weights:
        total = total + apply(x, weights["l"])
    return total
