# SPDX-License-Identifier: Apache-2.0
"""Contractions by register tile: convolution of any kernel, stride, dilation and groups; dense layers; matrix-vector.

    Y[n, oh, ow, o] = sum over r, s, c of X[n, oh*sh + r*dh - top, ow*sw + s*dw - left, c] * W[o, c, r, s]

A tile of `mr` pixels x `nv` vectors of output channels stays in registers while the sum runs (`register_tile`). Weights
are packed `[panels][R][S][C/groups][nv * lanes]`, so that one panel is read in order. Here: which tile, in which order.
With `planar` beside the point X is [N, C, H, W]: a network's image as it comes.
"""

from __future__ import annotations

from tvm import tirx

from schedules.contraction_point import (
    OUTPUT,
    PARTIAL,
    WEIGHTS_OR_PIXELS,
    Point,
    packed_shape,
    panels_per_group,
)
from schedules.fused import Fused
from schedules.register_tile import Contraction
from schedules.target import CpuTarget
from schedules.terms import FloatTerms, PlanarTerms
from schedules.windows import Problem, tile_rows, vectors

__all__ = ["Point", "Problem", "default_point", "packed_shape", "panels_per_group", "schedule"]


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused contraction. Raises ScheduleError if the packed weights do not fit its parameters."""
    problem, point = (
        Problem.from_dict(fused.point["problem"]),
        Point.from_dict(fused.point["point"]),
    )
    with fused.emit() as kernel:
        kernel.require_packed(packed_shape(problem, point))
        terms = PlanarTerms(kernel) if fused.point.get("planar") else FloatTerms(kernel)
        Contraction(kernel, fused.shape, problem, point, target.threads, terms).emit()
    return kernel.func


# Shares of the second-level cache: an operand that is still there when it is read again; a panel of weights that is
# worth cutting into chunks, and the size of these. Measured on 1 MiB (Cascade Lake).
NEAR = 0.4
_LONG_PANEL = 0.25
_CHUNK_PANEL = 0.1
_ALIAS_BYTES = 4096  # pixels this far apart compete for one set of the first-level cache
_ALIAS_ROWS = 8  # as many as fit into one set
_SHORT_RUN = 32  # steps of the sum in one kernel row


def step_cycles(mr: int, nv: int, sums: int) -> float:
    """Cycles per step of the sum: two FMA and two load ports, latency 4, weights from the second-level cache.

    The last two terms are measured (Cascade Lake, tiles from 28x1 to 4x6): each broadcast and each vector of weights
    delays the FMAs a little, more so when another thread shares the core's front end.
    """
    return max(mr * nv / 2, 0.58 * (mr + nv), 2.6 * nv, 4 / sums) + 0.16 * mr + 0.1 * nv


def estimated_cycles(problem: Problem, lanes: int, mr: int, nv: int, sums: int) -> float:
    """Cycles of a whole row of tiles over all channels of one group."""
    count = len(vectors(problem.group_outputs, lanes))
    total = 0.0
    for first in range(0, count, nv):
        part = min(nv, count - first)
        total += problem.steps * step_cycles(mr, part, sums) + 2 * mr * part + 12
    return total * -(-problem.row // mr)


def _tile(problem: Problem, target: CpuTarget) -> tuple[int, int, int]:
    """(mr, nv, sums) of the least estimated time."""
    count = len(vectors(problem.group_outputs, target.lanes))
    aliased = 4 * problem.c * problem.stride[1] % _ALIAS_BYTES == 0
    # An image's few channels make many short runs at its edges, where LLVM spills larger tiles.
    short = problem.r > 1 and problem.groups == 1 and problem.s * problem.c <= _SHORT_RUN
    best = None
    for nv in range(1, min(count, 8 if problem.row <= 2 else 6) + 1):
        largest = (target.registers - 1 - nv) // nv
        if short and nv > 2:
            break
        if (aliased or short) and problem.row > _ALIAS_ROWS:
            largest = min(largest, _ALIAS_ROWS)
        for mr in sorted(
            {tile_rows(problem.row, m) for m in range(max(1, largest // 2), largest + 1)}
        ):
            sums, inputs = 1, problem.group_inputs
            while (
                mr * nv * sums < 8
                and 2 * sums * mr * nv + nv + 1 <= target.registers
                and 2 * sums <= inputs
            ):
                sums *= 2
            cost = estimated_cycles(problem, target.lanes, mr, nv, sums)
            if best is None or cost < best[0] * 0.995:
                best = (cost, mr, nv, sums)
    return best[1:]


def _chunk(problem: Problem, mr: int, panel: int, target: CpuTarget) -> int:
    """Input channels of a chunk, 0 if the weights of a panel of `panel` channels stay near all the same, or are used
    once only, by one tile of `mr` pixels."""
    size = 4 * problem.steps * panel
    once = problem.rows == 1 and problem.row <= max(2, mr)
    if problem.groups > 1 or once or size <= _LONG_PANEL * target.l2_bytes:
        return 0
    parts = max(2, round(size / (_CHUNK_PANEL * target.l2_bytes)))
    chunk = -(-problem.c // parts // 16) * 16
    return chunk if chunk < problem.c else 0


def _order(problem: Problem, panels: int, chunk: int, target: CpuTarget) -> tuple[str, int]:
    """(order, block) that reads least from beyond the second-level cache."""
    near = NEAR * target.l2_bytes
    weights = 4 * problem.o * problem.steps
    if weights <= near:
        return "blocks", 1
    rows = problem.n * problem.oh
    row_bytes = 4 * problem.ow * problem.c * (problem.stride[0] if problem.r > 1 else 1)
    pixels = row_bytes * rows
    if chunk:
        return ("panels" if pixels <= near else "chunks"), 1
    by_panels = weights + pixels * (panels if pixels > 1.25 * near else 1)
    block = max(1, int(near * 0.8 / row_bytes))
    by_blocks = pixels + weights * -(-rows // block)
    return ("panels", 1) if problem.flat or by_panels <= by_blocks else ("blocks", block)


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """The tile with the least estimated time, and the order that moves the least memory."""
    return point_of_tile(problem, _tile(problem, target), target)


def point_of_tile(problem: Problem, tile: tuple[int, int, int], target: CpuTarget) -> Point:
    """The point of a tile (mr, nv, sums): the order that moves the least memory, unrolling, prefetching."""
    mr, nv, sums = tile
    panels = problem.groups * -(-len(vectors(problem.group_outputs, target.lanes)) // nv)
    chunk = _chunk(problem, mr, nv * target.lanes, target)
    order, block = _order(problem, panels, chunk, target)
    tiles = -(-problem.row // mr)
    if target.threads > 1:
        order = _order_for_threads(
            order, panels, tiles if problem.flat else problem.rows, target.threads
        )
    if order == "blocks":
        chunk = 0
    # Two steps at a time need room for the next step's weights; small tiles take four to hide the loop's own work.
    unroll = 1 if mr * nv + nv + 3 > target.registers else 4 if mr * nv <= 14 else 2
    unroll = min(max(sums, unroll), chunk or problem.group_inputs)
    prefetch = 0
    if tiles * problem.rows > 1:
        prefetch = (
            WEIGHTS_OR_PIXELS * (order != "blocks" or problem.flat)
            + OUTPUT
            + PARTIAL * (order == "chunks")
        )
    return Point(target.lanes, mr, nv, order, block, chunk, unroll, sums, prefetch)


def _order_for_threads(order: str, panels: int, units: int, threads: int) -> str:
    """The other order if the preferred one has too few parts to keep every thread busy."""

    def busy(parts: int) -> float:
        return parts / (-(-parts // threads) * threads)

    mine, other = (units, panels) if order == "blocks" else (panels, units)
    if busy(mine) < 0.9 and busy(other) > busy(mine):
        return "panels" if order == "blocks" else "blocks"
    return order
