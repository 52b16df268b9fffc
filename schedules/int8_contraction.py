# SPDX-License-Identifier: Apache-2.0
"""Contractions of uint8 pixels with int8 weights: the register tile of `contraction` over quads of channels.

Channels come in multiples of 4 per group. Weights are packed `[panels][R][S][quads][nv * lanes * 4]`, the four channels of
a quad side by side for each output channel. Where pixels have an offset, a table of int32 says what each tap inside the
image starts a sum with, so that no border is ever copied and no product is computed for it.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx

from schedules import contraction
from schedules.contraction import Point
from schedules.fused import Fused
from schedules.target import CpuTarget
from schedules.windows import Problem, tile_rows, vectors

__all__ = ["Point", "Problem", "default_point", "in_quads", "packed_shape", "schedule"]

QUAD = 4


def in_quads(problem: Problem) -> Problem:
    """The problem whose inputs are counted in quads of channels."""
    return replace(problem, c=problem.c // QUAD)


def packed_shape(problem: Problem, point: Point) -> tuple[int, ...]:
    """[panels of all groups, R, S, quads of a group, bytes of a panel]."""
    *lead, panel = contraction.packed_shape(in_quads(problem), point)
    return (*lead, panel * QUAD)


def starts_shape(problem: Problem, point: Point) -> tuple[int, ...]:
    """[panels of all groups, R, S + 1, channels of a panel], the last of a kernel row being the sum of its taps; a single
    sum where nothing is padded."""
    taps = (problem.r, problem.s + 1) if any(problem.padding) else (1, 1)
    return (packed_shape(problem, point)[0], *taps, point.panel)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused integer contraction. Raises ScheduleError if the packed weights do not fit its parameters."""
    from schedules.register_tile import Contraction
    from schedules.terms import QuadTerms

    problem = Problem.from_dict(fused.point["problem"])
    point = Point.from_dict(fused.point["point"])
    with fused.emit() as kernel:
        kernel.require_packed(packed_shape(problem, point))
        widths = vectors(problem.group_outputs, point.lanes)
        whole = all(computed == stored for computed, stored in widths)
        terms = QuadTerms(kernel, target, whole)
        Contraction(kernel, fused.shape, in_quads(problem), point, target.threads, terms).emit()
    return kernel.func


# Sums of a tile: fewer do not hide the latency of a dot product, and more leave LLVM no registers to load ahead into.
_SUMS = 16


def _tile(problem: Problem, target: CpuTarget) -> tuple[int, int, int]:
    """(mr, nv, sums) of the least estimated time; `problem` counts quads."""
    count = len(vectors(problem.group_outputs, target.lanes))
    most = min(_SUMS, target.registers - 4)
    best = None
    for nv in range(1, min(count, 8 if problem.row <= 2 else 4) + 1):
        for mr in sorted({tile_rows(problem.row, m) for m in range(1, max(1, most // nv) + 1)}):
            sums = 1
            while mr * nv * sums < 8 and 2 * sums <= problem.group_inputs:
                sums *= 2
            cost = contraction.estimated_cycles(problem, target.lanes, mr, nv, sums)
            if best is None or cost < best[0] * 0.995:
                best = (cost, mr, nv, sums)
    return best[1:]


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """The tile with the least estimated time, and the order that moves the least memory."""
    quads = in_quads(problem)
    point = contraction.point_of_tile(quads, _tile(quads, target), target)
    if quads.c == 1 and not quads.flat and quads.dilation[1] == 1:
        return replace(point, unroll=quads.s)  # a kernel row is as many steps, too few for a loop
    return point
