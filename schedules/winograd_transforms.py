# SPDX-License-Identifier: Apache-2.0
"""Products of the matrices of Winograd's convolution with vectors of floats or integers, in few operations; and reading the
tiles that are transformed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.emission import Row, ramp, splat, workspace


@dataclass(frozen=True)
class Numbers:
    """What vectors hold, and what adds, subtracts and multiplies them: `add`, `sub` and `mul` of `ops`."""

    dtype: str = "float32"
    ops: object = operator

    @property
    def exact(self) -> bool:
        """Whether sums may be multiplied in place of their terms."""
        return self.dtype != "float32"


FLOATS = Numbers()


def linear(matrix: np.ndarray, values: list, lanes: int, numbers: Numbers = FLOATS) -> list:
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
                values[j], values[k] = (
                    T.bind(numbers.ops.add(values[j], values[k])),
                    T.bind(numbers.ops.sub(values[j], values[k])),
                )
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
                e = T.bind(_sum(even, values, lanes, numbers))
                o = T.bind(_sum(odd / factor, values, lanes, numbers))
                o = o if factor == 1 else _scaled(o, factor, lanes, numbers)
                results[i], results[j] = numbers.ops.add(e, o), numbers.ops.sub(e, o)
        if results[i] is None:
            results[i] = _sum(matrix[i], values, lanes, numbers)
    return results


def _sum(coefficients: np.ndarray, values: list, lanes: int, numbers: Numbers):
    """sum of coefficient * value, a term without a multiplication first."""
    used = abs(coefficients[np.flatnonzero(coefficients)])
    factor = used[0]
    if numbers.exact and factor != 1 and (used == factor).all():
        return _scaled(_sum(coefficients / factor, values, lanes, numbers), factor, lanes, numbers)
    order = sorted(np.flatnonzero(coefficients), key=lambda i: coefficients[i] != 1)
    result = None
    for i in order:
        c, value = coefficients[i], values[i]
        if result is None:
            result = value if c == 1 else _scaled(value, c, lanes, numbers)
        elif abs(c) == 1:
            result = numbers.ops.add(result, value) if c == 1 else numbers.ops.sub(result, value)
        else:
            result = numbers.ops.add(result, _scaled(value, c, lanes, numbers))
    return result


def _scaled(value, factor: float, lanes: int, numbers: Numbers):
    return numbers.ops.mul(value, splat(factor, lanes, numbers.dtype))


def transform(
    matrix: np.ndarray, load: Callable, lanes: int, numbers: Numbers = FLOATS
) -> Iterator[tuple[int, int, object]]:
    """(i, j, vector) of `matrix @ d @ matrix^T`, d[q, t] being the vector `load(q, t)`."""
    size = matrix.shape[1]
    half = []  # half[t][i] = (matrix @ d)[i, t]
    for t in range(size):
        column = [T.bind(load(q, t)) for q in range(size)]
        half.append([T.bind(e) for e in linear(matrix, column, lanes, numbers)])
    for i in range(len(matrix)):
        for j, value in enumerate(
            linear(matrix, [half[t][i] for t in range(size)], lanes, numbers)
        ):
            yield i, j, value


def read_tile(
    x, problem, size: int, corner: tuple, row: Row, outside: float, emit: Callable
) -> None:
    """`emit(pixel)`, once for tiles within a `problem`'s image `x` [N, H, W, C] and once for others, with
    `pixel(q, t, channels)` what reads pixel (q, t) of the tile of `size` pixels whose `corner` (image, top, left) is given:
    of the others from a buffer, filled a `row` of channels at a time, that is `outside` beyond the image."""
    n, top, left = corner
    bottom, right = top + size, left + size
    with T.If(tirx.all(top >= 0, left >= 0, bottom <= problem.h, right <= problem.w)):
        with T.Then():
            emit(lambda q, t, lane: x[n, top + q, left + t, lane])
        with T.Else():
            patch = _padded_tile(x, problem, size, corner, row, outside)
            emit(lambda q, t, lane: patch[q, t, lane])


def _padded_tile(x, problem, size: int, corner: tuple, row: Row, outside: float):
    n, top, left = corner
    dtype = str(x.dtype)
    patch = workspace(size, size, problem.c, dtype=dtype)
    with T.serial(0, size) as q, T.serial(0, size) as t:
        i, j = top + q, left + t

        def fill(value: Callable) -> None:
            def body(channel, _slot, _fresh):
                lane = ramp(channel, row.lanes)
                T.buffer_store(patch, value(lane), [q, t, lane])

            row.each(body, 1)

        with T.If(tirx.all(i >= 0, j >= 0, i < problem.h, j < problem.w)):
            with T.Then():
                fill(lambda lane: x[n, i, j, lane])
            with T.Else():
                fill(lambda lane: splat(outside, row.lanes, dtype))
    return patch
