# SPDX-License-Identifier: Apache-2.0
"""The kernel of `int8_winograd`: weights and a block of tiles transformed to 16 bits, their products, these transformed back.

Numbers of 16 bits lie in buffers of int32, two neighbouring channels in each, for products take them in pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules import wrapping
from schedules.byte_stores import Cell, store_cells
from schedules.emission import (
    Row,
    Tile,
    loop,
    ramp,
    runs_parallel,
    splat,
    unravel,
    workspace,
)
from schedules.fused import Emission
from schedules.int8_winograd import (
    ENTRIES,
    PAIR,
    SIZE,
    M,
    Point,
    Problem,
    held,
    odd_lines,
    panel_start,
    tile_count,
    tiles,
)
from schedules.target import CpuTarget
from schedules.terms import pair_product
from schedules.winograd_matrices import integer_matrices
from schedules.winograd_transforms import Numbers, read_tile, transform

_WORDS, _SUMS = Numbers("int16"), Numbers("int32", wrapping)


@dataclass
class Emitter:
    """State of one emission. Threads share out panels, then blocks of tiles, or tiles, then panels."""

    kernel: Emission
    problem: Problem
    point: Point
    target: CpuTarget

    def __post_init__(self):
        p, point = self.problem, self.point
        self.x, self.w, *rest = self.kernel.inputs
        self.tiles = tile_count(p)
        self.blocks = -(-self.tiles // point.block)
        self.panels = -(-p.o // point.panel)
        self.bt, self.g, self.at, factor = integer_matrices()
        square = factor**2
        self.shift = (square & -square).bit_length() - 1
        self.inverse = pow(square >> self.shift, -1, 2**32)
        self.parallel = runs_parallel(self.target, 2, self.tiles * p.c * p.o)
        if p.o % point.panel == 0:  # else the last panel would read what the one before has stored
            self.kernel.write_over_residual()
        # What is added to the sums of a channel, each [..., O].
        self.added = [b for b in (*rest, self.kernel.bias_of_sums()) if b is not None]
        # int32s between matrices: of pixels [tile, pair], of weights [pair, output], of products [tile][matrix, output].
        together = held(point)
        if point.kept == "pixels":
            together += (self.blocks - 1) * point.block
        self.pixels_apart = odd_lines(4 * together * p.c // PAIR) // 4
        self.weights_apart = odd_lines(4 * p.c // PAIR * point.panel) // 4
        self.products_apart = odd_lines(4 * ENTRIES * point.panel) // 4

    def emit(self) -> None:
        if self.point.kept == "weights":
            u = self._weights_of(self.panels)
            with loop(self.panels, parallel=self.parallel) as panel:
                self._transform_weights(u, panel, panel)
            with loop(self.blocks, parallel=self.parallel) as block:
                base, count = self._block(block)
                v = self._pixels_of()
                with T.serial(0, count) as tile:
                    self._transform_pixels(v, base + tile, tile)
                with T.serial(0, self.panels) as panel:
                    self._emit_block((v, 0), (u, panel), base, count, panel)
            return
        v = self._pixels_of()
        with loop(self.tiles, parallel=self.parallel) as tile:
            self._transform_pixels(v, tile, tile)
        with loop(self.panels, parallel=self.parallel) as panel:
            u = self._weights_of(1)
            self._transform_weights(u, panel, 0)
            with T.serial(0, self.blocks) as block:
                base, count = self._block(block)
                self._emit_block((v, base), (u, 0), base, count, panel)

    def _block(self, block) -> tuple:
        """First tile of a block, and how many it has."""
        size = self.point.block
        if self.tiles % size == 0:
            return block * size, size
        return block * size, tirx.min(size, self.tiles - block * size)

    def _emit_block(self, pixels: tuple, weights: tuple, base, count, panel) -> None:
        """The outputs of `count` tiles from number `base` on in the channels of a panel; `pixels` and `weights` are
        transformed, each with its first tile or panel."""
        product = workspace(held(self.point) * self.products_apart, dtype="int32")
        self._multiply(*pixels, *weights, product, count)
        with T.serial(0, count) as tile, T.serial(0, self.point.nv) as vector:
            self._transform_back(product, tile, base + tile, panel, vector * self.point.lanes)

    def _pixels_of(self):
        return workspace(ENTRIES * self.pixels_apart, dtype="int32")

    def _weights_of(self, panels: int):
        return workspace(panels * ENTRIES * self.weights_apart, dtype="int32")

    def _transform_weights(self, u, panel, number) -> None:
        """u[number][e][pair, output] of a panel, from its bytes."""
        lanes = self.point.lanes
        row = self.point.panel
        with T.serial(0, self.problem.c // PAIR) as pair:
            with T.serial(0, self.point.nv) as vector:

                def load(q, t):
                    at = ramp(vector * (PAIR * lanes), PAIR * lanes)
                    return self.w[panel, pair, q * 3 + t, at].astype(f"int16x{PAIR * lanes}")

                for q, t, value in transform(self.g, load, PAIR * lanes, _WORDS):
                    at = (number * ENTRIES + q * SIZE + t) * self.weights_apart
                    at += pair * row + vector * lanes
                    T.buffer_store(u, _pairs(value, lanes), [ramp(at, lanes)])

    def _transform_pixels(self, v, tile, to) -> None:
        """v[e][to, pair] = (B^T d B)[e] of tile number `tile`, zero points around the image."""
        p = self.problem
        n, i, j = unravel(tile, tiles(p))
        top, left = i * M - p.padding[0], j * M - p.padding[1]
        row = Row(p.c, PAIR * self.target.lanes)

        def emit(pixel: Callable) -> None:
            def body(channel, _slot, _fresh):
                def load(q, t):
                    return pixel(q, t, ramp(channel, row.lanes)).astype(f"int16x{row.lanes}")

                for q, t, value in transform(self.bt, load, row.lanes, _WORDS):
                    at = (q * SIZE + t) * self.pixels_apart + to * (p.c // PAIR)
                    at += tirx.floordiv(channel, PAIR)
                    T.buffer_store(
                        v, _pairs(value, row.lanes // PAIR), [ramp(at, row.lanes // PAIR)]
                    )

            row.each(body, 1)

        outside, bytes_at_once = (
            self.kernel.fused.point["zero_point"],
            Row(p.c, 4 * self.target.lanes),
        )
        read_tile(self.x, p, SIZE, (n, top, left), bytes_at_once, outside, emit)

    def _multiply(self, v, start, u, number, product, count) -> None:
        """product[tile][e, output] = sum over c of v[e][start + tile, c] * u[number][e][c, output], modulo 2^32."""
        point, pairs = self.point, self.problem.c // PAIR
        tile = Tile(point.rows, point.nv, point.lanes, "int32")
        acc = tile.allocate()
        with T.serial(0, ENTRIES) as e:
            with T.serial(0, tirx.floordiv(count + (point.rows - 1), point.rows)) as step:
                first = step * point.rows

                def pixels(r, k):
                    return v[e * self.pixels_apart + (start + first + r) * pairs + k]

                def weights(k, t):
                    at = (number * ENTRIES + e) * self.weights_apart + k * point.panel
                    return u[ramp(at + t * point.lanes, point.lanes)]

                tile.multiply(acc, pairs, pixels, weights, add=pair_product(self.target))
                for r, t in tile.cells():
                    at = (first + r) * self.products_apart + e * point.panel + t * point.lanes
                    T.buffer_store(product, acc[r][tile.at(t)], [ramp(at, point.lanes)])

    def _transform_back(self, product, number, tile, panel, offset) -> None:
        """The pixels of a tile for the vector of output channels at `offset` of a panel, stored; its products come
        `number`th."""
        p, lanes = self.problem, self.point.lanes
        channel = panel_start(p, self.point, panel) + offset
        n, i, j = unravel(tile, tiles(p))
        start = number * self.products_apart + offset

        def load(q, t):
            return product[ramp(start + (q * SIZE + t) * self.point.panel, lanes)]

        rows: dict[int, list] = {}
        for q, _t, value in transform(self.at, load, lanes, _SUMS):
            exact = wrapping.mul(value, splat(self.inverse, lanes, "int32"))
            total = tirx.shift_right(exact, splat(self.shift, lanes, "int32"))
            for added in self.added:
                total = total + added[(*[0] * (len(added.shape) - 1), ramp(channel, lanes))]
            rows.setdefault(q, []).append(T.bind(total))
        for q, values in rows.items():
            y = i * M + q
            cells = [Cell(v, (n, y, j * M + t), channel, lanes) for t, v in enumerate(values)]
            below = [y < p.oh] if p.oh % M else []
            if p.ow % M == 0:
                self._store(cells, below)
                continue
            for cell in cells:
                self._store([cell], [*below, cell.lead[-1] < p.ow])

    def _store(self, cells: list[Cell], checks: list) -> None:
        def store():
            store_cells(self.kernel, self.target, [[cell] for cell in cells])

        if not checks:
            store()
            return
        with T.If(tirx.all(*checks)), T.Then():
            store()


def _pairs(value, lanes: int):
    """A vector of int16 as one of half as many int32."""
    return tirx.reinterpret(f"int32x{lanes}", value)
