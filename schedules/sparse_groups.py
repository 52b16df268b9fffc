# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse convolution in groups, from planes to planes: one group's planes at a time are padded and multiplied.

As `sparse_windows`, but a panel holds a band of the planes of one group only, which stay in the nearest cache, and every
group finds the borders that the first one's zeros left. Its blocks of output channels walk their non-zeros for one tile of
the band after the other; then the sums of each line go through the epilogue into the planes.
Indices are places in a panel, counted from the group's first channel. An image's few channels are a group of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated
from schedules.emission import covering, ramp
from schedules.fused import Fused
from schedules.sparse_bands import Bands
from schedules.sparse_panel import columns_of, scratch
from schedules.sparse_planes import Planes, emitted
from schedules.sparse_planes import Point as PlanesPoint
from schedules.sparse_planes import default_point as planes_point
from schedules.sparse_problem import Problem, tiles_of
from schedules.sparse_windows import SLACK, bands, offsets, steps, window_of
from schedules.target import CpuTarget

# Channels of an image, which is taken for one group: red, green and blue.
_FEW_CHANNELS = 4
# Share of the second-level cache that a group's planes may take.
_PANEL_SHARE = 0.2
# Pixel vectors of a tile of one output channel: loads come from the nearest cache, so what counts is how many loops start.
VECTORS_OF_ELEMENTS = 12


@dataclass(frozen=True)
class Point(Annotated):
    """Frozen parameters of one kernel.

    vectors  pixel vectors of a tile: accumulators per output channel (some tiles have one less)
    rows     output channels computed at once, a divisor of the block
    lines    output lines of a band
    splits   tasks that share one band, each with its own groups
    """

    vectors: int
    rows: int
    lines: int
    splits: int = 1


def suits(problem: Problem) -> bool:
    """Whether this is the kernel to use."""
    in_planes = problem.planes_in and problem.planes_out and problem.together == 1
    return in_planes and problem.taps > 1 and few_channels(problem.groups, problem.channels)


def few_channels(groups: int, channels: int) -> bool:
    """Whether sums are over so few channels that their planes stay near: those of a group, or of an image."""
    return groups > 1 or channels < _FEW_CHANNELS


