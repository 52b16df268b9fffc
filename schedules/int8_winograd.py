# SPDX-License-Identifier: Apache-2.0
"""Winograd convolution F(4x4, 3x3) of uint8 pixels with int8 weights in whole numbers: the sums of the direct convolution,
every bit of them.

    576 y = A^T [ sum over c of (24 G g 24 G^T) * (B^T d B) ] A      modulo 2^32

With the points 0, +-1, +-2 the matrices are integers, transformed pixels and weights fit 16 bits (at most 17340 and 18432),
and products of pairs of them are added in 32 bits, wherever they wrap. 576 is 9 * 2^6, and 9 has an inverse modulo 2^32: the
product with it is 64 y modulo 2^32, so that an arithmetic shift gives y wherever -2^25 <= y < 2^25, which the weights decide
(`sums_fit`).

There are 4 times fewer products than in the direct sum, 32 in an instruction where bytes have 64. Weights are packed as they
are: what they become is four times as many numbers of twice the size, which take longer to come from memory than to compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from schedules import int8_contraction
from schedules.annotated import Annotated
from schedules.fused import Fused
from schedules.target import CpuTarget
from schedules.terms import has_vnni
from schedules.windows import LINE_BYTES, Problem

__all__ = ["Point", "Problem", "cost", "default_point", "direct_cost", "packed_shape", "points", "schedule", "sums_fit", "tiles"]  # fmt: skip

M = 4  # outputs of a tile in either direction
SIZE = M + 2
ENTRIES = SIZE**2
PAIR = 2  # neighbouring channels that one lane of a product adds up


@dataclass(frozen=True)
class Point(Annotated):
    """Parameters: `block` tiles multiplied together; register tile of `rows` tiles by `nv` vectors of `lanes` output
    channels; `kept`, what is transformed first, once, and stays: all "weights", the pixels following block by block, or all
    "pixels", the weights following panel by panel."""

    block: int
    rows: int
    nv: int
    lanes: int
    kept: str

    @property
    def panel(self) -> int:
        return self.nv * self.lanes


def held(point: Point) -> int:
    """Tiles of a block that there is room for: a last register tile may reach beyond the block."""
    return -(-point.block // point.rows) * point.rows


def tiles(problem: Problem) -> tuple[int, int, int]:
    """Images, tile rows, tile columns."""
    return problem.n, -(-problem.oh // M), -(-problem.ow // M)


def tile_count(problem: Problem) -> int:
    return int(np.prod(tiles(problem)))


def panel_start(problem: Problem, point: Point, panel):
    """First output channel of a panel: the last one overlaps that before it, where they do not cut the channels evenly."""
    if problem.o % point.panel == 0:
        return panel * point.panel
    smaller = min if isinstance(panel, int) else tirx.min
    return smaller(panel * point.panel, problem.o - point.panel)


def packed_shape(problem: Problem, point: Point) -> tuple[int, ...]:
    """[panels, pairs of input channels, 9, bytes of a panel: the two channels of a pair side by side for each output]."""
    return (-(-problem.o // point.panel), problem.c // PAIR, 9, point.panel * PAIR)


def sums_fit(weight: np.ndarray) -> bool:
    """Whether every sum of pixels 0 to 255 with these weights [O, C, 3, 3] lies within 2^25 of 0."""
    flat = weight.reshape(len(weight), -1).astype(np.int64)
    ends = 255 * np.maximum(flat, 0).sum(1), 255 * np.maximum(-flat, 0).sum(1)
    return max(int(e.max()) for e in ends) < 2**25


def odd_lines(size: int) -> int:
    """`size` bytes rounded up to an odd number of cache lines: such a distance spreads over the sets of a cache."""
    return LINE_BYTES * (-(-size // LINE_BYTES) | 1)


# Cycles, measured on Cascade Lake (56x56x64 and 28x28x128), for a vector of results.
_INPUT_CYCLES = 125  # a tile's 36 matrices, of 16 channels
_WEIGHT_CYCLES = 220  # the same of weights, of 16 outputs of a pair of channels
_OUTPUT_CYCLES = 220  # a tile's 16 pixels of 16 channels, stored
_ISSUE = 2.65  # instructions of a product's loop in a cycle, much of what it reads coming from the second-level cache
# The direct kernel's time where bytes are widened to 16 bits first, over that of VNNI.
_WIDENED = 4.5
# Of the second-level cache: for a block's matrices beside all weights, and for a block's products beside all pixels.
_SHARES = {"weights": 0.62, "pixels": 0.85}


def _product_cycles(rows: int, nv: int, target: CpuTarget) -> float:
    """Of one pair of channels: products, broadcasts, loads of weights and the loop."""
    products = rows * nv * (1 if has_vnni(target) else 2)
    return max(products / 2, (products + rows + nv + 3) / _ISSUE)


def points(problem: Problem, target: CpuTarget) -> Iterator[Point]:
    """Register tiles that fit the registers, with whatever is kept and a block that fit the second-level cache."""
    count, lanes = tile_count(problem), target.lanes
    for nv in (n for n in (4, 2, 1) if n * lanes <= problem.o):
        panel = nv * lanes
        pixels, weights, products = (
            ENTRIES * n for n in (2 * problem.c, 2 * problem.c * panel, 4 * panel)
        )
        most = max(1, min(count, (target.registers - 1 - nv) // nv))
        for rows in range(-(-most // 2), most + 1):
            room = _SHARES["weights"] * target.l2_bytes - weights * -(-problem.o // panel)
            if (fit := int(room // (rows * (pixels + products)))) > 0:
                yield Point(min(count, fit * rows), rows, nv, lanes, "weights")
            room = _SHARES["pixels"] * target.l2_bytes - count * pixels - weights
            if (fit := int(room // (rows * products))) > 0:
                yield Point(min(count, fit * rows), rows, nv, lanes, "pixels")


def default_point(problem: Problem, target: CpuTarget) -> Point | None:
    """The point of least cost; None if transformed pixels and weights are too many for the second-level cache."""
    return min(
        points(problem, target), key=lambda point: cost(problem, point, target), default=None
    )


def cost(problem: Problem, point: Point, target: CpuTarget) -> float:
    """Estimated cycles on one core."""
    count, panels = tile_count(problem), -(-problem.o // point.panel)
    blocks, rest = divmod(count, point.block)
    steps = blocks * -(-point.block // point.rows) + -(-rest // point.rows)
    products = ENTRIES * steps * panels * problem.c / PAIR
    products *= _product_cycles(point.rows, point.nv, target)
    wide = point.lanes / 16
    weights = panels * point.nv * problem.c / PAIR * _WEIGHT_CYCLES
    pixels = count * problem.c / 16 / wide * _INPUT_CYCLES
    return products + weights + pixels + count * panels * point.nv * _OUTPUT_CYCLES


def direct_cost(problem: Problem, target: CpuTarget) -> float:
    """Estimated cycles of the direct convolution on one core."""
    quads = int8_contraction.in_quads(problem)
    point = int8_contraction.default_point(problem, target)
    row = int8_contraction.estimated_cycles(quads, point.mr, point.nv, point.sums, target)
    return row * problem.rows * (1 if has_vnni(target) else _WIDENED)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused integer convolution. Raises ScheduleError if the packed weights do not fit its parameters."""
    from schedules.int8_winograd_emitter import Emitter

    problem = Problem.from_dict(fused.point["problem"])
    point = Point.from_dict(fused.point["point"])
    with fused.emit() as kernel:
        kernel.require_packed(packed_shape(problem, point))
        Emitter(kernel, problem, point, target).emit()
    return kernel.func
