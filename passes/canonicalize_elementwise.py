# SPDX-License-Identifier: Apache-2.0
"""One spelling for bounds and nothing where nothing is computed.

rewrite: clip(x, 0, 6)                              ->  minimum(relu(x), 6)
         clip(x, 0, inf), maximum(x, 0)             ->  relu(x)
         clip(x, low, high)                         ->  minimum(maximum(x, low), high)
         x + 0, x - 0, x * 1, x / 1, dropout(x)     ->  x
         where(all true, x, y)                      ->  x
         astype(x, its own dtype)                   ->  x
         attention(q, k, v, bias all 0)             ->  attention(q, k, v)
requires: constants folded
ensures: no `relax.clip` of floats is left
"""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax

from passes.layers import const_array, is_call, is_const, shape_of
from passes.rewriting import Graph, constant, rewrite_function, rewrite_module, scalar

# operator -> (the operand's value that changes nothing, the positions it may stand at)
_NEUTRAL = {
    "relax.add": (0, (0, 1)),
    "relax.subtract": (0, (1,)),
    "relax.multiply": (1, (0, 1)),
    "relax.divide": (1, (1,)),
}


def _bound(expr) -> float | None:
    return scalar(expr) if is_const(expr) else float(expr.value) if hasattr(expr, "value") else None


def spell_clip(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """clip as relu, maximum and minimum, without the bounds that are infinite."""
    if not is_call(value, "relax.clip") or "float" not in str(value.ty.dtype):
        return None
    x, dtype = value.args[0], str(value.ty.dtype)
    low, high = (_bound(b) for b in list(value.args)[1:])
    if low is None or high is None or not low <= high:
        return None
    largest = float(np.finfo(dtype).max)  # exporters write the largest number for infinity
    if low == 0:
        x = relax.op.nn.relu(x)
    elif low > -largest:
        x = relax.op.maximum(x, relax.const(low, dtype))
    return relax.op.minimum(x, relax.const(high, dtype)) if high < largest else x


def spell_relu(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """maximum(x, 0) -> relu(x)"""
    if not is_call(value, "relax.maximum"):
        return None
    for x, other in (value.args, list(value.args)[::-1]):
        if (
            scalar(other) == 0
            and not math.copysign(1, scalar(other)) < 0
            and shape_of(x) == shape_of(value)
        ):
            return relax.op.nn.relu(x)
    return None


def drop_neutral(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """x + 0 and its like -> x, where shape and type stay."""
    name = (
        value.op.name if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) else ""
    )
    if name not in _NEUTRAL:
        return None
    neutral, positions = _NEUTRAL[name]
    for at in positions:
        x, other = value.args[1 - at], value.args[at]
        if (
            is_const(other)
            and shape_of(x) == shape_of(value)
            and str(x.ty.dtype) == str(value.ty.dtype)
        ):
            if np.all(const_array(other) == neutral):
                return x
    return None


def drop_where(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """where(constant condition that is everywhere the same, x, y) -> x or y"""
    if not is_call(value, "relax.where") or not is_const(value.args[0]):
        return None
    condition = const_array(value.args[0])
    chosen = value.args[1] if condition.all() else value.args[2] if not condition.any() else None
    return chosen if chosen is not None and shape_of(chosen) == shape_of(value) else None


def drop_cast(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """astype(x, its own dtype) -> x"""
    same = is_call(value, "relax.astype") and str(value.args[0].ty.dtype) == str(value.ty.dtype)
    return value.args[0] if same else None


def drop_dropout(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """The first result of a dropout, which at inference is its input."""
    if isinstance(value, relax.TupleGetItem) and value.index == 0:
        dropout = graph.call(value.tuple_value, "relax.nn.dropout")
        return dropout.args[0] if dropout is not None else None
    return None


def drop_mask(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """attention_bias with a bias of zeros -> attention"""
    if (
        not is_call(value, "relax.nn.attention_bias")
        or not is_const(value.args[3])
        or const_array(value.args[3]).any()
    ):
        return None
    a = value.attrs
    causal = None if a.causal_mask is None else str(a.causal_mask)
    return relax.op.nn.attention(
        *list(value.args)[:3], scale=a.scale, causal_mask=causal, window_size=a.window_size
    )


def spell_scalar(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """A one-element constant operand of an elementwise operator becomes a scalar, where the shape
    stays.
    """
    name = (
        value.op.name if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) else ""
    )
    if name not in (*_NEUTRAL, "relax.maximum", "relax.minimum", "relax.power"):
        return None
    for at in (0, 1):
        x, other = value.args[1 - at], value.args[at]
        if (
            is_const(other)
            and shape_of(other)
            and math.prod(shape_of(other)) == 1
            and shape_of(x) == shape_of(value)
            and not is_const(x)
        ):
            args = list(value.args)
            args[at] = constant(const_array(other).reshape(()))
            return relax.Call(value.op, args, value.attrs)
    return None


RULES = (
    spell_scalar,
    spell_clip,
    spell_relu,
    drop_neutral,
    drop_where,
    drop_cast,
    drop_dropout,
    drop_mask,
)


@tvm.transform.module_pass(opt_level=0, name="kerf.CanonicalizeElementwise")
class CanonicalizeElementwise:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(mod, lambda func: rewrite_function(func, RULES))
