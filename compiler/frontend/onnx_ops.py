# SPDX-License-Identifier: Apache-2.0
"""ONNX operators to Relax, one converter each: right for every attribute it accepts, refusing the others.

A converter takes the `Converter` and the node's inputs (Relax expressions, None for an omitted one) and returns an
expression or a list of them. What differs between operator-set versions (axes as attribute or as input) is read by
`Converter.operand`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax
from tvm.relax import op

from compiler.frontend.onnx_einsum import einsum
from compiler.frontend.support import Refused, dtype_of, number
from passes.layers import is_const, shape_of

if TYPE_CHECKING:
    from compiler.frontend.onnx_convert import Converter


def _unary(function: Callable) -> Callable:
    return lambda c, x: function(x)


def _binary(function: Callable) -> Callable:
    return lambda c, a, b: function(a, b)


def _variadic(function: Callable) -> Callable:
    def convert(c: Converter, *operands: relax.Expr) -> relax.Expr:
        result = operands[0]
        for operand in operands[1:]:
            result = c.emit(function(result, operand))
        return result

    return convert


def _add(c: Converter, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    for x, y in ((a, b), (b, a)):  # exporters add masks that mask nothing
        if (
            is_const(y)
            and not is_const(x)
            and c.graph.types.get(c.node.output[0], ((), None))[0] == shape_of(x)
            and not y.value.numpy().any()
        ):
            return x
    return op.add(a, b)


def _divide(c: Converter, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    if "int" in dtype_of(a):
        raise Refused("integer division")
    return op.divide(a, b)


def _power(c: Converter, x: relax.Expr, exponent: relax.Expr) -> relax.Expr:
    value = c.graph.constants.get(c.node.input[1])
    if (
        value is not None
        and value.size == 1
        and shape_of(x) == c.shape()
        and dtype_of(x) == "float32"
    ):
        wanted = float(value.reshape(-1)[0])
        if wanted == 2:
            return op.multiply(x, x)
        if wanted == 3:
            return op.multiply(c.emit(op.multiply(x, x)), x)
        if wanted == 0.5:
            return op.sqrt(x)
    if dtype_of(x) != dtype_of(exponent):
        exponent = op.astype(exponent, dtype_of(x))
    return op.power(x, exponent)


def _clip(
    c: Converter, x: relax.Expr, low: relax.Expr | None = None, high: relax.Expr | None = None
) -> relax.Expr:
    low = number(c.attr("min"), x) if "min" in c.attributes else low
    high = number(c.attr("max"), x) if "max" in c.attributes else high
    x = x if low is None else c.emit(op.maximum(x, low))
    return x if high is None else op.minimum(x, high)


def _where(c: Converter, condition: relax.Expr, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    if _guards_softmax(c):
        return b
    return op.where(condition, a, b)


def _guards_softmax(c: Converter) -> bool:
    """Whether this is `Where(IsNaN(p), 0, p)` with p = Softmax(s) and no row of s masked as a whole.

    Exporters guard attention so; p is NaN only for a row of -inf, which a constant mask without such a row cannot make.
    """
    condition, zero, kept = c.node.input
    producers = {o: n for n in c.graph.nodes for o in n.output}
    guard, softmax = producers.get(condition), producers.get(kept)
    if (
        guard is None
        or softmax is None
        or guard.op_type != "IsNaN"
        or guard.input[0] != kept
        or softmax.op_type != "Softmax"
    ):
        return False
    if zero not in c.graph.constants or c.graph.constants[zero].any():
        return False
    scores = producers.get(softmax.input[0])
    if scores is None:
        return False
    if scores.op_type == "Add":
        masks = [c.graph.constants[n] for n in scores.input if n in c.graph.constants]
        return len(masks) == 1 and bool(np.isfinite(masks[0]).any(axis=-1).all())
    return scores.op_type in ("MatMul", "Mul", "Div")


def _cast(c: Converter, x: relax.Expr, *_like: Any) -> relax.Expr:
    dtype = np.dtype(c.graph.types[c.node.output[0]][1]).name
    if dtype_of(x) == dtype:
        return x
    if dtype == "bool":
        return op.not_equal(x, number(0, x))
    if dtype in ("float16", "bfloat16", "float64"):
        raise Refused(f"a cast to {dtype}")
    return op.astype(x, dtype)


def _gelu(c: Converter, x: relax.Expr) -> relax.Expr:
    return op.nn.gelu_tanh(x) if c.attr("approximate", "none") == "tanh" else op.nn.gelu(x)


def _hard_sigmoid(c: Converter, x: relax.Expr) -> relax.Expr:
    line = op.add(op.multiply(x, number(c.attr("alpha", 0.2), x)), number(c.attr("beta", 0.5), x))
    return op.minimum(op.nn.relu(line), number(1, x))


def _hard_swish(c: Converter, x: relax.Expr) -> relax.Expr:
    gate = op.minimum(op.nn.relu(op.add(x, number(3, x))), number(6, x))
    return op.multiply(x, op.multiply(gate, number(1 / 6, x)))


def _elu(c: Converter, x: relax.Expr) -> relax.Expr:
    negative = op.subtract(op.exp(op.minimum(x, number(0, x))), number(1, x))
    return op.where(
        op.greater(x, number(0, x)), x, op.multiply(negative, number(c.attr("alpha", 1.0), x))
    )


def _prelu(c: Converter, x: relax.Expr, slope: relax.Expr) -> relax.Expr:
    return op.where(op.greater(x, number(0, x)), x, op.multiply(x, slope))


def _softmax(function: Callable) -> Callable:
    def convert(c: Converter, x: relax.Expr) -> relax.Expr:
        rank = len(shape_of(x))
        axis = c.attr("axis", -1 if c.opset >= 13 else 1) % rank
        if c.opset >= 13 or axis == rank - 1:
            return function(x, axis)
        # Before operator set 13, softmax was taken over all the axes from `axis` on.
        rows = c.emit(op.reshape(x, (math.prod(shape_of(x)[:axis]), math.prod(shape_of(x)[axis:]))))
        return op.reshape(c.emit(function(rows, 1)), shape_of(x))

    return convert


def _logical(function: Callable) -> Callable:
    return lambda c, *operands: function(*operands)


CONVERTERS: dict[str, Callable] = {
    **{name: _unary(function) for name, function in (
        ("Abs", op.abs), ("Neg", op.negative), ("Exp", op.exp), ("Log", op.log), ("Sqrt", op.sqrt), ("Floor", op.floor), ("Ceil", op.ceil),
        ("Erf", op.erf), ("Sigmoid", op.sigmoid), ("Tanh", op.tanh), ("Sin", op.sin), ("Cos", op.cos), ("Relu", op.nn.relu), ("Sign", op.sign),
        ("IsNaN", op.isnan), ("Not", op.logical_not), ("Softplus", op.nn.softplus), ("Round", op.round),
    )},
    **{name: _binary(function) for name, function in (
        ("Sub", op.subtract), ("Mul", op.multiply), ("Equal", op.equal), ("Less", op.less), ("LessOrEqual", op.less_equal),
        ("Greater", op.greater), ("GreaterOrEqual", op.greater_equal), ("MatMul", op.matmul),
    )},
    **{name: _logical(function) for name, function in (("And", op.logical_and), ("Or", op.logical_or), ("Xor", op.logical_xor))},
    "Add": _add, "Div": _divide, "Pow": _power, "Max": _variadic(op.maximum), "Min": _variadic(op.minimum), "Sum": _variadic(op.add),
    "Reciprocal": lambda c, x: op.divide(number(1, x), x), "Clip": _clip, "Where": _where, "Cast": _cast, "CastLike": _cast,
    "Gelu": _gelu, "HardSigmoid": _hard_sigmoid, "HardSwish": _hard_swish, "Elu": _elu, "PRelu": _prelu,
    "LeakyRelu": lambda c, x: op.nn.leakyrelu(x, float(c.attr("alpha", 0.01))),
    "Mish": lambda c, x: op.multiply(x, op.tanh(op.nn.softplus(x))), "Softsign": lambda c, x: op.divide(x, op.add(number(1, x), op.abs(x))),
    "Einsum": einsum, "Softmax": _softmax(op.nn.softmax), "LogSoftmax": _softmax(op.nn.log_softmax),
}  # fmt: skip
