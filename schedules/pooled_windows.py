# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse convolution and the maximum over windows of its result, which is nowhere written whole.

As `sparse_windows`, but a tile is a band of pooled lines. Of few output channels at a time the convolution's lines of the
band are made, which stay in the nearest cache; what each pooled line sees of them is reduced first down, then along the
line, and goes through the epilogue into planes, or, with the other channels of its part, to channels last or into planes
of quads.

Pixels of the padding take no part in a maximum: instead a window sees one of its own pixels twice. Every window must
hold one (`pooling.reaches_image`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules import sparse_windows, windows
from schedules.annotated import Annotated
from schedules.emission import covering, ramp, widest_lanes
from schedules.fused import Fused
from schedules.pooling import larger
from schedules.sparse_bands import Bands
from schedules.sparse_elements import elements_of
from schedules.sparse_groups import VECTORS_OF_ELEMENTS
from schedules.sparse_panel import scratch
from schedules.sparse_planes import default_point as planes_point
from schedules.sparse_problem import Problem, parts_of, tiles_of
from schedules.sparse_windows import WindowsKernel, window_of
from schedules.target import CpuTarget

# Shares of the second-level cache that a band's panel, and the sums of a few channels, may take; of the first-level cache, a
# panel of quads, which are a quarter as many (measured on Cascade Lake).
_PANEL_SHARE, _SUMS_SHARE, _QUADS_SHARE = 0.4, 1 / 32, 0.8


@dataclass(frozen=True)
class Point(Annotated):
    """Frozen parameters of one kernel.

    vectors  pixel vectors of a tile: accumulators per output channel (some tiles have one less)
    rows     output channels computed at once, a divisor of the block
    part     output channels whose pooled lines are kept before they are stored, but in planes of one channel each
    splits   tasks that share one band, each with its own parts; each packs the panel again
    lines    lines of the convolution in a band
    """

    vectors: int
    rows: int
    part: int
    splits: int
    lines: int


def band_lines(pool: windows.Problem, pooled: int) -> int:
    """Lines of the convolution that so many pooled lines see."""
    return (pooled - 1) * pool.stride[0] + (pool.r - 1) * pool.dilation[0] + 1


def pooled_lines(pool: windows.Problem, lines: int) -> int:
    """The inverse of `band_lines`."""
    return (lines - band_lines(pool, 1)) // pool.stride[0] + 1


def default_point(problem: Problem, pool: windows.Problem, target: CpuTarget) -> Point:
    """The longest bands whose panel and sums stay near, as long as the others if that leaves half of them."""
    base = planes_point(problem, target)
    vectors = base.vectors if base.rows > 1 else min(VECTORS_OF_ELEMENTS, target.registers // 2)
    room = int(_PANEL_SHARE * target.l2_bytes)
    if problem.together > 1:
        room = int(_QUADS_SHARE * target.l1_bytes)

    def fits(pooled: int) -> bool:
        window = window_of(problem, band_lines(pool, pooled))
        panel = 4 * problem.channels * window.channel
        sums = 4 * base.rows * window.line * band_lines(pool, pooled)
        return panel <= room and sums <= _SUMS_SHARE * target.l2_bytes

    heights = [-(-pool.oh // count) for count in range(1, pool.oh + 1)]
    longest = next((n for n in heights if fits(n)), 1)
    equal = next((n for n in heights if n <= longest and pool.oh % n == 0), 1)
    pooled = equal if 2 * equal >= longest else longest
    part, splits = max(target.lanes, problem.block, 64), 1
    tasks = problem.batch * -(-pool.oh // pooled)
    if target.threads > 1 and tasks < 2 * target.threads:
        splits = min(target.threads, len(parts_of(problem.outputs, part)))
    return Point(vectors, base.rows, part, splits, band_lines(pool, pooled))


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused function whose anchor is annotated `pooled_windows`."""
    problem = Problem.from_dict(fused.point["problem"])
    pool = windows.Problem.from_dict(fused.point["pool"])
    point = Point.from_dict(fused.point["point"])
    with fused.emit() as kernel:
        elements = elements_of(fused.point, target)
        _Pooled(kernel, problem, pool, point, target, elements).emit()
    return kernel.func


class _Pooled(Bands, WindowsKernel):
    """Emits one kernel. `first_line` is the convolution's first line of a band, `first_pooled` the first that is pooled."""

    def __init__(
        self, kernel, problem: Problem, pool: windows.Problem, point: Point, target: CpuTarget, elements
    ):  # fmt: skip
        self.pool = pool
        self.pooled = pooled_lines(pool, point.lines)
        super().__init__(kernel, problem, point, target, elements)
        self.by_quads = self.staging = False
        self.width = -(-self.pooled * pool.ow // self.lanes) * self.lanes

    def _stores_once(self) -> bool:
        if not self.problem.planes_out:
            return self._stores_channels_once()
        pool, together = self.pool, self.problem.together > 1
        run = math.gcd(pool.oh, self.pooled) * pool.ow if together else pool.ow
        return run % widest_lanes(pool.ow, self.lanes) == 0

    def emit(self) -> None:
        p, splits, lanes = self.problem, self.point.splits, self.lanes
        count = -(-self.pool.oh // self.pooled)
        tiles = tiles_of(
            (self.lines - 1) * self.window.line + p.out_width, lanes, self.point.vectors
        )
        self.band = -(-((self.lines - 1) * self.window.line + p.out_width) // lanes) * lanes
        loop = T.parallel if self.threads > 1 and p.batch * count * splits > 1 else T.serial
        with loop(0, p.batch * count * splits) as task:
            self.image = T.Bind(task // splits // count)
            self.first_pooled = T.Bind(task // splits % count * self.pooled)
            self.first_line = T.Bind(self.first_pooled * self.pool.stride[0] - self.pool.padding[0])
            dtype = self.elements.dtype
            panel = scratch(p.channels * self.window.channel + sparse_windows.SLACK, dtype)
            sums = scratch(self.point.rows * self.band, dtype)
            at_once = p.planes_out and p.together == 1
            self.kept = None if at_once else scratch(self.parts[-1][1] * self.width, dtype)
            if p.planes_in:
                self._copy_band(panel)
            else:
                self._pack_band(panel)
            with T.serial(*self._share_of_parts(task % splits)) as part:
                first_channel, channels = self._part(part)
                self.first_channel = first_channel
                self._multiply_band(panel, sums, part, tiles)
                if self.kept is not None:
                    self._store_kept(first_channel, channels)

    def _pooled_lines(self):
        """Pooled lines of a band: the last one may have fewer."""
        if self.pool.oh % self.pooled == 0:
            return self.pooled
        return T.Bind(tirx.min(self.pool.oh - self.first_pooled, self.pooled))

    def _store_band(self, sums, channel) -> None:
        lines = self._pooled_lines()
        # One loop, not one in another: LLVM takes the deeper one for the hotter, and its constants registers from sums.
        with T.serial(0, self.point.rows * lines) as i, self._output(channel, i // lines) as output:
            begin, o = output
            line = T.Bind(i % lines)
            found = self._pooled_line(sums, begin, line)
            if self.kept is None:
                self._store_line(found, o, T.Bind(self.first_pooled + line))
            else:
                start = T.Bind((o - self.first_channel) * self.width + line * self.pool.ow)
                for column, lanes, value in found:
                    T.buffer_store(self.kept, value, [ramp(start + column, lanes)])

    def _store_kept(self, first_channel, channels) -> None:
        """Store the pooled lines of a part, channels last or in planes of quads."""
        if self.problem.planes_out:
            self._store_kept_quads(first_channel, channels)
        elif self.problem.outputs < self.lanes:
            self._store_few(self.kept, 0, self.width)
        else:
            vectors = self.width // self.lanes
            self._store(self.kept, 0, first_channel, channels, vectors, self.width)

    def _store_kept_quads(self, first_channel, channels) -> None:
        """Store the pooled lines of a part, which follow one another in each plane, the last vector overlapping."""
        together, lanes = self.problem.together, widest_lanes(self.pool.ow, self.lanes)
        pixels = T.Bind(T.int32(0) + self._pooled_lines() * self.pool.ow)
        first = T.Bind(self.first_pooled * self.pool.ow)
        with T.serial(0, channels // together) as plane:
            begin = T.Bind(plane * (together * self.width))
            o = T.Bind(first_channel + plane * together)
            with T.serial(0, (pixels + lanes - 1) // lanes) as j:
                at = T.Bind(tirx.min(j * lanes, pixels - lanes))
                values = [
                    T.Bind(self.kept[ramp(begin + i * self.width + at, lanes)])
                    for i in range(together)
                ]
                self._store_plane(values, o, T.Bind(first + at), lanes)

    def _store_line(self, found: list, channel, line) -> None:
        """Store a pooled line into its channel's plane, and behind the last one what ends the plane."""
        pool = self.pool
        for column, lanes, value in found:
            self._store_plane([value], channel, T.Bind(line * pool.ow + column), lanes)
        pixels, plane = pool.oh * pool.ow, self.kernel.fused.shape[-1]
        if plane > pixels:
            _, lanes, value = found[-1]
            last = value if lanes == 1 else tirx.Shuffle([value], [lanes - 1])
            with T.If(line == pool.oh - 1), T.Then():
                self._repeat([T.Bind(last)], channel, pixels, plane)

    def _pooled_line(self, sums, begin, line) -> list[tuple]:
        """(column, lanes, value) of the vectors of a pooled line of a band, the last one overlapping; a channel's sums lie
        from `begin` on."""
        pool = self.pool
        down = self._reduced_down(sums, begin, line)
        made = []
        for column, lanes in covering(pool.ow, self.lanes):
            held = None
            for tap in range(pool.s):
                value = self._along(down, column, lanes, tap)
                held = value if held is None else T.Bind(larger(held, value))
            made.append((column, lanes, held))
        return made

    def _reduced_down(self, sums, begin, line) -> Callable:
        """`down(i)`: vector number i of a line as wide as the convolution's, its largest values down a pooled line's window."""
        pool = self.pool
        first, last = windows.kernel_rows(pool, T.Bind(self.first_pooled + line))
        starts = []
        for row in range(pool.r):
            inside = row if isinstance(first, int) else tirx.max(row, first)
            inside = inside if isinstance(last, int) else tirx.min(inside, last - 1)
            of_band = line * pool.stride[0] + inside * pool.dilation[0]
            starts.append(T.Bind(begin + of_band * self.window.line))
        known: dict = {}

        def down(number: int):
            if number not in known:
                column, lanes = self.columns[number]
                held = None
                for start in starts:
                    value = T.Bind(sums[ramp(start + column, lanes)])
                    held = value if held is None else T.Bind(larger(held, value))
                known[number] = held
            return known[number]

        return down

    @property
    def columns(self) -> list[tuple[int, int]]:
        """(first column, lanes) of the vectors of a line of the convolution."""
        return covering(self.pool.w, self.lanes)

    def _along(self, down: Callable, column: int, lanes: int, tap: int):
        """What `lanes` windows from pooled `column` on see through a tap: lanes of the vectors `down`."""
        pool = self.pool
        places = []  # (vector, lane) of each window's
        for o in range(column, column + lanes):
            seen = [
                o * pool.stride[1] + t * pool.dilation[1] - pool.padding[1] for t in range(pool.s)
            ]
            inside = [t for t, x in enumerate(seen) if 0 <= x < pool.w]
            x = seen[min(max(tap, inside[0]), inside[-1])]
            number = min(x // self.columns[0][1], len(self.columns) - 1)
            places.append((number, x - self.columns[number][0]))
        used = sorted({number for number, _ in places})
        each = self.columns[0][1]
        if each == 1:
            return down(used[0])
        if lanes == each and len(used) == 1 and [at for _, at in places] == list(range(lanes)):
            return down(used[0])
        order = [used.index(number) * each + at for number, at in places]
        return T.Bind(tirx.Shuffle([down(number) for number in used], order))

    @contextmanager
    def _stored(self, pixel):
        row, column = T.Bind(pixel // self.pool.ow), T.Bind(pixel % self.pool.ow)
        at = T.Bind(self.first_pooled + row)
        with T.If(tirx.all(row < self.pooled, at < self.pool.oh)), T.Then():
            yield [self.image, at, column]
