# SPDX-License-Identifier: Apache-2.0
"""Convolutions lowered to Winograd's algorithm, where its cost rule says that pays: 3x3 of stride 1, and strided ones
of larger kernels over a planar image of few channels.

    rewrite: y = kerf.conv2d(x, w)  ->  y = call_tir(winograd, (x, packed G w G^T, or packed w))

The call attribute `winograd` = "never" forbids it: its rounding error is 3-8 times that of the direct sum (see
`schedules/winograd.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import relax

from passes.family import LoweredCall
from passes.hoist_constants import handle_of
from passes.layers import attrs_of, const_array, shape_of
from passes.lower import call_te
from passes.max_pooling import largest_of
from schedules import windows, winograd
from schedules.errors import Declined
from schedules.fused import annotations
from schedules.spaces import point_for
from schedules.target import CpuTarget

# The estimate is good to about a tenth, and the direct kernel is the more accurate one.
_WORTH = 0.9


def unsuited(call: relax.Call, planar: bool = False) -> Declined | None:
    """Why Winograd's algorithm does not apply to a `kerf.conv2d` call, in whichever layout; `planar`: its image can be had
    as [N, C, H, W]."""
    attrs, (_, _, r, s) = attrs_of(call), shape_of(call.args[1])
    stride = max(attrs["strides"])
    if stride > 1 and not planar:
        return Declined(f"Winograd: strides of {stride} over an image of channels last")
    taps = -(-r // stride)
    if r != s or taps not in winograd.SIZES or (stride == 1 and r != 3):
        return Declined(f"Winograd: the kernel is {r}x{s}, not 3x3")
    for key, wanted in (
        ("strides", [stride, stride]),
        ("dilation", [1, 1]),
        ("groups", 1),
    ):
        if attrs[key] != wanted:
            return Declined(f"Winograd: {key} is {attrs[key]}, not {wanted}")
    if attrs.get("winograd", "auto") == "never":
        return Declined("Winograd: forbidden for this layer")
    return None


def problem_of(call: relax.Call, planar: bool = False) -> winograd.Problem | Declined:
    """The problem of a `kerf.conv2d` call in NHWC, or why there is none: `unsuited`."""
    if (declined := unsuited(call, planar)) is not None:
        return declined
    attrs, (o, c, kernel, _) = attrs_of(call), shape_of(call.args[1])
    n, h, w, _ = shape_of(call.args[0])
    return winograd.Problem(n, h, w, c, o, tuple(attrs["padding"]), kernel, max(attrs["strides"]))


def choose(problem: winograd.Problem, target: CpuTarget) -> int | Declined:
    """The output tile m of F(m x m, taps x taps) that the cost rule expects to be fastest, or why the direct kernel is."""
    direct = winograd.direct_cost(problem, target)
    points = {m: winograd.default_point(problem, m, target) for m in winograd.SIZES[problem.taps]}
    costs = {m: winograd.cost(problem, point, target) for m, point in points.items()}
    return cheapest(costs, direct)


def cheapest(costs: Mapping[int, float], direct: float) -> int | Declined:
    """The m of least cost, or that none is worth its coarser rounding beside the `direct` cost."""
    best = min(costs, key=costs.get)
    if costs[best] > _WORTH * direct:
        return Declined(
            f"Winograd: F({best}x{best}) is expected to take {costs[best] / direct:.2f} of direct"
        )
    return best


def lower(
    bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget, planes: relax.Expr | None = None
) -> LoweredCall | None:
    """The Winograd kernel for a `kerf.conv2d` call in NHWC; None where it does not apply or does not pay. `planes` is its
    image as [N, C, H, W], if there is one."""
    problem = problem_of(call, planes is not None)
    m = problem if isinstance(problem, Declined) else choose(problem, target)
    if isinstance(m, Declined):
        return None
    default = winograd.default_point(problem, m, target)
    x = call.args[0] if problem.stride == 1 else planes
    return lower_at(bb, call, problem, point_for(winograd, problem, target, default), x)


def lower_at(
    bb: relax.BlockBuilder,
    call: relax.Call,
    problem: winograd.Problem,
    point: winograd.Point,
    x: relax.Expr | None = None,
    pool: windows.Problem | None = None,
) -> LoweredCall:
    """The kernel at a point, whatever the cost rule says; of the image `x`, the call's own if None; with the maxima over the
    windows `pool`, if given."""
    source = winograd.weight_source([const_array(call.args[1])], point, problem.stride)
    packed = relax.const(source.prepared())
    height, width = problem.output_hw

    def define(x, u):
        if pool is None:
            return winograd.define_winograd(x, u, problem, point)
        notes = annotations(
            winograd.LOOPS, problem=problem.to_dict(), point=point.to_dict(), pool=pool.to_dict()
        )
        return largest_of(pool, winograd.define_stages(x, u, problem, point, "winograd"), notes)

    kernel = f"_{problem.kernel}x{problem.kernel}s{problem.stride}" if problem.stride > 1 else ""
    hint = f"winograd{point.m}{kernel}_{height}x{width}_{problem.c}_{problem.o}"
    hint += f"_max_pool{pool.r}x{pool.s}" if pool is not None else ""
    lowered = call_te(bb, define, call.args[0] if x is None else x, packed, hint=hint)
    return LoweredCall(lowered, {handle_of(packed): source})
