# SPDX-License-Identifier: Apache-2.0
"""Search spaces of the weight-sparse kernels: tiles, what is kept of the outputs, how much of the panel is walked at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from schedules import (
    sparse_chain,
    sparse_groups,
    sparse_near,
    sparse_planes,
    sparse_vector,
    sparse_windows,
)
from schedules.sparse_problem import Problem, tiles_of
from schedules.target import CpuTarget

Choices = dict[str, tuple]
_PARTS = (16, 32, 64, 128, 256)
_CHUNKS = (96, 192, 384, 768)
_LINES = (1, 2, 3, 4, 7, 8, 14, 16, 28)
_PANELS = (1, 2, 3, 4, 6, 8, 12, 16)
_CHANNELS = (4, 8, 16, 24, 32, 48, 64, 96)
_SUMS = (1, 2, 4, 8, 16)


def tiles(problem: Problem, target: CpuTarget) -> set[tuple[int, int]]:
    """(rows, vectors) whose sums and operands fit the registers."""
    found = set()
    for rows in (r for r in (1, 2, 4, 8, 16) if problem.block % r == 0):
        # One row takes its panel operand from memory; more rows keep it in registers.
        for vectors in range(1, 13):
            operands = 1 if rows == 1 else vectors + 1
            if rows * vectors + operands <= target.registers:
                found.add((rows, vectors))
    return found


def _parts(problem: Problem, target: CpuTarget) -> set[int]:
    return {p for p in _PARTS if p % problem.block == 0 and p >= target.lanes}


def _cycles(problem: Problem, target: CpuTarget, point, pixels: int) -> float:
    """Rough cycles: two FMA ports, two loads, a few cycles for each loop over the non-zeros of a block."""
    step = max(point.rows * point.vectors / 2, (point.rows + 1.6 * point.vectors + 1) / 2)
    walks = problem.block // point.rows
    count = tiles_of(pixels, target.lanes, point.vectors)[0]
    return count * walks * (problem.stored * step + problem.blocks * (20 + point.vectors))


def planes_choices(problem: Problem, default: sparse_planes.Point, target: CpuTarget):
    """(choices, assemble, estimate) around a `sparse_planes` point."""
    rows = problem.panel_rows
    choices: Choices = {
        "tile": _sorted(tiles(problem, target), (default.rows, default.vectors)),
        "part": _sorted(_parts(problem, target), default.part),
        "chunk": _sorted({c for c in _CHUNKS if c < rows} | {rows}, default.chunk),
    }

    def assemble(chosen) -> sparse_planes.Point:
        tile_rows, vectors = chosen["tile"]
        part, chunk = chosen["part"], chosen["chunk"]
        return replace(default, rows=tile_rows, vectors=vectors, part=part, chunk=chunk)

    return choices, assemble, lambda p: _cycles(problem, target, p, problem.pixels)


def windows_choices(problem: Problem, default: sparse_windows.Point, target: CpuTarget):
    """(choices, assemble, estimate) around a `sparse_windows` point."""
    lines = {n for n in _LINES if n < problem.out_height} | {problem.out_height}
    choices: Choices = {
        "tile": _sorted(tiles(problem, target), (default.rows, default.vectors)),
        "part": _sorted(_parts(problem, target), default.part),
        "lines": _sorted(lines, default.lines),
    }

    def assemble(chosen) -> sparse_windows.Point:
        tile_rows, vectors = chosen["tile"]
        part, height = chosen["part"], chosen["lines"]
        return replace(default, rows=tile_rows, vectors=vectors, part=part, lines=height)

    def estimate(point: sparse_windows.Point) -> float:
        window = sparse_windows.window_of(problem, point.lines)
        bands = problem.batch * sparse_windows.bands(problem, point.lines)
        panel = 4 * problem.channels * window.channel
        slow = 1.0 if panel <= target.l2_bytes else 2.0
        packing = 6 * panel / 4 / target.lanes
        return bands * (slow * _cycles(problem, target, point, point.lines * window.line) + packing)

    return choices, assemble, estimate


def groups_choices(problem: Problem, default: sparse_groups.Point, target: CpuTarget):
    """(choices, assemble, estimate) around a `sparse_groups` point."""
    lines = {n for n in _LINES if n < problem.out_height} | {problem.out_height}
    choices: Choices = {
        "tile": _sorted(tiles(problem, target), (default.rows, default.vectors)),
        "lines": _sorted(lines, default.lines),
    }

    def assemble(chosen) -> sparse_groups.Point:
        tile_rows, vectors = chosen["tile"]
        return replace(default, rows=tile_rows, vectors=vectors, lines=chosen["lines"])

    def estimate(point: sparse_groups.Point) -> float:
        window = sparse_windows.window_of(problem, point.lines)
        count = problem.batch * sparse_windows.bands(problem, point.lines)
        panel = 4 * problem.channels // problem.groups * window.channel
        slow = 1.0 if panel <= target.l2_bytes // 2 else 2.0
        copying = 2 * problem.channels * window.channel / target.lanes
        return count * (slow * _cycles(problem, target, point, point.lines * window.line) + copying)

    return choices, assemble, estimate


def near_choices(problem: Problem, default: sparse_near.Point, target: CpuTarget):
    """(choices, assemble, estimate) around a `sparse_near` point."""
    lines = {n for n in _LINES if n < problem.out_height} | {problem.out_height}
    choices: Choices = {
        "vectors": _sorted({v for _, v in tiles(problem, target)}, default.vectors),
        "lines": _sorted(lines, default.lines),
        "channels": _sorted({c for c in _CHANNELS if c < problem.channels}, default.channels),
    }

    def assemble(chosen) -> sparse_near.Point:
        return replace(default, **chosen)

    def estimate(point: sparse_near.Point) -> float:
        panel = 4 * sparse_near.panel_elements(problem, point)
        slow = 1.0 if panel <= target.l1_bytes else 1.5
        return slow * sparse_near.work(problem, point, target)

    return choices, assemble, estimate


def chain_choices(problem: Problem, default: sparse_chain.Point, target: CpuTarget):
    """(choices, assemble, estimate) around a `sparse_chain` point."""
    total = -(-problem.computed // target.lanes)
    choices: Choices = {
        "tile": _sorted(tiles(problem, target), (default.rows, default.vectors)),
        "span": _sorted({-(-total // n) for n in _PANELS if n <= total}, default.span),
    }

    def assemble(chosen) -> sparse_chain.Point:
        tile_rows, vectors = chosen["tile"]
        return replace(default, rows=tile_rows, vectors=vectors, span=chosen["span"])

    def estimate(point: sparse_chain.Point) -> float:
        panels = problem.batch * -(-total // point.span)
        panel = problem.panel_rows * point.span * target.lanes * 4
        slow = 1.0 if panel <= target.l2_bytes // 2 else 2.0
        return panels * slow * _cycles(problem, target, point, point.span * target.lanes)

    return choices, assemble, estimate


def vector_choices(problem: Problem, default: sparse_vector.Point, target: CpuTarget):
    """(choices, assemble, estimate) around a `sparse_vector` point."""
    fits = {s for s in _SUMS if s * problem.pixels <= max(16, default.sums * problem.pixels)}
    choices: Choices = {"sums": _sorted(fits, default.sums)}

    def estimate(point: sparse_vector.Point) -> float:
        chains = point.sums * problem.pixels
        per_block = problem.stored / max(1, problem.blocks)
        return problem.pixels * per_block * max(1.5, 4 / chains) + 4 * chains

    return choices, lambda chosen: sparse_vector.Point(chosen["sums"]), estimate


def _sorted(values: set, default) -> tuple:
    return tuple(sorted({*values, default}))


CHOICES: dict[str, Callable] = {
    "sparse_chain": chain_choices,
    "sparse_groups": groups_choices,
    "sparse_near": near_choices,
    "sparse_planes": planes_choices,
    "sparse_windows": windows_choices,
    "sparse_vector": vector_choices,
}
