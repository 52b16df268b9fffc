# SPDX-License-Identifier: Apache-2.0
"""Graphs that compare or round floats, such as a binary network before it is compiled as one: what rounding does to them.

Where a value lies at a threshold, the last bit of a sum decides on which side, and everything behind follows. One float32
evaluation may by luck flip nothing; so what rounding alone does to such a graph's outputs is the most that several
evaluations show, on inputs moved by a few units in the last place, and by more: of a million values one or two lie within
rounding of a threshold, so that what one flip does may need a longer reach to be seen at all. If much flips that says little about the kernels, so
these are compared one by one with their definitions as well, where only what one kernel flips itself can differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tvm
from tvm import relax

from compiler.comparison import UNIT, difference
from passes.rewriting import bindings_of

_STEPS = frozenset(
    f"relax.{name}"
    for name in (
        "sign", "round", "floor", "ceil", "trunc", "greater", "greater_equal", "less", "less_equal",
    )
)  # fmt: skip
_EVALUATIONS = 3
# What another order of summation does to the sums of a first layer, and more than it does to most.
_MOVED = 16 * UNIT
_FARTHER = 16
# Of the elements a kernel writes, so many may lie on the other side of a threshold than its definition puts them.
FLIPS = 1e-4


def compares_floats(mod: tvm.IRModule) -> bool:
    """Whether `main` has an operator that jumps where a float passes a threshold."""
    calls = [b.value for b in bindings_of(mod["main"]) if isinstance(b.value, relax.Call)]
    return any(
        isinstance(c.op, tvm.ir.Op) and c.op.name in _STEPS and "float" in str(c.args[0].ty.dtype)
        for c in calls
    )


def farthest(
    evaluate: Callable[[Sequence[np.ndarray]], list[np.ndarray]],
    inputs: Sequence[np.ndarray],
    exact: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """Of `evaluate(inputs)` and evaluations nearby the one whose outputs lie farthest from `exact`."""
    rng = np.random.default_rng(0)
    found = evaluate(inputs)

    def evaluated(distance: float) -> list[np.ndarray]:
        return evaluate([moved(x, rng, distance) if x.dtype.kind == "f" else x for x in inputs])

    for _ in range(_EVALUATIONS):
        other = evaluated(_MOVED)
        if _distance(other, exact) > _distance(found, exact):
            found = other
    # Outputs that follow their inputs smoothly differ no more than that many times as much.
    other = evaluated(_FARTHER * _MOVED)
    jumped = _distance(other, exact) > 2 * _FARTHER * _distance(found, exact)
    return other if jumped else found


def moved(x: np.ndarray, rng: np.random.Generator, distance: float = _MOVED) -> np.ndarray:
    """Floats moved up or down by the share `distance` of themselves."""
    return (x * (1 + distance * rng.choice([-1.0, 1.0], x.shape))).astype(x.dtype)


def _distance(found: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    return max((difference(f, e) for f, e in zip(found, exact)), default=0.0)
