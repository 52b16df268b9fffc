# SPDX-License-Identifier: Apache-2.0
"""Contractions of bytes over an image, and the maximum over windows of 3x3 and stride 2 of their sums, in one kernel.

Only sums of pooled pixels exist, a line of them, in the nearest cache. A tile of the contraction starts and ends with whole
windows' columns: the maximum along the line is taken in registers, but for the column before the tile, which its left
neighbour leaves behind. Down the line an even row joins what the odd one before it left; an odd row completes a line,
which goes through the epilogue, and begins the next.

    line[x] = max(line[x], row[2x - 1], row[2x], row[2x + 1])
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules import int8_contraction
from schedules.byte_stores import Cell
from schedules.emission import loop
from schedules.fused import Emission, Fused
from schedules.int8_contraction import Point, Problem, in_quads
from schedules.pooling import larger, lowest
from schedules.register_tile import Contraction
from schedules.sparse_panel import scratch
from schedules.target import CpuTarget
from schedules.terms import QuadTerms
from schedules.tile_fetch import Chunk, Panel, Pixels
from schedules.windows import Problem as Windows
from schedules.windows import span, splat

_STRIDE = 2


def suits(pool: Windows) -> bool:
    """Whether these are windows of 3x3 and stride 2 over an even number of rows and columns, with padding before the first."""
    return (
        (pool.r, pool.s, pool.stride, pool.dilation) == (3, 3, (_STRIDE, _STRIDE), (1, 1))
        and pool.padding[:2] == (1, 1)
        and (pool.h, pool.w) == (_STRIDE * pool.oh, _STRIDE * pool.ow)
    )


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """The contraction's own tile, of an even number of pixels."""
    point = int8_contraction.default_point(problem, target)
    pixels = max(_STRIDE, min(point.mr, problem.ow) // _STRIDE * _STRIDE)
    return replace(point, mr=pixels, order="blocks", block=1, chunk=0, prefetch=0)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused pooled contraction. Raises ScheduleError if the packed weights do not fit its parameters."""
    problem = Problem.from_dict(fused.point["problem"])
    point = Point.from_dict(fused.point["point"])
    with fused.emit() as kernel:
        kernel.require_packed(int8_contraction.packed_shape(problem, point))
        terms = int8_contraction.terms_of(kernel, problem, point, target)
        _Pooled(kernel, problem, point, target, terms).emit()
    return kernel.func


class _Tile(Contraction):
    """The contraction of a tile's pixels; `keep(pixels, rows)` is what becomes of its sums."""

    def __init__(self, kernel, problem, point, target, terms, keep):
        super().__init__(kernel, kernel.fused.shape, problem, point, target.threads, terms)
        self._store = keep


class _Pooled:
    """Emits one kernel: rows of the image in order, each in tiles, the last of which may be smaller."""

    def __init__(
        self, kernel: Emission, problem: Problem, point: Point, target: CpuTarget, terms: QuadTerms
    ):
        self.kernel, self.target, self.terms = kernel, target, terms
        self.problem = quads = in_quads(problem)
        self.images, self.rows, self.columns, _ = kernel.fused.shape
        self.tiles, rest = divmod(quads.ow, point.mr)
        self.tile, self.last = (
            _Tile(kernel, quads, replace(point, mr=pixels), target, terms, self._keep)
            for pixels in (point.mr, rest or point.mr)
        )
        self.rest = rest
        self.lanes = point.lanes
        self.channels = -(-quads.o // point.lanes) * point.lanes

    def emit(self) -> None:
        parts = min(self.rows, self.target.threads)
        each = -(-self.rows // parts)
        with loop(self.images * parts, parallel=self.target.threads > 1) as share:
            self.image, part = T.Bind(share // parts), share % parts
            first = T.Bind(part * each)
            count = T.Bind(tirx.max(0, tirx.min(each, self.rows - first)))
            # Out here, so that they are allocated once: they stay from one row to the next.
            self.line = scratch(self.columns * self.channels, "int32")
            self.before = scratch(self.channels, "int32")
            with T.serial(0, self.columns) as x:
                self._clear(self.line, x * self.channels)
            if parts > 1:  # the odd row before a part's first, which its first line sees
                with T.If(tirx.all(first > 0, count > 0)), T.Then():
                    self._row(T.Bind(_STRIDE * first - 1), None)
            with T.serial(0, count) as i:
                y = T.Bind(first + i)
                self._row(T.Bind(_STRIDE * y), None)
                self._row(T.Bind(_STRIDE * y + 1), y)

    def _clear(self, buffer, start=0) -> None:
        """Make the channels of one pixel, which begin at `start`, smaller than any sum."""
        lowest_of_all = splat(lowest("int32"), self.lanes)
        for first in range(0, self.channels, self.lanes):
            T.buffer_store(buffer, lowest_of_all, [span(start + first, self.lanes)])

    def _row(self, row, completes) -> None:
        """Row `row` of the contraction; `completes` is the pooled line that ends with it, if one does."""
        self.completes = completes
        everything = Chunk(0, self.problem.group_inputs, True, True)
        self._clear(self.before)

        def panel(panel: Panel) -> None:
            with T.serial(0, self.tiles) as t:
                base = t * self.tile.point.mr
                self.tile._tile(Pixels(t, self.image, row, base, None, base), panel, everything)
            if self.rest:
                base = self.tiles * self.tile.point.mr
                at = Pixels(self.tiles, self.image, row, base, None, base)
                self.last._tile(at, panel, everything)

        self.tile._over_panels(panel, False)

    def _keep(self, pixels: Pixels, rows: list[list[Cell]]) -> None:
        """Join a tile's sums to the line, `rows` by pixel and vector; store the line's pixels that are complete."""
        stored: list[list[Cell]] = [[] for _ in rows[::_STRIDE]]
        for v, cell in enumerate(rows[0]):
            lane = span(cell.channel, cell.lanes)
            sums = [T.Bind(row[v].value) for row in rows]
            held = T.Bind(self.before[lane])
            for x, (even, odd) in enumerate(zip(sums[::_STRIDE], sums[1::_STRIDE])):
                column = pixels.base // _STRIDE + x
                along = T.Bind(larger(larger(held, even), odd))
                place = [span(column * self.channels + cell.channel, cell.lanes)]
                joined = T.Bind(larger(self.line[place[0]], along))
                T.buffer_store(self.line, joined if self.completes is None else along, place)
                if self.completes is not None:
                    at = (self.image, self.completes, column)
                    stored[x].append(Cell(joined, at, cell.channel, cell.lanes))
                held = odd
            T.buffer_store(self.before, held, [lane])
        if self.completes is not None:
            self.terms.store(self.kernel, stored)
