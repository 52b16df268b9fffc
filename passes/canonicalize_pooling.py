# SPDX-License-Identifier: Apache-2.0
"""Spell pooling by what it computes.

rewrite: adaptive_avg_pool2d(x, [1, 1])                  ->  mean(x, [2, 3], keepdims)
         adaptive_avg_pool2d(x, its own size)            ->  x
         adaptive_avg_pool2d(x, a divisor of its size)   ->  avg_pool2d(x)
         avg_pool2d(x, the whole image, no padding)      ->  mean(x, [2, 3], keepdims)
         max_pool1d(x), avg_pool1d(x)                    ->  reshape(max_pool2d(reshape(x)))
         adaptive_avg_pool1d(x, 1)                       ->  mean(x, [2], keepdims)
requires: NCHW
ensures: an adaptive pool is left only where its windows differ in size
"""

from __future__ import annotations

import tvm
from tvm import relax

from passes.layers import is_call, shape_of
from passes.rewriting import Graph, ints, rewrite_function, rewrite_module


def spell_adaptive(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """adaptive_avg_pool2d as a mean, an ordinary pool, or nothing."""
    if not is_call(value, "relax.nn.adaptive_avg_pool2d") or str(value.attrs.layout) != "NCHW":
        return None
    x, size = shape_of(value.args[0])[2:], shape_of(value)[2:]
    if size == x:
        return value.args[0]
    if size == (1, 1):
        return relax.op.mean(value.args[0], [2, 3], True)
    if any(a % b for a, b in zip(x, size)):
        return None
    window = [a // b for a, b in zip(x, size)]
    return relax.op.nn.avg_pool2d(value.args[0], window, window)


def spell_global(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """avg_pool2d over the whole image -> mean"""
    if not is_call(value, "relax.nn.avg_pool2d") or str(value.attrs.layout) != "NCHW":
        return None
    whole = tuple(ints(value.attrs.pool_size)) == shape_of(value.args[0])[2:] and shape_of(value)[
        2:
    ] == (1, 1)
    plain = not any(ints(value.attrs.padding)) and all(d == 1 for d in ints(value.attrs.dilation))
    return relax.op.mean(value.args[0], [2, 3], True) if whole and plain else None


def spell_pool1d(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """One-dimensional pools as pools over an image of height 1."""
    if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
        return None
    name = value.op.name
    if name == "relax.nn.adaptive_avg_pool1d" and shape_of(value)[2:] == (1,):
        return relax.op.mean(value.args[0], [2], True) if str(value.attrs.layout) == "NCW" else None
    if (
        name not in ("relax.nn.max_pool1d", "relax.nn.avg_pool1d")
        or str(value.attrs.layout) != "NCW"
    ):
        return None
    make = relax.op.nn.max_pool2d if "max" in name else relax.op.nn.avg_pool2d
    a, (n, c, width) = value.attrs, shape_of(value.args[0])
    left, right = (ints(a.padding) * 2)[:2]
    pooled = make(
        relax.op.reshape(value.args[0], (n, c, 1, width)),
        [1, *ints(a.pool_size)],
        [1, *ints(a.strides)],
        [0, left, 0, right],
        [1, *ints(a.dilation)],
        bool(a.ceil_mode),
        bool(a.count_include_pad),
    )
    return relax.op.reshape(pooled, shape_of(value))


@tvm.transform.module_pass(opt_level=0, name="kerf.CanonicalizePooling")
class CanonicalizePooling:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(
            mod, lambda func: rewrite_function(func, (spell_adaptive, spell_global, spell_pool1d))
        )
