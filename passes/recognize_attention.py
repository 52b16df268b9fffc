# SPDX-License-Identifier: Apache-2.0
"""Put attention that an exporter spelled out back together.

    rewrite: matmul(softmax(matmul(q, permute_dims(k)) * scale + mask), v), all [B, H, S, D]
             ->  permute_dims(attention(q, k, v, mask, scale)), all [B, S, H, D]
             attention_bias(q, k, v, 0 on and below the diagonal, -inf above)
             ->  attention(q, k, v, causal_mask="TopLeft")
    requires: constants folded, shapes canonical
    ensures: the permutes that split and merge heads meet their inverses; scalar factors of q, k or
      the scores are in `scale`; a mask is added, or chosen by `where`, and broadcasts; one of zeros
      does not exist

Scores or probabilities that anything else reads stay. `where(isnan(p), 0, p)` and the equivalent
test for rows of -inf, by which exporters give a query that may attend to nothing a zero, are
dropped if no row of the mask is all -inf: then they only act on scores that are not finite.
"""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax

from passes.layers import const_array, is_call, is_const, shape_of
from passes.rewriting import Graph, constant, rewrite_function, rewrite_module, scalar

# Added to a float32 score, a number below this leaves nothing of it.
_NOTHING_LEFT = -1e30


def _unscaled(expr: relax.Expr, graph: Graph) -> tuple[relax.Expr, float]:
    """An expression without scalar factors that nothing else reads, and their product."""
    value = graph.definition(expr)
    if value is not None and graph.is_read_once(expr):
        if is_call(value, "relax.multiply"):
            for x, other in (list(value.args), list(value.args)[::-1]):
                if scalar(other) is not None and shape_of(x) == shape_of(expr):
                    inner, scale = _unscaled(x, graph)
                    return inner, scale * scalar(other)
        if is_call(value, "relax.divide") and scalar(value.args[1]):
            inner, scale = _unscaled(value.args[0], graph)
            return inner, scale / scalar(value.args[1])
    return expr, 1.0


def _product(
    expr: relax.Expr, graph: Graph, guarded: bool = False
) -> tuple[relax.Call, float] | None:
    """The matmul behind an expression, and the scale of the scores."""
    inner, scale = _unscaled(expr, graph)
    found = graph.call(inner, "relax.matmul")
    once = graph.is_read_once(inner) or (guarded and inner is expr)
    return (found, scale) if found is not None and once else None


def _masked_product(
    expr: relax.Expr, graph: Graph, guarded: bool
) -> tuple[relax.Call, float, relax.Expr | None] | None:
    """(matmul, scale, additive mask or None) behind the argument of a softmax."""
    if len(graph.readers(expr)) > (2 if guarded else 1):  # the guard may read the scores as well
        return None
    if (plain := _product(expr, graph, guarded)) is not None:
        return (*plain, None)
    if (added := graph.call(expr, "relax.add")) is not None:
        for scores, mask in (list(added.args), list(added.args)[::-1]):
            found = _product(scores, graph) if shape_of(scores) == shape_of(expr) else None
            if found is not None and len(shape_of(mask)) <= len(shape_of(expr)):
                return (*found, mask)
    if (chosen := graph.call(expr, "relax.where")) is not None:
        keep, scores, other = chosen.args
        low = scalar(other)
        found = _product(scores, graph) if shape_of(scores) == shape_of(expr) else None
        if (
            found is not None
            and low is not None
            and low < _NOTHING_LEFT
            and str(keep.ty.dtype) == "bool"
        ):
            dtype = str(expr.ty.dtype)
            if is_const(keep):
                return (*found, constant(np.where(const_array(keep), 0, low).astype(dtype)))
            return (
                *found,
                graph.emit(
                    relax.op.where(keep, relax.const(0, dtype), relax.const(low, dtype)), "mask"
                ),
            )
    return None


def _blocks_a_row(mask: relax.Expr | None) -> bool:
    """Whether a mask may leave a query nothing to attend to."""
    if mask is None:
        return False
    return (
        not is_const(mask) or bool(np.any(np.all(np.isneginf(const_array(mask)), axis=-1)))
        if shape_of(mask)
        else True
    )


def _without_guard(expr: relax.Expr, graph: Graph) -> tuple[relax.Call, bool] | None:
    """(softmax, whether rows of nothing are guarded) behind probabilities."""
    if not graph.is_read_once(expr):
        return None
    if (softmax := graph.call(expr, "relax.nn.softmax")) is not None:
        return softmax, False
    guard = graph.call(expr, "relax.where")
    if guard is None:
        return None
    condition, zero, probabilities = guard.args
    softmax = graph.call(probabilities, "relax.nn.softmax")
    if softmax is None or not _is_zero(zero, graph) or shape_of(probabilities) != shape_of(expr):
        return None
    nan = graph.call(condition, "relax.isnan")
    if nan is not None and nan.args[0].same_as(probabilities):
        return softmax, True
    return (softmax, True) if _finds_blocked_rows(condition, softmax.args[0], graph) else None


