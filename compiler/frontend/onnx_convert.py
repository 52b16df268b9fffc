# SPDX-License-Identifier: Apache-2.0
"""Converts the nodes of a prepared ONNX graph in order, and says which it could not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper
from tvm import relax

from compiler.frontend.names import is_anonymous
from compiler.frontend.onnx_graph import OnnxGraph, scope_of
from compiler.frontend.support import Refused, constant, dtype_of, first_line
from passes.layers import is_const, shape_of
from passes.name_layers import Grid
from schedules.errors import UnsupportedModel

_LAYERS = frozenset({"Conv", "MatMul", "Gemm"})
Converters = Mapping[str, Callable]  # by operator


def converter_of(node: onnx.NodeProto, converters: Converters) -> Callable | None:
    return converters.get(node.op_type) if node.domain in ("", "ai.onnx") else None


def unsupported(graph: OnnxGraph, converters: Converters) -> list[str]:
    """`operator (node, node, ...)` for every operator of the graph without a converter."""
    missing: dict[str, list[str]] = {}
    for node in graph.nodes:
        if converter_of(node, converters) is None:
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
    """Converts nodes in order; `env` maps values to Relax expressions, `names` weights to layer names, `grids` weights to
    the scales they are stored with, `unsigned` int8 tensors to what they are as uint8."""

    def __init__(self, builder: relax.BlockBuilder, graph: OnnxGraph, converters: Converters):
        self.builder, self.graph, self.converters = builder, graph, converters
        self.env: dict[str, relax.Expr] = {}
        self.names: dict[relax.Expr, str] = {}
        self.grids: dict[relax.Expr, Grid] = {}
        self.unsigned: dict[relax.Expr, relax.Expr] = {}
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
            function = converter_of(node, self.converters)
            results = function(self, *[self.value(n) if n else None for n in node.input])
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
                    else self._emit_result(result, at)
                )
                self._check(name, self.env[name], at)

    def _emit_result(self, result: relax.Expr, at: str) -> relax.Expr:
        """Emit what a node computes. Raises UnsupportedModel with the operands' shapes where no type can be inferred."""
        try:
            return self.emit(result)
        except (RuntimeError, TypeError, ValueError) as error:
            operands = [self.env[n] for n in self.node.input if n in self.env]
            raise UnsupportedModel(
                f"{at}: its operands do not fit one another", where=self.graph.where,
                found=", ".join("x".join(map(str, shape_of(o))) or "scalar" for o in operands),
            ) from error  # fmt: skip

    def _name_weight(self, node: onnx.NodeProto) -> None:
        if len(node.input) < 2 or node.input[1] not in self.graph.constants:
            return
        weight, given = self.value(node.input[1]), self.graph.names.get(node.input[1], "")
        self.names.setdefault(
            weight, given if not is_anonymous(given) else scope_of(node) or node.output[0]
        )
        if node.input[1] in self.graph.grids:
            self.grids[weight] = self.graph.grids[node.input[1]]

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
