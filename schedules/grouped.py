# SPDX-License-Identifier: Apache-2.0
"""Convolution in small groups: as many outputs as inputs each, fewer than a vector has lanes, a power of two.

    Y[n, oh, ow, o] = sum over r, s, d < g of X[n, oh*sh + r*dh - top, ow*sw + s*dw - left, o ^ d] * W[r, s, d, o]

A depthwise convolution whose input vectors are seen in `g` orders: exchanging the channels o and o ^ d within their
group brings each of the group's inputs to each of its outputs. So vectors are whole however small the groups are, and
one shuffle serves all the taps that see a pixel.
"""

from __future__ import annotations

from tvm import tirx

from schedules.depthwise import ChannelTiles, Point
from schedules.fused import Fused
from schedules.lanes import lanes_of
from schedules.target import CpuTarget
from schedules.windows import Problem, tile_rows

# Pixels of a tile. The input vectors of a tile twice as wide leave the registers between one view and the next, which
# costs 10 % (AVX-512, 7x7 to 56x56 pixels, 48 to 440 channels, strides 1 and 2).
_LARGEST = 7


def suits(problem: Problem, target: CpuTarget) -> bool:
    """Whether the groups are square, smaller than a vector and divide it."""
    group = problem.group_inputs
    return (
        problem.groups > 1
        and 1 < group == problem.group_outputs < target.lanes
        and target.lanes % group == 0
    )


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """As many pixels as leave registers for one kernel row of weights and two input vectors."""
    largest = max(1, min(_LARGEST, target.registers - 3 - problem.s))
    return Point(target.lanes, tile_rows(problem.ow, largest), 1)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused convolution in small groups."""
    problem = Problem.from_dict(fused.point["problem"])
    with fused.emit() as kernel:
        kernel.require_packed((problem.r, problem.s, problem.group_inputs, problem.o))
        _Grouped(kernel, problem, Point.from_dict(fused.point["point"])).emit(target)
    return kernel.func


class _Grouped(ChannelTiles):
    @property
    def orders(self) -> int:
        return self.problem.group_inputs

    def start(self) -> float:
        return 0.0

    def view(self, value, order: int):
        lanes = lanes_of(value)
        return tirx.Shuffle([value], [lane ^ order for lane in range(lanes)]) if order else value

    def combine(self, held, value, r, s: int, channels, order: int):
        return held + value * self.kernel.inputs[1][r, s, order, channels]
