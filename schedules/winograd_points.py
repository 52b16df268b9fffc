# SPDX-License-Identifier: Apache-2.0
"""Problems, parameters and expected cycles of Winograd's convolution F(m x m, taps x taps), of (m+taps-1)^2 matrices.

Weights come transformed, (m+2)^2/9 times as many as the layer has, or plain, and are transformed in registers right
before their products. The former serves any number of tiles from one transform, made when the layer is packed; the
latter reads a quarter of the bytes, which pays where few tiles share each weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schedules.annotated import Annotated
from schedules.target import CpuTarget
from schedules.windows import LINE_WORDS


@dataclass(frozen=True)
class Problem(Annotated):
    """A convolution of a square kernel; `padding` is (top, left, bottom, right).

    Of a stride beyond 1 each of stride^2 phases of the image's pixels meets every stride-th tap alone: their channels
    side by side are an image of stride 1 and fewer taps. Such an image is planar, [N, C, H, W]; others are [N, H, W, C].
    """

    n: int
    h: int
    w: int
    c: int
    o: int
    padding: tuple[int, int, int, int]
    kernel: int = 3
    stride: int = 1

    @property
    def taps(self) -> int:
        """Of a phase, in either direction; those that the kernel lacks are zero."""
        return -(-self.kernel // self.stride)

    @property
    def depth(self) -> int:
        """Channels of all phases."""
        return self.stride**2 * self.c

    @property
    def output_hw(self) -> tuple[int, int]:
        (top, left, bottom, right), k = self.padding, self.kernel
        height, width = self.h + top + bottom - k, self.w + left + right - k
        return height // self.stride + 1, width // self.stride + 1

    def size(self, m: int) -> int:
        """Extent of a tile of the input, whose square is the number of matrices."""
        return m + self.taps - 1

    def tiles(self, m: int) -> tuple[int, int, int]:
        """Images, tile rows, tile columns."""
        height, width = self.output_hw
        return self.n, -(-height // m), -(-width // m)


@dataclass(frozen=True)
class Point(Annotated):
    """Parameters: output tile `m`; `block` tiles transformed together; register tile of `rows` tiles by `vectors`
    vectors of `lanes` output channels; `divide` what threads share out, "tiles" (blocks) or "channels" (panels).

    `chunk` 0: weights are packed transformed. Otherwise they are packed plain, and the register tile is `rows` tiles by
    the m+2 entries of a row of matrices, of one vector of channels; `chunk` input channels at a time pass through it
    for all rows, so that their weights stay in the first-level cache. `rows` divides `block` then.

    `order`: whether the (m+2)^2 matrices of the input pass through one "panels" of weights after another, which suits
    weights that stay near, or the panels through one of the "entries" after another, which reads each matrix once.
    `quadratic_winograd` has a third, "rows" of entries (`winograd_rows`)."""

    m: int
    block: int
    rows: int
    vectors: int
    lanes: int
    divide: str = "tiles"
    chunk: int = 0
    order: str = "panels"

    @property
    def panel(self) -> int:
        """Output channels of a panel of weights."""
        return self.vectors * self.lanes


def strides(size: int, channels: int) -> tuple[int, int]:
    """Floats between a tile's (m+2)^2 vectors of channels, in whole lines, and between tiles: an odd number of lines,
    for the rows of a register tile must not share a few cache sets."""
    lines = -(-channels // LINE_WORDS)
    return LINE_WORDS * lines, LINE_WORDS * (size * size * lines | 1)


def default_point(problem: Problem, m: int, target: CpuTarget, branches: int = 1) -> Point:
    """The point that is expected to be fastest: weights packed transformed, or transformed as they are used."""
    points = [transformed_point(problem, m, target, branches)]
    if problem.stride == 1:
        points.append(transforming_point(problem, m, target))
    return min(points, key=lambda point: cost(problem, point, target, 1, branches))


def transformed_point(problem: Problem, m: int, target: CpuTarget, branches: int = 1) -> Point:
    """For weights packed transformed: block and register tile with the least padding, and fewer blocks where each must
    fetch the weights anew.

    A block's matrices share the second-level cache with what streams through it: 45 % of it if the weights stay there
    too, 70 % if they do not anyway. Several branches of weights (see `winograd.Emitter`) go through the same matrices
    in turn.
    """
    lanes = target.lanes
    channel_vectors = -(-problem.o // lanes)
    # Of few input channels products are short, and storing them and what is read again to transform them back is most of
    # the work: wide panels, for which the input is transformed once, and blocks that stay near.
    few = problem.depth <= lanes
    widths = (4, 3, 2) if few else (2, 3)
    vectors = next((v for v in widths if channel_vectors % v == 0), min(2, channel_vectors))
    most_rows = min(14, (target.registers - 2 - vectors) // vectors)
    tiles, size = int(np.prod(problem.tiles(m))), problem.size(m)
    resident = 4 * size**2 * problem.depth * problem.o * branches <= target.l2_bytes
    bytes_per_tile = 4 * (strides(size, problem.depth)[1] + strides(size, vectors * lanes)[1])
    most_tiles = max(
        most_rows,
        int((0.3 if few else 0.45 if resident else 0.7) * target.l2_bytes) // bytes_per_tile,
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
    order = "panels" if resident else "entries"
    return Point(m, block, rows, vectors, lanes, _divide(tiles, block, target), 0, order)


def transforming_point(problem: Problem, m: int, target: CpuTarget) -> Point:
    """For weights packed plain: blocks of whole register tiles with the least work, chunks of a third of the
    first-level cache."""
    lanes, size = target.lanes, m + 2
    tiles = int(np.prod(problem.tiles(m)))
    # Beside the sums: a row of transformed weights, and one product of it.
    most_rows = max(1, (target.registers - size - 2) // size)
    most_tiles = int(0.4 * target.l2_bytes) // (4 * strides(size, problem.c)[1])
    # Fetching a row's part of the weights anew, in multiply-adds, two of which take a cycle.
    fetch = 2 * 4 * 9 * lanes / size / _WEIGHT_BYTES_PER_CYCLE

    def work(candidate: tuple[int, int]) -> tuple:
        block, rows = candidate
        blocks = -(-tiles // block)
        return (
            blocks * (block // rows * (rows * size + _transform_steps(m)) + fetch),
            -rows,
            block,
        )

    candidates = [
        (rows * count, rows)
        for rows in range(1, min(most_rows, tiles) + 1)
        for count in range(1, max(1, min(tiles, most_tiles) // rows) + 1)
    ]
    block, rows = min(candidates, key=work)
    fitting = max(1, int(0.3 * target.l1_bytes) // (4 * 9 * lanes))
    chunk = next((c for c in range(fitting, fitting // 2, -1) if problem.c % c == 0), fitting)
    divide = _divide(tiles, block, target)
    return Point(m, block, rows, 1, lanes, divide, min(chunk, problem.c))


def _divide(tiles: int, block: int, target: CpuTarget) -> str:
    blocks = -(-tiles // block)
    by_tiles = blocks >= 3 * target.threads or blocks % target.threads == 0
    return "tiles" if by_tiles else "channels"


def _transform_steps(m: int) -> float:
    """Multiply-adds that make a vector of each of a row's m+2 entries from nine weights, mean of the rows."""
    return 6 * m / (m + 2) + 1.5 * m


