# SPDX-License-Identifier: Apache-2.0
"""Compute in numpy whatever depends on constants and static shapes only.

    rewrite: permute_dims(const) -> const;  arange(0, 9) -> const;  shape_of(x) -> shape
    requires: static shapes
    ensures: no operator is left whose operands are all constants, except creations too large to be
      worth storing

TVM's own FoldConstant compiles every distinct constant expression with LLVM, which takes tens of
seconds on a large network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tvm
from tvm import relax

from passes.evaluate import evaluate_value
from passes.layers import is_const, shape_of
from passes.numpy_nn import NN_OPERATORS
from passes.numpy_operators import OPERATORS, Numeric
from passes.rewriting import Graph, constant, rewrite_function, rewrite_module

_AS_DECLARED = Numeric("")
# A result larger than this is only stored if it is no larger than what it was computed from.
_GROWTH_LIMIT_BYTES = 1 << 26


def _is_foldable(expr) -> bool:
    if isinstance(expr, relax.Tuple):
        return all(_is_foldable(f) for f in expr.fields)
    return not isinstance(expr, (relax.Var, relax.Call, relax.TupleGetItem))


def _bytes(expr) -> int:
    if isinstance(expr, relax.Tuple):
        return sum(_bytes(f) for f in expr.fields)
    return math.prod(shape_of(expr)) * 4 if is_const(expr) else 0


def _shape_operand(value: relax.Call, graph: Graph):
    """`shape_to_tensor(shape_of(x))` and `shape_of(x)` need the type of x, not its value."""
    if value.op.name == "relax.shape_of":
        return relax.ShapeExpr(list(shape_of(value.args[0])))
    if value.op.name == "relax.shape_to_tensor":
        shape = graph.definition(value.args[0])
        if isinstance(shape, relax.ShapeExpr):
            return constant(np.asarray([int(d) for d in shape.values], "int64"))
    return None


def fold(value: relax.Expr, graph: Graph):
    """The constant a value always has, or None."""
    if isinstance(value, relax.TupleGetItem):
        items = graph.definition(value.tuple_value)
        return (
            items.fields[value.index]
            if isinstance(items, relax.Tuple) and _is_foldable(items.fields[value.index])
            else None
        )
    if not isinstance(value.op, tvm.ir.Op):
        return None
    if (shape := _shape_operand(value, graph)) is not None:
        return shape
    name = value.op.name
    if (name not in OPERATORS and name not in NN_OPERATORS) or not all(
        _is_foldable(a) for a in value.args
    ):
        return None
    if isinstance(value.ty, relax.TensorType) and _too_large(value):
        return None
    with np.errstate(all="ignore"):
        result = evaluate_value(value, {}, _AS_DECLARED, {})
    if isinstance(result, tuple):
        return (
            relax.Tuple([constant(r) for r in result])
            if all(isinstance(r, np.ndarray) for r in result)
            else None
        )
    return constant(result)


def _too_large(value: relax.Call) -> bool:
    size = math.prod(shape_of(value)) * 4
    return size > _GROWTH_LIMIT_BYTES and size > sum(_bytes(a) for a in value.args)


@tvm.transform.module_pass(opt_level=0, name="kerf.FoldConstants")
class FoldConstants:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        rules: Sequence = (fold,)
        return rewrite_module(mod, lambda func: rewrite_function(func, rules))
