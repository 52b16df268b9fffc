# SPDX-License-Identifier: Apache-2.0
"""Fold zeroth biases, one constant row per token position, into what the layer adds anyway.

rewrite: dense(x + d, w) + b  ->  dense(x, w) + (d w^T + b)       d [T, K] constant, at the input
         (dense(h, w) + b) + d  ->  dense(h, w) + (b + d)          d [T, O] constant, at the output
requires: x + d is read by layers named here only, and the table [T, O] is no larger than the weight
ensures: nothing is added to the input at run time; the same function but for rounding
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import tvm
from tvm import relax

from passes.layers import DENSE, attrs_of, const_array, dense, is_call, is_const, shape_of
from passes.rewriting import Graph, constant, rewrite_function, rewrite_module


def fold_zeroth_biases(mod: tvm.IRModule, layers: Collection[str]) -> tvm.IRModule:
    """`mod` with the zeroth biases before and behind these dense layers folded."""

    def before(value: relax.Expr, graph: Graph) -> relax.Expr | None:
        if not (is_call(value, DENSE) and attrs_of(value)["name"] in layers):
            return None
        added = graph.call(value.args[0], "relax.add")
        if added is None or not _read_by(graph, value.args[0], layers):
            return None
        x, bias = _split(added)
        if x is None or shape_of(x) != shape_of(added):
            return None
        weight = const_array(value.args[1]).astype(np.float64)
        rows = const_array(bias)
        width = 1 if rows.shape[-1:] != (weight.shape[1],) else rows.shape[-1]
        if rows.ndim == 0 or width == 1 or rows.size // width * weight.shape[0] > weight.size:
            return None
        table = (rows.astype(np.float64) @ weight.T).astype(rows.dtype)
        inner = dense(x, value.args[1], name=attrs_of(value)["name"])
        return relax.op.add(inner, constant(table))

    def behind(value: relax.Expr, graph: Graph) -> relax.Expr | None:
        if not is_call(value, "relax.add"):
            return None
        inner, second = _split(value)
        added = None if inner is None else graph.call(inner, "relax.add")
        if added is None or not graph.is_read_once(inner):
            return None
        result, first = _split(added)
        call = None if result is None else graph.call(result, DENSE)
        if (
            call is None
            or attrs_of(call)["name"] not in layers
            or shape_of(added) != shape_of(value)
        ):
            return None
        total = const_array(first).astype(np.float64) + const_array(second)
        if total.size > const_array(call.args[1]).size:
            return None
        return relax.op.add(result, constant(total.astype(const_array(first).dtype)))

    return rewrite_module(mod, lambda func: rewrite_function(func, (before, behind)))


def _split(added: relax.Call) -> tuple[relax.Expr | None, relax.Expr | None]:
    """(value, constant) of a sum with one constant operand."""
    a, b = added.args
    if is_const(a) == is_const(b):
        return None, None
    return (b, a) if is_const(a) else (a, b)


def _read_by(graph: Graph, expr: relax.Expr, layers: Collection[str]) -> bool:
    return all(
        is_call(reader, DENSE) and attrs_of(reader)["name"] in layers
        for reader in graph.readers(expr)
    )
