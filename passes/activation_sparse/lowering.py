# SPDX-License-Identifier: Apache-2.0
"""Lower the activation-sparse operators to gathered rows.

rewrite: kerf.activation_sparse_dense(h, w)  ->  call_tir(gathered_rows, (h, packed w))
         kerf.activation_cut(h)  ->  call_tir(cut, h), which joins the kernel that computes h
         kerf.activation_sparse_gated(x, g, up, scale, bias, down)
             ->  call_tir(gathered_gate, (x, g, packed up, scale, bias, packed down))
"""

from __future__ import annotations

import math

from tvm import relax, te, tirx

from passes.layers import attrs_of, const_array, shape_of
from passes.lower import call_te
from schedules import contraction, gathered_gate, gathered_rows
from schedules.spaces import point_for
from schedules.target import CpuTarget


def lower_dense(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """Rows of w gathered for each row of h; the contraction that the dense layer would be for more non-zeros."""
    attrs, h, weight = attrs_of(call), call.args[0], const_array(call.args[1])
    shape = shape_of(h)
    problem = gathered_rows.dense_problem(math.prod(shape[:-1]), shape[-1], weight.shape[0])
    dense = point_for(contraction, problem, target)
    point = gathered_rows.default_point(
        problem, target, attrs["density"], attrs["crossover"], dense, weight.itemsize
    )
    packed = relax.const(gathered_rows.pack_weights(weight, problem, point, target.lanes))
    hint = f"gathered_rows_{problem.w}_{problem.c}_{problem.o}"
    return call_te(bb, gathered_rows.define(shape, problem, point), h, packed, hint=hint)


def lower_gated(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """One row: up and down computed where the gate is open."""
    x, gate, *constants = call.args
    up, scale, bias, down = (const_array(c) for c in constants)
    problem = gathered_gate.Problem(up.shape[1], up.shape[0], down.shape[0])
    packed = gathered_gate.pack_weights(up, scale, bias, down, target.lanes)
    shapes = (shape_of(x), shape_of(gate))
    hint = f"gathered_gate_{problem.inputs}_{problem.hidden}_{problem.outputs}"
    define = gathered_gate.define(shapes, problem)
    return call_te(bb, define, x, gate, *map(relax.const, packed), hint=hint)


def lower_cut(bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget) -> relax.Expr:
    """Elementwise, by comparisons that NaN fails."""
    threshold = attrs_of(call)["threshold"]
    high, low, zero = (tirx.const(v, "float32") for v in (threshold, -threshold, 0.0))

    def define(x):
        def value(*at):
            within = tirx.Select(x(*at) >= low, zero, x(*at))
            return tirx.Select(x(*at) <= high, within, x(*at))

        return te.compute(x.shape, value, name="cut")

    return bb.call_te(define, call.args[0], primfunc_name_hint="cut")
