# SPDX-License-Identifier: Apache-2.0
"""ATen operators to Relax, one converter each: right for every argument it accepts, refusing the others.

A converter takes the `Converter` and the operator's arguments in the order of its schema (defaults filled in, tensors as
Relax expressions) and returns an expression, or a tuple of them for an operator with several results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from tvm import relax
from tvm.relax import op

from compiler.frontend.support import Refused, dtype_of, is_bool
from compiler.frontend.torch_graph import DTYPES
from passes.layers import shape_of

if TYPE_CHECKING:
    from compiler.frontend.torch_convert import Converter


def _unary(function: Callable) -> Callable:
    return lambda c, x: function(c.cast(x, c.dtype))


def _predicate(function: Callable) -> Callable:
    return lambda c, x: function(x)


# What arithmetic means on truth values, for which TVM generates no code.
_ON_BOOLEANS = {
    op.add: op.logical_or,
    op.multiply: op.logical_and,
    op.maximum: op.logical_or,
    op.minimum: op.logical_and,
}


def _arithmetic(function: Callable) -> Callable:
    """Operands are cast to the result's dtype; `alpha` scales the second."""

    def convert(c: Converter, a: Any, b: Any, alpha: Any = 1) -> relax.Expr:
        a, b = c.cast(a, c.dtype), c.cast(b, c.dtype)
        if c.dtype == "bool":
            if function not in _ON_BOOLEANS or alpha != 1:
                raise Refused("arithmetic on truth values")
            return _ON_BOOLEANS[function](a, b)
        return function(a, b if alpha == 1 else op.multiply(b, c.cast(alpha, c.dtype)))

    return convert


def _comparison(function: Callable) -> Callable:
    def convert(c: Converter, a: Any, b: Any) -> relax.Expr:
        common = DTYPES[torch.result_type(c.meta(0), c.meta(1))]
        return function(c.cast(a, common), c.cast(b, common))

    return convert


def _logical(function: Callable) -> Callable:
    def convert(c: Converter, *operands: Any) -> relax.Expr:
        return function(
            *[o if is_bool(o) else op.not_equal(o, c.cast(0, dtype_of(o))) for o in operands]
        )

    return convert


def _divide(c: Converter, a: Any, b: Any, rounding_mode: str | None = None) -> relax.Expr:
    a, b = c.cast(a, c.dtype), c.cast(b, c.dtype)
    if rounding_mode is None:
        return op.divide(a, b)
    if rounding_mode == "floor":
        return op.floor_divide(a, b)
    if "int" in c.dtype:
        raise Refused("integer division rounding towards zero")
    return op.trunc(op.divide(a, b))


def _subtract_from(c: Converter, a: Any, b: Any, alpha: Any = 1) -> relax.Expr:
    return _arithmetic(op.subtract)(c, b, a, alpha)


def _power(c: Converter, x: Any, exponent: Any) -> relax.Expr:
    x_is_number = isinstance(x, (int, float))
    if exponent == 2 and not x_is_number:
        x = c.cast(x, c.dtype)
        return op.multiply(x, x)
    if exponent == 0.5 and not x_is_number:
        return op.sqrt(c.cast(x, c.dtype))
    if exponent == 3 and not x_is_number:
        # As tanh GELU spells it; a general power of a negative base is not what exp(log) gives.
        x = c.cast(x, c.dtype)
        return op.multiply(op.multiply(x, x), x)
    return op.power(c.cast(x, c.dtype), c.cast(exponent, c.dtype))


def _clamp(c: Converter, x: relax.Expr, low: Any = None, high: Any = None) -> relax.Expr:
    x = c.cast(x, c.dtype)
    if low is not None:
        x = op.maximum(x, c.cast(low, c.dtype))
    return x if high is None else op.minimum(x, c.cast(high, c.dtype))


def _gelu(c: Converter, x: relax.Expr, approximate: str) -> relax.Expr:
    return op.nn.gelu_tanh(x) if approximate == "tanh" else op.nn.gelu(x)


def _hardsigmoid(c: Converter, x: relax.Expr) -> relax.Expr:
    clipped = op.minimum(op.nn.relu(op.add(x, c.cast(3, c.dtype))), c.cast(6, c.dtype))
    return op.multiply(clipped, c.cast(1 / 6, c.dtype))


def _elu(c: Converter, x: relax.Expr, alpha: float, scale: float, input_scale: float) -> relax.Expr:
    negative = op.subtract(
        op.exp(op.multiply(op.minimum(x, c.cast(0, c.dtype)), c.cast(input_scale, c.dtype))),
        c.cast(1, c.dtype),
    )
    positive = x if scale == 1 else op.multiply(x, c.cast(scale, c.dtype))
    return op.where(
        op.greater(x, c.cast(0, c.dtype)),
        positive,
        op.multiply(negative, c.cast(alpha * scale, c.dtype)),
    )