# Cycles per vector and matrix entry of an input or output transform; bytes of weights per cycle from memory, half of whose
# time prefetching hides; share of the multiply-add peak that the products and the direct kernel reach. Fitted to layers of
# a ResNet-18, timed inside the network with AVX-512, and to products alone at 14 pixels (F(2x2) 0.97 ms, F(3x3) 0.81,
# F(4x4) 1.0); within 25 %.
_TRANSFORM_CYCLES = 5.0
_WEIGHT_BYTES_PER_CYCLE = 8.0
_TRANSFORMED_EFFICIENCY, _DIRECT_EFFICIENCY = 0.9, 0.95
_PLAIN_EFFICIENCY, _PLAIN_EFFICIENCY_OF_MORE = 0.65, 0.5  # of one register tile, of several


def cost(
    problem: Problem, point: Point, target: CpuTarget, sources: int = 1, branches: int = 1
) -> float:
    """Estimated cycles of the kernel at `point` on one core, weights not in cache."""
    m, lanes = point.m, target.lanes
    tiles, entries = int(np.prod(problem.tiles(m))), problem.size(m) ** 2
    panels = -(-problem.o // point.panel) * point.panel
    vectors = (
        tiles * entries * (sources * -(-problem.depth // lanes) + branches * -(-problem.o // lanes))
    )
    blocks, steps = -(-tiles // point.block), -(-point.block // point.rows)
    if point.chunk:
        per_tile = (m + 2) * (point.rows * (m + 2) + _transform_steps(m)) * problem.c
        efficiency = _PLAIN_EFFICIENCY if blocks * steps == 1 else _PLAIN_EFFICIENCY_OF_MORE
        products = per_tile * panels / (2 * lanes * efficiency)
        weights = blocks * 4 * 9 * problem.c * panels / _WEIGHT_BYTES_PER_CYCLE
    else:
        per_tile = point.rows * entries * problem.depth
        products = per_tile * panels / (2 * lanes * _TRANSFORMED_EFFICIENCY)
        weights = 4 * entries * problem.depth * panels / _WEIGHT_BYTES_PER_CYCLE
    return branches * (blocks * steps * products + weights) + vectors * _TRANSFORM_CYCLES


def direct_cost(problem: Problem, target: CpuTarget) -> float:
    """Estimated cycles of the direct convolution on one core, weights not in cache."""
    height, width = problem.output_hw
    outputs = -(-problem.o // target.lanes) * target.lanes
    weights = problem.kernel**2 * problem.c * outputs
    products = problem.n * height * width * weights
    products /= 2 * target.lanes * _DIRECT_EFFICIENCY
    return products + 4 * weights / _WEIGHT_BYTES_PER_CYCLE
