# SPDX-License-Identifier: Apache-2.0
"""ATen operators to Relax, one converter each: right for every argument it accepts, refusing the others.

A converter takes the `Converter` and the operator's arguments in the order of its schema (defaults filled in, tensors as
Relax expressions) and returns an expression, or a tuple of them for an operator with several results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax
from tvm.relax import op

from compiler.frontend import torch_shape_ops
from compiler.frontend.support import Refused, constant, dtype_of, is_bool
from compiler.frontend.torch_graph import Prepared
from passes.layers import shape_of
from schedules.errors import UnsupportedModel

DTYPES = {
    torch.float32: "float32", torch.float64: "float64", torch.int64: "int64", torch.int32: "int32", torch.int16: "int16", torch.int8: "int8",
    torch.uint8: "uint8", torch.bool: "bool",
}  # fmt: skip


def key_of(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def unsupported(prepared: Prepared) -> list[str]:
    """`operator (node, node, ...)` for every operator of the graph without a converter."""
    missing: dict[str, list[str]] = {}
    for node in prepared.graph.nodes:
        if (
            node.op in ("placeholder", "output", "get_attr")
            or node in prepared.constants
            or not node.users
        ):
            continue
        if node.op != "call_function" or converter_of(node) is None:
            missing.setdefault(key_of(node), []).append(_position(node))
    return [
        f"{name} ({', '.join(at[:4])}{', ...' if len(at) > 4 else ''})"
        for name, at in sorted(missing.items())
    ]


def _position(node: fx.Node) -> str:
    """The module a node comes from, if the export kept it, and the node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(p) for p, _ in reversed(stack.values()) if p), "")
    path = path.removeprefix("L['self'].")
    return f"{path}: {node.name}" if path else node.name


def converter_of(node: fx.Node) -> Callable | None:
    return CONVERTERS.get(key_of(node)) or torch_shape_ops.CONVERTERS.get(key_of(node))


