# SPDX-License-Identifier: Apache-2.0
"""One spelling for changes of shape, as few of them as possible, and permutes where they cancel.

    rewrite: squeeze, expand_dims, flatten, broadcast_to its own shape  ->  reshape, or nothing
             reshape(reshape(x)), permute_dims(permute_dims(x))         ->  one of them, or nothing
             permute_dims that moves axes of size 1 only                ->  reshape
             permute_dims(reshape(x, merged axes))                      ->  reshape(permute_dims(x))
             reshape(permute_dims(x), more axes)                        ->  permute_dims(reshape(x))
             f(reshape(x, fewer axes)), f along the last axis at most   ->  reshape(f(x))
             mean(reshape(x, without axes of size 1))                   ->  reshape(mean(x))
             reshape(kerf.dense(x), more axes)                          ->  kerf.dense(reshape(x))
             matmul(reshape(a, [B*H, M, K]), reshape(b, [B*H, K, N]))   ->  reshape(matmul(a, b))
    requires: static shapes, constants folded
    ensures: no squeeze, expand_dims, flatten is left

Reshapes that keep the last axis sink towards the output, where they meet their inverses; permutes
act on the most axes.
"""

from __future__ import annotations

import math

import tvm
from tvm import relax

from passes.layers import DENSE, attrs_of, const_array, is_call, is_const, operator_call, shape_of
from passes.numpy_operators import BINARY, UNARY
from passes.rewriting import Graph, axes_of, constant, permutation, rewrite_function, rewrite_module

_RESHAPES = ("relax.squeeze", "relax.expand_dims", "relax.flatten", "relax.nn.batch_flatten")
_UNARY = frozenset(
    [f"relax.{n}" for n in (*UNARY, "rsqrt", "round", "clip", "astype")]
    + [
        f"relax.nn.{n}"
        for n in ("relu", "leakyrelu", "selu", "gelu", "gelu_tanh", "silu", "softplus")
    ]
)
_BINARY = frozenset(f"relax.{n}" for n in (*BINARY, "divide"))


def _name(value: relax.Expr) -> str:
    return (
        value.op.name if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) else ""
    )


