# SPDX-License-Identifier: Apache-2.0
"""Integer 3x3 convolutions lowered to Winograd's algorithm, exactly, where its cost rule says that pays.

rewrite: kerf.int8_conv2d(x, w)  ->  call_tir(int8_winograd, (x, packed w[, starts]))
"""

from __future__ import annotations

import numpy as np
from tvm import relax, te, tirx

from passes.lower import call_te
from schedules import int8_winograd
from schedules.errors import Declined
from schedules.fused import annotations
from schedules.int8_winograd import PAIR, Point, Problem
from schedules.spaces import point_for
from schedules.target import CpuTarget
from schedules.terms import pair_product

_WORTH = 0.85  # the estimates of direct kernels of 3x3 are a tenth too long


def declined(weight: np.ndarray, problem: Problem, target: CpuTarget) -> Declined | None:
    """Why Winograd's algorithm does not apply to a convolution of these weights, int8 [O, C, 3, 3]."""
    if (problem.r, problem.s) != (3, 3):
        return Declined(f"Winograd: the kernel is {problem.r}x{problem.s}, not 3x3")
    for key, found, wanted in (
        ("stride", problem.stride, (1, 1)),
        ("dilation", problem.dilation, (1, 1)),
        ("groups", problem.groups, 1),
    ):
        if found != wanted:
            return Declined(f"Winograd: {key} is {found}, not {wanted}")
    if pair_product(target) is None:
        return Declined(f"Winograd: {target.tier} has no products of 16-bit pairs")
    if problem.c % PAIR or problem.o < target.lanes:
        return Declined(f"Winograd: {problem.c} input and {problem.o} output channels")
    if not int8_winograd.sums_fit(weight):
        return Declined("Winograd: sums of these weights may reach 2^25")
    return None


def choose(weight: np.ndarray, problem: Problem, target: CpuTarget) -> Point | Declined:
    """The parameters of the kernel, or why the direct one is used."""
    if (reason := declined(weight, problem, target)) is not None:
        return reason
    point = int8_winograd.default_point(problem, target)
    if point is None:
        return Declined("Winograd: more pixels and weights than the second-level cache holds")
    direct = int8_winograd.direct_cost(problem, target)
    expected = int8_winograd.cost(problem, point, target) / direct
    if expected > _WORTH:
        return Declined(f"Winograd: is expected to take {expected:.2f} of direct")
    return point_for(int8_winograd, problem, target, point)


def pack_weights(weight: np.ndarray, problem: Problem, point: Point) -> np.ndarray:
    """int8 [O, C, 3, 3] -> `int8_winograd.packed_shape`."""
    panels, pairs, taps, _ = shape = int8_winograd.packed_shape(problem, point)
    starts = [int8_winograd.panel_start(problem, point, panel) for panel in range(panels)]
    split = np.stack([weight[start : start + point.panel] for start in starts])
    split = split.reshape(panels, point.panel, pairs, PAIR, taps)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 1, 3)).reshape(shape)


def define(problem: Problem, point: Point, zero_point: int):
    """te function (x uint8 [N, H, W, C], packed w[, starts int32 [O]]) -> int32 [N, OH, OW, O]: the direct sum."""
    notes = annotations(
        "int8_winograd", problem=problem.to_dict(), point=point.to_dict(), zero_point=zero_point
    )
    top, left = problem.padding[:2]
    shape = (problem.n, problem.oh, problem.ow, problem.o)

    def winograd(x, w, *starts):
        r, s = te.reduce_axis((0, 3), "r"), te.reduce_axis((0, 3), "s")
        k = te.reduce_axis((0, problem.c), "k")

        def term(n, i, j, o):
            y, z = i + r - top, j + s - left
            inside = tirx.all(y >= 0, y < problem.h, z >= 0, z < problem.w)
            around = tirx.const(zero_point, "uint8")
            pixel = te.if_then_else(inside, x[n, y, z, k], around).astype("int32")
            panel = o // point.panel
            lane = o - int8_winograd.panel_start(problem, point, panel)
            weight = w[panel, k // PAIR, r * 3 + s, lane * PAIR + k % PAIR].astype("int32")
            return te.sum(pixel * weight, axis=[r, s, k])

        if not starts:
            return te.compute(shape, term, name="int8_winograd", attrs=notes)
        total = te.compute(shape, term, name="int8_winograd_sum")
        return te.compute(
            shape, lambda *at: total(*at) + starts[0][at[-1]], name="int8_winograd", attrs=notes
        )

    return winograd


def lower_at(
    bb: relax.BlockBuilder, x: relax.Expr, weight: np.ndarray, problem: Problem, point: Point, zero_point: int
) -> relax.Expr:  # fmt: skip
    """The kernel at a point, whatever the cost rule says."""
    packed = [relax.const(pack_weights(weight, problem, point))]
    if zero_point:
        sums = weight.astype(np.int64).sum(axis=(1, 2, 3))
        packed.append(relax.const((-zero_point * sums).astype(np.int32)))
    hint = f"int8_winograd_{problem.oh}x{problem.ow}_{problem.c}_{problem.o}"
    return call_te(bb, define(problem, point, zero_point), x, *packed, hint=hint)
