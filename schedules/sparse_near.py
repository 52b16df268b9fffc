# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse convolution of single output channels, from planes to planes: a few input channels at a time lie near.

As `sparse_groups`, but every output channel is a sum over all input channels. A panel holds a band of as many planes as the
nearest cache takes; every output channel walks its non-zeros in it, and its sums of the band are kept, in the second-level
cache, from one panel to the next. One channel alone uses each line that it loads once, so that what counts is where it lies.
An element of the output may hold several channels, whose sums are stored together.
Indices are places in a panel, counted from its first channel.
"""

from __future__ import annotations

import itertools
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

# Shares of the first-level cache that what a tile reads of a panel may take, and of the second that the sums of a band may.
_READ_SHARES, _SUMS_SHARE = (0.5, 0.8, 1.1), 0.6
# Vectors of a tile that are tried: more share an index, and read more of a panel.
_VECTORS = (6, 8, 10, 12, 14, 16)
# Beside its multiplications of vectors, in their number: what a non-zero of a tile costs, a vector that is copied into a panel,
# and a vector of sums, in each panel, where the sums take the whole second-level cache (fitted on Cascade Lake: within 4 % of
# the best of 20 parameters each for 8 layers of 7x7 to 112x112 pixels).
_INDEX_COST, _COPY_COST, _SUM_COST = 1.1, 22.0, 4.5
# What multiplications cost more for each first-level cache that a tile reads of a panel, and that a panel takes, beyond a share.
_READ_COST, _READ_FREE, _PANEL_COST, _PANEL_FREE = 0.25, 0.7, 0.11, 1.6


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

    def points():
        for count in range(1, problem.out_height + 1):
            lines = -(-problem.out_height // count)
            flat = _flat(problem, lines)
            if lines > 1 and 4 * problem.outputs * flat > _SUMS_SHARE * target.l2_bytes:
                continue
            for most, share in itertools.product(_VECTORS, _READ_SHARES):
                _, vectors, _ = tiles_of(flat, target.lanes, min(most, target.registers // 2))
                read = _read_bytes(problem, lines, vectors, target.lanes)
                room = max(1, int(target.l1_bytes * share) // read)
                panels = -(-problem.channels // room)
                channels = -(-problem.channels // panels)
                yield Point(vectors, 1, lines, channels, problem.outputs)

    point = min(points(), key=lambda p: work(problem, p, target))
    tasks, splits = problem.batch * bands(problem, point.lines), 1
    if tasks < 2 * target.threads and target.threads > 1:
        splits = min(target.threads, problem.outputs // problem.together)
    planes = problem.outputs // problem.together // splits
    return replace(point, part=planes * problem.together, splits=splits)


def _flat(problem: Problem, lines: int) -> int:
    """Pixels of a band, those between its lines counted."""
    return (lines - 1) * window_of(problem, lines).line + problem.out_width


def _read_bytes(problem: Problem, lines: int, vectors: int, lanes: int) -> int:
    """Bytes of one channel of a panel that a tile of a band reads: its pixels in every phase, and the lines below them."""
    window = window_of(problem, lines)
    below = (problem.kernel[0] - 1) // problem.strides[0] * window.line
    phases = window.phases[0] * window.phases[1]
    return 4 * min(window.channel, phases * (vectors * lanes + below))


def work(problem: Problem, point: Point, target: CpuTarget) -> float:
    """What a kernel takes, in multiplications of a vector."""
    flat = _flat(problem, point.lines)
    tiles, _, _ = tiles_of(flat, target.lanes, point.vectors)
    total = math.ceil(flat / target.lanes)
    panels = -(-problem.channels // point.channels)
    read = point.channels * _read_bytes(problem, point.lines, point.vectors, target.lanes)
    panel = 4 * panel_elements(problem, point)
    far = _READ_COST * max(0.0, read / target.l1_bytes - _READ_FREE)
    far += _PANEL_COST * max(0.0, panel / target.l1_bytes - _PANEL_FREE)
    multiply = problem.stored * (total * (1 + far) + tiles * _INDEX_COST / problem.run)
    sums = problem.outputs * flat * 4 / target.l2_bytes
    kept = problem.outputs * panels * total * _SUM_COST * sums
    copied = problem.channels * window_of(problem, point.lines).channel / target.lanes
    return bands(problem, point.lines) * (multiply + kept + copied * _COPY_COST)


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
