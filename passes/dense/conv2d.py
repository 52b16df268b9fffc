# SPDX-License-Identifier: Apache-2.0
"""Dense convolutions: te definitions over packed weights, and the lowering of `kerf.conv2d`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax, te

from passes.dense import winograd
from passes.family import Lowering
from passes.layers import CONV2D, const_array, is_call, windows_of
from passes.lower import call_te
from schedules import contraction, depthwise, grouped
from schedules.fused import annotations
from schedules.spaces import point_for
from schedules.target import CpuTarget

MOST_PLANES = 4  # channels up to which a convolution reads a planar image as it is


def pack_weights(
    weight: np.ndarray, problem: contraction.Problem, point: contraction.Point
) -> np.ndarray:
    """[O, C/groups, R, S] -> `contraction.packed_shape`, zeros where a group's last panel has no channel."""
    groups, outputs = problem.groups, problem.group_outputs
    panels = contraction.panels_per_group(problem, point)
    full = np.zeros((groups, panels * point.panel, *weight.shape[1:]), np.float32)
    full[:, :outputs] = weight.reshape(groups, outputs, *weight.shape[1:])
    split = full.reshape(groups, panels, point.panel, *weight.shape[1:])
    return np.ascontiguousarray(split.transpose(0, 1, 4, 5, 3, 2)).reshape(
        contraction.packed_shape(problem, point)
    )


def pad_image(x, problem):
    """`x` with `problem.padding` zeros around it; `x` itself if there are none. Kernels never run this block."""
    top, left, bottom, right = problem.padding
    if not any(problem.padding):
        return x
    n, h, w, c = problem.n, problem.h, problem.w, problem.c

    def inside(b, i, j, k):
        within = tvm.tirx.all(i >= top, i < h + top, j >= left, j < w + left)
        return te.if_then_else(within, x[b, i - top, j - left, k], tvm.tirx.const(0.0, "float32"))

    return te.compute((n, h + top + bottom, w + left + right, c), inside, name="pad")