def _softmax(function: Callable) -> Callable:
    def convert(c: Converter, x: relax.Expr, axis: int, _dtype: Any) -> relax.Expr:
        return function(c.cast(x, c.dtype), axis)

    return convert


def _mish(c: Converter, x: relax.Expr) -> relax.Expr:
    return op.multiply(x, op.tanh(op.nn.softplus(x)))


def _softplus(c: Converter, x: relax.Expr, beta: Any, threshold: Any) -> relax.Expr:
    return op.nn.softplus(x, float(beta), float(threshold))


def _log1p(c: Converter, x: relax.Expr) -> relax.Expr:
    return op.log(op.add(c.cast(x, c.dtype), c.cast(1, c.dtype)))


def _logarithm(base: float) -> Callable:
    return lambda c, x: op.multiply(op.log(c.cast(x, c.dtype)), c.cast(1 / math.log(base), c.dtype))


def _expm1(c: Converter, x: relax.Expr) -> relax.Expr:
    return op.subtract(op.exp(c.cast(x, c.dtype)), c.cast(1, c.dtype))


def _prelu(c: Converter, x: relax.Expr, weight: relax.Expr) -> relax.Expr:
    if shape_of(weight) != (1,):
        weight = op.reshape(weight, (1, -1, *[1] * (len(shape_of(x)) - 2)))
    return op.where(op.greater(x, c.cast(0, c.dtype)), x, op.multiply(x, weight))


CONVERTERS: dict[str, Callable] = {
    **{f"{name}.default": _unary(getattr(op, name)) for name in (
        "abs", "ceil", "cos", "erf", "exp", "floor", "log", "rsqrt", "sigmoid", "sin", "sqrt", "square", "tan", "tanh", "trunc",
        "acos", "asin", "atan", "cosh", "sinh", "sign", "round",
    )},
    **{f"{name}.default": _predicate(getattr(op, name)) for name in ("isfinite", "isinf", "isnan")},
    **{f"{name}.{o}": _arithmetic(f) for name, f in (("add", op.add), ("sub", op.subtract), ("mul", op.multiply)) for o in ("Tensor", "Scalar")},
    **{f"{name}.{o}": _comparison(f) for name, f in (
        ("eq", op.equal), ("ne", op.not_equal), ("lt", op.less), ("le", op.less_equal), ("gt", op.greater), ("ge", op.greater_equal),
    ) for o in ("Tensor", "Scalar")},
    **{f"logical_{name}.default": _logical(getattr(op, f"logical_{name}")) for name in ("and", "or", "xor", "not")},
    **{f"{name}.{o}": _divide for name, o in (("div", "Tensor"), ("div", "Scalar"), ("div", "Tensor_mode"))},
    "maximum.default": _arithmetic(op.maximum), "minimum.default": _arithmetic(op.minimum),
    "bitwise_and.Tensor": lambda c, a, b: op.logical_and(a, b) if is_bool(a) and is_bool(b) else op.bitwise_and(c.cast(a, c.dtype), c.cast(b, c.dtype)),
    "bitwise_or.Tensor": lambda c, a, b: op.logical_or(a, b) if is_bool(a) and is_bool(b) else op.bitwise_or(c.cast(a, c.dtype), c.cast(b, c.dtype)),
    "bitwise_not.default": lambda c, x: op.logical_not(x) if is_bool(x) else op.bitwise_not(x),
    "neg.default": _unary(op.negative), "reciprocal.default": lambda c, x: op.divide(c.cast(1, c.dtype), c.cast(x, c.dtype)),
    "log1p.default": _log1p, "log2.default": _logarithm(2), "log10.default": _logarithm(10), "expm1.default": _expm1, "rsub.Scalar": _subtract_from, "rsub.Tensor": _subtract_from,
    "pow.Tensor_Scalar": _power, "pow.Tensor_Tensor": _power, "pow.Scalar": _power,
    "relu.default": _predicate(op.nn.relu), "silu.default": _predicate(op.nn.silu), "gelu.default": _gelu,
    "relu6.default": lambda c, x: _clamp(c, x, 0, 6), "hardtanh.default": _clamp, "clamp.default": _clamp, "clamp.Tensor": _clamp,
    "clamp_min.default": _clamp, "clamp_max.default": lambda c, x, high: _clamp(c, x, None, high),
    "hardsigmoid.default": _hardsigmoid, "hardswish.default": lambda c, x: op.multiply(x, c.emit(_hardsigmoid(c, x))),
    "leaky_relu.default": lambda c, x, slope: op.nn.leakyrelu(x, float(slope)), "elu.default": _elu, "mish.default": _mish,
    "softplus.default": _softplus, "prelu.default": _prelu,
    "_softmax.default": _softmax(op.nn.softmax), "softmax.int": _softmax(op.nn.softmax),
    "_log_softmax.default": _softmax(op.nn.log_softmax), "log_softmax.int": _softmax(op.nn.log_softmax),
}  # fmt: skip
