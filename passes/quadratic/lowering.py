# SPDX-License-Identifier: Apache-2.0
"""Lower `kerf.quadratic_conv2d` and `kerf.quadratic_dense`: weights stacked by branch, sums combined in the last stage.

rewrite: kerf.quadratic_conv2d(x, w_r, w_g, w_b, shifts)  ->  call_tir(quadratic, (x, packed w, shifts))
"""

from __future__ import annotations

import numpy as np
from tvm import relax, te

from passes.dense import conv2d, matmul
from passes.dense.conv2d import pad_image
from passes.layers import attrs_of, shape_of, windows_of
from passes.lower import call_te
from passes.quadratic import winograd
from passes.quadratic.operators import (
    QUADRATIC_CONV2D,
    plain_layer,
    quadratic_call,
    shifts_of,
    weights_of,
)
from schedules import contraction, quadratic_contraction
from schedules.fused import annotations
from schedules.quadratic_contraction import LOOPS, PRODUCT, SQUARED, Point, Problem, combine
from schedules.spaces import point_for
from schedules.target import CpuTarget

_FEW_ROWS = 2  # of pixels: what their weights cost is reading them


def problem_of(call: relax.Call) -> Problem:
    """The problem of a quadratic call; convolutions in NHWC layout, else ScheduleError."""
    return Problem(*windows_of(call), form=attrs_of(call)["form"])


def pack_weights(weights: dict[str, np.ndarray], problem: Problem, point: Point) -> np.ndarray:
    """[O, C/groups, R, S] per branch -> `quadratic_contraction.packed_shape`, zeros where there is no channel."""
    groups, outputs, lanes = problem.groups, problem.group_outputs, point.lanes
    count = contraction.panels_per_group(problem, point) * point.nv
    shape = (problem.group_inputs, problem.r, problem.s)
    full = np.zeros((groups, count * lanes, len(problem.form), *shape), np.float32)
    for i, branch in enumerate(problem.form):
        full[:, :outputs, i] = weights[branch].reshape(groups, outputs, *shape)
    # groups, panel, vector, lane, branch, c, r, s -> groups, panel, r, s, c, vector, branch, lane
    split = full.reshape(groups, -1, point.nv, lanes, len(problem.form), *shape)
    return np.ascontiguousarray(split.transpose(0, 1, 6, 7, 5, 2, 4, 3)).reshape(
        quadratic_contraction.packed_shape(problem, point)
    )


def define_quadratic(shape: tuple[int, ...], problem: Problem, point: Point):
    """te function (x, packed w, shifts if any) -> the neurons; `shape` is x's: [N, H, W, C], or [..., K] if flat."""
    notes = annotations(LOOPS, problem=problem.to_dict(), point=point.to_dict())
    (sh, sw), (dh, dw), lanes = problem.stride, problem.dilation, point.lanes
    panels, outputs = contraction.panels_per_group(problem, point), problem.group_outputs
    branches = len(problem.form)
    dense = len(shape) != 4 or problem.flat
    out = (*shape[:-1], problem.o) if dense else (problem.n, problem.oh, problem.ow, problem.o)

    def define(x, w, *shifts):
        padded = x if dense else pad_image(x, problem)

        def branch_sum(index: int, branch: str):
            r = te.reduce_axis((0, problem.r), "r")
            s = te.reduce_axis((0, problem.s), "s")
            k = te.reduce_axis((0, problem.group_inputs), "k")

            def value(*i):
                *lead, o = i
                group, within = (0, o) if problem.groups == 1 else (o // outputs, o % outputs)
                channel = group * problem.group_inputs + k
                if dense:
                    pixel = padded[(*lead, channel)]
                else:
                    n, oh, ow = lead
                    pixel = padded[n, oh * sh + r * dh, ow * sw + s * dw, channel]
                vector, lane = within // lanes, within % lanes
                at = (vector % point.nv * branches + index) * lanes + lane
                weight = w[group * panels + vector // point.nv, r, s, k, at]
                return te.sum(
                    (pixel * pixel if branch == SQUARED else pixel) * weight, axis=[r, s, k]
                )

            return te.compute(out, value, name=f"branch_{branch}")

        sums = [branch_sum(i, branch) for i, branch in enumerate(problem.form)]

        def neuron(*i):
            return combine(
                problem.form, [b(*i) for b in sums], shifts[0] if shifts else None, i[-1]
            )

        return te.compute(out, neuron, name="quadratic", attrs=notes)

    return define


def lower_quadratic(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """Both operators, activations channels last: Winograd's algorithm where its cost rule says that it pays."""
    if (fast := winograd.lower(bb, call, target)) is not None:
        return fast
    problem = problem_of(call)
    if len(problem.form) > 2 and problem.row > _FEW_ROWS:
        return _lower_apart(bb, call, target)
    return lower_fused(bb, call, target)


def lower_fused(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """All branches in one register tile."""
    problem = problem_of(call)
    return lower_at(bb, call, problem, point_for(quadratic_contraction, problem, target))


def _lower_apart(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """The added branch by itself, then the product, which adds it as it stores.

    Three branches leave registers for tiles of one vector of outputs, which load x and x^2 for every three
    multiplications: where the weights are read more than once or twice, 1.2 times the time of two kernels.
    """
    x, weights, layers = call.args[0], weights_of(call), attrs_of(call)["layers"]
    (added,) = set(weights) - set(PRODUCT)
    if added == SQUARED:
        alone = quadratic_call(call, x, {added: weights.pop(added)}, None, layers)
        first = lower_fused(bb, bb.normalize(alone), target)
    else:
        alone = plain_layer(call, x, weights.pop(added), layers[0])
        lower = {**conv2d.LOWERINGS, **matmul.LOWERINGS}[alone.op.name]
        first = lower(bb, bb.normalize(alone), target)
    product = bb.normalize(quadratic_call(call, x, weights, shifts_of(call), layers))
    first, second = bb.emit(first), bb.emit(lower_fused(bb, product, target))
    return relax.op.add(second, first)


def lower_at(
    bb: relax.BlockBuilder, call: relax.Call, problem: Problem, point: Point
) -> relax.Expr:
    """The direct kernel at a point."""
    weights = {b: w.reshape(*w.shape, *[1] * (4 - w.ndim)) for b, w in weights_of(call).items()}
    args = [call.args[0], relax.const(pack_weights(weights, problem, point))]
    if (shifts := shifts_of(call)) is not None:
        args.append(relax.const(shifts))
    kind = f"{problem.r}x{problem.s}" if call.op.name == QUADRATIC_CONV2D else "dense"
    size = f"{problem.oh}x{problem.ow}_{problem.c}_{problem.o}"
    define = define_quadratic(shape_of(call.args[0]), problem, point)
    return call_te(bb, define, *args, hint=f"quadratic_{problem.form}_{kind}_{size}")
