# SPDX-License-Identifier: Apache-2.0
"""Contractions of uint8 pixels with int8 weights: the register tile of `contraction` over quads of channels.

Channels come in multiples of 4 per group. Weights are packed `[panels][R][S][quads][nv * lanes * 4]`, the four channels of
a quad side by side for each output channel. Where pixels have an offset, a table of int32 says what each tap inside the
image starts a sum with, so that no border is ever copied and no product is computed for it.

Pixels may overlap: with `step` in its annotations, a pixel's bytes begin `step` behind those of its left neighbour.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules import contraction
from schedules.contraction import Point
from schedules.fused import Emission, Fused
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

    problem = Problem.from_dict(fused.point["problem"])
    point = Point.from_dict(fused.point["point"])
    with fused.emit() as kernel:
        kernel.require_packed(packed_shape(problem, point))
        terms = terms_of(kernel, problem, point, target)
        Contraction(kernel, fused.shape, in_quads(problem), point, target.threads, terms).emit()
    return kernel.func


def terms_of(kernel: Emission, problem: Problem, point: Point, target: CpuTarget):
    """What the kernel of a fused integer contraction multiplies and adds."""
    from schedules.terms import QuadTerms

    widths = vectors(problem.group_outputs, point.lanes)
    whole = all(computed == stored for computed, stored in widths)
    terms = QuadTerms(kernel, target, whole)
    if "step" in kernel.fused.point:
        terms.x = _overlapping(terms.x, problem, kernel.fused.point["step"])
        terms.overlapping = True
    return terms


def _overlapping(x, problem: Problem, step: int):
    """x [N, H, W, C] as [N, H, OW, bytes of a kernel row], these running into those of the next pixels."""
    _, height, width, channels = (int(d) for d in x.shape)
    row = width * channels
    shape = (problem.n, height, problem.w, problem.c)
    return T.decl_buffer(shape, str(x.dtype), data=x.data, strides=(height * row, row, step, 1))


_SUMS = 24  # of a tile, at most: with the weights and pixels of a step they fill the registers
_FEW_STEPS = 8  # too few for a loop
_OVERLAPPING_STEPS = 3
_STAYS = 0.6  # share of the first-level cache: weights that are still there when the next tile needs them
_TOGETHER = 4  # vectors of bytes in one store


def _panel_stays(quads: Problem, nv: int, target: CpuTarget) -> bool:
    """Whether a panel of `nv` vectors stays in the first-level cache from one tile to the next."""
    return QUAD * quads.steps * nv * target.lanes <= _STAYS * target.l1_bytes


def estimated_cycles(quads: Problem, mr: int, nv: int, sums: int, target: CpuTarget) -> float:
    """Cycles of a row of tiles over all channels: dot products, then what becomes of the sums and their stores.

    Fitted to layers of ResNet-50 and MobileNetV2 on Cascade Lake, whose tiles of 7 x 3 and 6 x 4 also issue a tenth fewer
    instructions per dot product than 7 x 2, which counts where another thread shares the core. A panel that ends within a
    cache line makes two stores of one, for the next panel has the rest of it.
    """
    count = len(vectors(quads.group_outputs, target.lanes))
    near = _panel_stays(quads, nv, target)
    total = 0.0
    for first in range(0, count, nv):
        part = min(nv, count - first)
        loads = 0.5 * (mr + part) if near else 2.6 * part
        step = max(mr * part / 2, loads, 4 / sums) + 0.16 * mr + (0.1 if near else 0.4) * part
        whole = part % _TOGETHER == 0 or part == count
        stores = mr * -(-part // _TOGETHER) * (1 if whole else 2)
        total += quads.steps * step + 2.5 * mr * part + 2 * stores + 16
    return total * -(-quads.row // mr)


def _tile(quads: Problem, target: CpuTarget) -> tuple[int, int, int]:
    """(mr, nv, sums) of the least estimated time."""
    count = len(vectors(quads.group_outputs, target.lanes))
    most = min(_SUMS, target.registers - 4)
    best = None
    for nv in range(1, min(count, 8) + 1):
        for mr in sorted({tile_rows(quads.row, m) for m in range(1, max(1, most // nv) + 1)}):
            sums = 1
            while (
                mr * nv * sums < 8
                and 2 * sums * mr * nv + nv + 1 <= target.registers
                and 2 * sums <= quads.group_inputs
            ):
                sums *= 2
            cost = (
                contraction.estimated_cycles(quads, target.lanes, mr, nv, sums)
                if quads.row <= 2  # weights read once are all that counts
                else estimated_cycles(quads, mr, nv, sums, target)
            )
            if best is None or cost < best[0] * 0.995:
                best = (cost, mr, nv, sums)
    return best[1:]


def _panels_first(quads: Problem, point: Point, target: CpuTarget) -> bool:
    """Whether all pixels for one panel, the next being fetched meanwhile, beats all panels for one tile."""
    if not quads.flat or point.panel >= quads.o:
        return False
    pixels = QUAD * quads.row * quads.c
    if _panel_stays(quads, point.nv, target):
        return pixels <= contraction.NEAR * target.l2_bytes
    return pixels <= 2 * target.l1_bytes


def _rows_by_panel(quads: Problem, point: Point, target: CpuTarget) -> bool:
    """Whether all rows for one panel beat all panels for one row: one panel stays in the first-level cache, several do not."""
    if quads.flat or not _panel_stays(quads, point.nv, target):
        return False
    several = not _panel_stays(quads, len(vectors(quads.group_outputs, target.lanes)), target)
    pixels = QUAD * quads.n * quads.h * quads.w * quads.c
    return several and pixels <= contraction.NEAR * target.l2_bytes


def _strided_by_panel(quads: Problem, point: Point, target: CpuTarget) -> bool:
    """Whether all rows of a strided layer for one panel, the next being fetched meanwhile, beat all panels for one row: the
    pixels that it reads stay near (.73 to .98 of the time, measured on ResNet's with weights from the third-level cache)."""
    if quads.stride == (1, 1) or quads.groups > 1 or point.panel >= quads.o:
        return False
    read = quads.oh * quads.ow if quads.r * quads.s == 1 else quads.h * quads.w
    return QUAD * quads.n * read * quads.c <= contraction.NEAR * target.l2_bytes


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """The tile with the least estimated time, and the order that moves the least memory."""
    quads = in_quads(problem)
    point = contraction.point_of_tile(quads, _tile(quads, target), target)
    if target.threads == 1 and point.order == "blocks" and _strided_by_panel(quads, point, target):
        # Not its output: that of larger images is only delayed by it.
        point = replace(point, order="panels", block=1, prefetch=contraction.WEIGHTS_OR_PIXELS)
    elif target.threads == 1 and point.order == "blocks" and _panels_first(quads, point, target):
        fetched = contraction.WEIGHTS_OR_PIXELS + contraction.OUTPUT
        point = replace(point, order="panels", prefetch=fetched)
    elif target.threads == 1 and point.order == "blocks" and _rows_by_panel(quads, point, target):
        point = replace(point, block=quads.rows)
    steps = quads.s * quads.c
    if steps <= _FEW_STEPS and quads.groups == 1 and quads.dilation[1] == 1:
        # All those of a kernel row, or, where its taps are one whose pixels overlap, not so many that LLVM keeps what these share.
        overlap = quads.r > 1 and quads.s == 1
        return replace(point, unroll=min(steps, _OVERLAPPING_STEPS) if overlap else steps)
    return point