class Converter:
    """Converts nodes in order; `env` maps nodes to Relax expressions, `names` weights to layer names."""

    def __init__(self, builder: relax.BlockBuilder, prepared: Prepared, where: str):
        self.builder, self.prepared, self.where = builder, prepared, where
        self.env: dict[fx.Node, Any] = {}
        self.names: dict[relax.Expr, str] = {}
        self.node: fx.Node | None = None

    def emit(self, expr: relax.Expr) -> relax.Expr:
        return self.builder.emit(expr)

    def convert(self, node: fx.Node) -> None:
        """Raises UnsupportedModel for arguments no converter covers, or if the result's type is not torch's."""
        self.node = node
        function = converter_of(node)
        try:
            result = function(self, *self._arguments(node))
        except Refused as error:
            raise UnsupportedModel(
                f"{key_of(node)} ({_position(node)}): {error}", where=self.where
            ) from None
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            KeyError,
            AssertionError,
        ) as error:
            message = (str(error).strip() or type(error).__name__).splitlines()[-1][:300]
            raise UnsupportedModel(
                f"{key_of(node)} ({_position(node)}) cannot be converted: {message}",
                where=self.where,
            ) from error
        result = tuple(result) if isinstance(result, (tuple, list)) else self._bound(result)
        self._check(node, result)
        self.env[node] = result

    def _bound(self, expr: relax.Expr) -> relax.Expr:
        return expr if isinstance(expr, (relax.Var, tvm.ir.expr.GenericConst)) else self.emit(expr)

    def _check(self, node: fx.Node, result: Any) -> None:
        expected = node.meta.get("val")
        pairs = (
            zip(result, expected) if isinstance(expected, (tuple, list)) else [(result, expected)]
        )
        for got, wanted in pairs:
            if got is None or not isinstance(wanted, torch.Tensor):
                continue
            found = (shape_of(got), dtype_of(got))
            if found != (tuple(wanted.shape), DTYPES.get(wanted.dtype)):
                raise UnsupportedModel(
                    f"{key_of(node)} ({_position(node)}) converts to the wrong type", where=self.where,
                    found=f"{found[1]}{list(found[0])}", wanted=f"{wanted.dtype}{list(wanted.shape)}",
                )  # fmt: skip

    def _arguments(self, node: fx.Node) -> list:
        schema = getattr(node.target, "_schema", None)
        if schema is None:  # getitem
            return [self.value(a) for a in node.args]
        values = list(node.args)
        for argument in schema.arguments[len(values) :]:
            values.append(node.kwargs.get(argument.name, argument.default_value))
        return [self.value(v) for v in values]

    def value(self, argument: Any) -> Any:
        """A node's expression (a constant if it is one); lists by element; anything else as it is."""
        if isinstance(argument, (list, tuple)):
            return (
                type(argument)(map(self.value, argument))
                if type(argument) in (list, tuple)
                else [self.value(a) for a in argument]
            )
        if not isinstance(argument, fx.Node):
            return argument
        if argument not in self.env:
            tensor = self.prepared.constants[argument]
            if not isinstance(tensor, torch.Tensor):
                return tensor
            const = constant(tensor.numpy())
            self.env[argument] = const
            if argument in self.prepared.names:
                self.names[const] = self.prepared.names[argument]
        return self.env[argument]

    def meta(self, position: int) -> Any:
        """torch's own (fake) tensor, or the Python number, at a position of the current node's arguments."""
        argument = self.node.args[position]
        return argument.meta["val"] if isinstance(argument, fx.Node) else argument

    @property
    def dtype(self) -> str:
        """Dtype of the current node's result."""
        value = self.node.meta["val"]
        dtype = (value[0] if isinstance(value, (tuple, list)) else value).dtype
        if dtype not in DTYPES:
            raise Refused(f"a result of type {dtype}")
        return DTYPES[dtype]

    def cast(self, value: Any, dtype: str) -> relax.Expr:
        """A tensor or Python number as a tensor of `dtype`."""
        if isinstance(value, (bool, int, float)):
            return constant(np.array(value, dtype))
        if dtype_of(value) == dtype:
            return value
        if isinstance(value, tvm.ir.expr.GenericConst):
            return constant(value.value.numpy().astype(dtype))
        return self.emit(op.astype(value, dtype))


def _unary(function: Callable) -> Callable:
    return lambda c, x: function(c.cast(x, c.dtype))


def _predicate(function: Callable) -> Callable:
    return lambda c, x: function(x)


def _arithmetic(function: Callable) -> Callable:
    """Operands are cast to the result's dtype; `alpha` scales the second."""

    def convert(c: Converter, a: Any, b: Any, alpha: Any = 1) -> relax.Expr:
        a, b = c.cast(a, c.dtype), c.cast(b, c.dtype)
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


def _linear(c: Converter, x: relax.Expr, weight: relax.Expr, bias: relax.Expr | None) -> relax.Expr:
    result = c.emit(op.matmul(x, op.permute_dims(weight)))
    return result if bias is None else op.add(result, bias)


def _addmm(
    c: Converter, bias: Any, a: relax.Expr, b: relax.Expr, beta: Any, alpha: Any
) -> relax.Expr:
    if beta != 1 or alpha != 1:
        raise Refused("beta or alpha other than 1")
    return op.add(c.emit(op.matmul(a, b)), bias)


def _baddbmm(
    c: Converter, bias: Any, a: relax.Expr, b: relax.Expr, beta: Any, alpha: Any
) -> relax.Expr:
    product = c.emit(op.matmul(a, b))
    scaled = product if alpha == 1 else op.multiply(product, c.cast(alpha, c.dtype))
    return (
        scaled
        if beta == 0
        else op.add(scaled, bias if beta == 1 else op.multiply(bias, c.cast(beta, c.dtype)))
    )


