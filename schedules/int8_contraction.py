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
from schedules.contraction import OUTPUT, WEIGHTS_OR_PIXELS, Point
from schedules.errors import ScheduleError
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
    """[panels of all groups, R, S, channels of a panel]; R = S = 1 where nothing is padded."""
    taps = (problem.r, problem.s) if any(problem.padding) else (1, 1)
    return (packed_shape(problem, point)[0], *taps, point.panel)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused integer contraction. Raises ScheduleError if the packed weights do not fit its parameters."""
    from schedules.register_tile import Contraction
    from schedules.terms import QuadTerms

    problem = Problem.from_dict(fused.point["problem"])
    point = Point.from_dict(fused.point["point"])
    with fused.emit() as kernel:
        found, wanted = tuple(int(d) for d in kernel.inputs[1].shape), packed_shape(problem, point)
        if found != wanted:
            raise ScheduleError(
                "packed weights of another shape", found=str(found), wanted=str(wanted)
            )
        terms = QuadTerms(kernel, target)
        Contraction(kernel, fused.shape, in_quads(problem), point, target.threads, terms).emit()
    return kernel.func


# Bytes of weights up to which all panels are gone through for a row of pixels; beyond, all pixels for a panel.
_NEAR_WEIGHTS = 30_000
# Registers a tile leaves free: two of quads being broadcast, and what LLVM keeps of the epilogue.
_SPARE = 8


def _tile(problem: Problem, target: CpuTarget) -> tuple[int, int]:
    """(mr, nv): two vectors of channels and about seven pixels, enough sums to hide a dot product's latency."""
    count = len(vectors(problem.group_outputs, target.lanes))
    best = None
    for nv in range(1, min(count, 8 if problem.row <= 2 else 4) + 1):
        largest = min((target.registers - _SPARE - nv) // nv, 8)
        for largest_here in range(1, max(1, largest) + 1):
            mr = tile_rows(problem.row, largest_here)
            step = max(mr * nv / 2, 0.5 * (mr + nv), 5 / 2) + 0.1 * mr + 0.1 * nv
            passes = -(-problem.row // mr) * -(-count // nv)
            cost = passes * (problem.steps / QUAD * step + 3 * mr * nv + 12)
            if best is None or cost < best[0] * 0.995:
                best = (cost, mr, nv)
    return best[1:]


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """The tile with the least estimated time; weights that leave the first-level cache are read once."""
    quads = in_quads(problem)
    mr, nv = _tile(problem, target)
    order = "blocks" if problem.o * problem.steps <= _NEAR_WEIGHTS else "panels"
    sums = 1
    while mr * nv * sums < 8 and 2 * sums <= quads.group_inputs:
        sums *= 2
    unroll = min(max(sums, 2), quads.group_inputs)
    several = -(-problem.row // mr) * problem.rows > 1
    prefetch = 0
    if several:
        prefetch = WEIGHTS_OR_PIXELS * (order != "blocks" or problem.flat) + OUTPUT
    return Point(target.lanes, mr, nv, order, 1, 0, unroll, sums, prefetch)
