# SPDX-License-Identifier: Apache-2.0
"""Matrices of Winograd's convolution F(m, taps), and weights transformed with them in numpy.

Matrices are Toom-Cook's, from points that keep rounding small: 0, +-5/8, +-3/2 give F(4x4) 0.4 of the error of the
usual 0, +-1, +-2 (root mean square, 64 channels, unit outputs: 7.4e-7; F(2x2) 2.8e-7), and 0, +-3/4, 2 give F(3x3)
0.8 of that, 0.7 of what 0, +-1, 2 would. Weights transformed at run time, in float32, add a hundredth to that of
F(4x4) (512 channels: 1.76e-6 after 1.74e-6). F(6x6) would save another 10 % of the multiplications on 56 and 28
pixels at 5 times the error: not offered. Of 4x4 taps over 12 channels F(3x3) has 1.7 times the direct sum's error
(4.3e-7), F(4x4) five times (1.2e-6).
"""

from __future__ import annotations

import functools

import numpy as np

_COLUMNS = 8192  # weights of one tap that are transformed together: float64 temporaries stay in the second-level cache
_POINTS = {  # by outputs and taps
    (2, 3): (0.0, 1.0, -1.0),
    (3, 3): (0.0, 0.75, -0.75, 2.0),
    (4, 3): (0.0, 0.625, -0.625, 1.5, -1.5),
    (3, 4): (0.0, 0.625, -0.625, 1.5, -1.5),
    (4, 4): (0.0, 0.5, -0.5, 1.125, -1.125, 2.5),
}
# Sizes m of output tiles, by taps.
SIZES = {3: (4, 3, 2), 4: (4, 3)}


@functools.cache
def matrices(
    m: int, plain_weights: bool = False, taps: int = 3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B^T [size, size], G [size, taps], A^T [m, size]) in float64, size = m+taps-1; every row of B^T is monic, the scale
    is in G.

    With `plain_weights`, which are transformed at run time, rows of G begin with 1 and the scale is in B^T.
    """
    bt, g, at, scales = _scaled_matrices(_POINTS[m, taps], m, taps)
    if plain_weights:
        return bt / scales[:, None], g, at
    return bt, g / scales[:, None], at


def _scaled_matrices(points: tuple[float, ...], m: int, taps: int) -> tuple[np.ndarray, ...]:
    """(B^T of monic rows, G whose rows begin with 1, A^T, the number by which one of the former's rows is to be divided)."""
    size = m + taps - 1

    def powers(degree: int) -> np.ndarray:
        at_infinity = [0.0] * (degree - 1) + [1.0]
        return np.array([[p**k for k in range(degree)] for p in points] + [at_infinity])

    bt, g, at = np.linalg.inv(powers(size)).T, powers(taps), powers(m).T
    scales = np.ones(size)
    scales[:-1] = [np.prod([p - q for q in points if q != p]) for p in points]
    # Of monic rows the entries are short binary fractions; inversion leaves rounding noise.
    return np.round(bt * scales[:, None] * 2**20) / 2**20, g, at, scales


@functools.cache
def integer_matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(B^T [6, 6], G [6, 3], A^T [4, 6]) of F(4x4, 3x3) in whole numbers, and the factor by which they make either side of
    the sum too large: points 0, +-1, +-2.

    Rows of |B^T| add up to at most 10 and those of |G| to at most 12: uint8 and int8 become int16.
    """
    # The least common denominator of G; of its last row the half, the other half in A^T.
    factor = 24
    bt, g, at, scales = _scaled_matrices((0.0, 1.0, -1.0, 2.0, -2.0), 4, 3)
    g = np.round(g / scales[:, None] * factor)
    g[-1] /= 2
    at[:, -1] *= 2
    return bt, g, at, factor


def transform_weights(weights: np.ndarray, m: int, taps: int = 3) -> np.ndarray:
    """float32 [panels, b * taps^2, C, panel], b kernels w -> [panels, b * (m+taps-1)^2, C, panel] of G w G^T, rounded
    once from float64. Raises ValueError for another m, number of taps, dtype or shape."""
    known = (m, taps) in _POINTS and weights.ndim == 4 and weights.shape[1] % taps**2 == 0
    if not known or weights.dtype != np.float32:
        raise ValueError(
            f"no weights of F({m}x{m}, {taps}x{taps}): {weights.dtype} {weights.shape}"
        )
    (panels, rows, *rest), size, g = weights.shape, m + taps - 1, matrices(m, taps=taps)[1]
    kernels, columns = panels * rows // taps**2, rest[0] * rest[1]
    source = weights.reshape(kernels, taps, taps, columns)
    result = np.empty((kernels, size, size, columns), np.float32)
    for kernel in range(kernels):
        for first in range(0, columns, _COLUMNS):
            part = slice(first, first + _COLUMNS)
            w = source[kernel, :, :, part].astype(np.float64)
            for i in range(size):
                row = _combine(g[i], w)
                for j in range(size):
                    result[kernel, i, j, part] = _combine(g[j], row)
    return result.reshape(panels, rows // taps**2 * size**2, *rest)


def _combine(coefficients: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The sum of coefficient times value over the first axis, in its order; zeros of the matrix are left out."""
    terms = [c * value for c, value in zip(coefficients, values) if c]
    for term in terms[1:]:
        terms[0] += term
    return terms[0]
