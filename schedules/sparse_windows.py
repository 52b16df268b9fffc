# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse convolution over padded planes: every tap of a kernel reads the same panel, shifted.

As `sparse_planes`, but a tile is a band of output lines and its panel holds the band's input once, channels first and zero
padded: `panel[c][phase][line][column]`, a stride of two or more split into its phases. A non-zero is then one offset into
the panel, and its loads are unaligned. Beyond 1x1 this saves writing (and keeping in cache) one panel row per tap.
Sums are kept for every column of a padded line; those beyond the output's width are dropped at the store.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated
from schedules.emission import covering, ramp
from schedules.fused import Fused
from schedules.sparse_panel import columns_of, scratch, small
from schedules.sparse_planes import Planes, emitted
from schedules.sparse_planes import Point as PlanesPoint
from schedules.sparse_planes import default_point as planes_point
from schedules.sparse_problem import Problem, parts_of, tiles_of
from schedules.target import CpuTarget


@dataclass(frozen=True)
class Point(Annotated):
    """Frozen parameters of one kernel: as `sparse_planes.Point` without chunks, and the output `lines` of a tile."""

    vectors: int
    rows: int
    part: int
    splits: int
    lines: int


# Non-zeros between fetching a panel row into the first-level cache and using it.
_AHEAD = 3
# Vectors that begin in the last columns of a panel end within this many elements of it.
SLACK = 16
# Shares of the second-level cache that the panel of a whole image may take, and that of a band: where there are several, what
# is read and written does not fit it either (measured on Cascade Lake).
_WHOLE_SHARE, _BAND_SHARE = 0.6, 0.35
# Of a stride, each with code of its own to fill its part of a panel.
_MOST_PHASES = 16


@dataclass(frozen=True)
class Window:
    """Layout of a panel: `line` columns, `lines` of them, `phases` of the stride, `plane` elements each with `slack`."""

    line: int
    lines: int
    phases: tuple[int, int]
    slack: int

    @property
    def plane(self) -> int:
        return self.line * self.lines + self.slack

    @property
    def channel(self) -> int:
        return self.phases[0] * self.phases[1] * self.plane


