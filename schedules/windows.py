# SPDX-License-Identifier: Apache-2.0
"""Sliding windows over NHWC images: the geometry that contraction, depthwise convolution and pooling share.

Padding is never copied. A window's rows outside the image shorten its loop over kernel rows (`kernel_rows`); its columns
outside the image are left out of the edge tiles when these are generated (`RowTiles`). Where a row of pixels is no
multiple of the tile, the last tile overlaps the one before it; both write the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated

LINE_BYTES = 64  # of a cache line
LINE_WORDS = LINE_BYTES // 4  # floats of one, or other numbers of 32 bits


@dataclass(frozen=True)
class Problem(Annotated):
    """X [n, h, w, c] (*) W [o, c/groups, r, s]; a dense layer with M rows is n = h = 1, w = M."""

    n: int
    h: int
    w: int
    c: int
    o: int
    r: int = 1
    s: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def oh(self) -> int:
        reach = self.dilation[0] * (self.r - 1)
        return (self.h + self.padding[0] + self.padding[2] - reach - 1) // self.stride[0] + 1

    @property
    def ow(self) -> int:
        reach = self.dilation[1] * (self.s - 1)
        return (self.w + self.padding[1] + self.padding[3] - reach - 1) // self.stride[1] + 1

    @property
    def group_inputs(self) -> int:
        return self.c // self.groups

    @property
    def group_outputs(self) -> int:
        return self.o // self.groups

    @property
    def steps(self) -> int:
        """Terms of the sum of one output."""
        return self.r * self.s * self.group_inputs

    @property
    def flat(self) -> bool:
        """Whether output pixel i reads exactly input pixel i, so that tiles may run across rows and images."""
        return (self.r, self.s, self.stride) == (1, 1, (1, 1)) and not any(self.padding)

    @property
    def row(self) -> int:
        """Pixels in a row of tiles."""
        return self.n * self.h * self.w if self.flat else self.ow

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return 1 if self.flat else self.n * self.oh


def vectors(channels: int, lanes: int) -> tuple[tuple[int, int], ...]:
    """(lanes computed, lanes stored) of the vectors covering `channels`; only the last may be narrower."""
    widths = [(lanes, lanes)] * (channels // lanes)
    if rest := channels % lanes:
        widths.append((min(lanes, max(4, 1 << (rest - 1).bit_length())), rest))
    return tuple(widths)


def tile_rows(row: int, largest: int) -> int:
    """The tile that covers `row` pixels with as few tiles as `largest` would and overlaps least."""
    tiles = -(-row // max(1, min(row, largest)))
    return -(-row // tiles)


def span(start, lanes: int):
    """The indices start, ..., start + lanes - 1, as the index of a vector or, for one lane, of a scalar."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def splat(value, lanes: int):
    """`value` in every lane of a vector; itself for one lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def loop(extent: int, parallel: bool = False):
    """A loop frame over `extent`."""
    return T.parallel(0, extent) if parallel else T.serial(0, extent)


def prefetch(element, write: bool = False, near: bool = False) -> None:
    """Ask for the cache line of a buffer's element, in the second-level cache or, to write it or if `near`, the first.

    The address may lie outside the buffer: then it does nothing.
    """
    hints = (T.int32(int(write)), T.int32(3 if write or near else 2), T.int32(1))
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", tirx.address_of(element), *hints))


def unravel(index, shape: tuple[int, ...]) -> list:
    """The indices of flat position `index` in `shape`; dimensions of 1 get the constant 0."""
    out: list = []
    inner = math.prod(shape)
    first = True
    for extent in shape:
        inner //= extent
        if extent == 1:
            out.append(0)
            continue
        part = tirx.floordiv(index, inner) if inner > 1 else index
        out.append(part if first else tirx.floormod(part, extent))
        first = False
    return out


def kernel_rows(problem: Problem, oh) -> tuple:
    """First and one past the last kernel row that lies inside the image for output row `oh`."""
    step, dilation, top = problem.stride[0], problem.dilation[0], problem.padding[0]
    first, last = 0, problem.r
    if top > 0:
        first = tirx.max(0, tirx.floordiv(top - oh * step + dilation - 1, dilation))
    if (problem.oh - 1) * step - top + (problem.r - 1) * dilation >= problem.h:
        last = tirx.min(
            problem.r, tirx.floordiv(problem.h + top - oh * step + dilation - 1, dilation)
        )
    return first, last


class RowTiles:
    """Tiles of `mr` pixels covering `length` pixels: a row of output, or all pixels of a flat problem."""

    def __init__(self, problem: Problem, mr: int, length: int):
        self.problem, self.mr, self.length = problem, mr, length
        self.count = -(-length // mr)

    def base(self, tile):
        """First pixel of tile number `tile`."""
        last = self.length - self.mr
        if isinstance(tile, int):
            return min(tile * self.mr, last)
        return tile * self.mr if self.length % self.mr == 0 else tirx.min(tile * self.mr, last)

    def taps_inside(self, base: int, s: int) -> list[int]:
        """Pixels of the tile at column `base` whose tap `s` lies inside the image."""
        p = self.problem
        offset = s * p.dilation[1] - p.padding[1]
        return [i for i in range(self.mr) if 0 <= (base + i) * p.stride[1] + offset < p.w]

    def _touches_padding(self, tile: int) -> bool:
        taps = range(self.problem.s)
        return any(len(self.taps_inside(self.base(tile), s)) < self.mr for s in taps)

    def each(self, body: Callable) -> None:
        """`body(tile, base, edge)` for all tiles; `edge` is the column of a tile that touches padding, else None.

        Tiles that touch no padding are emitted once, in a loop; the others one by one.
        """
        inner = [t for t in range(self.count) if not self._touches_padding(t)]
        for t in range(self.count):
            if t not in inner:
                body(t, self.base(t), self.base(t))
            elif t - 1 not in inner:  # inner tiles are consecutive: padding is at the ends of a row
                run = next(stop for stop in range(t, self.count + 1) if stop not in inner) - t
                if run == 1:
                    body(t, self.base(t), None)
                else:
                    with T.serial(t, t + run) as i:
                        body(i, self.base(i), None)