def _convolution(
    c, x, weight, bias, stride, padding, dilation, transposed=False, output_padding=(), groups=1
) -> relax.Expr:
    rank = len(shape_of(x)) - 2
    if rank not in (1, 2) or len(shape_of(weight)) != rank + 2:
        raise Refused(f"a convolution with {rank} spatial dimensions; wanted 1 or 2, batched")
    if isinstance(padding, str):
        raise Refused("padding by name")
    stride, padding, dilation = (_spread(v, rank) for v in (stride, padding, dilation))
    geometry = {
        "strides": stride,
        "padding": [*padding, *padding],
        "dilation": dilation,
        "groups": groups,
    }
    if transposed:
        functions = {1: op.nn.conv1d_transpose, 2: op.nn.conv2d_transpose}
        geometry["output_padding"] = _spread(output_padding, rank)
        if any(d != 1 for d in dilation):
            raise Refused("a transposed convolution with dilation")
    else:
        functions = {1: op.nn.conv1d, 2: op.nn.conv2d}
    result = c.emit(functions[rank](x, weight, **geometry))
    if bias is None:
        return result
    shape = (1, shape_of(bias)[0], *[1] * rank)
    if isinstance(bias, tvm.ir.expr.GenericConst):
        return op.add(result, constant(bias.value.numpy().reshape(shape)))
    return op.add(result, op.reshape(bias, shape))


def _spread(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in (values * rank if len(values) == 1 else values)]


def _conv(c, x, weight, bias, stride, padding, dilation, groups) -> relax.Expr:
    return _convolution(c, x, weight, bias, stride, padding, dilation, False, (), groups)


def _ones_and_zeros(c: Converter, weight: Any, bias: Any, size: int | tuple) -> tuple:
    ones, zeros = np.ones(size, "float32"), np.zeros(size, "float32")
    return constant(ones) if weight is None else weight, constant(zeros) if bias is None else bias


def _batch_norm_inference(c, x, weight, bias, mean, variance, _momentum, epsilon) -> tuple:
    weight, bias = _ones_and_zeros(c, weight, bias, shape_of(x)[1])
    result = c.emit(
        op.nn.batch_norm(x, weight, bias, mean, variance, axis=1, epsilon=epsilon, training=False)
    )
    return c.emit(relax.TupleGetItem(result, 0)), None, None


def _layer_norm(c, x, shape, weight, bias, epsilon, _cudnn=True) -> relax.Expr:
    weight, bias = _ones_and_zeros(c, weight, bias, tuple(shape))
    return op.nn.layer_norm(
        x, weight, bias, axes=[-i for i in range(len(shape), 0, -1)], epsilon=epsilon
    )


def _native_layer_norm(c, x, shape, weight, bias, epsilon) -> tuple:
    return c.emit(_layer_norm(c, x, shape, weight, bias, epsilon)), None, None


def _group_norm(c, x, groups, weight, bias, epsilon, _cudnn=True) -> relax.Expr:
    weight, bias = _ones_and_zeros(c, weight, bias, shape_of(x)[1])
    axes = list(range(2, len(shape_of(x))))
    return op.nn.group_norm(
        x, weight, bias, num_groups=groups, channel_axis=1, axes=axes, epsilon=epsilon
    )


def _native_group_norm(c, x, weight, bias, _n, _c, _hw, groups, epsilon) -> tuple:
    return c.emit(_group_norm(c, x, groups, weight, bias, epsilon)), None, None


def _rms_norm(c, x, shape, weight, epsilon) -> relax.Expr:
    axes = [-i for i in range(len(shape), 0, -1)]
    epsilon = float(np.finfo(np.float32).eps) if epsilon is None else epsilon
    scale = op.rsqrt(
        op.add(op.mean(op.multiply(x, x), axes, keepdims=True), c.cast(epsilon, c.dtype))
    )
    normal = op.multiply(x, scale)
    return normal if weight is None else op.multiply(normal, weight)


