# SPDX-License-Identifier: Apache-2.0
"""Quadratic 3x3 convolutions of stride 1 lowered to Winograd's algorithm, where its cost rule says that pays.

rewrite: kerf.quadratic_conv2d(x, w_r, w_g, w_b, shifts)  ->  call_tir(quadratic_winograd, (x, packed G w G^T, shifts))
"""

from __future__ import annotations

from dataclasses import asdict

from tvm import relax

from passes.dense import winograd as dense
from passes.family import LoweredCall
from passes.hoist_constants import handle_of
from passes.layers import attrs_of, shape_of
from passes.lower import call_te
from passes.quadratic.operators import shifts_of, weights_of
from schedules import quadratic_winograd, winograd
from schedules.errors import Declined
from schedules.quadratic_winograd import Point, Problem, sources_of
from schedules.spaces import point_for
from schedules.target import CpuTarget


def problem_of(call: relax.Call) -> Problem | Declined:
    """The problem of a quadratic call, or why Winograd's algorithm does not apply to it."""
    if len(shape_of(call.args[1])) != 4:
        return Declined("Winograd: not a convolution")
    problem = dense.problem_of(call)
    if isinstance(problem, Declined):
        return problem
    return Problem(**asdict(problem), form=attrs_of(call)["form"])


def choose(problem: Problem, target: CpuTarget) -> int | Declined:
    """The m of F(m x m, 3 x 3) that is expected to be fastest, or why the direct kernel is."""
    branches, sources = len(problem.form), len(sources_of(problem.form))
    direct = branches * winograd.direct_cost(problem, target)
    points = {m: default_point(problem, m, target) for m in (4, 2)}
    costs = {m: winograd.cost(problem, p, target, sources, branches) for m, p in points.items()}
    return dense.cheapest(costs, direct)


def lower(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> LoweredCall | None:
    """The Winograd kernel of a quadratic call in NHWC; None where it does not apply or does not pay."""
    problem = problem_of(call)
    m = problem if isinstance(problem, Declined) else choose(problem, target)
    if isinstance(m, Declined):
        return None
    return lower_at(bb, call, problem, default_point(problem, m, target, tuned=True))


def default_point(problem: Problem, m: int, target: CpuTarget, tuned: bool = False) -> Point:
    """The default parameters of F(m x m), or what tuning recorded."""
    point = quadratic_winograd.default_point(problem, m, target)
    return point_for(quadratic_winograd, problem, target, point) if tuned else point


def lower_at(
    bb: relax.BlockBuilder, call: relax.Call, problem: Problem, point: Point
) -> LoweredCall:
    """The kernel at a point, whatever the cost rule says."""
    weights = weights_of(call)
    source = winograd.weight_source([weights[branch] for branch in problem.form], point)
    packed = relax.const(source.prepared())
    args = [call.args[0], packed]
    if (shifts := shifts_of(call)) is not None:
        args.append(relax.const(shifts))
    height, width = problem.output_hw
    size = f"{height}x{width}_{problem.c}_{problem.o}"
    define = quadratic_winograd.define(problem, point)
    hint = f"quadratic_{problem.form}_winograd{point.m}_{size}"
    return LoweredCall(call_te(bb, define, *args, hint=hint), {handle_of(packed): source})
