# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution and pooling: vectors of channels, several output pixels of a row in registers.

    Y[n, oh, ow, c] = reduce over r, s of X[n, oh*sh + r*dh - top, ow*sw + s*dw - left, c] * W[r, s, c]

Every loaded vector of the input serves all the pixels and taps of the tile that want it. There is no padded copy: rows
outside the image shorten the loop over r, columns outside it are left out of the edge tiles when they are generated.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.fused import Emission, Fused
from schedules.target import CpuTarget
from schedules.windows import Problem, RowTiles, kernel_rows, loop, tile_rows, vectors


@dataclass(frozen=True)
class Point:
    """`mr` output pixels of a row x `nv` vectors of channels in registers; `lanes` float32 in a vector."""

    lanes: int
    mr: int
    nv: int

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(fields: dict) -> Point:
        return Point(**fields)


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """As many pixels as leave registers for one kernel row of weights and one input vector."""
    nv = 2 if len(vectors(problem.c, target.lanes)) % 2 == 0 and target.registers >= 32 else 1
    largest = max(1, min(8, (target.registers - 2 - nv * problem.s) // nv))
    return Point(target.lanes, tile_rows(problem.ow, largest), nv)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused depthwise convolution."""
    problem, point = Problem.from_dict(fused.point["problem"]), Point.from_dict(fused.point["point"])
    with fused.emit() as kernel:
        _Depthwise(kernel, problem, point).emit(target.threads > 1)
    return kernel.func


class _Depthwise:
    """One kernel being emitted."""

    def __init__(self, kernel: Emission, problem: Problem, point: Point):
        self.kernel, self.problem, self.point = kernel, problem, point
        self.x, self.w = kernel.inputs
        self.row = RowTiles(problem, point.mr, problem.ow)

    def emit(self, parallel: bool) -> None:
        problem = self.problem
        with loop(problem.n * problem.oh, parallel) as u:
            image, oh = (0, u) if problem.n == 1 else (tirx.floordiv(u, problem.oh), tirx.floormod(u, problem.oh))
            self.row.each(lambda _, base, edge: self._channels(image, oh, base, edge))

    def _channels(self, image, oh, base, edge: int | None) -> None:
        """All channels of one tile of pixels, full groups of vectors in a loop, the rest after it."""
        width = self.point.nv * self.point.lanes
        full, rest = divmod(self.problem.c, width)
        if full:
            with T.serial(0, full) as q:
                self._tile(image, oh, base, edge, q * width, vectors(width, self.point.lanes))
        if rest:
            self._tile(image, oh, base, edge, full * width, vectors(rest, self.point.lanes))

    def _tile(self, image, oh, base, edge: int | None, channel, widths: list) -> None:
        problem, mr, lanes = self.problem, self.point.mr, self.point.lanes
        # Nothing is packed here, so a vector may not reach past the last channel: it has as many lanes as are stored.
        sums = [[T.alloc_buffer((stored,), "float32") for _, stored in widths] for _ in range(mr)]
        for row in sums:
            for (_, stored), register in zip(widths, row):
                T.buffer_store(register, T.broadcast(T.float32(0), stored), [T.ramp(0, 1, stored)])
        with T.serial(*kernel_rows(problem, oh)) as r:
            ih = oh * problem.stride[0] + r * problem.dilation[0] - problem.padding[0]
            for offset, users in sorted(self._columns(edge).items()):
                iw = base * problem.stride[1] + offset
                for v, (_, stored) in enumerate(widths):
                    lane, channels = T.ramp(0, 1, stored), T.ramp(channel + v * lanes, 1, stored)
                    for p, s in users:
                        term = self.x[image, ih, iw, channels] * self.w[r, s, channels]
                        T.buffer_store(sums[p][v], sums[p][v][lane] + term, [lane])
        for p, row in enumerate(sums):
            for v, (_, stored) in enumerate(widths):
                value = row[v][T.ramp(0, 1, stored)]
                self.kernel.store(value, [image, oh, base + p, T.ramp(channel + v * lanes, 1, stored)])

    def _columns(self, edge: int | None) -> dict[int, list[tuple[int, int]]]:
        """Input column, relative to the tile's first pixel times the stride -> the (pixel, tap) pairs that read it."""
        problem = self.problem
        users: dict[int, list[tuple[int, int]]] = {}
        for s in range(problem.s):
            for p in range(self.point.mr) if edge is None else self.row.taps_inside(edge, s):
                column = p * problem.stride[1] + s * problem.dilation[1] - problem.padding[1]
                users.setdefault(column, []).append((p, s))
        return users
