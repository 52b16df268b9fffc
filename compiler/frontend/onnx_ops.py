# SPDX-License-Identifier: Apache-2.0
"""ONNX operators to Relax, one converter each: right for every attribute it accepts, refusing the others.

A converter takes the `Converter` and the node's inputs (Relax expressions, None for an omitted one) and returns an
expression or a list of them. What differs between operator-set versions (axes as attribute or as input) is read by
`Converter.operand`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper
from tvm import relax
from tvm.relax import op

from compiler.frontend import onnx_shape_ops
from compiler.frontend.names import is_anonymous
from compiler.frontend.onnx_graph import OnnxGraph, scope_of
from compiler.frontend.support import Refused, constant, dtype_of, first_line
from passes.layers import is_const, shape_of
from schedules.errors import UnsupportedModel

_LAYERS = {"Conv", "MatMul", "Gemm"}


def converter_of(node: onnx.NodeProto) -> Callable | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    return CONVERTERS.get(node.op_type) or onnx_shape_ops.CONVERTERS.get(node.op_type)


def unsupported(graph: OnnxGraph) -> list[str]:
    """`operator (node, node, ...)` for every operator of the graph without a converter."""
    missing: dict[str, list[str]] = {}
    for node in graph.nodes:
        if converter_of(node) is None:
            kind = (
                f"{node.domain}.{node.op_type}"
                if node.domain not in ("", "ai.onnx")
                else node.op_type
            )
            missing.setdefault(kind, []).append(node.name or node.output[0])
    return [
        f"{kind} ({', '.join(at[:4])}{', ...' if len(at) > 4 else ''})"
        for kind, at in sorted(missing.items())
    ]


class Converter:
    """Converts nodes in order; `env` maps values to Relax expressions, `names` weights to layer names."""

    def __init__(self, builder: relax.BlockBuilder, graph: OnnxGraph):
        self.builder, self.graph = builder, graph
        self.env: dict[str, relax.Expr] = {}
        self.names: dict[relax.Expr, str] = {}
        self.node = onnx.NodeProto()
        self.attributes: dict[str, Any] = {}

    def emit(self, expr: relax.Expr) -> relax.Expr:
        return self.builder.emit(expr)

    def convert(self, node: onnx.NodeProto) -> None:
        """Raises UnsupportedModel for attributes no converter covers, or if the result's type is not the inferred one."""
        self.node = node
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        at = f"{node.op_type} ({node.name or node.output[0]})"
        if node.op_type in _LAYERS:
            self._name_weight(node)
        try:
            results = converter_of(node)(self, *[self.value(n) if n else None for n in node.input])
        except Refused as error:
            raise UnsupportedModel(f"{at}: {error}", where=self.graph.where) from None
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            KeyError,
            AssertionError,
        ) as error:
            raise UnsupportedModel(
                f"{at} cannot be converted: {first_line(error)}", where=self.graph.where
            ) from error
        results = results if isinstance(results, (list, tuple)) else [results]
        for name, result in zip(node.output, results):
            if name:
                self.env[name] = (
                    result
                    if isinstance(result, relax.Var) or is_const(result)
                    else self.emit(result)
                )
                self._check(name, self.env[name], at)

    def _name_weight(self, node: onnx.NodeProto) -> None:
        if len(node.input) < 2 or node.input[1] not in self.graph.constants:
            return
        weight, given = self.value(node.input[1]), self.graph.names.get(node.input[1], "")
        self.names.setdefault(
            weight, given if not is_anonymous(given) else scope_of(node) or node.output[0]
        )

    def _check(self, name: str, expr: relax.Expr, at: str) -> None:
        found, wanted = (shape_of(expr), dtype_of(expr)), self.graph.types.get(name)
        if wanted is not None and found != (tuple(wanted[0]), np.dtype(wanted[1]).name):
            raise UnsupportedModel(
                f"{at} converts to the wrong type", where=self.graph.where, found=f"{found[1]}{list(found[0])}",
                wanted=f"{np.dtype(wanted[1]).name}{list(wanted[0])}",
            )  # fmt: skip

    def value(self, name: str) -> relax.Expr:
        if name not in self.env:
            self.env[name] = constant(self.graph.constants[name])
        return self.env[name]

    def attr(self, name: str, default: Any = None) -> Any:
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    @property
    def opset(self) -> int:
        return self.graph.opset

    def array(self, position: int) -> np.ndarray | None:
        """The constant at an input position, None if omitted. Raises Refused if it is computed."""
        if position >= len(self.node.input) or not self.node.input[position]:
            return None
        name = self.node.input[position]
        if name not in self.graph.constants:
            raise Refused(f"input {position} is computed at run time")
        return self.graph.constants[name]

    def operand(self, name: str, position: int) -> list | None:
        """A list that older operator sets give as attribute `name`, newer ones as a constant input."""
        if name in self.attributes:
            value = self.attributes[name]
            return list(value) if isinstance(value, (list, tuple)) else [value]
        array = self.array(position)
        return None if array is None else array.reshape(-1).tolist()

    def shape(self) -> tuple[int, ...]:
        """Inferred shape of the first output. Raises Refused if it depends on data."""
        if self.node.output[0] not in self.graph.types:
            raise Refused("the shape of its result depends on data")
        return self.graph.types[self.node.output[0]][0]


