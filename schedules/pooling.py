# SPDX-License-Identifier: Apache-2.0
"""Max and average pooling over NHWC images, by the tiles of `depthwise`. Of float32, or of uint8 with a zero point.

A maximum with a NaN in its window is NaN. Values outside the image take no part; `counting` says what an average
divides by: "window" the whole window, "image" the values of it inside the image.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.depthwise import ChannelTiles, Point, Taps
from schedules.fused import Fused
from schedules.target import CpuTarget
from schedules.windows import Problem, tile_rows, vectors

_LOWEST = {"float32": float("-inf"), "int32": -(2**31), "uint8": 0}


def lowest(dtype: str):
    """The least value of a type that is pooled, as a constant."""
    return tirx.const(_LOWEST[dtype], dtype)


def default_point(problem: Problem, target: CpuTarget, lanes: int | None = None) -> Point:
    """Pooling waits for memory: a small tile is enough. `lanes` of a register, float32's by default."""
    lanes = lanes or target.lanes
    nv = 2 if len(vectors(problem.c, lanes)) % 2 == 0 else 1
    return Point(lanes, tile_rows(problem.ow, 4), nv)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused pooling: `kind` "max", "average", or "byte_average" with a zero point."""
    problem, point = (
        Problem.from_dict(fused.point["problem"]),
        Point.from_dict(fused.point["point"]),
    )
    with fused.emit() as kernel:
        if fused.point["kind"] == "max":
            tiles = _Max(kernel, problem, point)
        elif fused.point["kind"] == "byte_average":
            tiles = _ByteAverage(kernel, problem, point, fused.point["counting"])
            tiles.zero_point = fused.point["zero_point"]
        else:
            tiles = _Average(kernel, problem, point, fused.point["counting"])
        tiles.emit(target)
    return kernel.func


def larger(held, value):
    """The larger of two scalars or vectors; NaN if either is."""
    if "float" not in str(value.ty.dtype):
        return tirx.max(held, value)
    # A maximum is its second operand if either is NaN.
    return tirx.Select(tirx.isnan(value), value, tirx.max(value, held))


class _Max(ChannelTiles):
    def __init__(self, kernel, problem: Problem, point: Point):
        super().__init__(kernel, problem, point)
        self.dtype = str(self.x.dtype)

    def start(self) -> float:
        return _LOWEST[self.dtype]

    def combine(self, held, value, r, s: int, channels, order: int):
        return larger(held, value)


class _Average(ChannelTiles):
    def __init__(self, kernel, problem: Problem, point: Point, counting: str):
        super().__init__(kernel, problem, point)
        self.counting = counting

    def start(self) -> float:
        return 0.0

    def combine(self, held, value, r, s: int, channels, order: int):
        return held + value

    def finish(self, held, taps: Taps, pixel: int):
        rows, columns = self.counted(taps, pixel)
        if isinstance(rows, int):
            return held * T.float32(1.0 / (rows * columns))
        return held * (T.float32(1.0 / columns) / tirx.Cast("float32", rows))

    def counted(self, taps: Taps, pixel: int) -> tuple:
        """Rows and columns of the window that an average divides by."""
        if self.counting == "window":
            return self.problem.r, self.problem.s
        columns = self.problem.s
        if taps.edge is not None:
            columns = sum(
                pixel in self.row.taps_inside(taps.edge, s) for s in range(self.problem.s)
            )
        return taps.last - taps.first, columns


class _ByteAverage(_Average):
    """An exact int32 sum of x - zero_point over the pixels inside the image, times float32(1 / count)."""

    dtype = "int32"
    zero_point = 0

    def combine(self, held, value, r, s: int, channels, order: int):
        return held + value.astype(held.ty.dtype)

    def finish(self, held, taps: Taps, pixel: int):
        inside = _Average(self.kernel, self.problem, self.point, "image").counted(taps, pixel)
        total = held - inside[0] * inside[1] * self.zero_point if self.zero_point else held
        rows, columns = self.counted(taps, pixel)
        lanes = tvm.DataType(held.ty.dtype).lanes
        steps = total.astype("float32" if lanes == 1 else f"float32x{lanes}")
        if isinstance(rows, int):
            return steps * T.float32(1.0 / (rows * columns))
        return steps * (T.float32(1.0) / tirx.Cast("float32", rows * columns))
