# SPDX-License-Identifier: Apache-2.0
"""Winograd's convolution and the maximum over windows of its result in one kernel: the result itself never exists.

One row of tiles after the other is computed, into the lines of two of them; then the windows are taken that its last line
completes, over lines of it and of the row of tiles before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules import windows
from schedules.emission import Row, loop, ramp, unravel, workspace
from schedules.pooling import larger
from schedules.winograd_emitter import Emitter
from schedules.winograd_points import Point, Problem


def windows_of_row(problem: Problem, m: int, pool: windows.Problem) -> tuple[int, int] | None:
    """(first, count): of the windows of a column those from `count * i + first` are complete with row i of tiles, as many
    as `count`, and with the last row all. None if that is no regular number, or they reach further back than the row
    before, or hold nothing of the image."""
    (stride, _), top, r = pool.stride, pool.padding[0], pool.r
    if m % stride or pool.dilation != (1, 1):
        return None
    count = m // stride
    first = (m - r + top) // stride - count + 1
    reach = stride * first - top  # from the row's first line to that of its first window
    empty = (pool.oh - 1) * stride >= problem.output_hw[0] + top
    return None if reach < -m or empty else (first, count)


def default_point(problem: Problem, point: Point) -> Point:
    """`point` with blocks that make up a row of tiles."""
    columns = problem.tiles(point.m)[2]
    block = -(-columns // -(-columns // point.block))

    def steps(rows: int) -> float:
        return -(-block // rows) * (rows + 0.5)

    rows = min(range(1, min(point.rows, block) + 1), key=lambda r: (steps(r), -r))
    return replace(point, block=block, rows=rows, divide="tiles")


@dataclass
class PooledEmitter(Emitter):
    """The emitter of `winograd`, with `pool`, the windows over its result."""

    pool: windows.Problem = None

    def __post_init__(self):
        super().__post_init__()
        self.by_channels = False

    def emit(self) -> None:
        n, rows, columns = self.problem.tiles(self.point.m)
        self.first, self.count = windows_of_row(self.problem, self.point.m, self.pool)
        parts = min(rows, self.target.threads) if self.parallel else 1
        each = -(-rows // parts)
        self._gather()
        with loop(n * parts, parallel=self.parallel) as share:
            self.n, part = unravel(share, (n, parts))
            start = T.Bind(part * each)
            # The row of tiles before a part's first one, whose windows reach into it.
            before = T.Bind(tirx.min(part, 1))
            stop = T.Bind(tirx.min(start + each, rows))
            self.lines = workspace(2 * self.point.m, columns * self.point.m, self.problem.o)
            # Out here, so that it is allocated once: lines stay there from one row of tiles to the next.
            T.buffer_store(self.lines, tirx.const(0.0, "float32"), [0, 0, 0])
            with T.serial(0, tirx.max(0, stop - start + before)) as step:
                i = T.Bind(start - before + step)
                self._row_of_tiles(i, rows, columns)
                with T.If(i >= start), T.Then():
                    self._windows(i)

    def _row_of_tiles(self, i, rows: int, columns: int) -> None:
        """The lines of row i of tiles."""
        block = self.point.block
        with T.serial(0, -(-columns // block)) as number:
            first = tirx.min(number * block, columns - block)
            self.base = T.Bind((self.n * rows + i) * columns + first)
            self._emit_block()

    def _store(self, result, tile, tile_at: tuple, pixel: tuple, channel) -> None:
        """Keep one pixel of the convolution's result; lines and columns beyond it are never read."""
        m, (_, i, j) = self.point.m, tile_at
        at = [tirx.floormod(i, 2) * m + pixel[0], j * m + pixel[1], channel]
        T.buffer_store(self.lines, result, at)

    def _windows(self, i) -> None:
        """The maxima over the windows that row i of tiles completes."""
        pool, (height, width) = self.pool, self.problem.output_hw
        first = T.Bind(i * self.count + self.first)
        last = self.problem.tiles(self.point.m)[1] - 1
        count = tirx.Select(i < last, self.count, tirx.max(self.count, pool.oh - first))
        with T.serial(0, count) as number:
            y = T.Bind(first + number)

            def inside(start, taps: int, extent: int) -> list:
                """The pixels of a window; in place of one outside the image the one nearest to it, which it has, too."""
                return [T.Bind(tirx.max(0, tirx.min(start + t, extent - 1))) for t in range(taps)]

            with T.If(tirx.all(y >= 0, y < pool.oh)), T.Then():
                top = y * pool.stride[0] - pool.padding[0]
                lines = [
                    T.Bind(tirx.floormod(line, 2 * self.point.m))
                    for line in inside(top, pool.r, height)
                ]
                with T.serial(0, pool.ow) as x:
                    columns = inside(x * pool.stride[1] - pool.padding[1], pool.s, width)
                    row = Row(pool.c, self.target.lanes)

                    def largest(base, _slot, _fresh, x=x, y=y, columns=columns, row=row) -> None:
                        lane = ramp(base, row.lanes)
                        found = None
                        for line in lines:
                            for column in columns:
                                value = T.Bind(self.lines[line, column, lane])
                                found = value if found is None else T.Bind(larger(found, value))
                        self.kernel.store(found, [self.n, y, x, lane])

                    row.each(largest)
