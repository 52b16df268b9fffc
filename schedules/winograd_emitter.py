# SPDX-License-Identifier: Apache-2.0
"""The kernel of Winograd's convolution: a block of tiles transformed, its products, their inverse transforms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.emission import (
    Row,
    Tile,
    covering,
    loop,
    ramp,
    runs_parallel,
    splat,
    unravel,
    workspace,
)
from schedules.lanes import broadcast
from schedules.target import CpuTarget
from schedules.windows import LINE_WORDS, prefetch
from schedules.winograd_matrices import matrices
from schedules.winograd_phases import gather_phases
from schedules.winograd_points import Point, Problem, strides
from schedules.winograd_transforms import linear, read_tile, transform


@dataclass(frozen=True)
class Span:
    """`panels` panels of weights from number `first`, of which the first `channels` output channels exist."""

    first: object
    panels: int
    channels: int


@dataclass
class Emitter:
    """State of one emission.

    A subclass may sum several products for each output, its branches, to be combined where it is stored. `groups` has
    the branches of each source that is transformed, in order; branches are numbered as their weights lie.
    """

    groups = ((0,),)
    phases = None  # the image that a strided convolution is one of stride 1 over

    kernel: object
    problem: Problem
    point: Point
    target: CpuTarget
    x: object
    u: object

    def __post_init__(self):
        self.size = self.problem.size(self.point.m)
        self.tiles = int(np.prod(self.problem.tiles(self.point.m)))
        self.strides = strides(self.size, self.problem.depth)
        self.bt, self.g, self.at = matrices(self.point.m, bool(self.point.chunk), self.problem.taps)
        self.blocks = -(-self.tiles // self.point.block)
        self.parallel = runs_parallel(
            self.target, 2, 2 * self.tiles * self.problem.depth * self.problem.o
        )
        # Threads share out blocks, or the panels of each.
        by_blocks = self.point.divide == "tiles" and self.blocks > 1
        self.by_channels = self.parallel and not by_blocks
        # Else the last vectors of a pixel's outputs overlap, and the second would read what the first has stored.
        if self.problem.o % self.point.lanes == 0:
            self.kernel.write_over_residual()

    def emit(self) -> None:
        self._gather()
        with self._blocks():
            self._emit_block()

    def _gather(self) -> None:
        """What is read in place of a strided convolution's image."""
        if self.problem.stride > 1:
            self.phases = gather_phases(
                self.x, self.problem, self.point.m, self.target.lanes, self.parallel
            )

    def _emit_block(self) -> None:
        """All output channels of the block of tiles from `base` on."""
        point = self.point
        whole, rest = divmod(self.problem.o, point.panel)
        span = self._span(whole)
        v = workspace(point.block * self.strides[1])
        kept: dict = {}
        for source, branches in enumerate(self.groups):
            with loop(point.block, parallel=self.by_channels) as tile:
                self._transform_input(v, tile, source)
            if source + 1 < len(self.groups):
                kept |= {b: self._keep(whole + bool(rest)) for b in branches}
            if whole:
                with loop(whole // span, parallel=self.by_channels) as part:
                    panels = Span(part * span, span, span * point.panel)
                    self._emit_span(v, panels, branches, kept)
            if rest:
                panels = Span(tirx.const(whole, "int32"), 1, rest)
                self._emit_span(v, panels, branches, kept)

    @contextmanager
    def _blocks(self):
        """A loop over blocks of tiles, from tile `base` each, of which `fresh` is the first that no block before has
        computed."""
        size = self.point.block
        with loop(self.blocks, parallel=self.parallel and not self.by_channels) as block:
            self.base = tirx.min(block * size, self.tiles - size)
            self.fresh = block * size
            yield

    def _span(self, panels: int) -> int:
        """Panels that pass through a matrix of the input together; threads that share out panels take one at a time."""
        entries = self.point.order == "entries" and not self.point.chunk and not self.by_channels
        return max(1, panels) if entries else 1

    def _keep(self, panels: int):
        """A buffer for a branch's results, for a block of tiles and so many panels, until the last branch is there."""
        return workspace(self.point.block, self.point.m**2, panels * self.point.panel)

    def source(self, value, index: int):
        """What source `index` is made of, from a vector of x."""
        return value

    def combine(self, values: list, channel):
        """The outputs at `channel`, a vector of indices, from those of the branches."""
        return values[0]

    def _transform_input(self, v, tile, source: int) -> None:
        """v[tile, e, c] = (B^T d B)[e] of the block's tile number `tile`, of a source."""
        p, size = self.problem, self.size
        n, i, j = unravel(self.base + tile, p.tiles(self.point.m))
        top, left = i * self.point.m - p.padding[0], j * self.point.m - p.padding[1]
        phases = self.phases
        row = Row(p.c if phases is None else int(phases.shape[-1]), self.target.lanes)

        def emit(pixel: Callable) -> None:
            def body(channel, _slot, _fresh):
                lane = ramp(channel, row.lanes)

                def load(q, t):
                    return self.source(pixel(q, t, lane), source)

                for q, t, value in transform(self.bt, load, row.lanes):
                    at = tile * self.strides[1] + (q * size + t) * self.strides[0] + channel
                    T.buffer_store(v, value, [ramp(at, row.lanes)])

            row.each(body, 1)

        if phases is not None:
            emit(lambda q, t, lane: phases[n, i * self.point.m + q, j * self.point.m + t, lane])
            return
        read_tile(self.x, p, size, (n, top, left), row, 0.0, emit)

    def _emit_span(self, v, span: Span, branches: tuple[int, ...], kept: dict) -> None:
        """The output channels of some panels for a block of tiles: branches of one source."""
        point, lanes = self.point, self.point.lanes
        vectors = -(-min(span.channels, point.panel) // lanes)
        self.product_strides = strides(self.size, span.panels * point.panel)
        product = workspace(point.block * self.product_strides[1])
        multiply = self._multiply_plain if point.chunk else self._multiply
        tile = Tile(point.rows, self.size if point.chunk else vectors, lanes)
        acc = tile.allocate()
        # Of another source: for all panels. Of this one: for these.
        kept = {b: (buffer, span.first * point.panel) for b, buffer in kept.items()}
        for branch in branches:
            if branch not in kept and branch != self.last:
                kept[branch] = (self._keep(span.panels), 0)
            multiply(tile, acc, v, product, span, branch)
            with T.serial(0, point.block) as t:

                def store(offset, width, t=t, branch=branch):
                    self._transform_output(product, t, span, offset, width, branch, kept)

                self._each_vector(span.channels, store)

    def _each_vector(self, channels: int, body: Callable) -> None:
        """`body(offset, width)` for the vectors of `channels` output channels."""
        lanes = self.point.lanes
        if channels % lanes == 0:
            with T.serial(0, channels // lanes) as vector:
                body(vector * lanes, lanes)
        else:
            for offset, width in covering(channels, lanes):
                body(offset, width)

    @property
    def last(self) -> int:
        """The branch with which the others are combined."""
        return self.groups[-1][-1]

    def _multiply(self, tile: Tile, acc: list, v, product, span: Span, branch: int) -> None:
        """product[tile, e, o] = sum over c of v[tile, e, c] * u[panel, e, c, o], u being the branch's."""
        point, size, lanes = self.point, self.size, self.point.lanes
        steps = -(-point.block // point.rows)
        with T.serial(0, size**2) as e:
            at_u = e + branch * size**2 if branch else e
            with T.serial(0, span.panels) as within:
                panel = span.first + within
                with T.serial(0, steps) as step:
                    first = tirx.min(step * point.rows, point.block - point.rows)

                    def left(r, k):
                        return v[(first + r) * self.strides[1] + e * self.strides[0] + k]

                    tile.multiply(
                        acc, self.problem.depth, left, lambda k, t: self.u[panel, at_u, k, ramp(t * lanes, lanes)],
                        lambda k: self._prefetch(span, within, at_u, step * self.problem.depth + k, steps),
                    )  # fmt: skip
                    for r, t in tile.cells():
                        at = (first + r) * self.product_strides[1] + e * self.product_strides[0]
                        at += within * point.panel + t * lanes
                        T.buffer_store(product, acc[r][tile.at(t)], [ramp(at, lanes)])

    def _prefetch(self, span: Span, within, e, iteration, steps: int) -> None:
        """Ask for the matrix of weights after (panel, e), spread over the iterations that use this one."""
        each = -(-self.point.panel // (LINE_WORDS * steps))
        for line in range(each):
            at = (iteration * each + line) * LINE_WORDS
            if span.panels == 1:  # past the end of axis 2 lies the next matrix
                prefetch(self.u[span.first, e, self.problem.depth, at])
                continue
            more = within + 1 < span.panels
            panel = span.first + tirx.Select(more, within + 1, 0)
            prefetch(self.u[panel, tirx.Select(more, e, e + 1), 0, at])

    def _multiply_plain(self, tile: Tile, acc: list, v, product, span: Span, branch: int) -> None:
        """The products of `_multiply` from plain weights: acc holds a row of the matrices for some tiles, to which
        channel after channel adds its part, its weights transformed for that row. A chunk of channels at a time."""
        inputs, chunk, size, rows = self.problem.c, self.point.chunk, self.size, self.point.rows
        with T.serial(0, -(-inputs // chunk)) as c:
            start = c * chunk
            extent = chunk if inputs % chunk == 0 else tirx.min(chunk, inputs - start)
            for i in range(size):
                with T.serial(0, self.point.block // rows) as step:

                    def at(r, j, strides, step=step, i=i):
                        return (step * rows + r) * strides[1] + (i * size + j) * strides[0]

                    def sums(r, j, at=at):
                        return product[ramp(at(r, j, self.product_strides), tile.lanes)]

                    with T.If(c == 0):
                        with T.Then():
                            for r, j in tile.cells():
                                T.buffer_store(acc[r], splat(0.0, tile.lanes), [tile.at(j)])
                        with T.Else():
                            for r, j in tile.cells():
                                T.buffer_store(acc[r], sums(r, j), [tile.at(j)])
                    with T.serial(0, extent) as k:
                        channel = start + k + branch * inputs
                        weights = self._transform_weights(span.first, channel, i, tile.lanes)
                        for r, j in tile.cells():
                            left = v[at(r, j, self.strides) + start + k]
                            total = acc[r][tile.at(j)] + broadcast(left, tile.lanes) * weights[j]
                            T.buffer_store(acc[r], total, [tile.at(j)])
                    for r, j in tile.cells():
                        where = ramp(at(r, j, self.product_strides), tile.lanes)
                        T.buffer_store(product, acc[r][tile.at(j)], [where])

    def _transform_weights(self, panel, channel, i: int, lanes: int) -> list:
        """Row i of G g G^T for a vector of output channels; and the prefetch of the next chunk, a part for each row."""
        half = []
        for t in range(3):
            column = [self.u[panel, channel, q * 3 + t, ramp(0, lanes)] for q in range(3)]
            half.append(T.bind(linear(self.g[i : i + 1], column, lanes)[0]))
        lines = -(-9 * lanes // LINE_WORDS)
        for line in range(i * lines // self.size, (i + 1) * lines // self.size):
            # Past the end of axis 1 lies the next panel.
            prefetch(self.u[panel, channel + self.point.chunk, 0, line * LINE_WORDS], near=True)
        return [T.bind(value) for value in linear(self.g, half, lanes)]

    def _transform_output(
        self, product, tile, span: Span, offset, lanes: int, branch: int, kept: dict
    ) -> None:
        """A^T M A of one tile for `lanes` channels of a span: kept, or combined with what was kept and stored."""
        m, size = self.point.m, self.size
        tile_at = unravel(self.base + tile, self.problem.tiles(m))
        start = tile * self.product_strides[1] + offset

        def load(q, t):
            return product[ramp(start + (q * size + t) * self.product_strides[0], lanes)]

        channel = ramp(span.first * self.point.panel + offset, lanes)
        for r, s, value in transform(self.at, load, lanes):
            found = T.bind(value)
            at = {b: (tile, r * m + s, ramp(c + offset, lanes)) for b, (_, c) in kept.items()}
            if branch != self.last:
                T.buffer_store(kept[branch][0], found, list(at[branch]))
                continue
            values = {b: buffer[at[b]] for b, (buffer, _) in kept.items()} | {branch: found}
            result = self.combine([values[b] for b in sorted(values)], channel)
            self._store(result, tile, tile_at, (r, s), channel)

    def _store(self, result, tile, tile_at: tuple, pixel: tuple, channel) -> None:
        """Store one pixel of the outputs of the block's tile number `tile`, at `tile_at` (image, row, column), where it
        lies within the image, and, over residuals, where no block before has stored it."""
        m, (height, width) = self.point.m, self.problem.output_hw
        n, i, j = tile_at
        y, x = i * m + pixel[0], j * m + pixel[1]
        checks = [y < height] * bool(height % m) + [x < width] * bool(width % m)
        if self.kernel.in_place and self.tiles % self.point.block:
            checks.append(self.base + tile >= self.fresh)
        if not checks:
            self.kernel.store(result, [n, y, x, channel])
            return
        with T.If(tirx.all(*checks)), T.Then():
            self.kernel.store(result, [n, y, x, channel])