def define_conv2d(problem: contraction.Problem, point: contraction.Point, planar: bool = False):
    """te function (x [N, H, W, C], or [N, C, H, W] if `planar`, packed w) -> [N, OH, OW, O]."""
    form = {"planar": True} if planar else {}
    notes = annotations("contraction", problem=problem.to_dict(), point=point.to_dict(), **form)
    (sh, sw), (dh, dw) = problem.stride, problem.dilation
    panels, outputs, inputs = (
        contraction.panels_per_group(problem, point),
        problem.group_outputs,
        problem.group_inputs,
    )

    def conv2d(given, w):
        x = _channels_last(given) if planar else given
        padded = pad_image(x, problem)
        r = te.reduce_axis((0, problem.r), "r")
        s = te.reduce_axis((0, problem.s), "s")
        k = te.reduce_axis((0, inputs), "k")

        def value(n, i, j, o):
            group, within = (0, o) if problem.groups == 1 else (o // outputs, o % outputs)
            pixel = padded[n, i * sh + r * dh, j * sw + s * dw, group * inputs + k]
            return te.sum(
                pixel * w[group * panels + within // point.panel, r, s, k, within % point.panel],
                axis=[r, s, k],
            )

        return te.compute(
            (problem.n, problem.oh, problem.ow, problem.o), value, name="conv2d", attrs=notes
        )

    return conv2d


def _channels_last(x):
    """[N, C, H, W] -> [N, H, W, C]; kernels never run this block."""
    n, c, h, w = x.shape
    return te.compute((n, h, w, c), lambda b, i, j, k: x[b, k, i, j], name="channels_last")


def define_depthwise(problem: contraction.Problem, point: depthwise.Point):
    """te function (x [N, H, W, C], w [R, S, C]) -> [N, OH, OW, C]."""
    notes = annotations("depthwise", problem=problem.to_dict(), point=point.to_dict())

    def depthwise_conv2d(x, w):
        return _sum_of_taps(
            x, problem, "depthwise_conv2d", notes, lambda pixel, r, s, c: pixel(c) * w[r, s, c]
        )

    return depthwise_conv2d


def define_grouped(problem: contraction.Problem, point: depthwise.Point):
    """te function (x [N, H, W, C], w [R, S, C/groups, O] from `pack_grouped`) -> [N, OH, OW, O]."""
    notes = annotations("grouped", problem=problem.to_dict(), point=point.to_dict())

    def grouped_conv2d(x, w):
        d = te.reduce_axis((0, problem.group_inputs), "d")
        return _sum_of_taps(
            x,
            problem,
            "grouped_conv2d",
            notes,
            lambda pixel, r, s, o: pixel(o ^ d) * w[r, s, d, o],
            d,
        )

    return grouped_conv2d


def _sum_of_taps(x, problem: contraction.Problem, name: str, notes: dict, term: Callable, *inner):
    """[N, OH, OW, O]: the sum of `term(pixel, r, s, o)` over taps and `inner` axes; `pixel(c)` is the one that the tap sees."""
    (sh, sw), (dh, dw) = problem.stride, problem.dilation
    padded = pad_image(x, problem)
    r = te.reduce_axis((0, problem.r), "r")
    s = te.reduce_axis((0, problem.s), "s")

    def value(n, i, j, o):
        def pixel(c):
            return padded[n, i * sh + r * dh, j * sw + s * dw, c]

        return te.sum(term(pixel, r, s, o), axis=[r, s, *inner])

    return te.compute((problem.n, problem.oh, problem.ow, problem.o), value, name=name, attrs=notes)


def pack_grouped(weight: np.ndarray) -> np.ndarray:
    """[O, g, R, S] of groups with g outputs -> [R, S, g, O]: for d < g and o the weight of input o ^ d."""
    outputs, group = weight.shape[:2]
    o, d = np.arange(outputs), np.arange(group)[:, None]
    return np.ascontiguousarray(weight[o, (o % group) ^ d].transpose(2, 3, 0, 1))


def problem_of(call: relax.Call) -> contraction.Problem:
    """The problem of a `kerf.conv2d` call in NHWC layout. Raises ScheduleError in any other layout."""
    return contraction.Problem(*windows_of(call))


def lower_conv2d(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """Winograd's algorithm where it pays, channel by channel or in small groups where they are, else a contraction."""
    problem, weight = problem_of(call), const_array(call.args[1])
    planes = planes_of(bb, call.args[0], problem)
    if (fast := winograd.lower(bb, call, target, planes)) is not None:
        return fast
    kind = f"{problem.r}x{problem.s}" + (
        f"s{problem.stride[0]}" if problem.stride != (1, 1) else ""
    )
    size = f"{problem.oh}x{problem.ow}_{problem.c}_{problem.o}"
    if problem.groups == problem.c == problem.o and problem.groups > 1:
        point = point_for(depthwise, problem, target)
        packed = np.ascontiguousarray(weight[:, 0].transpose(1, 2, 0))
        return call_te(
            bb,
            define_depthwise(problem, point),
            call.args[0],
            relax.const(packed),
            hint=f"depthwise{kind}_{size}",
        )
    if grouped.suits(problem, target):
        point = point_for(grouped, problem, target)
        return call_te(
            bb,
            define_grouped(problem, point),
            call.args[0],
            relax.const(pack_grouped(weight)),
            hint=f"grouped{kind}_{size}_g{problem.groups}",
        )
    point = point_for(contraction, problem, target)
    packed = relax.const(pack_weights(weight, problem, point))
    groups = f"_g{problem.groups}" if problem.groups > 1 else ""
    x = call.args[0] if planes is None else planes
    define = define_conv2d(problem, point, planar=planes is not None)
    return call_te(bb, define, x, packed, hint=f"conv{kind}_{size}{groups}")


def planes_of(
    bb: relax.BlockBuilder, x: relax.Expr, problem: contraction.Problem
) -> relax.Expr | None:
    """The image [N, C, H, W] that `x` is the channels-last form of, if it has few channels: read where it is, it is not
    transposed first."""
    few = problem.c <= MOST_PLANES and problem.groups == 1 and problem.r * problem.s > 1
    made = bb.lookup_binding(x) if few and isinstance(x, relax.Var) else None
    if made is None or not is_call(made, "relax.permute_dims"):
        return None
    axes = made.attrs.axes
    return made.args[0] if axes and [int(a) for a in axes] == [0, 2, 3, 1] else None


LOWERINGS: dict[str, Lowering] = {CONV2D: lower_conv2d}
