# SPDX-License-Identifier: Apache-2.0
"""Winograd convolution F(m x m, 3 x 3): definition and kernel for 3x3, stride 1, no dilation, one group, NHWC.

    y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A       per (m+2)^2 input tile d and m^2 output tile

The image is cut into tiles; a block of tiles is transformed into (m+2)^2 matrices [tiles, C], each multiplied by its
[C, O] matrix of transformed weights, a panel of output channels at a time, and transformed back into the epilogue.
A block's matrices stay in the second-level cache. Weights are packed transformed, or, where few tiles share them, plain:
a row of their transform is then made in registers for each channel, and multiplied there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

from schedules.emission import (
    Row,
    Tile,
    covering,
    emitting,
    loop,
    ramp,
    runs_parallel,
    splat,
    unravel,
    workspace,
)
from schedules.fused import Fused, annotations
from schedules.lanes import broadcast
from schedules.preparation import Source
from schedules.target import CpuTarget
from schedules.windows import prefetch
from schedules.winograd_matrices import matrices
from schedules.winograd_points import (
    Point,
    Problem,
    cost,
    default_point,
    direct_cost,
    strides,
    transformed_point,
    transforming_point,
)
from schedules.winograd_transforms import linear, transform

__all__ = [
    "LOOPS", "Emitter", "Point", "Problem", "cost", "default_point", "define_stages", "define_winograd", "direct_cost", "pack_weights", "packed_rows", "schedule", "stages", "transformed_point", "transforming_point", "weight_source",
]  # fmt: skip

LOOPS = "winograd"
_LINE = 16  # floats in a cache line


def stages(point: Point) -> int:
    """Blocks of the definition."""
    return 8 if point.chunk else 6


def packed_rows(problem: Problem, point: Point) -> int:
    """Extent of the second axis of packed weights: the (m+2)^2 matrices, or, of plain weights, the input channels."""
    return problem.c if point.chunk else (point.m + 2) ** 2


def pack_weights(weight: np.ndarray, point: Point) -> np.ndarray:
    """[O, C, 3, 3] -> float32 [panels, (m+2)^2, C, panel], transformed in float64; if `point.chunk`, as they are,
    [panels, C, 9, panel]. Zeros in the last panel's rest."""
    return weight_source([weight], point).prepared()


def weight_source(weights: Sequence[np.ndarray], point: Point) -> Source:
    """What the packed weights of one kernel, or of several one after the other on their second axis, are made of."""
    panels = [_weight_panels(w, point) for w in weights]
    if point.chunk:
        return Source(np.concatenate([p.transpose(0, 2, 1, 3) for p in panels], axis=1))
    return Source(np.concatenate(panels, axis=1), "winograd", {"m": point.m})


