# SPDX-License-Identifier: Apache-2.0
"""Quadratic neurons by Winograd's algorithm: the kernel of `winograd` with several products for each output.

The square of x, taken in registers, is transformed for the branch b, then x once for all branches that read it; the
branches' results meet after their inverse transforms, where an output is stored. Weights are packed
one branch after the other in each panel.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import te, tirx

from schedules import winograd
from schedules.errors import ScheduleError
from schedules.fused import Fused, annotations
from schedules.quadratic_contraction import SQUARED, combine
from schedules.target import CpuTarget
from schedules.winograd import Point

__all__ = ["LOOPS", "Point", "Problem", "define", "schedule", "sources_of"]

LOOPS = "quadratic_winograd"


@dataclass(frozen=True)
class Problem(winograd.Problem):
    """A 3x3 convolution of stride 1 for each branch of `form`."""

    form: str = "rgb"


def sources_of(form: str) -> tuple[bool, ...]:
    """For each source that is transformed whether it is squared: x^2, then x, which most branches read."""
    return tuple(sorted({branch == SQUARED for branch in form}, reverse=True))


def define(problem: Problem, point: Point):
    """te function (x [N, H, W, C], packed weights, shifts if any) -> [N, OH, OW, O]."""
    notes = annotations(LOOPS, problem=problem.to_dict(), point=point.to_dict())
    rows = winograd.packed_rows(problem, point)

    def quadratic(x, u, *shifts):
        def squared(*i):
            return x(*i) * x(*i)

        branches = [
            winograd.define_stages(
                squared if b == SQUARED else x, u, problem, point, f"branch_{b}", first=i * rows
            )
            for i, b in enumerate(problem.form)
        ]

        def neuron(*i):
            return combine(problem.form, [b(*i) for b in branches], *(shifts or (None,)), i[-1])

        return te.compute(branches[0].shape, neuron, name="quadratic", attrs=notes)

    return quadratic


class _Emitter(winograd.Emitter):
    """Products of every branch, combined at the store."""

    def __init__(self, kernel, problem: Problem, point: Point, target: CpuTarget):
        x, u, *shifts = kernel.inputs
        self.squared, self.shifts = sources_of(problem.form), shifts[0] if shifts else None
        self.groups = tuple(
            tuple(i for i, b in enumerate(problem.form) if (b == SQUARED) == squared)
            for squared in self.squared
        )
        super().__init__(kernel, problem, point, target, x, u)

    def source(self, value, index: int):
        return value * value if self.squared[index] else value

    def combine(self, values: list, channel):
        return combine(self.problem.form, values, self.shifts, channel)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of fused quadratic neurons."""
    problem, point = (
        Problem.from_dict(fused.point["problem"]),
        Point.from_dict(fused.point["point"]),
    )
    blocks = winograd.stages(point) * len(problem.form) + 1
    if fused.anchor_index + 1 != blocks:
        raise ScheduleError(
            "the definition is not the one this kernel replaces",
            found=str([b.name_hint for b in fused.blocks[: fused.anchor_index + 1]]), wanted=f"{blocks} blocks",
        )  # fmt: skip
    with fused.emit() as kernel:
        _Emitter(kernel, problem, point, target).emit()
    return kernel.func
