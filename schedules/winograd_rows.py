# SPDX-License-Identifier: Apache-2.0
"""Winograd's convolution a row of matrices after the other: for weights too large for the second-level cache.

For each of the m+2 rows of transformed tiles all that it takes lies in cache: its part of the input, made from the pixels
when its turn comes, and of one panel's products, whose rows are transformed back at once. So weights are read once, in
order, whatever the number of tiles, and nothing else passes through memory but the products' half-transformed rows:

    y = A^T [ sum over rows i of  e_i (sum over c of (G g G^T)_i * (B^T d B)_i) A ]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.emission import (
    Row,
    Tile,
    loop,
    ramp,
    splat,
    unravel,
    workspace,
)
from schedules.windows import LINE_WORDS, prefetch
from schedules.winograd_emitter import Emitter
from schedules.winograd_transforms import linear

_AHEAD = 2  # matrices of weights between the one in use and the one asked for


@dataclass(frozen=True)
class _Step:
    """One pass over a row's weights: row `i`, a branch and a panel, and the first matrices of the pass that follows."""

    i: object
    branch: object
    panel: object
    next_panel: object
    next_matrix: object


class RowEmitter(Emitter):
    """The emitter of `winograd` with the rows of the matrices outside, panels within."""

    def emit(self) -> None:
        p, point, size = self.problem, self.point, self.size
        lines = -(-p.c // LINE_WORDS)
        # Tiles side by side, for a register tile reads a column of them; an odd number of lines between matrices.
        self.between = (LINE_WORDS * (point.block * lines | 1), LINE_WORDS * lines)
        self.panels, self.rest = divmod(p.o, point.panel)
        self.image = self._padded_image()
        with self._blocks():
            v = workspace(size * self.between[0])
            every = self.panels + bool(self.rest)
            branches = sum(len(group) for group in self.groups)
            half = workspace(size, branches, every, point.block * point.m * point.panel)
            with T.serial(0, size) as i:
                for source in range(len(self.groups)):
                    self._transform_row(v, i, source)
                    self._multiply_row(v, half, i, source)
            self._each_panel(lambda panel, channels: self._finish(half, panel, channels))

    def _each_panel(self, body: Callable) -> None:
        """`body(panel, channels)` for all panels, the last one's rest apart."""
        if self.panels:
            with loop(self.panels, parallel=self.by_channels) as panel:
                body(panel, self.point.panel)
        if self.rest:
            body(tirx.const(self.panels, "int32"), self.rest)

    def _padded_image(self):
        """x with zeros around it, as far as tiles reach; x itself if they stay within."""
        p = self.problem
        n, rows, columns = p.tiles(self.point.m)
        height, width = rows * self.point.m + p.taps - 1, columns * self.point.m + p.taps - 1
        if not any(p.padding) and (height, width) == (p.h, p.w):
            return self.x
        image = workspace(n, height, width, p.c)
        row = Row(p.c, self.target.lanes)
        with loop(n * height, parallel=self.parallel) as line:
            b, y = unravel(line, (n, height))
            with T.serial(0, width) as x:
                at = (y - p.padding[0], x - p.padding[1])

                def fill(value: Callable, b=b, y=y, x=x) -> None:
                    def body(channel, _slot, _fresh):
                        lane = ramp(channel, row.lanes)
                        T.buffer_store(image, value(lane), [b, y, x, lane])

                    row.each(body, 8)

                with T.If(tirx.all(at[0] >= 0, at[1] >= 0, at[0] < p.h, at[1] < p.w)):
                    with T.Then():
                        fill(lambda lane, b=b, at=at: self.x[b, at[0], at[1], lane])
                    with T.Else():
                        fill(lambda lane: splat(0.0, row.lanes))
        return image

    def _transform_row(self, v, i, source: int) -> None:
        """v[j, tile, c] = (B^T d B)[i, j] of the block's tiles of a source."""
        p, m, size = self.problem, self.point.m, self.size
        row = Row(p.c, self.target.lanes)
        with loop(self.point.block, parallel=self.by_channels) as tile:
            n, r, s = unravel(self.base + tile, p.tiles(m))

            def emit(number: int, tile=tile, n=n, r=r, s=s) -> None:
                taken = [q for q in range(size) if self.bt[number][q]]

                def body(channel, _slot, _fresh):
                    lane = ramp(channel, row.lanes)

                    def pixel(q: int, t: int):
                        value = T.bind(self.image[n, r * m + q, s * m + t, lane])
                        return T.bind(self.source(value, source))

                    columns = [[pixel(q, t) for q in taken] for t in range(size)]
                    matrix = self.bt[number : number + 1, taken]
                    sums = [T.bind(linear(matrix, column, row.lanes)[0]) for column in columns]
                    for j, value in enumerate(linear(self.bt, sums, row.lanes)):
                        at = j * self.between[0] + tile * self.between[1] + channel
                        T.buffer_store(v, value, [ramp(at, row.lanes)])

                row.each(body, 1)

            for number in range(size):
                with T.If(i == number):
                    with T.Then():
                        emit(number)

    def _multiply_row(self, v, half, i, source: int) -> None:
        """Row i of the products of every branch of a source, transformed back on one side."""
        group, size = self.groups[source], self.size
        following = self.groups[(source + 1) % len(self.groups)][0]
        later = i + 1 if source + 1 == len(self.groups) else i
        last = self.panels + bool(self.rest) - 1
        with T.serial(0, len(group)) as number:
            branch = group[0] + number

            def body(panel, channels: int) -> None:
                matrix = (branch * size + i) * size
                same = panel < last
                other = tirx.Select(
                    number + 1 < len(group), matrix + size**2, (following * size + later) * size
                )
                step = _Step(
                    i, branch, panel, tirx.Select(same, panel + 1, 0), tirx.Select(same, matrix, other)
                )  # fmt: skip
                self._multiply_panel(v, half, step, channels)

            self._each_panel(body)

    def _multiply_panel(self, v, half, step: _Step, channels: int) -> None:
        """half[i, branch, panel][tile, s] = sum over j of A[s, j] * products of matrix j, for one panel."""
        point, size, lanes = self.point, self.size, self.point.lanes
        vectors = -(-channels // lanes)
        product = workspace(size, point.block * point.panel)
        whole, rest = divmod(point.block, point.rows)
        tile = Tile(point.rows, vectors, lanes)
        acc = tile.allocate()
        with T.serial(0, size) as j:
            with T.serial(0, whole) as number:
                self._tile(v, product, tile, acc, step, j, number * point.rows, (number, whole))
            if rest:
                last = Tile(rest, vectors, lanes)
                self._tile(v, product, last, last.allocate(), step, j, whole * point.rows)
        with T.serial(0, point.block) as t:

            def store(offset, width, t=t) -> None:
                at = ramp(t * point.panel + offset, width)
                values = [T.bind(product[j, at]) for j in range(size)]
                for s, value in enumerate(linear(self.at, values, width)):
                    where = ramp((t * point.m + s) * point.panel + offset, width)
                    T.buffer_store(half, value, [step.i, step.branch, step.panel, where])

            self._each_vector(channels, store)

    def _tile(self, v, product, tile: Tile, acc, step: _Step, j, first, share=None) -> None:
        """Products of matrix j for the tiles from `first`, asking for a `share` (number, count) of later weights."""
        p, size, panel = self.problem, self.size, self.point.panel
        matrix = (step.branch * size + step.i) * size + j
        stays = j + _AHEAD < size
        ahead = (
            tirx.Select(stays, step.panel, step.next_panel),
            tirx.Select(stays, matrix + _AHEAD, step.next_matrix + (j + _AHEAD - size)),
        )

        def left(r, k):
            return v[j * self.between[0] + (first + r) * self.between[1] + k]

        def right(k, t):
            return self.u[step.panel, matrix, k, ramp(t * tile.lanes, tile.lanes)]

        def fetch(k) -> None:
            number, count = share
            each = -(-panel // (LINE_WORDS * count))
            for line in range(each):
                at = ((number * p.c + k) * each + line) * LINE_WORDS
                prefetch(self.u[(*ahead, 0, at)])

        tile.multiply(acc, p.c, left, right, fetch if share else None)
        for r, t in tile.cells():
            at = ramp((first + r) * panel + t * tile.lanes, tile.lanes)
            T.buffer_store(product, acc[r][tile.at(t)], [j, at])

    def _finish(self, half, panel, channels: int) -> None:
        """The outputs of one panel for the block's tiles."""
        p, m, size = self.problem, self.point.m, self.size
        branches = sum(len(group) for group in self.groups)
        with T.serial(0, self.point.block) as t:
            tile_at = unravel(self.base + t, p.tiles(m))

            def store(offset, lanes: int, t=t, tile_at=tile_at) -> None:
                channel = ramp(panel * self.point.panel + offset, lanes)
                with T.serial(0, m) as s:
                    at = ramp((t * m + s) * self.point.panel + offset, lanes)
                    columns = []
                    for b in range(branches):
                        values = [T.bind(half[row, b, panel, at]) for row in range(size)]
                        columns.append([T.bind(y) for y in linear(self.at, values, lanes)])
                    for r in range(m):
                        result = self.combine([column[r] for column in columns], channel)
                        self._store(result, t, tile_at, (r, s), channel)

            self._each_vector(channels, store)
