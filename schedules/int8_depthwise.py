# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution of uint8 with int8: a lane's four bytes are four pixels of one channel.

    Y[n, oh, ow, c] = sum over r, s of (X[n, oh*sh + r*dh - top, ow*sw + s*dw - left, c] - zero_point) * W[r, s, c]

Four neighbouring pixels of 4 * lanes channels are interleaved byte by byte into four registers, and one dot product takes
up to four taps of an output. Where the stride is 1 the four pixels serve two outputs, which see them through weights moved
by one byte: `slots` says which byte of which quad holds a tap. Interleaving works within 128 bits, so pixels are permuted
first, such that channels come out in order.

Weights are packed int8 [R, shifts, quads, 4 * C]. There is no padded copy: a pixel outside the image is a register of zeros,
and sums start with what the taps inside add for the zero point (int32 [R, S, C], or [1, 1, C] where all are inside).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.byte_stores import Cell, store_cells
from schedules.depthwise import Point
from schedules.fused import Emission, Fused
from schedules.target import CpuTarget
from schedules.terms import dot_product, reads_signed_pixels
from schedules.windows import Problem, RowTiles, kernel_rows, loop, splat, tile_rows

__all__ = ["Point", "Problem", "default_point", "packed_shape", "schedule", "slots", "suits"]

QUAD = 4
LEAST_CHANNELS = 16  # four 32-bit lanes of four channels
_SUMS = 16  # vectors of sums of a tile


def suits(problem: Problem) -> bool:
    """Whether this kernel takes a convolution: each channel its own group, and enough of them for the least register."""
    return problem.groups == problem.c == problem.o and problem.c >= LEAST_CHANNELS


def shifts(problem: Problem) -> int:
    """Ways in which an output's first tap lies in a quad: at its first byte, or also at its second."""
    return 2 if problem.stride[1] == 1 and problem.dilation[1] == 1 else 1


def slots(problem: Problem, shift: int) -> list[tuple[int, int]]:
    """(quad, byte) of each tap of a kernel row."""
    return [divmod(s + shift, QUAD) for s in range(problem.s)]


