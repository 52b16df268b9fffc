# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse 1x1 convolution and matrix product that leave their sums in planes, for another sparse layer to read.

As `sparse_planes`, but sums go from registers through the epilogue into planes `y[n, o, pixel]`. A panel holds as many pixels
as the second-level cache takes: a block of output channels walks it tile by tile, always through the same non-zeros, and
reads and writes long runs of each plane, which hardware prefetchers follow. Planes of whole cache lines, and long ones, are
not copied: a panel is then part of each, where it lies, be they of one input or of two (`Problem.beside`).

Where an element of the output holds several channels that are not computed at once, each tile walks all blocks instead, and its
sums are kept until those of a plane's channels are complete.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated
from schedules.emission import ramp
from schedules.fused import Fused
from schedules.sparse_panel import columns_of, scratch
from schedules.sparse_planes import Planes, emitted
from schedules.sparse_planes import Point as PlanesPoint
from schedules.sparse_planes import default_point as planes_point
from schedules.sparse_problem import INDICES_BEHIND, Problem, tiles_of
from schedules.target import CpuTarget
from schedules.windows import LINE_BYTES

# Share of the second-level cache that a panel may take: activations and weights pass through the rest. More where a layer
# writes more than it reads, which longer runs help most (measured on Cascade Lake).
_PANEL_SHARE, _PANEL_SHARE_EXPANDING = 0.35, 0.45
# Bytes of a plane from which on it is not worth copying: a page. Shorter ones come from beyond the second-level cache sooner
# in one pass over all of them than in the order of the non-zeros, if that splits lines.
_LONG_PLANE = 4096
# The share of the second-level cache that a block of output channels may walk, where planes are read in place; that those of
# two inputs may take; and that several channels together may where their tiles would else have fewer than so many vectors
# (measured on Cascade Lake).
_RUNS_SHARE, _RUNS_SHARE_BESIDE, _RUNS_SHARE_NARROW, _NARROW = 0.5, 0.8, 0.9, 4
# Non-zeros between fetching a plane's vectors into the first-level cache and using them, where a block has at least so many.
_AHEAD, _LONG_SUM = INDICES_BEHIND, 16
# What one more tile costs a block, and one more run of tiles, in multiplications of one vector with one row of it.
_TILE_COST, _RUN_COST = 6.0, 1.0
# Pixel vectors of a plane which 4 output channels at a time hold whole: faster than 8 of parts of it.
_SHORT_PLANE = 6
# Output channels whose sums of a tile are kept until a plane's are complete.
_KEPT_CHANNELS = 32


@dataclass(frozen=True)
class Point(Annotated):
    """Frozen parameters of one kernel.

    vectors  pixel vectors of a tile: accumulators per output channel (some tiles have one less)
    rows     output channels computed at once, a divisor of the block
    span     pixel vectors of a panel (some have one less)
    part     output channels of a task
    splits   tasks that share one panel, each with its own parts; each fills the panel again
    """

    vectors: int
    rows: int
    span: int
    part: int
    splits: int = 1


def suits(problem: Problem) -> bool:
    """Whether this is the kernel to use."""
    padded = problem.planes_in and any(problem.padding)
    return problem.planes_out and problem.taps == 1 and not padded


def lies_in_place(problem: Problem) -> bool:
    """Whether planes are read where they lie, not from a panel: those of whole lines, and long ones.

    Quads are few. Where one output channel alone uses what a load brings, loads should not straddle lines.
    """
    fits = 4 * problem.plane_in % LINE_BYTES == 0
    if problem.together > 1:
        fits = fits or problem.block > 1
    else:
        fits = fits or 4 * problem.plane_in >= _LONG_PLANE
    return problem.between_alike and fits


