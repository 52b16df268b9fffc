# SPDX-License-Identifier: Apache-2.0
"""First guess of a layer's time, dense and sparse, to leave dense what cannot win. Measurement has the last word.

Times are counted in vector multiply-adds at the core's peak, so only ratios mean anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedules import sparse_groups, sparse_vector
from schedules.sparse_problem import Problem
from schedules.target import CpuTarget

# Fitted to the layers of a ResNet-50 at density 10 % on Cascade Lake (AVX-512), timed inside the network; the median error
# is 12 %. Shares of the peak in the inner loops:
_DENSE_EFFICIENCY = 0.73
_SPARSE_EFFICIENCY = {1: 0.25, 4: 0.45, 8: 0.45, 16: 0.51}
# Winograd's gain over the direct kernel: 1.5 for a first layer, 7x7 of stride 2 over 224x224 pixels; of 3x3 layers 1.25 at 7x7
# pixels, 1.7 at 14x14, 3.1 at 56x56.
_FIRST_LAYER_GAIN = 1.5
_WINOGRAD_GAIN, _WINOGRAD_PIXELS, _WINOGRAD_GROWTH, _WINOGRAD_MOST = 1.25, 49, 0.22, 3.1
# Walking one block's non-zeros for one tile: mispredicted branches, sums in and out, what is left of waiting for the output's
# lines.
_LOOP_START = {1: 100.0, 4: 200.0, 8: 200.0, 16: 600.0}
# Moving one vector in or out, waiting for memory included; in planes there is no transposition, but more to wait for.
_TRANSPOSE = {1: 11.5, 4: 11.0, 8: 11.0, 16: 15.0}
_TILE = {1: 4, 4: 6, 8: 3, 16: 3}
# The same where activations stay in the second-level cache, of which they may take this share.
_NEAR_START, _NEAR_TRANSPOSE, _NEAR = 25.0, 6.0, 0.25
# Few channels (fitted to a RegNet-Y): the dense kernel's share of the peak in groups, and moving a vector of their planes.
_DENSE_GROUPS_EFFICIENCY, _GROUPS_MOVE = 0.36, 15.0
# Bytes of weights from beyond the caches, and activations looked up, in the time of one vector multiply-add.
_STREAMED = 2.1
_LOOKED_UP = 3.0
_ROW_START = 25.0


@dataclass(frozen=True)
class Estimate:
    """Estimated vector multiply-adds at peak of the best dense kernel and of the sparse one."""

    dense: float
    sparse: float

    @property
    def ratio(self) -> float:
        return self.sparse / self.dense


def has_winograd(problem: Problem) -> bool:
    """Whether the dense layer may run as Winograd: 3x3, stride 1, no dilation, no groups, enough channels."""
    return (
        problem.kernel == (3, 3) and problem.strides == (1, 1) and problem.dilation == (1, 1)
        and problem.groups == 1 and min(problem.channels, problem.outputs) >= 16
    )  # fmt: skip


def is_first_layer(problem: Problem) -> bool:
    """Whether the dense layer may run as Winograd over the phases of an image: strided, of few channels."""
    (r, s), (stride, along) = problem.kernel, problem.strides
    return (
        r == s and stride == along > 1 and -(-r // stride) in (3, 4) and problem.dilation == (1, 1)
        and problem.groups == 1 and problem.channels <= 4 and problem.outputs >= 32
    )  # fmt: skip


def estimate(problem: Problem, target: CpuTarget) -> Estimate:
    """Dense and sparse cost of a layer on one core."""
    p = problem
    if sparse_vector.suits(p):
        return _few_rows(p, target)
    vectors = -(-p.pixels // target.lanes)
    per_output = p.panel_rows // p.groups
    efficiency = _DENSE_EFFICIENCY if p.groups == 1 else _DENSE_GROUPS_EFFICIENCY
    dense = p.pixels * p.outputs * per_output / target.lanes / efficiency
    if is_first_layer(p):
        dense /= _FIRST_LAYER_GAIN
    elif has_winograd(p):
        grown = (p.pixels / _WINOGRAD_PIXELS) ** _WINOGRAD_GROWTH
        dense /= min(_WINOGRAD_MOST, max(1.0, _WINOGRAD_GAIN * grown))
    multiply = vectors * p.stored * p.block / _SPARSE_EFFICIENCY[p.block]
    activations = 4 * (p.batch * p.height * p.width * p.channels + p.pixels * p.outputs)
    near = activations <= _NEAR * target.l2_bytes
    start, move = (
        (_NEAR_START, _NEAR_TRANSPOSE) if near else (_LOOP_START[p.block], _TRANSPOSE[p.block])
    )
    few = p.taps > 1 and sparse_groups.few_channels(p.groups, p.channels)
    if few:
        start, move = _NEAR_START, _NEAR_TRANSPOSE if near else _GROUPS_MOVE
    starts = -(-vectors // _TILE[p.block]) * p.blocks * start
    rows = p.channels * (1 if p.taps == 1 else 1.5 * min(p.taps, p.strides[0] * p.strides[1]))
    moves = vectors * (rows + p.outputs) * move
    return Estimate(dense, multiply + starts + moves)


def _few_rows(problem: Problem, target: CpuTarget) -> Estimate:
    """Both kernels stream their weights; the sparse one also its indices, and looks up an activation for each."""
    p = problem
    dense = 4 * p.channels * p.outputs / _STREAMED
    multiply = p.stored * p.pixels * max(1, p.block / target.lanes) * _LOOKED_UP
    stream = p.stored * (4 * p.block + 2) / _STREAMED
    return Estimate(dense, max(multiply, stream) + p.blocks * _ROW_START)
