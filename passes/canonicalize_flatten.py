# SPDX-License-Identifier: Apache-2.0
"""Flatten images channels last: no permute is needed between a convolution and a dense layer.

rewrite: kerf.dense(reshape(x [N, C, H, W], [N, C*H*W]), w)
         ->  kerf.dense(reshape(permute_dims(x, [0, 2, 3, 1]), [N, H*W*C]), columns of w reordered)
         multiply(flat, flat), flat = reshape(x [N, C, H, W], [N, C*H*W])  ->  reshape(multiply(x, x))
requires: NCHW, constants folded; x comes from a convolution or pool, perhaps by way of
  elementwise operators
ensures: once the graph is channels last, flattening costs nothing
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from passes.layers import DENSE, attrs_of, const_array, is_call, is_const, operator_call, shape_of
from passes.numpy_operators import UNARY
from passes.rewriting import Graph, constant, rewrite_function, rewrite_module

_FOLLOWS = frozenset(
    [
        f"relax.{n}"
        for n in (
            *UNARY,
            "clip",
            "add",
            "subtract",
            "multiply",
            "divide",
            "maximum",
            "minimum",
            "concat",
            "nn.pad",
        )
    ]
    + [
        f"relax.nn.{n}"
        for n in ("relu", "leakyrelu", "gelu", "gelu_tanh", "silu", "softplus", "selu")
    ]
)
_SOURCES = (
    "relax.nn.max_pool2d",
    "relax.nn.avg_pool2d",
    "relax.nn.adaptive_avg_pool2d",
    "relax.image.resize2d",
)
_DEPTH = 12


def _is_image(expr: relax.Expr, graph: Graph, depth: int = _DEPTH) -> bool:
    """Whether a tensor will exist in channels-last form anyway."""
    value = graph.definition(expr)
    if depth == 0 or not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
        return False
    name = value.op.name
    if name in _SOURCES or (name.startswith("kerf.") and "layout" in attrs_of(value)):
        return True
    operands = (
        value.args[0].fields
        if name == "relax.concat" and isinstance(value.args[0], relax.Tuple)
        else value.args
    )
    tensors = (
        [a for a in operands if isinstance(a, relax.Var) and len(shape_of(a)) == 4]
        if name in _FOLLOWS
        else []
    )
    return any(_is_image(t, graph, depth - 1) for t in tensors)


def square_before_flattening(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """The square of a flattened image is a flattened image."""
    if not is_call(value, "relax.multiply") or not value.args[0].same_as(value.args[1]):
        return None
    reshape = graph.call(value.args[0], "relax.reshape")
    if reshape is None or len(shape_of(reshape.args[0])) != 4 or len(shape_of(reshape)) != 2:
        return None
    x = reshape.args[0]
    return (
        relax.op.reshape(relax.op.multiply(x, x), shape_of(reshape))
        if _is_image(x, graph)
        else None
    )


def flatten_last(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """See the module's docstring."""
    if not is_call(value, DENSE) or not is_const(value.args[1]):
        return None
    reshape = graph.call(value.args[0], "relax.reshape")
    if reshape is None or len(shape_of(reshape.args[0])) != 4 or len(shape_of(reshape)) != 2:
        return None
    n, c, h, w = shape_of(reshape.args[0])
    if (
        shape_of(reshape) != (n, c * h * w)
        or h * w == 1
        or c == 1
        or not _is_image(reshape.args[0], graph)
    ):
        return None
    weight = const_array(value.args[1])
    moved = np.ascontiguousarray(
        weight.reshape(-1, c, h, w).transpose(0, 2, 3, 1).reshape(weight.shape)
    )
    flat = relax.op.reshape(relax.op.permute_dims(reshape.args[0], [0, 2, 3, 1]), (n, h * w * c))
    return operator_call(DENSE, [flat, constant(moved)], **attrs_of(value))


@tvm.transform.module_pass(opt_level=0, name="kerf.CanonicalizeFlatten")
class CanonicalizeFlatten:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(
            mod, lambda func: rewrite_function(func, (square_before_flattening, flatten_last))
        )