def _attention(c, query, key, value, mask, dropout, causal, scale, gqa) -> relax.Expr:
    rank = len(shape_of(query))
    if rank not in (3, 4) or gqa or dropout:
        raise Refused("dropout, grouped queries or an input that is not [B, S, D] or [B, H, S, D]")
    if any(
        len(shape_of(t)) != rank or shape_of(t)[:-2] != shape_of(query)[:-2] for t in (key, value)
    ):
        raise Refused("batch or heads that broadcast")
    if mask is not None and causal:
        raise Refused("a mask together with is_causal")

    def to_bshd(x: relax.Expr) -> relax.Expr:
        return c.emit(op.permute_dims(x if rank == 4 else op.expand_dims(x, 1), [0, 2, 1, 3]))

    bias = None
    if mask is not None:
        bias, causal = _bias(c, mask, (shape_of(query)[-2], shape_of(key)[-2]))
    if bias is not None:
        if rank == 3 and len(shape_of(bias)) == 3:
            bias = c.emit(op.expand_dims(bias, 1))
        bias = c.emit(op.reshape(bias, (*[1] * (4 - len(shape_of(bias))), *shape_of(bias))))
    scale = 1 / math.sqrt(shape_of(query)[-1]) if scale is None else scale
    result = op.nn.attention(
        to_bshd(query),
        to_bshd(key),
        to_bshd(value),
        bias,
        scale=tvm.tirx.FloatImm("float32", scale),
        causal_mask="TopLeft" if causal else None,
    )
    result = op.permute_dims(c.emit(result), [0, 2, 1, 3])
    return result if rank == 4 else op.squeeze(c.emit(result), 1)


def _bias(
    c: Converter, mask: relax.Expr, extent: tuple[int, int]
) -> tuple[relax.Expr | None, bool]:
    """The additive mask, and whether it is the causal one; no mask for one that hides nothing."""
    bias = _additive_mask(c, mask)
    if not isinstance(bias, tvm.ir.expr.GenericConst):
        return bias, False
    array = bias.value.numpy()
    if not array.any():
        return None, False
    causal = np.tril(np.ones(extent, bool))
    hidden = array <= np.finfo(np.float32).min / 2
    is_causal = (
        array.shape[-2:] == extent
        and extent[0] == extent[1]
        and (hidden == ~causal).all()
        and not array[~hidden].any()
    )
    return (None, True) if is_causal else (bias, False)


def _additive_mask(c: Converter, mask: relax.Expr) -> relax.Expr:
    if not is_bool(mask):
        return c.cast(mask, c.dtype)
    if isinstance(mask, tvm.ir.expr.GenericConst):
        kept = mask.value.numpy()
        if not kept.any(axis=-1).all():
            raise Refused("a constant mask that hides every key from some query")
        return constant(np.where(kept, 0, -np.inf).astype("float32"))
    return c.emit(op.where(mask, c.cast(0.0, "float32"), c.cast(float("-inf"), "float32")))


def _embedding(c, weight, indices, *_unused) -> relax.Expr:
    # "clip" keeps an index that is out of range inside the table; the default reads whatever lies behind it.
    return op.take(weight, indices, axis=0, mode="clip")


def _max_pool(c, x, kernel, stride, padding, dilation, ceil_mode) -> tuple:
    rank = len(kernel) if len(kernel) > 1 else 2
    if rank != 2 or len(shape_of(x)) != 4:
        raise Refused("an input that is not [N, C, H, W]")
    kernel = _spread(kernel, 2)
    padding = _pool_padding(
        x,
        kernel,
        _spread(stride or kernel, 2),
        _spread(padding, 2),
        _spread(dilation, 2),
        ceil_mode,
    )
    pooled = op.nn.max_pool2d(
        x,
        kernel,
        strides=_spread(stride or kernel, 2),
        padding=padding[0],
        dilation=_spread(dilation, 2),
        ceil_mode=False,
    )
    return c.emit(pooled), None


