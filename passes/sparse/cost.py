# SPDX-License-Identifier: Apache-2.0
"""First guess of a layer's time, dense and sparse, to leave dense what cannot win. Measurement has the last word.

Times are counted in vector multiply-adds at the core's peak, so only ratios mean anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedules import sparse_vector
from schedules.sparse_problem import Problem
from schedules.target import CpuTarget

# Share of the multiply-add peak that each kernel's inner loop reaches, from tools-level measurements on AVX-512.
_DENSE_EFFICIENCY = 0.8
_WINOGRAD_GAIN = 2.5
_SPARSE_EFFICIENCY = {1: 0.27, 4: 0.5, 8: 0.5, 16: 0.5}
# Moving one vector through a transposition, in vector multiply-adds.
_TRANSPOSE = 6.0
# Starting the loop over one block's non-zeros for one tile (branch mispredictions, accumulators in and out).
_LOOP_START = 25.0
# Bytes of weights from beyond the caches, and activations looked up, in the time of one vector multiply-add.
_STREAMED = 2.1
_LOOKED_UP = 3.0


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


def estimate(problem: Problem, target: CpuTarget) -> Estimate:
    """Dense and sparse cost of a layer on one core."""
    p = problem
    if sparse_vector.suits(p):
        return _few_rows(p, target)
    vectors = -(-p.pixels // target.lanes)
    per_output = p.panel_rows // p.groups
    dense = p.pixels * p.outputs * per_output / target.lanes / _DENSE_EFFICIENCY
    if has_winograd(p):
        dense /= _WINOGRAD_GAIN
    multiply = vectors * p.stored * p.block / _SPARSE_EFFICIENCY[p.block]
    starts = -(-vectors // 6) * p.blocks * _LOOP_START
    windows = p.block > 1 and p.taps > 1
    rows = 1.5 * p.channels * min(p.taps, p.strides[0] * p.strides[1]) if windows else p.panel_rows
    moves = vectors * (rows + p.outputs) * _TRANSPOSE
    return Estimate(dense, multiply + starts + moves)


def _few_rows(problem: Problem, target: CpuTarget) -> Estimate:
    """Both kernels stream their weights; the sparse one also its indices, and looks up an activation for each."""
    p = problem
    dense = 4 * p.channels * p.outputs / _STREAMED
    multiply = p.stored * p.pixels * max(1, p.block / target.lanes) * _LOOKED_UP
    stream = p.stored * (4 * p.block + 2) / _STREAMED
    return Estimate(dense, max(multiply, stream) + p.blocks * _LOOP_START)
