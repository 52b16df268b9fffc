# SPDX-License-Identifier: Apache-2.0
"""The image that a strided convolution is one of stride 1 over: its phases' channels side by side, zeros around.

    phases[n, i, j, (p * stride + q) * C + c] = x[n, c, stride * i + p - top, stride * j + q - left]

Rows of pixels of a phase and channel are vectors; as many of them as a vector has lanes are transposed in registers.
"""

from __future__ import annotations

import itertools

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.emission import loop, ramp, splat, transpose, unravel, workspace
from schedules.winograd_points import Problem


def gather_phases(x, problem: Problem, m: int, lanes: int, parallel: bool):
    """A buffer [N, rows, columns, depth] of `phases`, as far as tiles reach; depth in whole vectors, the rest zeros."""
    n, rows, columns = problem.tiles(m)
    height, width = rows * m + problem.taps - 1, columns * m + problem.taps - 1
    image = workspace(n, height, width, -(-problem.depth // lanes) * lanes)
    with loop(n * height, parallel=parallel) as line:
        b, i = unravel(line, (n, height))
        _Line(x, image, problem, lanes, b, i, width).fill()
    return image


class _Line:
    """One line of the image that is gathered."""

    def __init__(self, x, image, problem: Problem, lanes: int, b, i, width: int):
        self.x, self.image, self.problem, self.lanes = x, image, problem, lanes
        self.b, self.i, self.width = b, i, width
        self.channels = list(
            itertools.product(range(problem.stride), range(problem.stride), range(problem.c))
        )

    def fill(self) -> None:
        """Vectors where all that they read lies within the image, zeros or values one by one elsewhere."""
        p = self.problem
        top, left = p.padding[:2]
        first = T.Bind(self.i * p.stride - top)
        start = -(-left // p.stride)
        stop = min(self.width, (p.w + left - p.stride) // p.stride + 1)
        vectors = max(0, stop - start) // self.lanes
        with T.If(tirx.all(first >= 0, first + p.stride <= p.h)):
            with T.Then():
                with T.serial(0, vectors) as vector:
                    self._vectors(start + vector * self.lanes)
                self._values(0, start)
                self._values(start + vectors * self.lanes, self.width)
            with T.Else():
                self._values(0, self.width)

    def _vectors(self, j) -> None:
        """`lanes` pixels from column j on."""
        for begin in range(0, len(self.channels), self.lanes):
            held = self.channels[begin : begin + self.lanes]

            def load(row: int, held=held):
                if row >= len(held):
                    return splat(0.0, self.lanes)
                p, q, c = held[row]
                return self.x[self._at(p, q, c, ramp(j, self.lanes))]

            def store(pixel: int, value, begin=begin) -> None:
                at = [self.b, self.i, j + pixel, ramp(begin, self.lanes)]
                T.buffer_store(self.image, value, at)

            transpose(self.lanes, load, store)

    def _values(self, start: int, stop: int) -> None:
        """The pixels of some columns, zeros outside the image."""
        if start >= stop:
            return
        problem = self.problem
        with T.serial(0, stop - start) as step:
            j = start + step
            for vector in range(0, problem.depth, self.lanes):
                lane = ramp(vector, self.lanes)
                T.buffer_store(self.image, splat(0.0, self.lanes), [self.b, self.i, j, lane])
            for k, (p, q, c) in enumerate(self.channels):
                *_, y, z = at = self._at(p, q, c, j)
                inside = tirx.all(y >= 0, y < problem.h, z >= 0, z < problem.w)
                with T.If(inside), T.Then():
                    T.buffer_store(self.image, self.x[at], [self.b, self.i, j, k])

    def _at(self, p: int, q: int, c: int, j) -> list:
        """Where x has channel c of the phase (p, q) of column j."""
        problem = self.problem
        y = self.i * problem.stride + (p - problem.padding[0])
        z = j * problem.stride + (q - problem.padding[1])
        return [self.b, c, y, z]
