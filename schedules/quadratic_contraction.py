# SPDX-License-Identifier: Apache-2.0
"""Quadratic neurons by register tile: several sums over one pass through x, combined where they are stored.

    Y = (R x + sr) * (G x + sg) + B x^2 + L x

for whichever of the branches r, g, b, l `Problem.form` names: r and g come together or not at all. It is the tile of
`contraction` with one vector of sums per branch for each vector of outputs; weights are packed
`[panels][R][S][C/groups][nv * branches * lanes]`, the branches of a vector of outputs next to one another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules import contraction, windows
from schedules.emission import Row, ramp, runs_parallel, workspace
from schedules.fused import Emission, Fused
from schedules.target import CpuTarget
from schedules.terms import FloatTerms
from schedules.windows import loop, span, splat, tile_rows, unravel, vectors

LOOPS = "quadratic_contraction"
PRODUCT = "rg"  # the branches whose sums, shifted, are multiplied
SQUARED = "b"  # the branch that reads x^2


@dataclass(frozen=True)
class Problem(windows.Problem):
    """A contraction with `o` outputs of several branches each, in the order of `form`."""

    form: str = "rgb"

    @property
    def stacked(self) -> windows.Problem:
        """The plain contraction with an output for every sum."""
        fields = windows.Problem.to_dict(self)
        del fields["form"]
        return windows.Problem.from_dict({**fields, "o": self.o * len(self.form)})


@dataclass(frozen=True)
class Point(contraction.Point):
    """A contraction's parameters, `nv` in vectors of outputs.

    `squares`: "registers" squares every pixel where it meets a panel of weights, "memory" squares x once beforehand.
    """

    squares: str = "registers"


def packed_shape(problem: Problem, point: Point) -> tuple[int, ...]:
    """[panels of all groups, R, S, C/groups, weights of a panel for one input]."""
    *lead, panel = contraction.packed_shape(problem, point)
    return (*lead, panel * len(problem.form))


class QuadraticTerms(FloatTerms):
    """The branches of quadratic neurons: which source each one's weights meet, and what their sums become.

    `shifts` is None, or float32 [2, outputs]: sr and sg.
    """

    def __init__(self, kernel: Emission, form: str, lanes: int, squares=None):
        self.x, self.w, *rest = kernel.inputs
        self.shifts = rest[0] if rest else None
        self.form, self.lanes, self.squares = form, lanes, squares
        self.branches = len(form)

    def pixel(self, at: tuple):
        """x at these indices, and x^2 if it lies in memory."""
        square = self.squares[at] if self.squares is not None else None
        return self.x[at], square

    def add(self, held, pixel, at: tuple, width: int):
        """`at` ends with a vector's place among those of its panel, which tells its branch."""
        branch = self.form[at[-1] // self.lanes % self.branches]
        x, square = pixel
        value = splat(x, width)
        if branch == SQUARED:
            # The same product for every vector: LLVM computes it once.
            value = value * value if square is None else splat(square, width)
        return held + value * self.w[(*at[:-1], span(at[-1], width))]

    def combine(self, sums: list, first, width: int):
        return combine(self.form, sums, self.shifts, span(first, width))


def combine(form: str, sums: list, shifts, channels):
    """(r + sr) * (g + sg) + the other branches, from a sum per branch; `channels` indexes `shifts`."""
    of = dict(zip(form, sums))
    added = [value for branch, value in of.items() if branch not in PRODUCT]
    if PRODUCT[0] in of:
        r, g = (of[b] + shifts[i, channels] for i, b in enumerate(PRODUCT))
        added.insert(0, r * g)
    total = added[0]
    for value in added[1:]:
        total = total + value
    return total


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of fused quadratic neurons. Raises ScheduleError if the packed weights do not fit its parameters."""
    from schedules.register_tile import Contraction

    problem = Problem.from_dict(fused.point["problem"])
    point = Point.from_dict(fused.point["point"])
    with fused.emit() as kernel:
        kernel.require_packed(packed_shape(problem, point))
        squares = None
        if point.squares == "memory" and SQUARED in problem.form:
            squares = _square(kernel.inputs[0], target)
        terms = QuadraticTerms(kernel, problem.form, point.lanes, squares)
        Contraction(kernel, fused.shape, problem, point, target.threads, terms).emit()
    return kernel.func


def _square(x, target: CpuTarget):
    """A workspace with the squares of x."""
    *lead, channels = (int(d) for d in x.shape)
    row, rows = Row(channels, target.lanes), 1
    for extent in lead:
        rows *= extent
    squares = workspace(*lead, channels)
    with loop(rows, runs_parallel(target, rows, rows * channels)) as i:
        at = unravel(i, tuple(lead))

        def body(base, _slot, _fresh):
            index = [*at, ramp(base, row.lanes)]
            value = T.bind(x[tuple(index)])
            T.buffer_store(squares, value * value, index)

        row.each(body)
    return squares


def _tile(problem: Problem, target: CpuTarget, in_registers: bool) -> tuple[int, int, int]:
    """(mr, vectors of sums, sums) of the least estimated time; the second is a multiple of the branches."""
    branches, squared = len(problem.form), SQUARED in problem.form
    count = len(vectors(problem.group_outputs, target.lanes))
    best = None
    for nv in range(1, min(count, max(1, 9 // branches)) + 1):
        held = nv * branches
        # Registers for the weights of a step, a pixel and its square.
        largest = max(1, (target.registers - 1 - squared - held) // held)
        for mr in sorted(
            {tile_rows(problem.row, m) for m in range(max(1, largest // 2), largest + 1)}
        ):
            sums = 1
            while mr * held * sums < 8 and (2 * sums * mr + 1) * held + 1 <= target.registers:
                if 2 * sums > problem.group_inputs:
                    break
                sums *= 2
            cost = 0.0
            for first in range(0, count, nv):
                part = min(nv, count - first) * branches
                step = contraction.step_cycles(mr, part, sums)
                step += squared * mr * (0.5 if in_registers else 0.16)
                cost += problem.steps * step + 2 * mr * part + 12
            cost *= -(-problem.row // mr)
            if best is None or cost < best[0] * 0.995:
                best = (cost, mr, held, sums)
    return best[1:]


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """As the contraction of all branches stacked, with the tile that counts squaring too.

    Squares are taken in registers where x is read by one panel alone, else once beforehand: each would cost a
    multiplication at every panel and tap.
    """
    branches = len(problem.form)
    lone = problem.flat and problem.row <= 2
    mr, held, sums = _tile(problem, target, lone)
    point = contraction.point_of_tile(problem.stacked, (mr, held, sums), target)
    fields = {**point.to_dict(), "nv": held // branches}
    panels = contraction.panels_per_group(problem, replace(point, nv=held // branches))
    again = panels * problem.r * problem.s
    once = again <= 2 or lone
    return Point(**fields, squares="registers" if once else "memory")
