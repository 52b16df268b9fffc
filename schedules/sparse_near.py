# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse convolution of single output channels, from planes to planes: a few input channels at a time lie near.

As `sparse_groups`, but every output channel is a sum over all input channels. A panel holds a band of as many planes as the
nearest cache takes; every output channel walks its non-zeros in it, and its sums of the band are kept, in the second-level
cache, from one panel to the next. One channel alone uses each line that it loads once, so that what counts is where it lies.
An element of the output may hold several channels, whose sums are stored together.
Indices are places in a panel, counted from its first channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated
from schedules.emission import ramp
from schedules.fused import Fused
from schedules.sparse_groups import GroupsKernel
from schedules.sparse_panel import scratch
from schedules.sparse_planes import emitted
from schedules.sparse_problem import Problem, parts_of, tiles_of
from schedules.sparse_windows import bands, window_of
from schedules.target import CpuTarget

# Share of the first-level cache that a panel may take, and of the second that the sums of a band may.
_PANEL_SHARE, _SUMS_SHARE = 0.8, 0.5
# Beside its multiplications of vectors, in their number: what a non-zero costs, and where a vector of sums or an output
# channel's walk of a panel begins (fitted on Cascade Lake).
_INDEX_COST, _SUM_COST, _WALK_COST = 0.9, 1.5, 17.0


@dataclass(frozen=True)
class Point(Annotated):
    """Frozen parameters of one kernel.

    vectors   pixel vectors of a tile: accumulators (some tiles have one less)
    rows      output channels computed at once, a divisor of the block
    lines     output lines of a band
    channels  input channels of a panel
    part      output channels of a task
    splits    tasks that share one band, each with its own output channels
    """

    vectors: int
    rows: int
    lines: int
    channels: int
    part: int
    splits: int = 1


def suits(problem: Problem) -> bool:
    """Whether this is the kernel to use: single output channels of more than one tap."""
    between = problem.planes_in and problem.planes_out
    return between and problem.block == 1 and problem.taps > 1 and problem.groups == 1


def panel_elements(problem: Problem, point: Point) -> int:
    """How far apart in the indices two panels begin."""
    return point.channels * window_of(problem, point.lines).channel


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """The bands and panels that should take the least time."""
    most = target.registers // 2

    def points():
        for count in range(1, problem.out_height + 1):
            lines = -(-problem.out_height // count)
            window = window_of(problem, lines)
            flat = (lines - 1) * window.line + problem.out_width
            _, vectors, _ = tiles_of(flat, target.lanes, most)
            sums = 4 * problem.outputs * (flat + target.lanes)
            room = int(target.l1_bytes * _PANEL_SHARE) // (4 * window.channel)
            if lines == 1 or (room and sums <= _SUMS_SHARE * target.l2_bytes):
                panels = -(-problem.channels // max(1, room))
                channels = -(-problem.channels // panels)
                yield Point(vectors, 1, lines, channels, problem.outputs)

    point = min(points(), key=lambda p: work(problem, p, target))
    tasks, splits = problem.batch * bands(problem, point.lines), 1
    if tasks < 2 * target.threads and target.threads > 1:
        splits = min(target.threads, problem.outputs // problem.together)
    planes = problem.outputs // problem.together // splits
    return replace(point, part=planes * problem.together, splits=splits)


def work(problem: Problem, point: Point, target: CpuTarget) -> float:
    """What a kernel takes, in multiplications of a vector."""
    flat = (point.lines - 1) * window_of(problem, point.lines).line + problem.out_width
    tiles, _, _ = tiles_of(flat, target.lanes, point.vectors)
    total = math.ceil(flat / target.lanes)
    panels = -(-problem.channels // point.channels)
    multiply = problem.stored * (total + tiles * _INDEX_COST)
    walks = problem.outputs * panels * (total * _SUM_COST + tiles * _WALK_COST)
    return bands(problem, point.lines) * (multiply + walks)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused function whose anchor is annotated `sparse_near`."""
    return emitted(fused, target, Point, _Near)


class _Near(GroupsKernel):
    """Emits one kernel: a panel holds some of the channels, as that of `sparse_groups` those of a group."""

    def __init__(self, kernel, problem: Problem, point: Point, target: CpuTarget, elements):
        super().__init__(kernel, problem, point, target, elements)
        self.group_inputs = point.channels
        self.chunks = -(-problem.channels // point.channels)
        self.staging = self._stages()
        self.point = replace(self.point, part=point.part)
        self.parts = parts_of(problem.outputs, point.part)

    def _bias(self):
        return None  # sums are kept from one panel to the next: the epilogue adds it

    def _compute_band(self, panel, tiles: tuple[int, int, int], share) -> None:
        """The share-th part of the output channels for a band: panel by panel, then stored."""
        sums = scratch(self.problem.outputs * self.band, self.elements.dtype)
        vectors = self.band // self.lanes
        parts = self._share_of_parts(share)
        with T.serial(*parts) as part:
            first_channel, channels = self._part(part)
            self._fill_all(sums, first_channel * vectors, channels * vectors, self._zeros())
        with T.serial(0, self.chunks) as chunk:
            self._copy_group(panel, chunk)

            def add(first, vectors: int, chunk=chunk) -> None:
                self.first = first
                with T.serial(*parts) as part:
                    self._add_panel(panel, sums, chunk, part, vectors)

            self._each_tile(tiles, add)
        together = self.problem.together
        if self.staging:
            self.staged = scratch(self.band, self.elements.dtype)
        with T.serial(*parts) as part:
            first_channel, channels = self._part(part)
            with T.serial(0, channels // together) as plane:
                channel = T.Bind(first_channel + plane * together)
                begin = T.Bind(channel * self.band)
                if self.staging:
                    self._store_plane_staged(sums, begin, channel)
                else:
                    self._store_lines(sums, begin, channel)

    def _store_plane_staged(self, sums, begin, channel) -> None:
        """Complete the elements of a plane's band from its channels' sums, from `begin` on, and store their lines."""
        together, lanes = self.problem.together, self.lanes
        with T.serial(0, self.band // lanes) as j:
            at = T.Bind(j * lanes)
            values = [sums[ramp(begin + i * self.band + at, lanes)] for i in range(together)]
            self._stage(values, 0, channel, at)
        self._store_staged(channel, together)

    def _add_panel(self, panel, sums, chunk, part, vectors: int) -> None:
        """Add what a panel holds to a tile's sums of a part's output channels."""
        first_channel, channels = self._part(part)
        with T.serial(0, channels) as b:
            at = T.Bind(chunk * self.problem.blocks + first_channel + b)
            span = T.Bind(self.pointer[at]), T.Bind(self.pointer[at + 1])
            channel = T.Bind(first_channel + self.order[at].astype("int32"))
            base = T.Bind(channel * self.band + self.first)
            acc = self._multiply_rows(panel, sums, base, span, 0, 0, vectors, channel)
            self._keep(acc, sums, base, vectors, channel)
