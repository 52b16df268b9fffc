# SPDX-License-Identifier: Apache-2.0
"""Where channels lie: which of them a layer reads, by group and by input, and where a reshape or a concatenation puts them."""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from passes.layers import shape_of


def reads(weight: np.ndarray) -> np.ndarray:
    """bool [O, I/groups]: whether an output channel reads an input channel of its group (NaN weights do)."""
    return (weight != 0).reshape(*weight.shape[:2], -1).any(axis=2)


def by_group(inputs: np.ndarray, groups: int, outputs: int) -> np.ndarray:
    """[O, I/groups]: the values of the input channels that each output channel may read."""
    return np.repeat(inputs.reshape(groups, -1), outputs // groups, axis=0)


def per_input(used: np.ndarray, groups: int) -> np.ndarray:
    """[O/groups, I] of [O, I/groups]: by input channel."""
    split = used.reshape(groups, -1, used.shape[1])
    return split.transpose(1, 0, 2).reshape(split.shape[1], -1)


def extent(expr: relax.Expr, axis: int, rank: int) -> int:
    """The size of an operand along axis `axis` of a result of rank `rank` that it is broadcast to."""
    shape = shape_of(expr)
    at = axis - (rank - len(shape))
    return shape[at] if at >= 0 else 1


def concat_parts(call: relax.Call) -> list[tuple[relax.Expr, int]]:
    """The operands of a concatenation and where each begins."""
    axis, first, parts = int(call.attrs.axis or 0), 0, []
    for part in call.args[0].fields:
        parts.append((part, first))
        first += shape_of(part)[axis]
    return parts


def reshaped_axis(before, after, axis: int, merge: bool) -> tuple[int, int] | None:
    """(axis, entries per channel) where a reshape or a broadcast of `before` to `after` has the channels of `axis`:
    alone on an axis, or merged with everything behind them. None where they are cut or mixed."""
    if not merge:
        at = axis + len(after) - len(before)
        return (at, 1) if after[at] == before[axis] else None
    lead, inner = math.prod(before[:axis]), math.prod(before[axis + 1 :])
    for at, size in enumerate(after):
        if (
            math.prod(after[:at]) != lead
            or math.prod(after[at + 1 :]) * size != inner * before[axis]
        ):
            continue
        if size == before[axis]:
            return at, 1
        if size == before[axis] * inner and at == len(after) - 1:
            return at, inner
    return None
