# SPDX-License-Identifier: Apache-2.0
"""Spell pooling by what it computes.

rewrite: adaptive_avg_pool2d(x, [1, 1])                  ->  mean(x, [2, 3], keepdims)
         adaptive_avg_pool2d(x, its own size)            ->  x
         adaptive_avg_pool2d(x, a divisor of its size)   ->  avg_pool2d(x)
         avg_pool2d(x, the whole image, no padding)      ->  mean(x, [2, 3], keepdims)
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


@tvm.transform.module_pass(opt_level=0, name="kerf.CanonicalizePooling")
class CanonicalizePooling:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(
            mod, lambda func: rewrite_function(func, (spell_adaptive, spell_global))
        )
