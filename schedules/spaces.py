# SPDX-License-Identifier: Apache-2.0
"""Search spaces: for a problem and a target, the legal values of each parameter of a kernel.

Parameters that constrain each other (a tile's height and width share the registers) are one choice,
so that every combination of choices is legal. The default point is always in its space.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from schedules import (
    batch_matmul,
    binary_spaces,
    contraction,
    depthwise,
    int8_contraction,
    int8_depthwise,
    int8_winograd,
    quadratic_contraction,
    sparse_spaces,
    winograd,
)
from schedules.errors import UserError
from schedules.target import CpuTarget
from schedules.windows import tile_rows, vectors

_COST_KEPT = 2.0  # tiles estimated slower than the best by more than this are left out
_BODY = 192  # multiply-adds of one loop iteration: larger bodies leave the micro-operation cache

_DEFAULT_SHARE = 0.45  # of the second-level cache, for the matrices of a block of Winograd tiles


@dataclass(frozen=True)
class Space:
    """Choices by name, each a tuple of values, and how one value of each makes a `Point`.

    `estimate` gives a point's expected time in any unit; the search starts from it and learns what
    it misses.
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


def space_of(loops: str, problem, default, target: CpuTarget) -> Space | None:
    """The search space around a problem's `default` point; None where there is nothing to tune."""
    spaces = {
        "contraction": _contraction,
        "int8_contraction": _int8_contraction,
        "int8_depthwise": _int8_depthwise,
        "int8_winograd": _int8_winograd,
        "depthwise": _depthwise,
        "grouped": _depthwise,
        "batch_matmul": _batch_matmul,
        "quadratic_contraction": _quadratic_contraction,
        "winograd": _winograd,
    }
    for several in (binary_spaces.CHOICES, sparse_spaces.CHOICES):
        if loops in several:
            return Space(*several[loops](problem, default, target))
    return spaces[loops](problem, default, target) if loops in spaces else None


def structure_of(loops: str):
    """The module of a tunable loop structure, with its `Problem` and `Point`."""
    return importlib.import_module(f"schedules.{loops}")


def point_for(structure, problem, target: CpuTarget, default=None):
    """The parameters of a kernel: those `target.records` has for this problem, else the default.

    `structure` is the module of a loop structure (`contraction`, ...) with `Point` and, unless
    `default` is given, `default_point(problem, target)`. Raises UserError if a record's parameters
    are not legal in this version.
    """
    if default is None:
        default = structure.default_point(problem, target)
    if target.records is None:
        return default
    loops = structure.__name__.rpartition(".")[2]
    fields = target.records.lookup(target, loops, problem.to_dict())
    if fields is None:
        return default
    try:
        point = structure.Point(**fields)
        legal = point == default or (
            (space := space_of(loops, problem, default, target)) is not None
            and space.indices_of(point) is not None
        )
    except (TypeError, ValueError):
        legal = False
    if not legal:
        raise UserError(
            f"recorded parameters of a {loops} kernel that this version cannot use",
            where="--records",
            found=json.dumps(dict(fields)),
            todo="Remove that line, or tune into a new directory",
        )
    return point


def _with(values, default) -> tuple:
    """`values` without repetitions, and `default`, in order."""
    return tuple(sorted({*values, default}))


def _step_cycles(mr: int, nv: int, sums: int = 1) -> float:
    """Rough cycles per step of a register tile's sum: two FMA and two load ports, latency 4."""
    return max(mr * nv / 2, 0.58 * (mr + nv), 2.6 * nv, 4 / sums) + 0.1 * mr + 0.2 * nv