def pixels_behind(problem: Problem, rows: int, target: CpuTarget) -> int:
    """The pixels of a plane behind its last whole vector, where their sums are made with the `rows` channels that are computed
    at once in lanes: few, of a plane that goes on to the end of that vector and whose sums the registers take whole."""
    whole, behind = divmod(problem.image_pixels, target.lanes)
    few = 0 < whole and behind <= rows // 2 and rows <= target.lanes and problem.together == 1
    held = rows * whole + whole + 1 + behind
    fits = problem.computed % target.lanes == 0 and held < target.registers
    return behind if few and fits else 0


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """Runs of planes as long as pays, or panels that fit the cache."""
    base = planes_point(problem, target)
    total = -(-problem.computed // target.lanes)
    rows, vectors = base.rows, min(base.vectors, total)
    if rows == 8 and total <= _SHORT_PLANE and not pixels_behind(problem, rows, target):
        rows, vectors = 4, total
    if lies_in_place(problem):
        tiles = 1 if problem.together > 1 else _runs(problem, target, rows, vectors)
    else:
        tiles = _panels(problem, target, rows, vectors)
    splits = 1
    if problem.batch * tiles < target.threads:
        splits = min(target.threads, problem.blocks)
    part = problem.outputs if splits == 1 else problem.blocks // splits * problem.block
    if rows < problem.together:
        part = min(part // problem.together * problem.together, _KEPT_CHANNELS)
    return Point(vectors, rows, -(-total // tiles), part, splits)


def _runs(problem: Problem, target: CpuTarget, rows: int, vectors: int) -> int:
    """Parts of planes read in place that a block of output channels walks."""
    line = problem.channels * target.lanes * 4
    share = _RUNS_SHARE_BESIDE if problem.beside else _RUNS_SHARE
    fit = max(1, int(target.l2_bytes * share) // line)
    if problem.block > 1:
        fit = max(fit, min(int(target.l2_bytes * _RUNS_SHARE_NARROW) // line, _NARROW))
    return _least_work(problem, target, rows, vectors, fit)


def _panels(problem: Problem, target: CpuTarget, rows: int, vectors: int) -> int:
    """Panels of an image."""
    expands = problem.outputs > problem.channels
    share = _PANEL_SHARE_EXPANDING if expands else _PANEL_SHARE
    fit = max(1, int(target.l2_bytes * share) // (problem.panel_rows * target.lanes * 4))
    return _least_work(problem, target, rows, vectors, fit)


def _least_work(problem: Problem, target: CpuTarget, rows: int, vectors: int, fit: int) -> int:
    """Parts of at most `fit` vectors of planes, for tiles of `rows` by `vectors`: those of the least estimated work."""
    total = -(-problem.computed // target.lanes)
    fewest = -(-total // fit)

    def work(parts: int) -> float:
        shorter, longer = total // parts, total % parts
        tiles = parts * -(-shorter // vectors) + longer * (shorter % vectors == 0)
        return parts * _RUN_COST + tiles * _TILE_COST / rows

    return min(range(fewest, min(2 * fewest, total) + 1), key=work)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused function whose anchor is annotated `sparse_chain`."""
    return emitted(fused, target, Point, _Chain)


class _Chain(Planes):
    """Emits one kernel: the planes kernel with longer panels and no sums to keep."""

    def __init__(self, kernel, problem: Problem, point: Point, target: CpuTarget, elements):
        whole = PlanesPoint(point.vectors, point.rows, problem.panel_rows, point.part, point.splits)
        self.span = point.span
        super().__init__(kernel, problem, whole, target, elements)
        # An odd number of vectors: rows of a power of two would share a few sets of the caches.
        self.row = (point.span | 1) * self.lanes
        self.lead = 0
        self.in_place = lies_in_place(problem)
        self.behind = 0
        if self.elements.dtype == "float32" and point.span * self.lanes >= problem.computed:
            self.behind = pixels_behind(problem, point.rows, target)
        if problem.planes_in and not problem.between_alike:
            # Lines are copied whole: those at both ends stick out.
            self.lead = -(-problem.out_width // self.lanes) * self.lanes
            self.row = ((self.row + 2 * self.lead) // self.lanes | 1) * self.lanes

    def emit(self) -> None:
        p, splits, lanes = self.problem, self.point.splits, self.lanes
        division = runs, most, _ = tiles_of(p.computed, lanes, self.span)
        tasks = p.batch * runs * splits
        loop = T.parallel if self.threads > 1 and tasks > 1 else T.serial
        with loop(0, tasks) as task:
            share = task % splits
            self.image = T.Bind(task // splits // runs)
            first, span = self._tile(T.Bind(task // splits % runs), division)
            panel = self.x
            if not self.in_place:
                panel = scratch(p.panel_rows * self.row, self.elements.dtype)
            self._either(span, most, lambda n: self._run(panel, first, n, share))

    def _run(self, panel, first, span: int, share) -> None:
        """The share-th part of the output channels for `span` vectors from `first` on."""
        p, lanes = self.problem, self.lanes
        self.first, self.span = first, span
        if p.computed % lanes:
            self.first = T.Bind(tirx.min(first, max(0, p.computed - span * lanes)))
        self.tiles = tiles_of(span * lanes, lanes, self.point.vectors)
        if not self.in_place:
            self._fill(panel)
        if self.point.rows < p.together:
            self._each_tile(self.tiles, lambda tile, n: self._multiply_tile(panel, share, tile, n))
            return
        with T.serial(*self._share_of_parts(share)) as part:
            first_channel, channels = self._part(part)
            self._multiply_part(panel, first_channel, channels)

    def _stores_once(self) -> bool:
        return self.problem.computed % self.lanes == 0

    def _start(self, first, vector):
        start = first + vector * self.lanes
        if self.problem.computed % self.lanes == 0:
            return start
        return tirx.min(start, self.problem.computed - self.lanes)

    def _fill(self, panel) -> None:
        p = self.problem
        if not p.planes_in:
            end = (self.image + 1) * p.image_pixels
            self.panel.pack(panel, lambda g: self._pixel(self.first, g), self.span, self.row, end)
            return
        if p.between_alike:
            self._copy(panel)
        else:
            self._fill_from_lines(panel)

    def _fill_from_lines(self, panel) -> None:
        """Copy the lines that a panel's pixels lie in, a stride of pixels apart."""
        p = self.problem
        pieces, _ = columns_of(p, p.out_width, 0, self.lanes)
        end = tirx.min(self.first + self.span * self.lanes, p.image_pixels)
        top = T.Bind(self.first // p.out_width)
        lines = T.Bind((end - 1) // p.out_width + 1 - top)
        with T.serial(0, p.channels) as c:
            begin = T.Bind(c * self.row + self.lead)
            with T.serial(0, lines) as line:
                h = T.Bind((top + line) * p.strides[0])
                row = T.Bind((self.image * p.channels + c) * p.plane_in + h * p.width)
                start = T.Bind(begin + (top + line) * p.out_width - self.first)
                self.panel.fetch_line(row + p.plane_in)
                for column, x, lanes in pieces:
                    value = self.panel.every(row, x, lanes)
                    T.buffer_store(panel, value, [ramp(start + column, lanes)])
            if p.plane_out > p.image_pixels:
                self._repeat_last(panel, begin, end)
            elif self.span * self.lanes > p.image_pixels:  # the last vector ends with the image
                value = panel[ramp(begin + p.image_pixels - self.lanes, self.lanes)]
                at = begin + (self.span - 1) * self.lanes
                T.buffer_store(panel, value, [ramp(at, self.lanes)])

    def _copy(self, panel) -> None:
        """Copy a part of each plane."""
        p, lanes = self.problem, self.lanes
        with T.serial(0, p.channels) as c:
            plane = T.Bind((self.image * p.channels + c) * p.plane_in)

            def copy(vector, start) -> None:
                pixels = self.x[T.ramp(plane + start, 1, lanes)]
                T.buffer_store(panel, pixels, [T.ramp(c * self.row + vector * lanes, 1, lanes)])

            if self.span > 1:
                with T.serial(0, self.span - 1) as g:
                    copy(g, self.first + g * lanes)
            copy(self.span - 1, T.Bind(self._start(self.first, self.span - 1)))

    def _repeat_last(self, panel, begin, end) -> None:
        """Fill a row of the panel, whose pixels end before `end`, behind the last pixel of the image."""
        with T.If(end == self.problem.image_pixels), T.Then():
            behind = T.Bind(begin + end - self.first)
            last = T.broadcast(panel[behind - 1], self.lanes)
            T.buffer_store(panel, last, [T.ramp(behind, 1, self.lanes)])

    def _multiply_part(self, panel, first_channel, channels) -> None:
        p, rows = self.problem, self.point.rows
        with T.serial(0, (channels + p.block - 1) // p.block) as b:
            spans, first = self._block(first_channel, b)
            with T.serial(0, p.block // rows) as half:
                channel = T.Bind(first + half * rows)

                def multiply(tile, vectors: int, half=half, channel=channel, spans=spans) -> None:
                    self.tile = tile
                    start = T.Bind(self.first + tile)
                    self._fetch_planes(channel, start, vectors)
                    whole = vectors - (self.behind > 0)
                    self._begin(start, whole)
                    acc = self._multiply_rows(
                        panel, None, 0, spans, 0, half * rows, whole, channel, self.behind
                    )
                    self._store_planes(acc, start, channel, vectors)

                if self.behind:
                    multiply(T.int32(0), self.span)
                else:
                    self._each_tile(self.tiles, multiply)

    def _multiply_tile(self, panel, share, tile, vectors: int) -> None:
        """The share-th part of the output channels for one tile."""
        p, rows = self.problem, self.point.rows
        self.tile = tile
        start = T.Bind(self.first + tile)
        self._begin(start, vectors)
        width = vectors * self.lanes
        with T.serial(*self._share_of_parts(share)) as part:
            first_channel, channels = self._part(part)
            sums = scratch(self.parts[-1][1] * width, self.elements.dtype)
            with T.serial(0, (channels + p.block - 1) // p.block) as b:
                spans, first = self._block(first_channel, b)
                with T.serial(0, p.block // rows) as half:
                    channel = T.Bind(first + half * rows)
                    acc = self._multiply_rows(
                        panel, None, 0, spans, 0, half * rows, vectors, channel
                    )
                    base = T.Bind((channel - first_channel) * width)
                    self._keep(acc, sums, base, vectors, channel)
            self._store_kept_planes(sums, start, first_channel, channels, vectors)

    def _block(self, first_channel, number) -> tuple:
        """(spans of non-zeros, of each input; first output channel) of the block at a position of a part."""
        p = self.problem
        at = T.Bind(first_channel // p.block + number)
        behind = [i * p.blocks for i in range(len(p.inputs))]
        spans = [(T.Bind(self.pointer[at + b]), T.Bind(self.pointer[at + b + 1])) for b in behind]
        block = T.Bind(self.order[at].astype("int32"))
        return spans, T.Bind(first_channel + block * p.block)

    def _add_products(self, acc: list, across: list, panel, spans, *where) -> None:
        """Those of the non-zeros of one input after the other."""
        for self.input, span in enumerate(spans):
            read = self.inputs[1] if self.input else panel
            super()._add_products(acc, across, read, span, *where)

    def _fetch_ahead(self, panel, n, width: int) -> None:
        p = self.problem
        # One output channel alone is bound by its loads, and the first non-zeros of a tile would come too late.
        if self.in_place and self.point.rows > 1 and p.stored >= _LONG_SUM * p.blocks:
            self._fetch_row(panel, n + _AHEAD, width, width // self.lanes)

    def _panel_start(self, position, width: int):
        if self.in_place:
            return super()._panel_start(position, width)
        return position * self.row + (self.lead + self.tile)
