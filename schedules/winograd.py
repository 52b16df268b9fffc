# SPDX-License-Identifier: Apache-2.0
"""Winograd convolution F(m x m, 3 x 3): definition and kernel for 3x3, stride 1, no dilation, one group, NHWC.

    y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A       per (m+2)^2 input tile d and m^2 output tile

The image is cut into tiles; a block of tiles is transformed into (m+2)^2 matrices [tiles, C], each multiplied by its
[C, O] matrix of transformed weights, a panel of output channels at a time, and transformed back into the epilogue.
A block's matrices stay in the second-level cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated
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
from schedules.target import CpuTarget
from schedules.winograd_transforms import matrices, transform

LOOPS = "winograd"
STAGES = 6  # blocks of the definition
_LINE = 16  # floats in a cache line


@dataclass(frozen=True)
class Problem(Annotated):
    """A 3x3 convolution of stride 1; `padding` is (top, left, bottom, right)."""

    n: int
    h: int
    w: int
    c: int
    o: int
    padding: tuple[int, int, int, int]

    @property
    def output_hw(self) -> tuple[int, int]:
        top, left, bottom, right = self.padding
        return self.h + top + bottom - 2, self.w + left + right - 2

    def tiles(self, m: int) -> tuple[int, int, int]:
        """Images, tile rows, tile columns."""
        height, width = self.output_hw
        return self.n, -(-height // m), -(-width // m)


@dataclass(frozen=True)
class Point(Annotated):
    """Parameters: output tile `m`; `block` tiles transformed together; register tile of `rows` tiles by `vectors`
    vectors of `lanes` output channels; `divide` what threads share out, "tiles" (blocks) or "channels" (panels)."""

    m: int
    block: int
    rows: int
    vectors: int
    lanes: int
    divide: str = "tiles"

    @property
    def panel(self) -> int:
        """Output channels of a panel of weights."""
        return self.vectors * self.lanes


def pack_weights(weight: np.ndarray, point: Point) -> np.ndarray:
    """[O, C, 3, 3] -> float32 [panels, (m+2)^2, C, panel], transformed in float64, zeros in the last panel's rest."""
    outputs, inputs = weight.shape[:2]
    size = point.m + 2
    g = matrices(point.m)[1]
    transformed = np.einsum("ai,bj,ocij->aboc", g, g, weight.astype(np.float64)).reshape(
        size * size, outputs, inputs
    )
    panels = -(-outputs // point.panel)
    full = np.zeros((size * size, panels * point.panel, inputs), np.float32)
    full[:, :outputs] = transformed
    split = full.reshape(size * size, panels, point.panel, inputs)
    return np.ascontiguousarray(split.transpose(1, 0, 3, 2))


def default_point(problem: Problem, m: int, target: CpuTarget, branches: int = 1) -> Point:
    """Block and register tile with the least padding, and fewer blocks where each must fetch the weights anew.

    A block's matrices share the second-level cache with what streams through it: 45 % of it if the weights stay there
    too, 70 % if they do not anyway. Several branches of weights (see `Emitter`) go through the same matrices in turn.
    """
    lanes = target.lanes
    channel_vectors = -(-problem.o // lanes)
    vectors = next((v for v in (2, 3) if channel_vectors % v == 0), min(2, channel_vectors))
    most_rows = min(14, (target.registers - 2 - vectors) // vectors)
    tiles = int(np.prod(problem.tiles(m)))
    resident = 4 * (m + 2) ** 2 * problem.c * problem.o * branches <= target.l2_bytes
    bytes_per_tile = 4 * (_strides(m + 2, problem.c)[1] + _strides(m + 2, vectors * lanes)[1])
    most_tiles = max(
        most_rows, int((0.45 if resident else 0.7) * target.l2_bytes) // bytes_per_tile
    )
    # Fetching the weights once, in rows of a register tile's work: 8 bytes a cycle from the next cache.
    fetch = 3 if resident else lanes

    def padded_rows(candidate: tuple[int, int]) -> tuple:
        block, rows = candidate
        return (-(-tiles // block) * (-(-block // rows) * (rows + 0.5) + fetch), -rows, block)

    candidates = [
        (b, r)
        for b in range(1, min(tiles, most_tiles) + 1)
        for r in range(1, min(most_rows, b) + 1)
    ]
    block, rows = min(candidates, key=padded_rows)
    blocks = -(-tiles // block)
    by_tiles = blocks >= 3 * target.threads or blocks % target.threads == 0
    return Point(m, block, rows, vectors, lanes, "tiles" if by_tiles else "channels")


# Cycles per vector and matrix entry of an input or output transform; bytes of weights per cycle from memory; share of
# the multiply-add peak that these products and the direct kernel reach. Fitted to the ratios measured on 12 layers of
# 7 to 56 pixels and 32 to 512 channels, AVX-512, weights not in cache: within 20 %, and 10 % where the choice is close.
_TRANSFORM_CYCLES = 5.0
_WEIGHT_BYTES_PER_CYCLE = 4.0
_PRODUCT_EFFICIENCY, _DIRECT_EFFICIENCY = 0.9, 0.95


def cost(problem: Problem, m: int, target: CpuTarget, sources: int = 1, branches: int = 1) -> float:
    """Estimated cycles of F(m x m) on one core, weights not in cache."""
    point = default_point(problem, m, target, branches)
    tiles, entries, lanes = int(np.prod(problem.tiles(m))), (m + 2) ** 2, target.lanes
    panels = -(-problem.o // point.panel) * point.panel
    computed = -(-tiles // point.block) * -(-point.block // point.rows) * point.rows
    products = computed * entries * problem.c * panels / (2 * lanes * _PRODUCT_EFFICIENCY)
    vectors = (
        tiles * entries * (sources * -(-problem.c // lanes) + branches * -(-problem.o // lanes))
    )
    weights = branches * 4 * entries * problem.c * panels / _WEIGHT_BYTES_PER_CYCLE
    return branches * products + vectors * _TRANSFORM_CYCLES + weights


def direct_cost(problem: Problem, target: CpuTarget) -> float:
    """Estimated cycles of the direct convolution on one core, weights not in cache."""
    height, width = problem.output_hw
    outputs = -(-problem.o // target.lanes) * target.lanes
    products = (
        problem.n
        * height
        * width
        * 9
        * problem.c
        * outputs
        / (2 * target.lanes * _DIRECT_EFFICIENCY)
    )
    return products + 4 * 9 * problem.c * outputs / _WEIGHT_BYTES_PER_CYCLE


def define_winograd(x, u, problem: Problem, point: Point):
    """te: x [N, H, W, C], u from `pack_weights` -> [N, OH, OW, O]."""
    notes = annotations(LOOPS, problem=problem.to_dict(), point=point.to_dict())
    return define_stages(x, u, problem, point, "winograd", notes)


def define_stages(
    x, u, problem: Problem, point: Point, name: str, notes: dict | None = None, first: int = 0
):
    """The definition's blocks, the last called `name`; u's matrices begin at `first` on its second axis."""
    m, size = point.m, point.m + 2
    bt, _, at = matrices(m)
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
    k = te.reduce_axis((0, problem.c), "k")
    product = te.compute(
        (*tile, problem.o),
        lambda b, r, s, i, j, o: te.sum(
            v(b, r, s, i, j, k) * u(o // point.panel, first + i * size + j, k, o % point.panel),
            axis=k,
        ),
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
    with emitting(fused, STAGES) as (kernel, (x, u)):
        Emitter(kernel, problem, point, target, x, u).emit()
    return kernel.func


def _strides(size: int, channels: int) -> tuple[int, int]:
    """Floats between a tile's (m+2)^2 vectors of channels, in whole lines, and between tiles: an odd number of lines,
    for the rows of a register tile must not share a few cache sets."""
    lines = -(-channels // _LINE)
    return _LINE * lines, _LINE * (size * size * lines | 1)


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
        self.strides = _strides(self.size, self.problem.c)
        self.product_strides = _strides(self.size, self.point.panel)
        self.bt, _, self.at = matrices(self.point.m)

    def emit(self) -> None:
        point = self.point
        blocks = -(-self.tiles // point.block)
        parallel = runs_parallel(self.target, 2, 2 * self.tiles * self.problem.c * self.problem.o)
        by_tiles = parallel and point.divide == "tiles" and blocks > 1
        by_channels = parallel and not by_tiles
        with loop(blocks, parallel=by_tiles) as block:
            base = tirx.min(block * point.block, self.tiles - point.block)
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
        tile = Tile(point.rows, vectors, lanes)
        product = workspace(point.block * self.product_strides[1])
        acc = tile.allocate()
        # Of another source: for all panels. Of this one: for this panel.
        kept = {b: (buffer, panel * point.panel) for b, buffer in kept.items()}
        for branch in branches:
            if branch not in kept and branch != self.last:
                kept[branch] = (self._keep(1), 0)
            self._multiply(tile, acc, v, product, panel, branch)
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
            address = tirx.address_of(
                self.u[panel, e, self.problem.c, (iteration * each + line) * _LINE]
            )
            T.evaluate(
                tirx.call_intrin(
                    "void", "tirx.prefetch", address, *(tirx.const(a, "int32") for a in (0, 2, 1))
                )
            )

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
            if not checks:
                self.kernel.store(result, [n, y, x, channel])
                continue
            with T.If(tirx.all(*checks)):
                with T.Then():
                    self.kernel.store(result, [n, y, x, channel])
