# SPDX-License-Identifier: Apache-2.0
"""Search spaces: for a problem and a target, the legal values of each parameter of a kernel.

Parameters that constrain each other (a tile's height and width share the registers) are one choice, so that every
combination of choices is legal. The default point is always in its space.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from schedules import batch_matmul, contraction, depthwise
from schedules.errors import UserError
from schedules.target import CpuTarget

_COST_KEPT = 2.0  # tiles estimated slower than the best by more than this are left out
_BODY = 192  # multiply-adds of one loop iteration: larger bodies leave the micro-operation cache


@dataclass(frozen=True)
class Space:
    """Choices by name, each a tuple of values, and how one value of each makes a `Point`.

    `estimate` gives a point's expected time in any unit; the search starts from it and learns what it misses.
    """

    choices: Mapping[str, tuple]
    assemble: Callable[[Mapping], object]
    estimate: Callable[[object], float]

    @property
    def size(self) -> int:
        return math.prod(len(values) for values in self.choices.values())

    def point(self, indices: Mapping[str, int]):
        return self.assemble({name: values[indices[name]] for name, values in self.choices.items()})

    @cached_property
    def _by_point(self) -> dict:
        found: dict = {}
        names = list(self.choices)
        for combination in itertools.product(*(range(len(v)) for v in self.choices.values())):
            indices = dict(zip(names, combination))
            found.setdefault(self.point(indices), indices)
        return found

    def indices_of(self, point) -> dict[str, int] | None:
        """Choices that make this point; None if it is not in the space."""
        return self._by_point.get(point)

    @property
    def points(self) -> list:
        """Every distinct point."""
        return list(self._by_point)


def space_of(loops: str, problem, target: CpuTarget) -> Space | None:
    """The search space of a problem; None for a loop structure that has no parameters to tune."""
    make = {
        "contraction": _contraction,
        "depthwise": _depthwise,
        "batch_matmul": _batch_matmul,
    }.get(loops)
    return make(problem, target) if make else None


def point_for(structure, problem, target: CpuTarget):
    """The parameters of a kernel: recorded ones if `target.records` has any for this problem, else the default.

    `structure` is a module of loop structures (`contraction`, ...) with `Point` and `default_point(problem, target)`.
    Raises UserError if a record's parameters are not legal in this version.
    """
    default = structure.default_point(problem, target)
    if target.records is None:
        return default
    loops = structure.__name__.rpartition(".")[2]
    fields = target.records.lookup(target, loops, problem.to_dict())
    if fields is None:
        return default
    try:
        point = structure.Point.from_dict(dict(fields))
        space = space_of(loops, problem, target)
        legal = point == default or (space is not None and space.indices_of(point) is not None)
    except (TypeError, ValueError):
        legal = False
    if not legal:
        raise UserError(
            f"recorded parameters of a {loops} kernel that this version cannot use", where="--records", found=json.dumps(dict(fields)),
            todo="Remove that line or tune again into a new directory",
        )  # fmt: skip
    return point


def structure_of(loops: str):
    """The module of a tunable loop structure: `Problem`, `Point`, `default_point`, `schedule`."""
    return {"contraction": contraction, "depthwise": depthwise, "batch_matmul": batch_matmul}[loops]


def _with(values, default) -> tuple:
    """`values` without repetitions, and `default`, in order."""
    return tuple(sorted({*values, default}))


def _contraction(problem: contraction.Problem, target: CpuTarget) -> Space:
    default = contraction.default_point(problem, target)
    lanes, registers = target.lanes, target.registers
    steps = problem.group_inputs

    def cost(mr: int, nv: int, sums: int) -> float:
        return contraction.estimated_cycles(problem, lanes, mr, nv, sums)

    tiles = set()
    for nv in range(
        1,
        min(len(contraction.vectors(problem.group_outputs, lanes)), 8 if problem.row <= 2 else 6)
        + 1,
    ):
        for largest in range(1, (registers - 1 - nv) // nv + 1):
            mr = contraction.tile_rows(problem.row, largest)
            for sums in (1, 2, 4, 8):
                fits = sums * mr * nv + nv + 1 <= registers and sums <= steps
                if sums == 1 or (fits and sums * mr * nv <= 16):
                    tiles.add((mr, nv, sums))
    best = min(cost(*tile) for tile in tiles)
    tiles = {tile for tile in tiles if cost(*tile) <= _COST_KEPT * best} | {
        (default.mr, default.nv, default.sums)
    }
    units = -(-problem.row // default.mr) if problem.flat else problem.rows
    # Partial sums are kept for all pixels while a chunk of the inputs is in use.
    chunks = (c for c in (128, 256, 384, 512) if problem.groups == 1 and c < steps)
    walks = {
        ("panels", 1, 0),
        *(("panels", 1, chunk) for chunk in chunks),
        *(("blocks", block, 0) for block in (1, 2, 4, 8, 16) if block <= units),
        (default.order, default.block, default.chunk),
    }
    unrolls = _with((u for u in (1, 2, 4, 8, 16) if u <= steps), default.unroll)

    def assemble(chosen: Mapping) -> contraction.Point:
        mr, nv, sums = chosen["tile"]
        order, block, chunk = chosen["walk"]
        unroll = chosen["unroll"]
        if (mr, nv, sums, unroll) != (default.mr, default.nv, default.sums, default.unroll):
            unroll = min(steps, max(sums, min(unroll, max(1, _BODY // (mr * nv)))))
        return contraction.Point(
            lanes, mr, nv, order, block, chunk, unroll, sums, chosen["prefetch"]
        )

    return Space(
        {
            "tile": tuple(sorted(tiles)),
            "walk": tuple(sorted(walks)),
            "unroll": unrolls,
            "prefetch": (0, 1),
        },
        assemble,
        lambda p: cost(p.mr, p.nv, p.sums),
    )


def _depthwise(problem: contraction.Problem, target: CpuTarget) -> Space:
    default = depthwise.default_point(problem, target)
    count = len(contraction.vectors(problem.c, target.lanes))
    tiles = {(default.mr, default.nv)}
    for nv in range(1, min(count, 4) + 1):
        for largest in range(1, (target.registers - 1 - nv) // nv + 1):
            tiles.add((contraction.tile_rows(problem.ow, min(largest, 14)), nv))

    def estimate(point: depthwise.Point) -> float:
        # Loads of inputs shared between the pixels of a tile, and of weights shared by all of them.
        columns = (point.mr - 1) * problem.stride[1] + (problem.s - 1) * problem.dilation[1] + 1
        tiles_in_row = -(-problem.ow // point.mr)
        groups = -(-count // point.nv)
        return (
            tiles_in_row
            * groups
            * (problem.r * point.nv * (columns + problem.s + point.mr * problem.s) / 2 + 8)
        )

    return Space(
        {"tile": tuple(sorted(tiles))},
        lambda chosen: depthwise.Point(target.lanes, *chosen["tile"]),
        estimate,
    )


def _batch_matmul(problem: batch_matmul.Problem, target: CpuTarget) -> Space:
    default = batch_matmul.default_point(problem, target)
    count = len(contraction.vectors(problem.n, target.lanes))
    tiles = {(default.mr, default.nv)}
    for nv in range(1, min(count, 6) + 1):
        for largest in range(1, (target.registers - 1 - nv) // nv + 1):
            tiles.add((contraction.tile_rows(problem.m, largest), nv))

    def estimate(point: batch_matmul.Point) -> float:
        step = max(point.mr * point.nv / 2, (point.mr + point.nv) / 2, 4.0)
        return (
            -(-problem.m // point.mr)
            * -(-count // point.nv)
            * (problem.k * step + 2 * point.mr * point.nv + 12)
        )

    return Space(
        {"tile": tuple(sorted(tiles))},
        lambda chosen: batch_matmul.Point(target.lanes, *chosen["tile"]),
        estimate,
    )