def _weight_panels(weight: np.ndarray, point: Point) -> np.ndarray:
    """[O, C, 3, 3] -> [panels, 9, C, panel], zeros in the last panel's rest."""
    outputs, inputs = weight.shape[:2]
    panels = -(-outputs // point.panel)
    full = np.zeros((9, inputs, panels * point.panel), np.float32)
    full[..., :outputs] = weight.reshape(outputs, inputs, 9).transpose(2, 1, 0)
    split = full.reshape(9, inputs, panels, point.panel)
    return np.ascontiguousarray(split.transpose(2, 0, 1, 3))


def define_winograd(x, u, problem: Problem, point: Point):
    """te: x [N, H, W, C], u from `pack_weights` -> [N, OH, OW, O]."""
    notes = annotations(LOOPS, problem=problem.to_dict(), point=point.to_dict())
    return define_stages(x, u, problem, point, "winograd", notes)


def define_stages(
    x, u, problem: Problem, point: Point, name: str, notes: dict | None = None, first: int = 0
):
    """The definition's blocks, the last called `name`; this branch's weights begin at `first` on u's second axis."""
    m, size = point.m, point.m + 2
    bt, g, at = matrices(m, bool(point.chunk))
    (n, rows, columns), (height, width) = problem.tiles(m), problem.output_hw
    top, left = problem.padding[:2]

    def pad(b, i, j, c):
        inside = tirx.all(i >= top, i < problem.h + top, j >= left, j < problem.w + left)
        return te.if_then_else(inside, x(b, i - top, j - left, c), tirx.const(0.0, "float32"))

    def combine(matrix, row, element: Callable):
        """sum over q of matrix[row, q] * element(q) for a symbolic row."""
        result = tirx.const(0.0, "float32")
        for index, coefficients in enumerate(matrix):
            terms = [
                element(q) * tirx.const(float(c), "float32")
                for q, c in enumerate(coefficients)
                if c
            ]
            result = tirx.Select(row == index, functools.reduce(lambda a, b: a + b, terms), result)
        return result

    padded = te.compute((n, rows * m + 2, columns * m + 2, problem.c), pad, name="pad")
    tile = (n, rows, columns, size, size)
    half = te.compute(
        (*tile, problem.c),
        lambda b, r, s, i, j, c: combine(bt, i, lambda q: padded(b, r * m + q, s * m + j, c)),
        name="input_rows",
    )
    v = te.compute(
        (*tile, problem.c),
        lambda b, r, s, i, j, c: combine(bt, j, lambda q: half(b, r, s, i, q, c)),
        name="input",
    )

    def packed(i, j, k, o):
        return u(o // point.panel, first + i * size + j, k, o % point.panel)

    def transformed():
        """The weights' transform as two blocks."""

        def plain(q, t, k, o):
            return u(o // point.panel, first + k, q * 3 + t, o % point.panel)

        rows = te.compute(
            (size, 3, problem.c, problem.o),
            lambda i, t, k, o: combine(g, i, lambda q: plain(q, t, k, o)), name="weight_rows",
        )  # fmt: skip
        return te.compute(
            (size, size, problem.c, problem.o),
            lambda i, j, k, o: combine(g, j, lambda t: rows(i, t, k, o)), name="weight",
        )  # fmt: skip

    weight = transformed() if point.chunk else packed
    k = te.reduce_axis((0, problem.c), "k")
    product = te.compute(
        (*tile, problem.o),
        lambda b, r, s, i, j, o: te.sum(v(b, r, s, i, j, k) * weight(i, j, k, o), axis=k),
        name="product",
    )
    inverse = te.compute(
        (n, rows, columns, m, size, problem.o),
        lambda b, r, s, i, j, o: combine(at, i, lambda q: product(b, r, s, q, j, o)), name="output_rows",
    )  # fmt: skip
    return te.compute(
        (n, height, width, problem.o),
        lambda b, i, j, o: combine(at, j % m, lambda q: inverse(b, i // m, j // m, i % m, q, o)),
        name=name, attrs=notes or {},
    )  # fmt: skip


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel for a fused Winograd convolution."""
    problem, point = (
        Problem.from_dict(fused.point["problem"]),
        Point.from_dict(fused.point["point"]),
    )
    with emitting(fused, stages(point)) as (kernel, _):
        Emitter(kernel, problem, point, target, *kernel.inputs).emit()
    return kernel.func


@dataclass
class Emitter:
    """State of one emission.

    A subclass may sum several products for each output, its branches, to be combined where it is stored. `groups` has
    the branches of each source that is transformed, in order; branches are numbered as their weights lie.
    """

    groups = ((0,),)

    kernel: object
    problem: Problem
    point: Point
    target: CpuTarget
    x: object
    u: object

    def __post_init__(self):
        self.size = self.point.m + 2
        self.tiles = int(np.prod(self.problem.tiles(self.point.m)))
        self.strides = strides(self.size, self.problem.c)
        self.product_strides = strides(self.size, self.point.panel)
        self.bt, self.g, self.at = matrices(self.point.m, bool(self.point.chunk))
        # Else the last vectors of a pixel's outputs overlap, and the second would read what the first has stored.
        if self.problem.o % self.point.lanes == 0:
            self.kernel.write_over_residual()

    def emit(self) -> None:
        point = self.point
        blocks = -(-self.tiles // point.block)
        parallel = runs_parallel(self.target, 2, 2 * self.tiles * self.problem.c * self.problem.o)
        by_tiles = parallel and point.divide == "tiles" and blocks > 1
        by_channels = parallel and not by_tiles
        with loop(blocks, parallel=by_tiles) as block:
            base = tirx.min(block * point.block, self.tiles - point.block)
            self.fresh = block * point.block  # the first tile that no block before has computed
            v = workspace(point.block * self.strides[1])
            whole, rest = divmod(self.problem.o, point.panel)
            kept: dict = {}
            for source, branches in enumerate(self.groups):
                with loop(point.block, parallel=by_channels) as tile:
                    self._transform_input(v, base, tile, source)
                if source + 1 < len(self.groups):
                    kept |= {b: self._keep(whole + bool(rest)) for b in branches}
                with loop(whole, parallel=by_channels) as panel:
                    self._emit_panel(v, base, panel, point.panel, branches, kept)
                if rest:
                    at = tirx.const(whole, "int32")
                    self._emit_panel(v, base, at, rest, branches, kept)

    def _keep(self, panels: int):
        """A buffer for a branch's results, for a block of tiles and so many panels, until the last branch is there."""
        return workspace(self.point.block, self.point.m**2, panels * self.point.panel)

    def source(self, value, index: int):
        """What source `index` is made of, from a vector of x."""
        return value

    def combine(self, values: list, channel):
        """The outputs at `channel`, a vector of indices, from those of the branches."""
        return values[0]

    def _transform_input(self, v, base, tile, source: int) -> None:
        """v[tile, e, c] = (B^T d B)[e] of tile `base + tile` of a source."""
        p, size = self.problem, self.size
        n, i, j = unravel(base + tile, p.tiles(self.point.m))
        top, left = i * self.point.m - p.padding[0], j * self.point.m - p.padding[1]
        row = Row(p.c, self.target.lanes)

        def emit(pixel: Callable) -> None:
            def body(channel, _slot, _fresh):
                lane = ramp(channel, row.lanes)

                def load(q, t):
                    return self.source(pixel(q, t, lane), source)

                for q, t, value in transform(self.bt, load, row.lanes):
                    at = tile * self.strides[1] + (q * size + t) * self.strides[0] + channel
                    T.buffer_store(v, value, [ramp(at, row.lanes)])

            row.each(body, 1)

        inside = tirx.all(top >= 0, left >= 0, top + size <= p.h, left + size <= p.w)
        with T.If(inside):
            with T.Then():
                emit(lambda q, t, lane: self.x[n, top + q, left + t, lane])
            with T.Else():
                patch = self._padded_tile(n, top, left, row)
                emit(lambda q, t, lane: patch[q, t, lane])

    def _padded_tile(self, n, top, left, row: Row):
        """A buffer with the input tile at (top, left), zeros where it reaches beyond the image."""
        p, size = self.problem, self.size
        patch = workspace(size, size, p.c)
        with T.serial(0, size) as q:
            with T.serial(0, size) as t:
                y, x = top + q, left + t

                def fill(value: Callable) -> None:
                    def body(channel, _slot, _fresh):
                        lane = ramp(channel, row.lanes)
                        T.buffer_store(patch, value(lane), [q, t, lane])

                    row.each(body, 1)

                with T.If(tirx.all(y >= 0, x >= 0, y < p.h, x < p.w)):
                    with T.Then():
                        fill(lambda lane: self.x[n, y, x, lane])
                    with T.Else():
                        fill(lambda lane: splat(0.0, row.lanes))
        return patch

    def _emit_panel(
        self, v, base, panel, channels: int, branches: tuple[int, ...], kept: dict
    ) -> None:
        """The output channels of one panel (its first `channels`) for a block of tiles: branches of one source."""
        point, lanes = self.point, self.point.lanes
        vectors = -(-channels // lanes)
        product = workspace(point.block * self.product_strides[1])
        multiply = self._multiply_plain if point.chunk else self._multiply
        tile = Tile(point.rows, self.size if point.chunk else vectors, lanes)
        acc = tile.allocate()
        # Of another source: for all panels. Of this one: for this panel.
        kept = {b: (buffer, panel * point.panel) for b, buffer in kept.items()}
        for branch in branches:
            if branch not in kept and branch != self.last:
                kept[branch] = (self._keep(1), 0)
            multiply(tile, acc, v, product, panel, branch)
            with T.serial(0, point.block) as t:

                def store(offset, width, t=t, branch=branch):
                    self._transform_output(product, base, t, panel, offset, width, branch, kept)

                if channels == point.panel:
                    with T.serial(0, vectors) as vector:
                        store(vector * lanes, lanes)
                else:
                    for offset, width in covering(channels, lanes):
                        store(offset, width)

    @property
    def last(self) -> int:
        """The branch with which the others are combined."""
        return self.groups[-1][-1]

    def _multiply(self, tile: Tile, acc: list, v, product, panel, branch: int) -> None:
        """product[tile, e, o] = sum over c of v[tile, e, c] * u[panel, e, c, o], u being the branch's."""
        point, size, lanes = self.point, self.size, self.point.lanes
        steps = -(-point.block // point.rows)
        with T.serial(0, size**2) as e:
            at_u = e + branch * size**2 if branch else e
            with T.serial(0, steps) as step:
                first = tirx.min(step * point.rows, point.block - point.rows)

                def left(r, k):
                    return v[(first + r) * self.strides[1] + e * self.strides[0] + k]

                tile.multiply(
                    acc, self.problem.c, left, lambda k, t: self.u[panel, at_u, k, ramp(t * lanes, lanes)],
                    lambda k: self._prefetch(panel, at_u, step * self.problem.c + k, steps),
                )  # fmt: skip
                for r, t in tile.cells():
                    at = (first + r) * self.product_strides[1] + e * self.product_strides[0]
                    T.buffer_store(product, acc[r][tile.at(t)], [ramp(at + t * lanes, lanes)])

    def _prefetch(self, panel, e, iteration, steps: int) -> None:
        """Ask for the matrix of weights after (panel, e), spread over the iterations that use this one."""
        each = -(-self.point.panel // (_LINE * steps))
        for line in range(each):
            # Past the end of axis 2 lies the next matrix.
            prefetch(self.u[panel, e, self.problem.c, (iteration * each + line) * _LINE])

    def _multiply_plain(self, tile: Tile, acc: list, v, product, panel, branch: int) -> None:
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
                        weights = self._transform_weights(panel, channel, i, tile.lanes)
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
        lines = -(-9 * lanes // _LINE)
        for line in range(i * lines // self.size, (i + 1) * lines // self.size):
            # Past the end of axis 1 lies the next panel.
            prefetch(self.u[panel, channel + self.point.chunk, 0, line * _LINE], near=True)
        return [T.bind(value) for value in linear(self.g, half, lanes)]

    def _transform_output(
        self, product, base, tile, panel, offset, lanes: int, branch: int, kept: dict
    ) -> None:
        """A^T M A of one tile for `lanes` channels of a panel: kept, or combined with what was kept and stored."""
        p, m, size = self.problem, self.point.m, self.size
        height, width = p.output_hw
        n, i, j = unravel(base + tile, p.tiles(m))
        start = tile * self.product_strides[1] + offset

        def load(q, t):
            return product[ramp(start + (q * size + t) * self.product_strides[0], lanes)]

        channel = ramp(panel * self.point.panel + offset, lanes)
        for r, s, value in transform(self.at, load, lanes):
            found = T.bind(value)
            at = {b: (tile, r * m + s, ramp(c + offset, lanes)) for b, (_, c) in kept.items()}
            if branch != self.last:
                T.buffer_store(kept[branch][0], found, list(at[branch]))
                continue
            values = {b: buffer[at[b]] for b, (buffer, _) in kept.items()} | {branch: found}
            result = self.combine([values[b] for b in sorted(values)], channel)
            y, x = i * m + r, j * m + s
            checks = [y < height] * bool(height % m) + [x < width] * bool(width % m)
            if self.kernel.in_place and self.tiles % self.point.block:
                checks.append(base + tile >= self.fresh)  # as above
            if not checks:
                self.kernel.store(result, [n, y, x, channel])
                continue
            with T.If(tirx.all(*checks)):
                with T.Then():
                    self.kernel.store(result, [n, y, x, channel])
