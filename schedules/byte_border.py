# SPDX-License-Identifier: Apache-2.0
"""Bytes of an image of up to three channels, given a border: what lies before it, quantizing and all, computed on the way.

    Y[n, i, j, c] = X[n, i - top, j - left, c] inside the image, `value` around it

A vector of pixels is computed channel by channel, put together to 32-bit numbers of a pixel each, and stored without the
bytes that no channel has, unless pixels are to be quads. For that X, or what it is computed from, has to be planar; else
pixels go one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated
from schedules.emission import loop, pieces
from schedules.fused import Emission, Fused
from schedules.target import CpuTarget

__all__ = ["MOST_CHANNELS", "Problem", "schedule"]

MOST_CHANNELS = 3  # and a byte to spare in 32 bits


@dataclass(frozen=True)
class Problem(Annotated):
    """An image [n, h, w, c] within [n, rows, columns, c], from row `top` and column `left`; pixels have `value`
    behind their channels, too, if each is to have `together` bytes."""

    n: int
    h: int
    w: int
    c: int
    top: int
    left: int
    rows: int
    columns: int
    value: int
    together: int = 0

    @property
    def pixel(self) -> int:
        """Bytes of a pixel."""
        return self.together or self.c


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a border and of what makes the image inside it."""
    problem = Problem.from_dict(fused.point["problem"])
    with fused.emit() as kernel:
        _Border(kernel, problem, target.lanes).emit(target.threads > 1)
    return kernel.func


class _Border:
    def __init__(self, kernel: Emission, problem: Problem, lanes: int):
        self.kernel, self.problem, self.lanes = kernel, problem, lanes
        self.image = kernel.fused.anchor.reads[0].source
        row = (problem.n, problem.rows, problem.columns * problem.pixel)
        self.rows = T.decl_buffer(row, "uint8", data=kernel.output.data)
        self.planar = self._is_planar()

    def _is_planar(self) -> bool:
        """Whether neighbouring pixels of a channel are neighbours in memory."""
        column, found = tirx.Var("column", "int32"), []
        value = self.kernel.operand(self.image, [0, 0, column, 0])

        def visit(load) -> None:
            if len(load.indices):  # a number that is computed at run time has none
                found.append(load.indices[-1].same_as(column))

        tvm_ffi.structural_walk(value, (tvm.ir.expr.TensorLoad, visit))
        return all(found)

    def emit(self, parallel: bool) -> None:
        problem = self.problem
        top, bottom = problem.top, problem.rows - problem.top - problem.h
        for image in range(problem.n):
            for first, count in ((0, top), (top + problem.h, bottom)):
                if count:
                    with T.serial(0, count) as i:
                        self._fill((image, first + i), 0, problem.columns)
            with loop(problem.h, parallel=parallel) as i:
                self._row(image, i)

    def _row(self, image: int, i) -> None:
        problem, at = self.problem, (image, i + self.problem.top)
        self._fill(at, 0, problem.left)
        lanes = self.lanes if self.planar else 1
        whole = problem.w // lanes
        if whole:
            with T.serial(0, whole) as q:
                self._pixels(at, (image, i), q * lanes, lanes)
        for offset, width in pieces(problem.w - whole * lanes, lanes):
            self._pixels(at, (image, i), whole * lanes + offset, width)
        end = problem.left + problem.w
        self._fill(at, end, problem.columns - end)

    def _fill(self, at: tuple, first: int, pixels: int) -> None:
        each, value = self.problem.pixel, T.uint8(self.problem.value)
        for offset, lanes in pieces(pixels * each, 4 * self.lanes):
            start = first * each + offset
            vector = value if lanes == 1 else T.broadcast(value, lanes)
            T.buffer_store(
                self.rows, vector, [*at, start if lanes == 1 else T.ramp(start, 1, lanes)]
            )

    def _pixels(self, at: tuple, source: tuple, first, lanes: int) -> None:
        """`lanes` pixels from column `first` of the image."""
        c, each = self.problem.c, self.problem.pixel
        columns = first if lanes == 1 else T.ramp(first, 1, lanes)
        start = (first + self.problem.left) * each
        values = [self.kernel.operand(self.image, [*source, columns, k]) for k in range(c)]
        if lanes == 1:
            behind = [T.uint8(self.problem.value)] * (each - c)
            for k, value in enumerate([*values, *behind]):
                T.buffer_store(self.rows, value, [*at, start + k])
            return
        number = _wide(values[0])
        for k, value in enumerate(values[1:], 1):
            moved = tirx.shift_left(_wide(value), T.broadcast(T.int32(8 * k), lanes))
            number = number | moved
        for k in range(c, each):
            number = number | T.broadcast(T.int32(_signed(self.problem.value << 8 * k)), lanes)
        pixels = T.bind(tirx.reinterpret(f"uint8x{4 * lanes}", T.bind(number)))
        if each < 4:
            order = [4 * pixel + k for pixel in range(lanes) for k in range(c)]
            pixels = tirx.Shuffle([pixels], order)
        T.buffer_store(self.rows, pixels, [*at, T.ramp(start, 1, each * lanes)])


def _signed(word: int) -> int:
    """The int32 of the same bits as an unsigned number."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _wide(value):
    """The bytes as int32: before they were narrowed, where they were bounded by then."""
    cast, largest = tvm.ir.prim.expr.Cast, tvm.ir.prim.expr.Max
    if isinstance(value, cast) and isinstance(value.value, largest):
        if "int32" in str(value.value.ty.dtype):
            return value.value
    lanes = tvm.DataType(value.ty.dtype).lanes
    return value.astype(f"int32x{lanes}")
