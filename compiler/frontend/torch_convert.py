# SPDX-License-Identifier: Apache-2.0
"""Converts the nodes of a prepared torch graph in order, and says which it could not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax
from tvm.relax import op

from compiler.frontend.support import Refused, constant, dtype_of
from compiler.frontend.torch_graph import DTYPES, Prepared
from passes.layers import shape_of
from passes.name_layers import Grid
from schedules.errors import UnsupportedModel

Converters = Mapping[str, Callable]  # by operator


def key_of(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def unsupported(prepared: Prepared, converters: Converters) -> list[str]:
    """`operator (node, node, ...)` for every operator of the graph without a converter."""
    missing: dict[str, list[str]] = {}
    for node in prepared.graph.nodes:
        if (
            node.op in ("placeholder", "output", "get_attr")
            or node in prepared.constants
            or not node.users
        ):
            continue
        if node.op != "call_function" or key_of(node) not in converters:
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


class Converter:
    """Converts nodes in order; `env` maps nodes to Relax expressions, `names` weights to layer names, `grids` weights to the
    scales they are stored with, `unsigned` int8 tensors to what they are as uint8."""

    def __init__(
        self, builder: relax.BlockBuilder, prepared: Prepared, where: str, converters: Converters
    ):
        self.builder, self.prepared, self.where = builder, prepared, where
        self.converters = converters
        self.env: dict[fx.Node, Any] = {}
        self.names: dict[relax.Expr, str] = {}
        self.grids: dict[relax.Expr, Grid] = {}
        self.unsigned: dict[relax.Expr, relax.Expr] = {}
        self.node: fx.Node | None = None

    def emit(self, expr: relax.Expr) -> relax.Expr:
        return self.builder.emit(expr)

    def convert(self, node: fx.Node) -> None:
        """Raises UnsupportedModel for arguments no converter covers, or if the result's type is not torch's."""
        self.node = node
        function = self.converters[key_of(node)]
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
            if argument in self.prepared.grids:
                self.grids[const] = self.prepared.grids[argument]
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
