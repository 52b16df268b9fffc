# SPDX-License-Identifier: Apache-2.0
"""Quadratic neurons by Winograd's algorithm: the kernel of `winograd` with several products for each output.

The square of x, taken in registers, is transformed for the branch b, then x once for all branches that read it; the
branches' results meet after their inverse transforms, where an output is stored. Weights are packed
one branch after the other in each panel.

Where a branch's weights exceed the second-level cache and many tiles share them, the rows of the matrices go outside
(`winograd_rows`), so that each weight is read once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import te, tirx

from schedules import winograd, winograd_points
from schedules.errors import ScheduleError
from schedules.fused import Fused, annotations
from schedules.quadratic_contraction import SQUARED, combine
from schedules.target import CpuTarget
from schedules.winograd import Point
from schedules.winograd_rows import RowEmitter

__all__ = ["LOOPS", "Point", "Problem", "default_point", "define", "schedule", "sources_of"]

LOOPS = "quadratic_winograd"
# Rows outside: share of the second-level cache for what a row needs of a block; tiles from which on it pays, measured with
# AVX-512: three layers' time at 28 pixels (49 tiles) 0.79-0.93 for 64 to 256 channels, 0.94-1.02 with blocks of tiles
# outside; at 20 pixels (25 tiles) 0.92 and 0.90; with weights that fit 1.13 and 1.09.
_ROW_SHARE, _LEAST_TILES, _MOST_ROWS = 0.45, 32, 14


@dataclass(frozen=True)
class Problem(winograd.Problem):
    """A 3x3 convolution of stride 1 for each branch of `form`."""

    form: str = "rgb"


def default_point(problem: Problem, m: int, target: CpuTarget) -> Point:
    """The point that is expected to be fastest for F(m x m, 3 x 3)."""
    by_tiles = winograd.default_point(problem, m, target, len(problem.form))
    weights = 4 * (m + 2) ** 2 * problem.c * problem.o  # of one branch
    tiles = math.prod(problem.tiles(m))
    if by_tiles.chunk or weights <= target.l2_bytes or tiles < _LEAST_TILES:
        return by_tiles
    # A row of a block's matrices stays in cache, beside the weights that pass through.
    lanes, vectors = target.lanes, by_tiles.vectors
    row_bytes = 4 * (m + 2) * (winograd_points.strides(1, problem.c)[0] + vectors * lanes)
    most = max(1, int(_ROW_SHARE * target.l2_bytes) // row_bytes)
    block = -(-tiles // -(-tiles // most))
    rows = min(block, (target.registers - 2 - vectors) // vectors, _MOST_ROWS)
    return Point(m, block, rows, vectors, lanes, by_tiles.divide, order="rows")


def sources_of(form: str) -> tuple[bool, ...]:
    """For each source that is transformed whether it is squared: x^2, then x, which most branches read."""
    return tuple(sorted({branch == SQUARED for branch in form}, reverse=True))


def define(problem: Problem, point: Point):
    """te function (x [N, H, W, C], packed weights, shifts if any) -> [N, OH, OW, O]."""
    notes = annotations(LOOPS, problem=problem.to_dict(), point=point.to_dict())
    rows = winograd.packed_rows(problem, point)

    def quadratic(x, u, *shifts):
        def squared(*i):
            return x(*i) * x(*i)

        branches = [
            winograd.define_stages(
                squared if b == SQUARED else x, u, problem, point, f"branch_{b}", first=i * rows
            )
            for i, b in enumerate(problem.form)
        ]

        def neuron(*i):
            return combine(problem.form, [b(*i) for b in branches], *(shifts or (None,)), i[-1])

        return te.compute(branches[0].shape, neuron, name="quadratic", attrs=notes)

    return quadratic


class _Neuron:
    """What an emitter computes: products of every branch, combined at the store."""

    def __init__(self, kernel, problem: Problem, point: Point, target: CpuTarget):
        x, u, *shifts = kernel.inputs
        self.squared, self.shifts = sources_of(problem.form), shifts[0] if shifts else None
        self.groups = tuple(
            tuple(i for i, b in enumerate(problem.form) if (b == SQUARED) == squared)
            for squared in self.squared
        )
        super().__init__(kernel, problem, point, target, x, u)

    def source(self, value, index: int):
        return value * value if self.squared[index] else value

    def combine(self, values: list, channel):
        return combine(self.problem.form, values, self.shifts, channel)


class _ByTiles(_Neuron, winograd.Emitter):
    pass


class _ByRows(_Neuron, RowEmitter):
    pass


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of fused quadratic neurons."""
    problem, point = (
        Problem.from_dict(fused.point["problem"]),
        Point.from_dict(fused.point["point"]),
    )
    blocks = winograd.stages(point) * len(problem.form) + 1
    if fused.anchor_index + 1 != blocks:
        raise ScheduleError(
            "the definition is not the one this kernel replaces",
            found=str([b.name_hint for b in fused.blocks[: fused.anchor_index + 1]]), wanted=f"{blocks} blocks",
        )  # fmt: skip
    with fused.emit() as kernel:
        emitter = _ByRows if point.order == "rows" else _ByTiles
        emitter(kernel, problem, point, target).emit()
    return kernel.func