def group_offsets(problem: Problem, lines: int) -> np.ndarray:
    """int64 [C/groups, R, S]: where in the panel the first pixel of a tile finds each tap of a group's channels."""
    return offsets(problem, lines)[: problem.channels // problem.groups]


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """The longest bands whose panel stays near."""
    base = planes_point(problem, target)
    vectors = base.vectors if base.rows > 1 else min(VECTORS_OF_ELEMENTS, target.registers // 2)
    room = int(target.l2_bytes * _PANEL_SHARE) // 4

    def fits(count: int) -> bool:
        lines = -(-problem.out_height // count)
        window = window_of(problem, lines)
        return problem.channels // problem.groups * window.channel <= room

    heights = range(1, problem.out_height + 1)
    count = next((n for n in heights if fits(n)), problem.out_height)
    lines = -(-problem.out_height // count)
    tasks, splits = problem.batch * bands(problem, lines), 1
    if tasks < 2 * target.threads and target.threads > 1:
        splits = min(target.threads, problem.groups)
    return Point(vectors, base.rows, lines, splits)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused function whose anchor is annotated `sparse_groups`."""
    return emitted(fused, target, Point, GroupsKernel)


class GroupsKernel(Bands, Planes):
    """Emits one kernel: a part of the output channels is a group."""

    def __init__(self, kernel, problem: Problem, point: Point, target: CpuTarget, elements):
        per_group = problem.outputs // problem.groups
        whole = PlanesPoint(point.vectors, point.rows, problem.panel_rows, per_group, point.splits)
        super().__init__(kernel, problem, whole, target, elements)
        self.lines, self.window = point.lines, window_of(problem, point.lines)
        self.steps = steps(problem, point.lines)
        self.group_inputs = problem.channels // problem.groups

    def emit(self) -> None:
        p, splits, lanes = self.problem, self.point.splits, self.lanes
        count = bands(p, self.lines)
        flat = (self.lines - 1) * self.window.line + p.out_width
        tiles = tiles_of(flat, lanes, self.point.vectors)
        self.band = -(-flat // lanes) * lanes
        loop = T.parallel if self.threads > 1 and p.batch * count * splits > 1 else T.serial
        with loop(0, p.batch * count * splits) as task:
            share = task % splits
            self.image = T.Bind(task // splits // count)
            self.first_line = T.Bind(task // splits % count * self.lines) if count > 1 else 0
            panel = scratch(-(-self._panel_size() // lanes) * lanes, self.elements.dtype)
            outside = T.broadcast(self.panel.outside, lanes)
            self._fill_all(panel, 0, -(-self._panel_size() // lanes), outside)
            self._compute_band(panel, tiles, share)

    def _fill_all(self, buffer, first, vectors, value) -> None:
        """`value` in `vectors` vectors of a buffer, from number `first` on."""
        with T.serial(0, vectors) as i:
            at = T.ramp((first + i) * self.lanes, 1, self.lanes)
            T.buffer_store(buffer, value, [at])

    def _compute_band(self, panel, tiles: tuple[int, int, int], share) -> None:
        """The share-th part of the groups for a band of `tiles` (`tiles_of`)."""
        sums = scratch(self.point.rows * self.band, self.elements.dtype)
        with T.serial(*self._share_of_parts(share)) as group:
            self._copy_group(panel, group)
            self._multiply_band(panel, sums, group, tiles)

    def _panel_size(self) -> int:
        return self.group_inputs * self.window.channel + SLACK

    def _copy_group(self, panel, group) -> None:
        """Copy the lines of a group's planes that a band needs to within the panel's borders, in the order they lie in."""
        p, window, (stride, _) = self.problem, self.window, self.problem.strides
        asides = [columns_of(p, window.line, a, self.lanes)[0] for a in range(window.phases[1])]
        above = self.first_line * stride - p.padding[0]  # the row of the panel's first line
        needed = (window.lines - 1) * stride + window.phases[0]
        first = T.Bind(tirx.max(above, 0))
        count = T.Bind(tirx.max(tirx.min(above + needed, p.height) - first, 0))
        inputs = self.group_inputs
        if p.channels % inputs:
            inputs = T.Bind(tirx.min(p.channels - group * inputs, inputs))
        with T.serial(0, inputs) as c:
            plane = self.image * p.channels + group * self.group_inputs + c
            plane = T.Bind(plane * p.plane_in)
            with T.serial(0, count) as i:
                h = T.Bind(first + i)
                line, up = T.Bind((h - above) // stride), T.Bind((h - above) % stride)
                to = T.Bind(
                    c * window.channel + up * (window.phases[1] * window.plane) + line * window.line
                )
                row = T.Bind(plane + h * p.width)
                self.panel.fetch_line(row + p.plane_in)

                def copy(row=row, to=to) -> None:
                    for aside, pieces in enumerate(asides):
                        for column, x, lanes in pieces:
                            value = self.panel.every(row, x, lanes)
                            at = ramp(to + (aside * window.plane + column), lanes)
                            T.buffer_store(panel, value, [at])

                if window.phases[0] == stride:
                    copy()
                else:
                    with T.If(up < window.phases[0]), T.Then():
                        copy()

    def _fetch_stores(self, channel, first, vectors: int) -> None:
        lead = (self.first_line + first // self.window.line) * self.problem.out_width
        self._fetch_planes(channel, lead + first % self.window.line, vectors)

    def _store_band(self, sums, channel) -> None:
        with T.serial(0, self.point.rows) as r, self._output(channel, r) as (begin, o):
            self._store_lines(sums, begin, o)

    def _store_lines(self, sums, begin, channel) -> None:
        """Store the sums of the band of a plane's channels, from `begin` on, through the epilogue, without what lies beyond
        its lines."""
        p, window = self.problem, self.window
        count = p.out_height - self.first_line
        lines = T.Bind(tirx.min(count, self.lines)) if p.out_height % self.lines else self.lines
        with T.serial(0, lines) as line:
            start = T.Bind(begin + line * window.line)
            pixel = T.Bind((self.first_line + line) * p.out_width)
            for column, lanes in covering(p.out_width, self.lanes):
                values = [
                    sums[ramp(start + (i * self.band + column), lanes)] for i in range(p.together)
                ]
                self._store_plane(values, channel, T.Bind(pixel + column), lanes)
        self._store_behind(sums, begin, channel)
