# SPDX-License-Identifier: Apache-2.0
"""Elementwise functions lowered to polynomials (`schedules/vector_math.py`), open to fusion behind a contraction.

    rewrite: y = relax.nn.gelu(x)  ->  y = call_tir(gelu, x)

float32 only; any other dtype is left to TVM. NaN propagates through every one of them, as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm import relax, te, tirx

from passes.family import Lowering
from schedules import vector_math
from schedules.target import CpuTarget


def _is_float32(*exprs) -> bool:
    return all(str(e.ty.dtype) == "float32" for e in exprs)


def _elementwise(bb: relax.BlockBuilder, x, function: Callable, hint: str) -> relax.Expr | None:
    """A call of `function(element)` over `x`; None unless float32."""
    if not _is_float32(x):
        return None

    def define(tensor):
        return te.compute(tensor.shape, lambda *i: function(tensor(*i)), name=hint)

    return bb.call_te(define, x, primfunc_name_hint=hint)


def _unary(hint: str, function: Callable) -> Lowering:
    def lower(bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget) -> relax.Expr | None:
        return _elementwise(bb, call.args[0], function, hint)

    return lower


def _lower_softplus(
    bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget
) -> relax.Expr | None:
    beta, threshold = float(call.attrs.beta), float(call.attrs.threshold)
    return _elementwise(
        bb, call.args[0], lambda x: vector_math.softplus(x, beta, threshold), "softplus"
    )


def _lower_leakyrelu(
    bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget
) -> relax.Expr | None:
    slope = tirx.const(float(call.attrs.alpha), "float32")
    zero = tirx.const(0.0, "float32")
    return _elementwise(
        bb, call.args[0], lambda x: tirx.Select(x > zero, x, x * slope), "leaky_relu"
    )


def _lower_clip(bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget) -> relax.Expr | None:
    x, low, high = call.args[0], *(_number(bound) for bound in call.args[1:])
    return _elementwise(
        bb, x, lambda e: vector_math.minimum(vector_math.maximum(e, low), high), "clip"
    )


def _number(bound) -> float:
    """The value of a PrimValue argument."""
    while hasattr(bound, "value"):
        bound = bound.value
    return float(bound)


def _lower_extremum(hint: str, first_wins: Callable, second_wins: Callable) -> Lowering:
    """maximum or minimum of two tensors, broadcasting."""

    def lower(bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget) -> relax.Expr | None:
        a, b = call.args
        if not _is_float32(a, b):
            return None
        shape = [int(d) for d in call.ty.shape]

        def define(x, y):
            def at(tensor, index):
                tail = index[len(index) - len(tensor.shape) :]
                return tensor(*(0 if int(d) == 1 else i for d, i in zip(tensor.shape, tail)))

            def element(*index):
                first, second = at(x, index), at(y, index)
                # Neither comparison holds where one of them is NaN, and then so is their sum.
                other = tirx.Select(second_wins(first, second), second, first + second)
                return tirx.Select(first_wins(first, second), first, other)

            return te.compute(shape, element, name=hint)

        return bb.call_te(define, a, b, primfunc_name_hint=hint)

    return lower


LOWERINGS: Mapping[str, Lowering] = {
    "relax.exp": _unary("exp", vector_math.exp),
    "relax.log": _unary("log", vector_math.log),
    "relax.erf": _unary("erf", vector_math.erf),
    "relax.tanh": _unary("tanh", vector_math.tanh),
    "relax.sigmoid": _unary("sigmoid", vector_math.sigmoid),
    "relax.nn.silu": _unary("silu", vector_math.silu),
    "relax.nn.gelu": _unary("gelu", vector_math.gelu),
    "relax.nn.gelu_tanh": _unary("gelu_tanh", vector_math.gelu_tanh),
    "relax.nn.relu": _unary("relu", vector_math.relu),
    "relax.nn.relu6": _unary("relu6", lambda x: vector_math.minimum(vector_math.relu(x), 6.0)),
    "relax.nn.softplus": _lower_softplus,
    "relax.nn.leakyrelu": _lower_leakyrelu,
    "relax.clip": _lower_clip,
    "relax.maximum": _lower_extremum("maximum", lambda a, b: a >= b, lambda a, b: a < b),
    "relax.minimum": _lower_extremum("minimum", lambda a, b: a <= b, lambda a, b: a > b),
}