def number(value: float, like: relax.Expr) -> relax.Expr:
    return constant(np.array(value, dtype_of(like)))


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
            and c.shape() == shape_of(x)
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


def _gemm(c: Converter, a: relax.Expr, b: relax.Expr, bias: relax.Expr | None = None) -> relax.Expr:
    alpha, beta = c.attr("alpha", 1.0), c.attr("beta", 1.0)
    a = c.emit(op.permute_dims(a)) if c.attr("transA", 0) else a
    b = c.emit(op.permute_dims(b)) if c.attr("transB", 0) else b
    product = c.emit(op.matmul(a, b))
    product = product if alpha == 1 else c.emit(op.multiply(product, number(alpha, product)))
    if bias is None or beta == 0:
        return product
    return op.add(product, bias if beta == 1 else op.multiply(bias, number(beta, product)))


def _padding(
    c: Converter, spatial: tuple, kernel: list, strides: list, dilations: list
) -> list[int]:
    """Zeros before each axis, then after each."""
    rank, mode = len(spatial), c.attr("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(c.attr("pads") or [0] * 2 * rank)
    if mode == "VALID":
        return [0] * 2 * rank
    before, after = [], []
    for size, k, s, d in zip(spatial, kernel, strides, dilations):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return before + after


def _geometry(c: Converter, x: relax.Expr, kernel: list[int]) -> tuple[list, list, list]:
    rank = len(kernel)
    strides, dilations = (
        list(c.attr("strides") or [1] * rank),
        list(c.attr("dilations") or [1] * rank),
    )
    return strides, dilations, _padding(c, shape_of(x)[2:], kernel, strides, dilations)


def _conv(
    c: Converter, x: relax.Expr, weight: relax.Expr, bias: relax.Expr | None = None
) -> relax.Expr:
    rank = len(shape_of(x)) - 2
    if rank not in (1, 2):
        raise Refused(f"a convolution with {rank} spatial dimensions; wanted 1 or 2")
    strides, dilations, padding = _geometry(c, x, list(shape_of(weight)[2:]))
    function = {1: op.nn.conv1d, 2: op.nn.conv2d}[rank]
    result = c.emit(
        function(
            x,
            weight,
            strides=strides,
            padding=padding,
            dilation=dilations,
            groups=c.attr("group", 1),
        )
    )
    return result if bias is None else op.add(result, _per_channel(bias, rank))


def _per_channel(bias: relax.Expr, rank: int) -> relax.Expr:
    shape = (1, shape_of(bias)[0], *[1] * rank)
    return (
        constant(bias.value.numpy().reshape(shape)) if is_const(bias) else op.reshape(bias, shape)
    )


def _conv_transpose(
    c: Converter, x: relax.Expr, weight: relax.Expr, bias: relax.Expr | None = None
) -> relax.Expr:
    rank = len(shape_of(x)) - 2
    strides, dilations, padding = _geometry(c, x, list(shape_of(weight)[2:]))
    if (
        rank not in (1, 2)
        or any(d != 1 for d in dilations)
        or c.attr("auto_pad", "NOTSET") != "NOTSET"
        or "output_shape" in c.attributes
    ):
        raise Refused(
            "a transposed convolution with dilation, automatic padding or more than 2 spatial dimensions"
        )
    function = {1: op.nn.conv1d_transpose, 2: op.nn.conv2d_transpose}[rank]
    extra = list(c.attr("output_padding") or [0] * rank)
    result = c.emit(
        function(
            x,
            weight,
            strides=strides,
            padding=padding,
            output_padding=extra,
            groups=c.attr("group", 1),
        )
    )
    return result if bias is None else op.add(result, _per_channel(bias, rank))


def _batch_norm(c: Converter, x, scale, bias, mean, variance) -> relax.Expr:
    if c.attr("training_mode", 0) or len([o for o in c.node.output if o]) > 1:
        raise Refused("training mode")
    result = c.emit(
        op.nn.batch_norm(
            x, scale, bias, mean, variance, axis=1, epsilon=c.attr("epsilon", 1e-5), training=False
        )
    )
    return relax.TupleGetItem(result, 0)


def _layer_norm(
    c: Converter, x: relax.Expr, scale: relax.Expr, bias: relax.Expr | None = None
) -> list:
    if any(c.node.output[1:]):
        raise Refused("the mean or the deviation is used")
    rank = len(shape_of(x))
    axes = list(range(c.attr("axis", -1) % rank, rank))
    extent = tuple(shape_of(x)[a] for a in axes)
    if shape_of(scale) != extent or (bias is not None and shape_of(bias) != extent):
        raise Refused("a scale or bias that broadcasts")
    bias = constant(np.zeros(extent, "float32")) if bias is None else bias
    return [
        op.nn.layer_norm(
            x, scale, bias, axes=[a - rank for a in axes], epsilon=c.attr("epsilon", 1e-5)
        )
    ]


def _instance_norm(c: Converter, x: relax.Expr, scale: relax.Expr, bias: relax.Expr) -> relax.Expr:
    channels, axes = shape_of(x)[1], list(range(2, len(shape_of(x))))
    return op.nn.group_norm(
        x,
        scale,
        bias,
        num_groups=channels,
        channel_axis=1,
        axes=axes,
        epsilon=c.attr("epsilon", 1e-5),
    )


def _group_norm(c: Converter, x: relax.Expr, scale: relax.Expr, bias: relax.Expr) -> relax.Expr:
    if shape_of(scale) != (shape_of(x)[1],):
        raise Refused("one scale per group")
    axes = list(range(2, len(shape_of(x))))
    return op.nn.group_norm(
        x,
        scale,
        bias,
        num_groups=c.attr("num_groups"),
        channel_axis=1,
        axes=axes,
        epsilon=c.attr("epsilon", 1e-5),
    )


def _max_pool(c: Converter, x: relax.Expr) -> list:
    if any(c.node.output[1:]) or len(shape_of(x)) != 4 or c.attr("storage_order", 0):
        raise Refused("indices, or an input that is not [N, C, H, W]")
    kernel = list(c.attr("kernel_shape"))
    strides, dilations, padding = _geometry(c, x, kernel)
    padding = _fitted(c, x, kernel, strides, dilations, padding)
    return [
        op.nn.max_pool2d(
            x, kernel, strides=strides, padding=padding, dilation=dilations, ceil_mode=False
        )
    ]


def _average_pool(c: Converter, x: relax.Expr) -> relax.Expr:
    kernel = list(c.attr("kernel_shape"))
    strides, dilations, padding = _geometry(c, x, kernel)
    if len(shape_of(x)) != 4 or any(d != 1 for d in dilations):
        raise Refused("dilation, or an input that is not [N, C, H, W]")
    counted = bool(c.attr("count_include_pad", 0)) and any(padding)
    fitted = _fitted(c, x, kernel, strides, dilations, padding)
    if counted and fitted != padding:
        raise Refused("ceil_mode with counted padding")
    return op.nn.avg_pool2d(
        x, kernel, strides=strides, padding=fitted, ceil_mode=False, count_include_pad=counted
    )


def _fitted(
    c: Converter, x, kernel: list, strides: list, dilations: list, padding: list[int]
) -> list[int]:
    """Padding at the end that gives the inferred size, so that ceil_mode is not needed."""
    if not c.attr("ceil_mode", 0):
        return padding
    ends = []
    for size, out, k, s, d, before in zip(
        shape_of(x)[2:], c.shape()[2:], kernel, strides, dilations, padding
    ):
        end = (out - 1) * s + d * (k - 1) + 1 - size - before
        if (out - 1) * s >= size + before:
            raise Refused("a last window that lies in the padding")
        ends.append(max(end, 0))
    return [*padding[:2], *ends]


def _global_pool(function: Callable) -> Callable:
    return lambda c, x: function(x, list(range(2, len(shape_of(x)))), keepdims=True)


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
    "Softmax": _softmax(op.nn.softmax), "LogSoftmax": _softmax(op.nn.log_softmax), "Gemm": _gemm, "Conv": _conv, "ConvTranspose": _conv_transpose,
    "BatchNormalization": _batch_norm, "LayerNormalization": _layer_norm, "InstanceNormalization": _instance_norm, "GroupNormalization": _group_norm,
    "MaxPool": _max_pool, "AveragePool": _average_pool, "GlobalAveragePool": _global_pool(op.mean), "GlobalMaxPool": _global_pool(op.max),
}  # fmt: skip
