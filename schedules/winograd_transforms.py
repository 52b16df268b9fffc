# SPDX-License-Identifier: Apache-2.0
"""Matrices of Winograd's convolution F(m, 3) and their products with vectors, in few operations.

Matrices are Toom-Cook's, from points that keep rounding small: 0, +-5/8, +-3/2 give F(4x4) 0.4 of the error of the
usual 0, +-1, +-2 (root mean square, 64 channels, unit outputs: 7.4e-7; F(2x2) 2.8e-7). Weights transformed at run time,
in float32, add a hundredth to that of F(4x4) (512 channels: 1.76e-6 after 1.74e-6). F(6x6) would save another 10 %
of the multiplications on 56 and 28 pixels at 5 times the error: not offered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
from tvm.tirx.script.builder import ir as T

from schedules.emission import splat

_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.625, -0.625, 1.5, -1.5)}


@functools.cache
def matrices(m: int, plain_weights: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B^T [m+2, m+2], G [m+2, 3], A^T [m, m+2]) in float64; every row of B^T is monic, the scale is in G.

    With `plain_weights`, which are transformed at run time, rows of G begin with 1 and the scale is in B^T.
    """
    points = _POINTS[m]

    def powers(degree: int) -> np.ndarray:
        at_infinity = [0.0] * (degree - 1) + [1.0]
        return np.array([[p**k for k in range(degree)] for p in points] + [at_infinity])

    bt, g, at = np.linalg.inv(powers(m + 2)).T, powers(3), powers(m).T
    scales = np.ones(m + 2)
    scales[:-1] = [np.prod([p - q for q in points if q != p]) for p in points]
    # Of monic rows the entries are short binary fractions; inversion leaves rounding noise.
    bt = np.round(bt * scales[:, None] * 2**20) / 2**20
    if plain_weights:
        return bt / scales[:, None], g, at
    return bt, g / scales[:, None], at


def linear(matrix: np.ndarray, values: list, lanes: int) -> list:
    """The vectors `matrix @ values`, shared sums bound to variables.

    Columns j, k with |column j| = |column k| enter as their sum and difference; rows i, j that are E + O and E - O with
    disjoint E and O are made from those two.
    """
    matrix, values = np.array(matrix), list(values)
    for j in range(matrix.shape[1]):
        for k in range(j + 1, matrix.shape[1]):
            same, opposite = matrix[:, j] == matrix[:, k], matrix[:, j] == -matrix[:, k]
            if (
                (matrix[:, j] != 0).sum() > 1
                and (same | opposite).all()
                and not same.all()
                and not opposite.all()
            ):
                values[j], values[k] = T.bind(values[j] + values[k]), T.bind(values[j] - values[k])
                matrix[:, j], matrix[:, k] = (
                    np.where(same, matrix[:, j], 0),
                    np.where(same, 0, matrix[:, j]),
                )
    results: list = [None] * len(matrix)
    for i in range(len(matrix)):
        for j in range(i + 1, len(matrix)):
            even, odd = (matrix[i] + matrix[j]) / 2, (matrix[i] - matrix[j]) / 2
            if results[i] is None and even.any() and odd.any() and not (even * odd).any():
                factor = odd[np.flatnonzero(odd)[-1]]
                e, o = T.bind(_sum(even, values, lanes)), T.bind(_sum(odd / factor, values, lanes))
                o = o if factor == 1 else o * splat(factor, lanes)
                results[i], results[j] = e + o, e - o
        if results[i] is None:
            results[i] = _sum(matrix[i], values, lanes)
    return results


def _sum(coefficients: np.ndarray, values: list, lanes: int):
    """sum of coefficient * value, a term without a multiplication first."""
    order = sorted(np.flatnonzero(coefficients), key=lambda i: coefficients[i] != 1)
    result = None
    for i in order:
        c, value = coefficients[i], values[i]
        if result is None:
            result = value if c == 1 else value * splat(c, lanes)
        elif abs(c) == 1:
            result = result + value if c == 1 else result - value
        else:
            result = result + value * splat(c, lanes)
    return result


def transform(matrix: np.ndarray, load: Callable, lanes: int) -> Iterator[tuple[int, int, object]]:
    """(i, j, vector) of `matrix @ d @ matrix^T`, d[q, t] being the vector `load(q, t)`."""
    size = matrix.shape[1]
    half = []  # half[t][i] = (matrix @ d)[i, t]
    for t in range(size):
        column = [T.bind(load(q, t)) for q in range(size)]
        half.append([T.bind(e) for e in linear(matrix, column, lanes)])
    for i in range(len(matrix)):
        for j, value in enumerate(linear(matrix, [half[t][i] for t in range(size)], lanes)):
            yield i, j, value