def packed_shape(problem: Problem) -> tuple[int, ...]:
    """[R, shifts, quads of a kernel row, 4 * C]: the four taps of a channel side by side."""
    quads = -(-(problem.s + shifts(problem) - 1) // QUAD)
    return (problem.r, shifts(problem), quads, QUAD * problem.c)


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """As many pixels as there are registers for sums; `nv` is always the four vectors that interleaving gives."""
    most = max(1, min(_SUMS, target.registers // 2) // QUAD)
    return Point(target.lanes, tile_rows(problem.ow, most), QUAD)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused integer depthwise convolution."""
    problem = Problem.from_dict(fused.point["problem"])
    point = Point.from_dict(fused.point["point"])
    with fused.emit() as kernel:
        _Depthwise(kernel, problem, point, target).emit()
    return kernel.func


@dataclass(frozen=True)
class _Tile:
    """Output pixels of a row at `base`, for the channels from `channel`, in vectors of `lanes`; `edge` as in RowTiles."""

    image: object
    oh: object
    base: object
    edge: int | None
    channel: object
    lanes: int


class _Depthwise:
    def __init__(self, kernel: Emission, problem: Problem, point: Point, target: CpuTarget):
        self.kernel, self.problem, self.point, self.target = kernel, problem, point, target
        self.x, self.w, *rest = kernel.inputs
        self.starts = rest[0] if rest else None
        self.dot = dot_product(target)
        self.signed = reads_signed_pixels(target)
        self.row = RowTiles(problem, point.mr, problem.ow)

    def emit(self) -> None:
        problem = self.problem
        with loop(problem.n * problem.oh, self.target.threads > 1) as u:
            image, oh = (0, u)
            if problem.n > 1:
                image, oh = tirx.floordiv(u, problem.oh), tirx.floormod(u, problem.oh)
            self.row.each(lambda _, base, edge: self._channels(_Tile(image, oh, base, edge, 0, 0)))

    def _channels(self, tile: _Tile) -> None:
        """Registers of all lanes in a loop, then narrower ones; the last of them may overlap what was done."""
        channels, lanes = self.problem.c, self.point.lanes
        width = QUAD * lanes
        done = channels // width * width
        if done:
            with T.serial(0, channels // width) as q:
                self._tile(replace(tile, channel=q * width, lanes=lanes))
        while done < channels:
            while width > LEAST_CHANNELS and width > channels - done:
                width //= 2
            self._tile(replace(tile, channel=min(done, channels - width), lanes=width // QUAD))
            done += width

    def _tile(self, tile: _Tile) -> None:
        mr, lanes = self.point.mr, tile.lanes
        every = T.ramp(0, 1, lanes) if lanes > 1 else 0
        sums = [[T.alloc_buffer((lanes,), "int32") for _ in range(QUAD)] for _ in range(mr)]
        for pixel in sums:
            for register in pixel:
                T.buffer_store(register, splat(T.int32(0), lanes), [every])
        first, last = kernel_rows(self.problem, tile.oh)
        if self.starts is not None and not any(self.problem.padding):
            self._start(sums, tile, 0, {0: range(mr)})
        with T.serial(first, last) as r:
            if self.starts is not None and any(self.problem.padding):
                taps = range(self.problem.s)
                inside = {s: self._outputs_inside(tile.edge, s) for s in taps}
                self._start(sums, tile, r, inside)
            self._kernel_row(sums, tile, r)
        rows = []
        for p, pixel in enumerate(sums):
            lead = (tile.image, tile.oh, tile.base + p)
            cells = [
                (register[every], tile.channel + v * lanes) for v, register in enumerate(pixel)
            ]
            rows.append([Cell(value, lead, channel, lanes) for value, channel in cells])
        store_cells(self.kernel, self.target, rows)

    def _outputs_inside(self, edge: int | None, s: int):
        return range(self.point.mr) if edge is None else self.row.taps_inside(edge, s)

    def _start(self, sums: list, tile: _Tile, r, taps: dict) -> None:
        """Add what each tap inside the image starts a sum with; `taps` says which outputs have it inside."""
        lanes = tile.lanes
        every = T.ramp(0, 1, lanes)
        for s, outputs in taps.items():
            for v in range(QUAD):
                start = self.starts[r, s, T.ramp(tile.channel + v * lanes, 1, lanes)]
                for p in outputs:
                    T.buffer_store(sums[p][v], sums[p][v][every] + start, [every])

    def _kernel_row(self, sums: list, tile: _Tile, r) -> None:
        """All taps of one kernel row: for each quad of columns that outputs need, one dot product per output."""
        lanes = tile.lanes
        every = T.ramp(0, 1, lanes)
        columns = _Columns(self, tile, r)
        for column, users in sorted(self._quads(tile.edge).items()):
            for v, quads in enumerate(columns.quads(column)):
                for p, shift, number in users:
                    first = (tile.channel + v * lanes) * QUAD
                    weights = self.w[r, shift, number, T.ramp(first, 1, QUAD * lanes)]
                    held = self.dot(sums[p][v][every], quads, weights, lanes)
                    T.buffer_store(sums[p][v], held, [every])

    def _quads(self, edge: int | None) -> dict[int, list[tuple[int, int, int]]]:
        """First column of a quad, relative to the corner of the tile's window -> its (output, shift, quad of the row)."""
        problem, users = self.problem, {}
        for s in range(problem.s):
            for p in self._outputs_inside(edge, s):
                column = p * problem.stride[1]
                shift = column % shifts(problem)
                number, _ = slots(problem, shift)[s]
                first = column - shift + QUAD * number * problem.dilation[1]
                users.setdefault(first, set()).add((p, shift, number))
        return {first: sorted(found) for first, found in users.items()}

    def columns_needed(self, edge: int | None) -> set[int]:
        """Columns, relative to the corner of the tile's window, that some tap inside the image reads."""
        problem = self.problem
        return {
            p * problem.stride[1] + s * problem.dilation[1]
            for s in range(problem.s)
            for p in self._outputs_inside(edge, s)
        }


class _Columns:
    """The columns of one kernel row of a tile, each loaded once, and what they are interleaved to."""

    def __init__(self, own: _Depthwise, tile: _Tile, r):
        self.own, self.tile = own, tile
        problem = own.problem
        self.needed = own.columns_needed(tile.edge)
        self.row = tile.oh * problem.stride[0] + r * problem.dilation[0] - problem.padding[0]
        self.bytes = QUAD * tile.lanes
        self._loaded: dict = {}
        self._pairs: dict = {}

    def _column(self, column: int):
        """uint8 x 4 lanes: part L of 128 bits holds what its four results need: channels lanes * q + 4 L of result q."""
        if column in self._loaded:
            return self._loaded[column]
        tile, problem, parts = self.tile, self.own.problem, self.tile.lanes // QUAD
        if column not in self.needed:
            value = T.broadcast(T.uint8(0), self.bytes)
        else:
            place = tile.base * problem.stride[1] - problem.padding[1] + column
            value = self.own.x[tile.image, self.row, place, T.ramp(tile.channel, 1, self.bytes)]
            if self.own.signed:
                value = value ^ T.broadcast(T.uint8(128), self.bytes)
            if parts > 1:
                numbers = tirx.reinterpret(f"int32x{tile.lanes}", value)
                order = [parts * q + part for part in range(parts) for q in range(QUAD)]
                value = tirx.reinterpret(f"uint8x{self.bytes}", tirx.Shuffle([numbers], order))
            value = T.bind(value)
        self._loaded[column] = value
        return value

    def _pair(self, column: int) -> list:
        """Bytes of a column and its right neighbour, interleaved: the lower and the upper halves of every part."""
        if column not in self._pairs:
            ab = [self._column(column), self._column(column + self.own.problem.dilation[1])]
            self._pairs[column] = self._interleaved(ab, 1)
        return self._pairs[column]

    def _interleaved(self, ab: list, size: int) -> list:
        """Groups of `size` bytes of two vectors, in turn, of the lower and of the upper half of each 128 bits."""
        found = []
        for half in (0, 8):
            order = [
                which * self.bytes + part + half + group + byte
                for part in range(0, self.bytes, 16)
                for group in range(0, 8, size)
                for which in (0, 1)
                for byte in range(size)
            ]
            found.append(T.bind(tirx.Shuffle(ab, order)))
        return found

    def quads(self, column: int) -> list:
        """Four int32 x lanes of consecutive channels, the bytes of each lane being four columns."""
        low, high = zip(self._pair(column), self._pair(column + 2 * self.own.problem.dilation[1]))
        found = [*self._interleaved(list(low), 2), *self._interleaved(list(high), 2)]
        return [tirx.reinterpret(f"int32x{self.tile.lanes}", value) for value in found]
