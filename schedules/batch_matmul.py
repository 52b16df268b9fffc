# SPDX-License-Identifier: Apache-2.0
"""Product of two activations: Y[..., m, n] = sum over k of A[..., m, k] B[..., k, n], leading dimensions broadcast.

A tile of `mr` rows x `nv` vectors of columns stays in registers. B is read where it lies; the last tile of rows and the
last group of columns overlap the ones before them, so nothing is read or written out of bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated
from schedules.fused import Fused
from schedules.target import CpuTarget
from schedules.windows import loop, span, splat, tile_rows, unravel, vectors


@dataclass(frozen=True)
class Problem(Annotated):
    """A [*a_batch, m, k] x B [*b_batch, k, n]; the batches broadcast against each other as in numpy."""

    a_batch: tuple[int, ...]
    b_batch: tuple[int, ...]
    m: int
    k: int
    n: int

    @property
    def batch(self) -> tuple[int, ...]:
        rank = max(len(self.a_batch), len(self.b_batch))
        a = (1,) * (rank - len(self.a_batch)) + self.a_batch
        b = (1,) * (rank - len(self.b_batch)) + self.b_batch
        return tuple(max(x, y) if min(x, y) else 0 for x, y in zip(a, b))

    @property
    def flops(self) -> int:
        """2 per multiply-accumulate."""
        return 2 * math.prod(self.batch) * self.m * self.k * self.n


@dataclass(frozen=True)
class Point(Annotated):
    """`mr` rows x `nv` vectors of `lanes` columns in registers."""

    lanes: int
    mr: int
    nv: int


def operand_index(index, shape: tuple[int, ...]) -> list:
    """The leading indices of an operand with leading dimensions `shape` at the result's leading `index`."""
    return [
        0 if extent == 1 else i for i, extent in zip(list(index)[len(index) - len(shape) :], shape)
    ]


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """Two or three vectors of columns, whichever wastes less; rows to fill the registers."""
    count = len(vectors(problem.n, target.lanes))
    nv = (
        min((-(-count // v) * v, -v) for v in (1, 2, 3) if v <= count and (v > 1 or count == 1))[1]
        * -1
    )
    return Point(target.lanes, tile_rows(problem.m, (target.registers - 1 - nv) // nv), nv)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused batch matrix product."""
    problem, point = (
        Problem.from_dict(fused.point["problem"]),
        Point.from_dict(fused.point["point"]),
    )
    rows = -(-problem.m // point.mr)
    width = min(problem.n, point.nv * point.lanes)
    columns = -(-problem.n // width)
    widths = [stored for _, stored in vectors(width, point.lanes)]
    with fused.emit() as kernel, loop(math.prod(problem.batch) * rows, target.threads > 1) as u:
        index = unravel(tirx.floordiv(u, rows), problem.batch)
        tile = tirx.floormod(u, rows)
        row = (
            tile * point.mr
            if problem.m % point.mr == 0
            else tirx.min(tile * point.mr, problem.m - point.mr)
        )
        with T.serial(0, columns) as q:
            column = q * width if problem.n % width == 0 else tirx.min(q * width, problem.n - width)
            _tile(kernel, problem, point, index, row, column, widths)
    return kernel.func


def _tile(kernel, problem: Problem, point: Point, index, row, column, widths: list[int]) -> None:
    # A product with itself reads one buffer as both operands.
    a, b = kernel.inputs if len(kernel.inputs) == 2 else kernel.inputs * 2
    left, right = operand_index(index, problem.a_batch), operand_index(index, problem.b_batch)
    sums = [[T.alloc_buffer((width,), "float32") for width in widths] for _ in range(point.mr)]
    for line in sums:
        for width, register in zip(widths, line):
            T.buffer_store(register, splat(T.float32(0), width), [span(0, width)])
    with T.serial(0, problem.k) as k:
        for p, line in enumerate(sums):
            for v, (width, register) in enumerate(zip(widths, line)):
                lane = span(0, width)
                term = (
                    splat(a[(*left, row + p, k)], width)
                    * b[(*right, k, span(column + v * point.lanes, width))]
                )
                T.buffer_store(register, register[lane] + term, [lane])
    for p, line in enumerate(sums):
        for v, (width, register) in enumerate(zip(widths, line)):
            kernel.store(
                register[span(0, width)], [*index, row + p, span(column + v * point.lanes, width)]
            )