def window_of(problem: Problem, lines: int) -> Window:
    """The panel's layout for tiles of `lines` output lines."""
    phases = tuple(
        max((t * d) % s for t in range(k)) + 1
        for k, d, s in zip(problem.kernel, problem.dilation, problem.strides)
    )
    halo = [
        max(t * d // s for t in range(k))
        for k, d, s in zip(problem.kernel, problem.dilation, problem.strides)
    ]
    # Planes are copied in vectors that end with a line; what is packed goes beyond.
    slack = 0 if problem.planes_in else SLACK
    return Window(problem.out_width + halo[1], lines + halo[0], phases, slack)


def offsets(problem: Problem, lines: int) -> np.ndarray:
    """int64 [C, R, S]: where in the panel the first pixel of a tile finds each channel's tap."""
    window = window_of(problem, lines)
    (sh, sw), (dh, dw) = problem.strides, problem.dilation
    c = np.arange(problem.channels)[:, None, None] * window.channel
    r = np.arange(problem.kernel[0])[None, :, None] * dh
    s = np.arange(problem.kernel[1])[None, None, :] * dw
    return c + (r % sh * window.phases[1] + s % sw) * window.plane + r // sh * window.line + s // sw


def steps(problem: Problem, lines: int) -> tuple[int, ...]:
    """How far behind the first one of a run in the panel each of its taps is."""
    of_channel = offsets(problem, lines)[0].ravel()[: problem.run]
    return tuple(int(place - of_channel[0]) for place in of_channel)


def lines_of(point) -> int:
    """The output lines of a tile of any sparse kernel's point, where indices are places in padded planes; 0 where they are
    panel rows."""
    return getattr(point, "lines", 0)


def bands(problem: Problem, lines: int) -> int:
    """Tiles of one image."""
    return -(-problem.out_height // lines)


def suits(problem: Problem) -> bool:
    """Whether this is the kernel to use: more than one tap and blocks of output channels.

    Their multiplications hide the unaligned loads, while one channel alone is bound by its loads and does better with
    aligned panel rows, unless the image has so few channels that packing a row for each tap would take longer. Windows that
    lie far apart share few pixels, or none, and each phase of a stride is code of its own.
    """
    few_phases = math.prod(problem.strides) <= _MOST_PHASES
    blocks = problem.taps > 1 and few_phases and (problem.block > 1 or problem.channels < 4)
    # Planes are copied into padded planes, whatever the kernel and stride, and written line by line.
    between_planes = problem.planes_out and problem.taps > 1
    return blocks or between_planes or (problem.planes_in and not problem.pointwise)


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """Tiles as in `sparse_planes`, of the whole image, or of as many lines as leave room for the rest in the second-level cache."""
    base = planes_point(problem, target)

    def fits(lines: int, share: float) -> bool:
        panel = 4 * problem.channels * window_of(problem, lines).channel
        return panel <= target.l2_bytes * share

    lines = problem.out_height
    if not fits(lines, _WHOLE_SHARE):
        heights = (-(-lines // count) for count in range(2, lines + 1))
        lines = next((n for n in heights if fits(n, _BAND_SHARE)), 1)
    tiles, splits = problem.batch * bands(problem, lines), 1
    if target.threads > 1 and tiles < 2 * target.threads:
        splits = min(target.threads, len(parts_of(problem.outputs, base.part)))
    part = max(target.lanes, problem.block, 64)
    if problem.planes_out and problem.together == 1:
        flat = lines * window_of(problem, lines).line
        while part > problem.block and part * flat * 4 > target.l2_bytes // 10:
            part //= 2
        part = max(part, problem.block)
    return Point(base.vectors, base.rows, part, splits, lines)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused function whose anchor is annotated `sparse_windows`."""
    return emitted(fused, target, Point, WindowsKernel)


class WindowsKernel(Planes):
    """Emits one kernel: the planes kernel with another panel and other tiles."""

    def __init__(self, kernel, problem: Problem, point: Point, target: CpuTarget, elements):
        whole = PlanesPoint(point.vectors, point.rows, problem.panel_rows, point.part, point.splits)
        super().__init__(kernel, problem, whole, target, elements)
        self.lines = point.lines
        self.window = window_of(problem, point.lines)
        self.steps = steps(problem, point.lines)
        self.staging = self._stages()

    def emit(self) -> None:
        p, splits, lanes, window = self.problem, self.point.splits, self.lanes, self.window
        count = bands(p, self.lines)
        loop = T.parallel if self.threads > 1 and p.batch * count * splits > 1 else T.serial
        flat = (self.lines - 1) * window.line + p.out_width
        division = tiles, most, _ = tiles_of(flat, lanes, self.point.vectors)
        self.band = -(-flat // lanes) * lanes
        with loop(0, p.batch * count * splits) as task:
            share = task % splits
            self.image = T.Bind(task // splits // count)
            self.first_line = T.Bind(task // splits % count * self.lines)
            panel = scratch(p.channels * window.channel + SLACK, self.elements.dtype)
            size = self._sums_size(most)
            if p.planes_out and not self.staging:
                size = size // (most * lanes) * self.band
            sums = scratch(size, self.elements.dtype)
            if self.staging:
                planes = -(-self.parts[-1][1] // p.block) * p.block // p.together
                self.staged = scratch(planes * self.band, self.elements.dtype)
            if p.planes_in:
                self._copy_band(panel)
            else:
                self._pack_band(panel)
            if p.planes_out:
                self._compute_band(panel, sums, division, share)
            else:
                with T.serial(0, tiles) as tile:
                    first, vectors = self._tile(tile, division)
                    self.first = first
                    self._compute(panel, sums, first, vectors, most, share)

    def _stores_once(self) -> bool:
        return super()._stores_once() if self.problem.planes_out else self._stores_channels_once()

    def _compute_band(self, panel, sums, division: tuple[int, int, int], share) -> None:
        """The share-th part of the output channels of a whole band, stored line by line into their planes."""
        with T.serial(*self._share_of_parts(share)) as part:
            first_channel, channels = self._part(part)

            def multiply(
                first, vectors: int, first_channel=first_channel, channels=channels
            ) -> None:
                self.first = first
                self._multiply(panel, sums, first, first_channel, channels, vectors)
                if self.staging and self.point.rows < self.problem.together:
                    self._stage_kept(sums, first_channel, channels, vectors)

            self._each_tile(division, multiply)
            if self.staging:
                self._store_staged(first_channel, channels)
            else:
                self._store_lines(sums, first_channel, channels)

    def _store_lines(self, sums, first_channel, channels) -> None:
        """Store a part's sums of a band through the epilogue, without what lies beyond the lines of the output."""
        p, window, together = self.problem, self.window, self.problem.together
        with T.serial(0, channels // together) as plane:
            begin = T.Bind(plane * (together * self.band))
            o = T.Bind(first_channel + plane * together)
            with T.serial(0, self.lines) as line, self._line_inside(line) as row:
                start = T.Bind(begin + line * window.line)
                pixel = T.Bind(row * p.out_width)
                for column, lanes in covering(p.out_width, self.lanes):
                    values = [
                        sums[ramp(start + (i * self.band + column), lanes)] for i in range(together)
                    ]
                    self._store_plane(values, o, T.Bind(pixel + column), lanes)
            self._store_behind(sums, begin, o)

    @contextmanager
    def _line_inside(self, line):
        """The line of the image that a band's is, if there is one."""
        row = T.Bind(self.first_line + line)
        with T.If(row < self.problem.out_height), T.Then():
            yield row

    def _keep(self, acc: list, sums, base, vectors: int, channel) -> None:
        together, lanes = self.problem.together, self.lanes
        if not self.staging or self.point.rows < together:
            super()._keep(acc, sums, base, vectors, channel)
            return
        for r in range(0, len(acc), together):
            for j in range(vectors):
                values = [row[ramp(j * lanes, lanes)] for row in acc[r : r + together]]
                self._stage(
                    values, base // together + r // together, channel + r, self.first + j * lanes
                )

    def _stage_kept(self, sums, first_channel, channels, vectors: int) -> None:
        """Complete the elements of a part's sums of a tile, kept `[channel][pixel]`."""

        def stage(values: list, plane, channel, j: int) -> None:
            self._stage(values, plane, channel, self.first + j * self.lanes)

        self._each_kept(sums, first_channel, channels, vectors, stage)

    def _place(self, row, first, width):
        if self.staging:  # elements need no place for sums, only their row
            return row if self.point.rows >= self.problem.together else row * width
        return row * self.band + first if self.problem.planes_out else row * width

    def _stride(self, width: int):
        return self.band if self.problem.planes_out and not self.staging else width

    def _fetch_ahead(self, panel, n, width: int) -> None:
        # Unaligned vectors of a panel in the second-level cache: out-of-order execution alone does not hide the wait.
        if self.point.rows == 1:
            return
        self._fetch_row(panel, n + _AHEAD, width, width // self.lanes + 1)

    def _pixel(self, first, vector):
        return first + vector * self.lanes

    def _copy_band(self, panel) -> None:
        """Copy a band of planes into the panel, with zeros around; all phases of a line at once, as they lie in it."""
        p, window = self.problem, self.window
        sh, top = p.strides[0], p.padding[0]
        asides = [columns_of(p, window.line, a, self.lanes) for a in range(window.phases[1])]
        with T.serial(0, p.channels) as c, T.serial(0, window.lines) as line:
            for up in range(window.phases[0]):
                h = T.Bind((self.first_line + line) * sh + (up - top))
                start = T.Bind(
                    c * window.channel + up * (window.phases[1] * window.plane) + line * window.line
                )
                with T.If(tirx.all(h >= 0, h < p.height)):
                    with T.Then():
                        plane = (self.image * p.channels + c) * p.plane_in
                        row = T.Bind(plane + h * p.width)
                        self.panel.fetch_line(row + p.plane_in)
                        for aside, columns in enumerate(asides):
                            self._copy_line(
                                panel, T.Bind(start + aside * window.plane), row, columns
                            )
                    with T.Else():
                        for aside in range(window.phases[1]):
                            self._clear_line(panel, T.Bind(start + aside * window.plane))

    def _copy_line(self, panel, start, row, columns: tuple[list, list]) -> None:
        """Copy a line of planes, which begins at `row`, into one of the panel, zeros where it lies on padding."""
        pieces, outside = columns
        for column, x, lanes in pieces:
            value = self.panel.every(row, x, lanes)
            T.buffer_store(panel, value, [ramp(start + column, lanes)])
        for column in outside:
            T.buffer_store(panel, self.panel.outside, [start + column])

    def _clear_line(self, panel, start) -> None:
        """Fill a line of the panel as outside the image."""
        for column, lanes in covering(self.window.line, self.lanes):
            outside = self.panel.outside
            value = T.broadcast(outside, lanes) if lanes > 1 else outside
            T.buffer_store(panel, value, [ramp(start + column, lanes)])

    def _pack_band(self, panel) -> None:
        """Transpose a band of x into the panel, line by line: what a line's last vector writes beyond it comes later."""
        p, lanes, window = self.problem, self.lanes, self.window
        (sh, sw), (top, left, _, _) = p.strides, p.padding
        every = T.ramp(0, 1, lanes)
        for phase in range(window.phases[0] * window.phases[1]):
            up, aside = divmod(phase, window.phases[1])
            with T.serial(0, window.lines) as line, T.serial(0, -(-window.line // lanes)) as g:
                offset = small((lanes,), "int32")
                inside = small((lanes,), "int32")
                h = T.Bind((self.first_line + line) * sh + (up - top))
                w = T.Bind(T.ramp(g * lanes, 1, lanes) * sw + (aside - left))
                line_inside = T.Bind(
                    tirx.Select(tirx.all(h >= 0, h < p.height), T.int32(1), T.int32(0))
                )
                within = tirx.Select(
                    tirx.all(w >= 0, w < p.width),
                    T.broadcast(line_inside, lanes),
                    T.broadcast(T.int32(0), lanes),
                )
                T.buffer_store(inside, within, [every])
                h = T.Bind(tirx.max(tirx.min(h, p.height - 1), 0))
                w = T.Bind(tirx.max(tirx.min(w, p.width - 1), 0))
                T.buffer_store(
                    offset,
                    w * p.channels + (self.image * p.height + h) * (p.width * p.channels),
                    [every],
                )
                start = T.Bind(phase * window.plane + line * window.line + g * lanes)
                self.panel.pack_vector(panel, start, window.channel, offset, inside)

    def _panel_start(self, position, width: int):
        return self.first + position

    def _flat_pixel(self, pixel):
        p, line = self.problem, self.window.line
        row = self.image * p.out_height + self.first_line + pixel // line
        return row * p.out_width + tirx.min(pixel % line, p.out_width - 1)

    @contextmanager
    def _stored(self, pixel):
        p, line = self.problem, self.window.line
        column = T.Bind(pixel % line)
        row = T.Bind(pixel // line)
        at = T.Bind(self.first_line + row)
        condition = tirx.all(column < p.out_width, row < self.lines, at < p.out_height)
        with T.If(condition), T.Then():
            yield [self.image, at, column]