def _is_zero(expr: relax.Expr, graph: Graph) -> bool:
    if (filled := graph.call(expr, "relax.full_like")) is not None:
        expr = filled.args[1]
    return is_const(expr) and not const_array(expr).any()


def _finds_blocked_rows(condition: relax.Expr, scores: relax.Expr, graph: Graph) -> bool:
    """not any(not (scores == -inf)) along the last axis, as torch's decomposition spells it."""
    chain = ("logical_not", "astype", "max", "astype", "logical_not", "equal")
    for name in chain:
        value = graph.call(condition, f"relax.{name}")
        if value is None:
            return False
        if name == "max" and not (
            value.attrs.keepdims
            and [int(a) % len(shape_of(scores)) for a in value.attrs.axis]
            == [len(shape_of(scores)) - 1]
        ):
            return False
        condition = value.args[0]
    return value.args[0].same_as(scores) and scalar(value.args[1]) == -math.inf


def _to_bshd(expr: relax.Expr, order: list[int]) -> relax.Expr:
    """[B, H, S, D] (or, by `order`, [B, H, D, S]) to [B, S, H, D]; three axes count as one head."""
    shape = shape_of(expr)
    if len(shape) == 3:
        expr = relax.op.reshape(expr, (shape[0], 1, *shape[1:]))
    return relax.op.permute_dims(expr, order)


def recognize_attention(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """matmul(softmax(scores), v) -> attention"""
    if (
        not is_call(value, "relax.matmul")
        or len(shape_of(value)) not in (3, 4)
        or str(value.ty.dtype) != "float32"
    ):
        return None
    v, rank = value.args[1], len(shape_of(value))
    found = _without_guard(value.args[0], graph)
    if found is None or int(found[0].attrs.axis) % rank != rank - 1:
        return None
    softmax, guarded = found
    scores = _masked_product(softmax.args[0], graph, guarded)
    if scores is None:
        return None
    product, scale, mask = scores
    if guarded and _blocks_a_row(mask):
        return None
    q, q_scale = _unscaled(product.args[0], graph)
    k, k_scale = _unscaled(product.args[1], graph)
    shapes = [shape_of(e) for e in (q, k, v)]
    if (
        any(len(s) != rank or s[:-2] != shapes[0][:-2] for s in shapes)
        or is_const(q)
        or is_const(k)
        or is_const(v)
    ):
        return None
    bias = _bias(mask, shape_of(softmax.args[0])) if mask is not None else None
    scale = tvm.tirx.FloatImm("float32", scale * q_scale * k_scale)
    query, keys, values = (
        _to_bshd(q, [0, 2, 1, 3]),
        _to_bshd(k, [0, 3, 1, 2]),
        _to_bshd(v, [0, 2, 1, 3]),
    )
    emitted = [graph.emit(e) for e in (query, keys, values)]
    result = relax.op.permute_dims(relax.op.nn.attention(*emitted, bias, scale=scale), [0, 2, 1, 3])
    return result if rank == 4 else relax.op.reshape(result, shape_of(value))


def recognize_causal(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """attention_bias whose constant bias only hides the future -> attention(causal_mask=..)"""
    if not is_call(value, "relax.nn.attention_bias") or not is_const(value.args[3]):
        return None
    bias, a = const_array(value.args[3]), value.attrs
    if bias.shape[-1] != bias.shape[-2] or a.causal_mask is not None or a.window_size is not None:
        return None
    allowed = np.tril(np.ones(bias.shape[-2:], bool))
    hidden = np.where(allowed, -np.inf, bias)  # what of the bias is hidden, at allowed places -inf
    if np.any(np.where(allowed, bias, 0)) or np.any(hidden > _NOTHING_LEFT) or allowed.all():
        return None
    return relax.op.nn.attention(*list(value.args)[:3], scale=a.scale, causal_mask="TopLeft")


def _bias(mask: relax.Expr, scores: tuple[int, ...]) -> relax.Expr | None:
    """The mask with four axes [B, H, S, T], the last two as they are in the scores."""
    shape = (1,) * (len(scores) - len(shape_of(mask))) + shape_of(mask)
    shape = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])
    if is_const(mask):
        array = const_array(mask)
        if not array.any():
            return None
        full = (*shape[:2], *scores[-2:])
        return constant(np.broadcast_to(array.reshape(shape), full))
    flat = mask if shape_of(mask) == shape else relax.op.reshape(mask, shape)
    return (
        flat
        if shape[-2:] == scores[-2:]
        else relax.op.broadcast_to(flat, (*shape[:2], *scores[-2:]))
    )


@tvm.transform.module_pass(opt_level=0, name="kerf.RecognizeAttention")
class RecognizeAttention:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(
            mod, lambda func: rewrite_function(func, (recognize_attention, recognize_causal))
        )