def spell_reshape(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """Operators that only change the shape become reshapes; those that do not even do that
    disappear.
    """
    name = _name(value)
    if name in _RESHAPES:
        return relax.op.reshape(value.args[0], shape_of(value))
    if name in ("relax.broadcast_to", "relax.reshape") and shape_of(value) == shape_of(
        value.args[0]
    ):
        return value.args[0]
    return None


def merge_reshapes(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """reshape(reshape(x)) -> reshape(x)"""
    if not is_call(value, "relax.reshape"):
        return None
    inner = graph.call(value.args[0], "relax.reshape")
    return relax.op.reshape(inner.args[0], shape_of(value)) if inner is not None else None


def merge_permutes(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """permute_dims(permute_dims(x)) -> permute_dims(x); one that changes nothing disappears."""
    if not is_call(value, "relax.permute_dims"):
        return None
    x, axes = value.args[0], permutation(value)
    if axes == sorted(axes):
        return x
    inner = graph.call(x, "relax.permute_dims")
    if inner is not None:
        within = permutation(inner)
        return relax.op.permute_dims(inner.args[0], [within[a] for a in axes])
    moving = [a for a in axes if shape_of(x)[a] != 1]
    return relax.op.reshape(x, shape_of(value)) if moving == sorted(moving) else None


def merged_axes(fine: tuple[int, ...], coarse: tuple[int, ...]) -> list[list[int]] | None:
    """For each axis of `coarse` the axes of `fine` it is the product of, or None if it is no such
    merging.
    """
    groups: list[list[int]] = []
    at = 0
    for size in coarse:
        group: list[int] = []
        product = 1
        while not group or product < size:
            if at == len(fine):
                return None
            group.append(at)
            product *= fine[at]
            at += 1
        if product != size:
            return None
        groups.append(group)
    if any(fine[a] != 1 for a in range(at, len(fine))) or not groups:
        return None
    groups[-1] += range(at, len(fine))
    return groups


def permute_before_merging(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """permute_dims(reshape(x, merged axes)) -> reshape(permute_dims(x), merged axes)"""
    if not is_call(value, "relax.permute_dims"):
        return None
    inner = graph.call(value.args[0], "relax.reshape")
    if inner is None or len(shape_of(inner.args[0])) <= len(shape_of(inner)):
        return None
    groups = merged_axes(shape_of(inner.args[0]), shape_of(inner))
    if groups is None:
        return None
    axes = [a for g in permutation(value) for a in groups[g]]
    return relax.op.reshape(relax.op.permute_dims(inner.args[0], axes), shape_of(value))


def permute_after_splitting(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """reshape(permute_dims(x), split axes) -> permute_dims(reshape(x, split axes))"""
    if not is_call(value, "relax.reshape"):
        return None
    inner = graph.call(value.args[0], "relax.permute_dims")
    if (
        inner is None
        or len(shape_of(value)) <= len(shape_of(inner))
        or not graph.is_read_once(value.args[0])
    ):
        return None
    groups = merged_axes(shape_of(value), shape_of(inner))
    if groups is None:
        return None
    axes, shape = permutation(inner), shape_of(value)
    order = sorted(range(len(axes)), key=lambda i: axes[i])  # groups in the order of x's axes
    before = [d for i in order for d in groups[i]]
    split = relax.op.reshape(inner.args[0], [shape[d] for d in before])
    return relax.op.permute_dims(split, [before.index(d) for d in range(len(shape))])


def _merged(expr: relax.Expr, graph: Graph, kept: int = 1) -> relax.Expr | None:
    """x, if `expr` is x with leading axes merged and its last `kept` axes as they were."""
    inner = graph.call(expr, "relax.reshape")
    if inner is None:
        return None
    x, result = shape_of(inner.args[0]), shape_of(expr)
    return inner.args[0] if len(x) > len(result) >= kept and x[-kept:] == result[-kept:] else None


def sink_reshape(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """f(reshape(x)) -> reshape(f(x)) for f that works element by element or along the last axis."""
    name = _name(value)
    if not name or not value.args or not isinstance(value.ty, relax.TensorType):
        return None
    x = _merged(value.args[0], graph)
    if name == "relax.take":
        ids = graph.call(value.args[1], "relax.reshape")
        if (
            ids is None
            or value.attrs.axis is None
            or int(value.attrs.axis) != 0
            or len(shape_of(ids.args[0])) <= len(shape_of(ids))
        ):
            return None
        return relax.op.reshape(
            relax.Call(value.op, [value.args[0], ids.args[0]], value.attrs), shape_of(value)
        )
    if name in _BINARY:
        return _sink_through_binary(value, graph)
    if x is None:
        return None
    rank = len(shape_of(value))
    if name == DENSE:
        moved = operator_call(name, [x, *list(value.args)[1:]], **attrs_of(value))
    elif name in _UNARY:
        moved = relax.Call(value.op, [x, *list(value.args)[1:]], value.attrs)
    elif name == "relax.nn.softmax" and int(value.attrs.axis) % rank == rank - 1:
        moved = relax.op.nn.softmax(x, -1)
    elif name == "relax.nn.layer_norm" and axes_of(value.attrs.axes, rank) == [rank - 1]:
        a = value.attrs
        moved = relax.op.nn.layer_norm(
            x,
            *list(value.args)[1:],
            axes=[-1],
            epsilon=float(a.epsilon),
            center=bool(a.center),
            scale=bool(a.scale),
        )
    elif name == "relax.nn.rms_norm" and axes_of(value.attrs.axes, rank) == [rank - 1]:
        moved = relax.op.nn.rms_norm(
            x, value.args[1], axes=[-1], epsilon=float(value.attrs.epsilon)
        )
    else:
        return None
    return relax.op.reshape(moved, shape_of(value))


def _unit_groups(expr: relax.Expr, graph: Graph) -> tuple[relax.Expr, list[list[int]]] | None:
    """(x, groups) if `expr` is x without some of its axes of size 1; see `merged_axes`."""
    x = _merged(expr, graph)
    if x is None:
        return None
    shape = shape_of(x)
    groups = merged_axes(shape, shape_of(expr))
    if groups is None or any(sum(shape[a] != 1 for a in g) > 1 for g in groups):
        return None
    return x, groups


def sink_reduction(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """mean(x without axes of size 1) -> mean(x), reshaped"""
    name = _name(value)
    if name.removeprefix("relax.") not in ("mean", "sum", "max", "min"):
        return None
    found = _unit_groups(value.args[0], graph)
    if found is None:
        return None
    x, groups = found
    axes = [a for g in axes_of(value.attrs.axis, len(groups)) for a in groups[g]]
    reduced = getattr(relax.op, name.removeprefix("relax."))(x, sorted(axes), True)
    return relax.op.reshape(reduced, shape_of(value))


def _sink_constant(
    value: relax.Call, at: int, other: relax.Expr, graph: Graph
) -> relax.Expr | None:
    """x without axes of size 1, combined with a constant -> x combined with it, reshaped."""
    found = _unit_groups(value.args[at], graph)
    if found is None:
        return None
    x, groups = found
    full = (1,) * (len(groups) - len(shape_of(other))) + shape_of(other)
    shape = [1] * len(shape_of(x))
    for size, group in zip(full, groups):
        shape[next((a for a in group if shape_of(x)[a] != 1), group[0])] = size
    args = [x, constant(const_array(other).reshape(shape))]
    return relax.op.reshape(
        relax.Call(value.op, args if at == 0 else args[::-1], value.attrs), shape_of(value)
    )


def _sink_through_binary(value: relax.Call, graph: Graph) -> relax.Expr | None:
    left, right = value.args
    merged = [_merged(left, graph), _merged(right, graph)]
    if merged[0] is not None and merged[1] is not None:
        if shape_of(merged[0]) != shape_of(merged[1]) or shape_of(left) != shape_of(right):
            return None
        return relax.op.reshape(relax.Call(value.op, merged, value.attrs), shape_of(value))
    for i, (tensor, other) in enumerate(((left, right), (right, left))):
        if merged[i] is None or not is_const(other) or shape_of(tensor) != shape_of(value):
            continue
        shape = shape_of(other)
        if math.prod(shape) != (
            shape[-1] if shape else 1
        ):  # it varies not just along the last axis
            if (sunk := _sink_constant(value, i, other, graph)) is not None:
                return sunk
            continue
        flat = constant(const_array(other).reshape(shape[-1:])) if len(shape) > 1 else other
        args = [merged[i], flat] if i == 0 else [flat, merged[i]]
        return relax.op.reshape(relax.Call(value.op, args, value.attrs), shape_of(value))
    return None


def raise_reshape(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """reshape(dense(x), more axes) -> dense(reshape(x)), and the same with a bias in between."""
    if not is_call(value, "relax.reshape"):
        return None
    inner, shape = graph.definition(value.args[0]), shape_of(value)
    if not isinstance(inner, relax.Call) or not graph.is_read_once(value.args[0]):
        return None
    if not shape or len(shape) <= len(shape_of(inner)) or shape[-1] != shape_of(inner)[-1]:
        return None
    if is_call(inner, DENSE):
        x = inner.args[0]
        split = relax.op.reshape(x, (*shape[:-1], shape_of(x)[-1]))
        return operator_call(DENSE, [split, inner.args[1]], **attrs_of(inner))
    if is_call(inner, "relax.add"):
        for i, (x, other) in enumerate((list(inner.args), list(inner.args)[::-1])):
            if (
                is_const(other)
                and shape_of(other) == shape[-1:]
                and graph.call(x, DENSE) is not None
                and graph.is_read_once(x)
            ):
                split = relax.op.reshape(x, shape)
                return relax.op.add(split, other) if i == 0 else relax.op.add(other, split)
    return None


def split_batched_matmul(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """matmul of operands whose leading axes were merged in the same way -> the matmul before that,
    merged.
    """
    if not is_call(value, "relax.matmul"):
        return None
    a, b = (_merged(arg, graph, kept=2) for arg in value.args)
    if a is None or b is None or shape_of(a)[:-2] != shape_of(b)[:-2]:
        return None
    if any(len(shape_of(arg)) != 3 for arg in value.args):
        return None
    return relax.op.reshape(relax.op.matmul(a, b, value.attrs.out_dtype), shape_of(value))


RULES = (
    spell_reshape,
    merge_reshapes,
    merge_permutes,
    permute_before_merging,
    permute_after_splitting,
    sink_reshape,
    sink_reduction,
    raise_reshape,
    split_batched_matmul,
)


@tvm.transform.module_pass(opt_level=0, name="kerf.CanonicalizeShapes")
class CanonicalizeShapes:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(mod, lambda func: rewrite_function(func, RULES, limit=100))
