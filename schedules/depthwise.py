# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution: vectors of channels, several output pixels of a row in registers.

    Y[n, oh, ow, c] = sum over r, s of X[n, oh*sh + r*dh - top, ow*sw + s*dw - left, c] * W[r, s, c]

Every loaded vector of the input serves all the pixels and taps of the tile that want it (`ChannelTiles`, which pooling
shares). There is no padded copy of the input, see `windows`. Of images beyond the second-level cache the rows below are
fetched ahead.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated
from schedules.fused import Emission, Fused
from schedules.target import CpuTarget
from schedules.windows import (
    LINE_BYTES,
    Problem,
    RowTiles,
    kernel_rows,
    loop,
    prefetch,
    span,
    splat,
    tile_rows,
    vectors,
)

_NEAR = 0.8  # share of the second-level cache up to which an image is still there when it is read


@dataclass(frozen=True)
class Point(Annotated):
    """`mr` output pixels of a row x `nv` vectors of channels in registers; `lanes` float32 in a vector."""

    lanes: int
    mr: int
    nv: int


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """As many pixels as leave registers for one kernel row of weights and one input vector."""
    nv = 2 if len(vectors(problem.c, target.lanes)) % 2 == 0 and target.registers >= 32 else 1
    largest = max(1, min(8, (target.registers - 2 - nv * problem.s) // nv))
    return Point(target.lanes, tile_rows(problem.ow, largest), nv)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused depthwise convolution."""
    problem, point = (
        Problem.from_dict(fused.point["problem"]),
        Point.from_dict(fused.point["point"]),
    )
    with fused.emit() as kernel:
        _Depthwise(kernel, problem, point).emit(target)
    return kernel.func


@dataclass(frozen=True)
class Taps:
    """What a tile's window sees: kernel rows [first, last) inside the image, and `edge` as in `RowTiles`."""

    first: object
    last: object
    edge: int | None


class ChannelTiles:
    """Emission of a window reduced per channel. A subclass says how: `dtype` (of the registers), `start`, `combine`, `finish`.

    Of `orders` views of each vector, one is taken by all pixels before the next: their sums do not wait for each other.
    """

    dtype = "float32"
    orders = 1

    def __init__(self, kernel: Emission, problem: Problem, point: Point):
        self.kernel, self.problem, self.point = kernel, problem, point
        self.x = kernel.inputs[0]
        self.row = RowTiles(problem, point.mr, problem.ow)
        self.element_bytes = tvm.DataType(self.x.dtype).bits // 8

    def start(self) -> float:
        """What a register holds before the first value."""
        raise NotImplementedError

    def view(self, value, order: int):
        """A vector of the input as its view number `order` has it."""
        return value

    def combine(self, held, value, r, s: int, channels, order: int):
        """`held` with the view `order` of an input vector taken in, seen through tap (r, s) at the ramp `channels`."""
        raise NotImplementedError

    def finish(self, held, taps: Taps, pixel: int):
        """The result from the register of the tile's pixel number `pixel`."""
        return held

    def emit(self, target: CpuTarget) -> None:
        problem = self.problem
        size = problem.n * problem.h * problem.w * problem.c * self.element_bytes
        self.is_far = size > _NEAR * target.l2_bytes
        with loop(problem.n * problem.oh, target.threads > 1) as u:
            image, oh = (
                (0, u)
                if problem.n == 1
                else (tirx.floordiv(u, problem.oh), tirx.floormod(u, problem.oh))
            )
            first, last = kernel_rows(problem, oh)
            self.row.each(
                lambda _, base, edge: self._channels(image, oh, base, Taps(first, last, edge))
            )

    def _channels(self, image, oh, base, taps: Taps) -> None:
        """All channels of one tile of pixels, full groups of vectors in a loop, the rest after it."""
        width = self.point.nv * self.point.lanes
        full, rest = divmod(self.problem.c, width)
        if full:
            with T.serial(0, full) as q:
                self._tile(image, oh, base, taps, q * width, width)
        if rest:
            self._tile(image, oh, base, taps, full * width, rest)

    def _tile(self, image, oh, base, taps: Taps, channel, width: int) -> None:
        problem, mr = self.problem, self.point.mr
        # Nothing is packed here, so a vector may not reach past the last channel: it has as many lanes as are stored.
        widths = [stored for _, stored in vectors(width, self.point.lanes)]
        registers = [[T.alloc_buffer((lanes,), self.dtype) for lanes in widths] for _ in range(mr)]
        start = tirx.const(self.start(), self.dtype)
        for pixel in registers:
            for lanes, register in zip(widths, pixel):
                T.buffer_store(register, splat(start, lanes), [span(0, lanes)])
        if self.is_far:
            self._prefetch_output(image, oh, base, channel, width)
        with T.serial(taps.first, taps.last) as r:
            ih = oh * problem.stride[0] + r * problem.dilation[0] - problem.padding[0]
            if self.is_far:
                self._prefetch_below(image, oh, r, base, channel, width)
            columns = sorted(self._columns(taps.edge).items())
            for order, (offset, users) in itertools.product(range(self.orders), columns):
                iw = base * problem.stride[1] + offset
                for v, lanes in enumerate(widths):
                    lane, channels = span(0, lanes), span(channel + v * self.point.lanes, lanes)
                    for p, s in users:
                        held, value = registers[p][v][lane], self.x[image, ih, iw, channels]
                        value = self.view(value, order)
                        result = self.combine(held, value, r, s, channels, order)
                        T.buffer_store(registers[p][v], result, [lane])
        for p, pixel in enumerate(registers):
            for v, lanes in enumerate(widths):
                value = self.finish(pixel[v][span(0, lanes)], taps, p)
                self.kernel.store(
                    value, [image, oh, base + p, span(channel + v * self.point.lanes, lanes)]
                )

    def _prefetch_output(self, image, oh, base, channel, width: int) -> None:
        """Ask for the lines that the tile will write."""
        output = self.kernel.output
        line = LINE_BYTES * 8 // tvm.DataType(output.dtype).bits
        for p in range(self.point.mr):
            for c in range(0, width, line):
                prefetch(output[image, oh, base + p, channel + c])

    def _prefetch_below(self, image, oh, r, base, channel, width: int) -> None:
        """Ask for what the next row of tiles reads below the windows of this one: a part in each kernel row."""
        problem, line = self.problem, LINE_BYTES // self.element_bytes
        (sh, sw), (top, left, _, _) = problem.stride, problem.padding
        below = oh * sh + (problem.r - 1) * problem.dilation[0] + 1 - top
        part = -(-self.point.mr * sw // problem.r)
        for row in range(min(sh, problem.r)):
            for i in range(part):
                column = base * sw - left + r * part + i
                for c in range(0, width, line):
                    prefetch(self.x[image, below + row, column, channel + c])

    def _columns(self, edge: int | None) -> dict[int, list[tuple[int, int]]]:
        """Input column, relative to the tile's first pixel times the stride -> the (pixel, tap) pairs that read it."""
        problem = self.problem
        users: dict[int, list[tuple[int, int]]] = {}
        for s in range(problem.s):
            for p in range(self.point.mr) if edge is None else self.row.taps_inside(edge, s):
                column = p * problem.stride[1] + s * problem.dilation[1] - problem.padding[1]
                users.setdefault(column, []).append((p, s))
        return users


class _Depthwise(ChannelTiles):
    def start(self) -> float:
        return 0.0

    def combine(self, held, value, r, s: int, channels, order: int):
        return held + value * self.kernel.inputs[1][r, s, channels]
