# SPDX-License-Identifier: Apache-2.0
"""Max and average pooling over NHWC images, by the tiles of `depthwise`.

A maximum with a NaN in its window is NaN. Values outside the image take no part; `counting` says what an average
divides by: "window" the whole window, "image" the values of it inside the image.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.depthwise import ChannelTiles, Point, Taps
from schedules.fused import Fused
from schedules.target import CpuTarget
from schedules.windows import Problem, tile_rows, vectors

LOWEST = float("-inf")


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """Pooling waits for memory: a small tile is enough."""
    nv = 2 if len(vectors(problem.c, target.lanes)) % 2 == 0 else 1
    return Point(target.lanes, tile_rows(problem.ow, 4), nv)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused pooling: `kind` "max" or "average"."""
    problem, point = (
        Problem.from_dict(fused.point["problem"]),
        Point.from_dict(fused.point["point"]),
    )
    with fused.emit() as kernel:
        if fused.point["kind"] == "max":
            tiles = _Max(kernel, problem, point)
        else:
            tiles = _Average(kernel, problem, point, fused.point["counting"])
        tiles.emit(target.threads > 1)
    return kernel.func


def larger(held, value):
    """The larger of two scalars or vectors; NaN if either is."""
    return tirx.Select(tirx.Or(value > held, tirx.isnan(value)), value, held)


class _Max(ChannelTiles):
    def start(self) -> float:
        return LOWEST

    def combine(self, held, value, r, s: int, channels):
        return larger(held, value)


class _Average(ChannelTiles):
    def __init__(self, kernel, problem: Problem, point: Point, counting: str):
        super().__init__(kernel, problem, point)
        self.counting = counting

    def start(self) -> float:
        return 0.0

    def combine(self, held, value, r, s: int, channels):
        return held + value

    def finish(self, held, taps: Taps, pixel: int):
        if self.counting == "window":
            return held * T.float32(1.0 / (self.problem.r * self.problem.s))
        columns = self.problem.s
        if taps.edge is not None:
            columns = sum(
                pixel in self.row.taps_inside(taps.edge, s) for s in range(self.problem.s)
            )
        rows = taps.last - taps.first
        if isinstance(rows, int):
            return held * T.float32(1.0 / (rows * columns))
        return held * (T.float32(1.0 / columns) / tirx.Cast("float32", rows))
