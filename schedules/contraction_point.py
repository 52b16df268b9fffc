# SPDX-License-Identifier: Apache-2.0
"""The parameters of a contraction's kernel, and how its weights lie in panels."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.annotated import Annotated
from schedules.windows import Problem

WEIGHTS_OR_PIXELS, OUTPUT, PARTIAL = 1, 2, 4


@dataclass(frozen=True)
class Point(Annotated):
    """Parameters of one kernel.

    `order`: "panels" runs all pixels for one panel of weights before the next (weights are read once); "blocks" runs
    all panels for `block` rows of tiles (flat problems: for `block` tiles). `chunk`: input channels summed before the
    pixels are gone through again, partial sums being kept in memory (0: all of them); with order "chunks" all panels
    are gone through before the next chunk. `unroll`: steps of the sum per loop iteration.
    `sums`: independent partial sums, for tiles too small to hide the latency of an addition. `prefetch`: what is fetched
    ahead, the sum of `WEIGHTS_OR_PIXELS` (the next panel, or with order "blocks" the next tile's pixels), `OUTPUT` (the
    lines a tile will write) and `PARTIAL` (the next tile's partial sums).
    """

    lanes: int
    mr: int
    nv: int
    order: str
    block: int = 1
    chunk: int = 0
    unroll: int = 1
    sums: int = 1
    prefetch: int = 0

    @property
    def panel(self) -> int:
        """Output channels of one panel of weights."""
        return self.nv * self.lanes


def panels_per_group(problem: Problem, point: Point) -> int:
    return -(-problem.group_outputs // point.panel)


def packed_shape(problem: Problem, point: Point) -> tuple[int, int, int, int, int]:
    """[panels of all groups, R, S, C/groups, channels of a panel]."""
    panels = problem.groups * panels_per_group(problem, point)
    return (panels, problem.r, problem.s, problem.group_inputs, point.panel)
