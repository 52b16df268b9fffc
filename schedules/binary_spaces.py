# SPDX-License-Identifier: Apache-2.0
"""Search spaces of the binary kernels: tiles, what is straight-line code, how words are added before they are counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from schedules import sign_tables
from schedules.binary_cost import instructions
from schedules.binary_problem import Point, Problem, line_words, row_units
from schedules.bit_words import BitCounter
from schedules.target import CpuTarget
from schedules.windows import tile_rows, vectors

_TILES = (1, 2, 3, 4)
_BLOCKS = (8, 16, 24, 32, 48)
_LONGEST = 160  # words of a tile in straight-line code
_LOOP = 12  # cycles that a tile costs besides its sums


def binary_choices(problem: Problem, default: Point, target: CpuTarget):
    """(choices, assemble, estimate) around a `binary_contraction` point."""
    counter, padded = BitCounter.of(target), problem.image
    line, steps = line_words(padded), padded.steps
    most = max(default.levels, min(counter.levels, int(math.log2(steps))))
    blocks = {b for b in (*_BLOCKS, line, padded.s * line, steps) if b <= min(steps, _LONGEST)}
    tiles = {
        (mr, block)
        for mr in _TILES
        for block in blocks
        if mr <= padded.row and mr * block <= _LONGEST
    }
    pairs = counter.three_inputs and line > 1
    added = {(levels, False) for levels in range(most + 1)}
    added |= {(levels, True) for levels in range(1, most + 1) if pairs}
    units = {mr: row_units(padded, mr)[0] for mr in {*_TILES, default.mr}}

    def rows_of(mr: int, share: int) -> int:
        """About one `share`th of the rows that tiles of `mr` pixels have: a divisor of them; 0 for all."""
        if share == 1:
            return 0
        return max(
            (d for d in range(1, units[mr]) if units[mr] % d == 0 and d <= units[mr] // share),
            default=0,
        )

    def assemble(chosen: Mapping) -> Point:
        (mr, block), (levels, paired), share = chosen["tile"], chosen["added"], chosen["share"]
        rows = default.rows if share == 0 and mr == default.mr else rows_of(mr, max(1, share))
        return replace(default, mr=mr, block=block, levels=levels, paired=paired, rows=rows)

    def estimate(point: Point) -> float:
        tiles = -(-padded.row // point.mr) * padded.rows
        vectors = -(-problem.group_outputs // target.lanes) * problem.groups
        one = instructions(padded, point, counter).total * point.mr / 2
        held = point.mr * (point.levels + 2)
        spilled = 2.0 * max(0, held - target.registers + 4) * steps / 8
        return tiles * vectors * (one + (point.mr + 1) * steps / 2 + spilled + _LOOP)

    choices = {
        "tile": tuple(sorted({*tiles, (default.mr, default.block)})),
        "added": tuple(sorted({*added, (default.levels, default.paired)})),
        "share": (0, 1, 2, 4, 8),
    }
    return choices, assemble, estimate


def tables_choices(problem: sign_tables.Problem, default: sign_tables.Point, target: CpuTarget):
    """(choices, assemble, estimate) around a `sign_tables` point."""
    count, row = len(vectors(problem.group_outputs, target.lanes)), problem.image.row
    tiles = {
        (tile_rows(row, largest), nv)
        for nv in range(1, min(count, 12) + 1)
        for largest in range(1, 13)
        if largest * nv + nv + 1 <= target.registers
    }

    def strip_of(mr: int, share: float) -> int:
        return sign_tables.strip_of(problem, target, mr, share)

    def assemble(chosen: Mapping) -> sign_tables.Point:
        (mr, nv), share = chosen["tile"], chosen["share"]
        return replace(default, mr=mr, nv=nv, strip=strip_of(mr, share))

    def estimate(point: sign_tables.Point) -> float:
        steps = problem.r * problem.s * sign_tables.fields(problem, point)
        step = point.mr * point.nv + point.nv / 2 + point.mr / 2  # two ports
        tile = steps * max(step, 4) + 4 * point.mr * point.nv + _LOOP
        return -(-row // point.mr) * problem.image.rows * -(-count // point.nv) * tile

    choices = {
        "tile": tuple(sorted({*tiles, (default.mr, default.nv)})),
        "share": (0.03, 0.1, sign_tables.CACHED, 0.5, 1.0),
    }
    return choices, assemble, estimate


CHOICES = {"binary_contraction": binary_choices, "sign_tables": tables_choices}
