# SPDX-License-Identifier: Apache-2.0
"""Lower `kerf.sign_conv2d` and `kerf.sign_dense`: float32 pixels, weights of +-1 packed as fields of bits.

rewrite: kerf.sign_conv2d(x, w)  ->  call_tir(sign_weights_conv3x3, (x, packed w))
"""

from __future__ import annotations

import numpy as np
from tvm import relax, te, tirx

from passes.binary.operators import SIGN_CONV2D, SIGN_DENSE
from passes.dense.conv2d import pad_image
from passes.family import Lowering
from passes.layers import const_array, shape_of, windows_of
from passes.lower import call_te
from schedules import sign_tables
from schedules.fused import annotations
from schedules.sign_tables import LOOPS, Point, Problem, packed_shape
from schedules.spaces import point_for
from schedules.target import CpuTarget


def pack_weights(weight: np.ndarray, problem: Problem, point: Point) -> np.ndarray:
    """+-1 [O, C/groups, R, S] -> `packed_shape`: channel i of a field in bit i of it, zeros where there is no channel."""
    groups, outputs, inputs = problem.groups, problem.group_outputs, problem.group_inputs
    panels, r, s, words, nv, lanes = packed_shape(problem, point)
    bits = np.zeros(
        (groups, panels // groups * nv * lanes, words * point.per_word * point.field, r, s), bool
    )
    bits[:, :outputs, :inputs] = (weight > 0).reshape(groups, outputs, inputs, r, s)
    places = np.arange(point.per_word * point.field, dtype=np.uint32)
    split = bits.reshape(panels, nv, lanes, words, len(places), r, s).astype(np.uint32)
    packed = (split << places[:, None, None]).sum(4, dtype=np.uint32)
    return np.ascontiguousarray(packed.transpose(0, 4, 5, 3, 1, 2))


def define(problem: Problem, point: Point, lead: tuple[int, ...]):
    """te function (x, packed w) -> sums [*lead, O]."""
    notes = annotations(LOOPS, problem=problem.to_dict(), point=point.to_dict())
    (sh, sw), (dh, dw) = problem.stride, problem.dilation
    inputs, outputs, width = problem.group_inputs, problem.group_outputs, point.nv * point.lanes
    panels, per_word = -(-outputs // width), point.per_word

    def sums(x, w):
        padded = pad_image(x, problem)
        r = te.reduce_axis((0, problem.r), "r")
        s = te.reduce_axis((0, problem.s), "s")
        k = te.reduce_axis((0, inputs), "k")

        def value(*at):
            o = at[-1]
            group, within = (0, o) if problem.groups == 1 else (o // outputs, o % outputs)
            channel = group * inputs + k
            if problem.flat:
                pixel = padded[(*at[:-1], channel)]
            else:
                pixel = padded[at[0], at[1] * sh + r * dh, at[2] * sw + s * dw, channel]
            field = k // point.field
            word = w[
                group * panels + within // width, r, s, field // per_word,
                within % width // point.lanes, within % point.lanes,
            ]  # fmt: skip
            place = field % per_word * point.field + k % point.field
            bit = tirx.shift_right(word, place.astype("uint32")) & tirx.const(1, "uint32")
            one = tirx.const(1.0, "float32")
            return te.sum(
                pixel * tirx.Select(bit > tirx.const(0, "uint32"), one, -one), axis=[r, s, k]
            )

        return te.compute((*lead, problem.o), value, name="sign_weights", attrs=notes)

    return sums


def lower_contraction(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """Convolutions and dense layers."""
    problem = Problem(*windows_of(call))
    point = point_for(sign_tables, problem, target)
    weight = const_array(call.args[1])
    packed = relax.const(pack_weights(weight, problem, point))
    kind = "dense" if weight.ndim == 2 else f"conv{problem.r}x{problem.s}"
    hint = f"sign_weights_{kind}_{problem.row}_{problem.c}_{problem.o}"
    definition = define(problem, point, tuple(shape_of(call)[:-1]))
    return call_te(bb, definition, call.args[0], packed, hint=hint)


LOWERINGS: dict[str, Lowering] = {SIGN_CONV2D: lower_contraction, SIGN_DENSE: lower_contraction}