def _contraction(
    problem: contraction.Problem, default: contraction.Point, target: CpuTarget
) -> Space:
    steps, count = problem.group_inputs, len(vectors(problem.group_outputs, target.lanes))

    def cost(mr: int, nv: int, sums: int) -> float:
        widths = [min(nv, count - first) for first in range(0, count, nv)]
        per_step = sum(_step_cycles(mr, width, sums) for width in widths)
        per_tile = problem.r * problem.s * steps * per_step + 2 * mr * count + 12 * len(widths)
        return per_tile * -(-problem.row // mr)

    tiles = set()
    for mr, nv in _register_tiles(problem.row, count, 8 if problem.row <= 2 else 6, target):
        for sums in (1, 2, 4, 8):
            fits = sums * mr * nv + nv + 1 <= target.registers and sums <= steps
            if sums == 1 or (fits and sums * mr * nv <= 16):
                tiles.add((mr, nv, sums))
    best = min(cost(*tile) for tile in tiles)
    tiles = {tile for tile in tiles if cost(*tile) <= _COST_KEPT * best}
    units = -(-problem.row // default.mr) if problem.flat else problem.rows
    chunks = [c for c in (128, 256, 384, 512) if problem.groups == 1 and c < steps]
    walks = {
        ("panels", 1, 0),
        *((order, 1, chunk) for chunk in chunks for order in ("panels", "chunks")),
        *(("blocks", block, 0) for block in (1, 2, 4, 8, 16) if block <= units),
    }
    unrolls = {unroll for unroll in (1, 2, 4, 8, 16) if unroll <= steps}

    def assemble(chosen: Mapping) -> contraction.Point:
        mr, nv, sums = chosen["tile"]
        order, block, chunk = chosen["walk"]
        unroll = chosen["unroll"]
        if (mr, nv, sums, unroll) != (default.mr, default.nv, default.sums, default.unroll):
            unroll = min(steps, max(sums, min(unroll, max(1, _BODY // (mr * nv)))))
        return replace(
            default, mr=mr, nv=nv, sums=sums, order=order, block=block, chunk=chunk, unroll=unroll,
            prefetch=chosen["prefetch"],
        )  # fmt: skip

    choices = {
        "tile": _with(tiles, (default.mr, default.nv, default.sums)),
        "walk": _with(walks, (default.order, default.block, default.chunk)),
        "unroll": _with(unrolls, default.unroll),
        "prefetch": _with({0, 1, 2, 3}, default.prefetch),
    }
    return Space(choices, assemble, lambda p: cost(p.mr, p.nv, p.sums))


def _int8_contraction(
    problem: int8_contraction.Problem, default: int8_contraction.Point, target: CpuTarget
) -> Space:
    """The choices of the same problem counted in quads."""
    quads = int8_contraction.in_quads(problem)

    def estimate(point: int8_contraction.Point) -> float:
        return int8_contraction.estimated_cycles(quads, point.mr, point.nv, point.sums, target)

    return replace(_contraction(quads, default, target), estimate=estimate)


def _quadratic_contraction(
    problem: quadratic_contraction.Problem, default: quadratic_contraction.Point, target: CpuTarget
) -> Space:
    """Tiles of all branches together, and where squares are taken."""
    branches, count = len(problem.form), len(vectors(problem.group_outputs, target.lanes))
    squared = quadratic_contraction.SQUARED in problem.form
    tiles = {
        (tile_rows(problem.row, largest), nv)
        for nv in range(1, min(count, max(1, 9 // branches)) + 1)
        for largest in range(1, (target.registers - 2) // (nv * branches))
    }

    def cost(point: quadratic_contraction.Point) -> float:
        step = _step_cycles(point.mr, point.nv * branches, point.sums)
        step += squared * point.mr * (0.5 if point.squares == "registers" else 0.16)
        per_tile = problem.steps * step + 2 * point.mr * point.nv * branches + 12
        return -(-count // point.nv) * -(-problem.row // point.mr) * per_tile

    def assemble(chosen: Mapping) -> quadratic_contraction.Point:
        mr, nv = chosen["tile"]
        fields = {"squares": chosen["squares"], "prefetch": chosen["prefetch"]}
        if (mr, nv) == (default.mr, default.nv):
            return replace(default, unroll=chosen["unroll"], **fields)
        unroll = min(chosen["unroll"], max(1, _BODY // (mr * nv * branches)))
        return replace(default, mr=mr, nv=nv, sums=1, unroll=unroll, **fields)

    unrolls = {unroll for unroll in (1, 2, 4, 8) if unroll <= problem.group_inputs}
    choices = {
        "tile": _with(tiles, (default.mr, default.nv)),
        "unroll": _with(unrolls | {default.sums}, default.unroll),
        "squares": ("memory", "registers") if squared else (default.squares,),
        "prefetch": _with({0, 1, 2, 3}, default.prefetch),
    }
    return Space(choices, assemble, cost)


def _int8_depthwise(
    problem: int8_depthwise.Problem, default: int8_depthwise.Point, target: CpuTarget
) -> Space:
    rows = {tile_rows(problem.ow, largest) for largest in range(1, target.registers // 4)}

    def estimate(point: int8_depthwise.Point) -> float:
        columns = (point.mr - 1) * problem.stride[1] + (problem.s - 1) * problem.dilation[1] + 1
        return -(-problem.ow // point.mr) * (problem.r * (columns + point.mr) + 8)

    return Space({"mr": _with(rows, default.mr)}, lambda c: replace(default, mr=c["mr"]), estimate)


def _int8_winograd(
    problem: int8_winograd.Problem, default: int8_winograd.Point, target: CpuTarget
) -> Space:
    """Register tiles, each with the blocks that fit beside what is kept, and halves and thirds of those."""
    points = {default: None}
    for point in int8_winograd.points(problem, target):
        for part in (1, 2, 3):
            steps = max(1, point.block // point.rows // part)
            points[replace(point, block=min(point.block, steps * point.rows))] = None

    def estimate(point: int8_winograd.Point) -> float:
        return int8_winograd.cost(problem, point, target)

    return Space({"point": tuple(points)}, lambda chosen: chosen["point"], estimate)


def _register_tiles(row: int, count: int, most: int, target: CpuTarget) -> set[tuple[int, int]]:
    """(rows, vectors) that fit the registers, for rows that cut `row` into equal tiles."""
    return {
        (tile_rows(row, largest), nv)
        for nv in range(1, min(count, most) + 1)
        for largest in range(1, (target.registers - 1 - nv) // nv + 1)
    }


def _depthwise(problem: contraction.Problem, default: depthwise.Point, target: CpuTarget) -> Space:
    count = len(vectors(problem.c, target.lanes))
    tiles = _register_tiles(problem.ow, count, 4, target)

    def estimate(point: depthwise.Point) -> float:
        # Loads of inputs shared between the pixels of a tile, and of weights shared by all of them.
        columns = (point.mr - 1) * problem.stride[1] + (problem.s - 1) * problem.dilation[1] + 1
        per_row = point.nv * (columns + problem.s + point.mr * problem.s) / 2
        return -(-problem.ow // point.mr) * -(-count // point.nv) * (problem.r * per_row + 8)

    choices = {"tile": _with((t for t in tiles if t[0] <= 14), (default.mr, default.nv))}
    return Space(choices, _tile_only(default), estimate)


def _batch_matmul(
    problem: batch_matmul.Problem, default: batch_matmul.Point, target: CpuTarget
) -> Space:
    count = len(vectors(problem.n, target.lanes))
    tiles = _register_tiles(problem.m, count, 6, target)

    def estimate(point: batch_matmul.Point) -> float:
        per_tile = problem.k * _step_cycles(point.mr, point.nv) + 2 * point.mr * point.nv + 12
        return -(-problem.m // point.mr) * -(-count // point.nv) * per_tile

    return Space({"tile": _with(tiles, (default.mr, default.nv))}, _tile_only(default), estimate)


def _tile_only(default) -> Callable[[Mapping], object]:
    """Points that differ from the default in their tile alone."""

    def assemble(chosen: Mapping):
        mr, nv = chosen["tile"]
        return replace(default, mr=mr, nv=nv)

    return assemble


def _winograd(problem: winograd.Problem, default: winograd.Point, target: CpuTarget) -> Space:
    lanes = target.lanes
    count = len(vectors(problem.o, lanes))
    tiles = {
        (rows, v)
        for v in range(1, min(count, 4) + 1)
        for rows in range(2, min(14, (target.registers - 2 - v) // v) + 1)
    }

    def block_of(m: int, panel: int, share: float) -> int:
        """Tiles transformed together whose matrices take `share` of the second-level cache."""
        every = math.prod(problem.tiles(m))
        most = int(share * target.l2_bytes) // (4 * problem.size(m) ** 2 * (problem.depth + panel))
        return -(-every // -(-every // max(1, min(most, every))))

    def assemble(chosen: Mapping) -> winograd.Point:
        m, (rows, v), share = chosen["m"], chosen["tile"], chosen["share"]
        if (m, rows, v, share) == (default.m, default.rows, default.vectors, 0.0):
            return default
        block = block_of(m, v * lanes, share or _DEFAULT_SHARE)
        return replace(default, m=m, block=block, rows=min(rows, block), vectors=v, chunk=0)

    def estimate(point: winograd.Point) -> float:
        matrices, every = problem.size(point.m) ** 2, math.prod(problem.tiles(point.m))
        step = _step_cycles(point.rows, point.vectors)
        per_tile = problem.depth * step + 4 * point.rows * point.vectors
        per_block = -(-point.block // point.rows) * -(-count // point.vectors) * per_tile
        transforms = every * (problem.depth + problem.o) / lanes * 3
        return matrices * (-(-every // point.block) * per_block + transforms)

    choices = {
        "m": tuple(sorted(winograd.SIZES[problem.taps])),
        "tile": _with(tiles, (default.rows, default.vectors)),
        "share": (0.0, 0.2, 0.3, 0.4, 0.55, 0.7, 0.9),
    }
    return Space(choices, assemble, estimate)