def _pool_padding(x, kernel, stride, padding, dilation, ceil_mode: bool) -> tuple[list[int], bool]:
    """(top, left, bottom, right) that make torch's output size without ceil_mode, and whether that is torch's own padding.

    torch drops a last window that would start beyond input and left padding; Relax's ceil_mode keeps it.
    """
    if not ceil_mode:
        return [*padding, *padding], True
    ends = []
    for size, k, s, p, d in zip(shape_of(x)[2:], kernel, stride, padding, dilation):
        span = size + 2 * p - d * (k - 1) - 1
        count = -(-span // s) + 1
        if (count - 1) * s >= size + p:
            count -= 1
        ends.append(max((count - 1) * s + d * (k - 1) + 1 - size - p, 0))
    return [*padding, *ends], ends == list(padding)


def _avg_pool(c, x, kernel, stride, padding, ceil_mode, count_include_pad, divisor) -> relax.Expr:
    if len(shape_of(x)) != 4 or divisor is not None:
        raise Refused("divisor_override, or an input that is not [N, C, H, W]")
    kernel, padding = _spread(kernel, 2), _spread(padding, 2)
    stride = _spread(stride or kernel, 2)
    ends, is_own = _pool_padding(x, kernel, stride, padding, [1, 1], ceil_mode)
    if not is_own and count_include_pad and any(padding):
        raise Refused("ceil_mode with counted padding")
    return op.nn.avg_pool2d(
        x,
        kernel,
        strides=stride,
        padding=ends,
        ceil_mode=False,
        count_include_pad=bool(count_include_pad and is_own),
    )


def _adaptive_avg_pool(c, x, size) -> relax.Expr:
    if len(shape_of(x)) != 4:
        raise Refused("an input that is not [N, C, H, W]")
    if list(size) == [1, 1]:
        return op.mean(x, [2, 3], keepdims=True)
    return op.nn.adaptive_avg_pool2d(x, output_size=list(size))


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


def _instance_norm(
    c, x, weight, bias, mean, _variance, use_input_stats, _momentum, epsilon, _cudnn
) -> relax.Expr:
    if not use_input_stats or mean is not None:
        raise Refused("running statistics")
    return _group_norm(c, x, shape_of(x)[1], weight, bias, epsilon)


def _prelu(c: Converter, x: relax.Expr, weight: relax.Expr) -> relax.Expr:
    if shape_of(weight) != (1,):
        weight = op.reshape(weight, (1, -1, *[1] * (len(shape_of(x)) - 2)))
    return op.where(op.greater(x, c.cast(0, c.dtype)), x, op.multiply(x, weight))


CONVERTERS: dict[str, Callable] = {
    **{f"{name}.default": _unary(getattr(op, name)) for name in (
        "abs", "ceil", "cos", "erf", "exp", "floor", "log", "rsqrt", "sigmoid", "sin", "sqrt", "square", "tan", "tanh", "trunc",
        "acos", "asin", "atan", "cosh", "sinh", "sign",
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
    "linear.default": _linear, "addmm.default": _addmm, "baddbmm.default": _baddbmm,
    "matmul.default": lambda c, a, b: op.matmul(a, b), "mm.default": lambda c, a, b: op.matmul(a, b), "bmm.default": lambda c, a, b: op.matmul(a, b),
    "convolution.default": _convolution, "conv1d.default": _conv, "conv2d.default": _conv,
    "_native_batch_norm_legit_no_training.default": _batch_norm_inference,
    "layer_norm.default": _layer_norm, "native_layer_norm.default": _native_layer_norm, "rms_norm.default": _rms_norm,
    "group_norm.default": _group_norm, "instance_norm.default": _instance_norm, "native_group_norm.default": _native_group_norm,
    "scaled_dot_product_attention.default": _attention, "embedding.default": _embedding,
    "max_pool2d_with_indices.default": _max_pool, "avg_pool2d.default": _avg_pool,
    "adaptive_avg_pool2d.default": _adaptive_avg_pool, "_adaptive_avg_pool2d.default": _adaptive_avg_pool,
}  # fmt: skip
