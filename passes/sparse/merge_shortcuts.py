# SPDX-License-Identifier: Apache-2.0
"""Compute a shortcut's convolution in the kernel of the convolution that it is added to.

    rewrite: add(kerf.sparse_conv2d(a, v) + p, kerf.sparse_conv2d(b, w) + q)
             ->  kerf.sparse_conv2d(a, [v w], b) + (p + q)
    requires: layouts decided (`keep_planes.py`)
    ensures: the same sums, of which the shortcut's are never written; the operator says which `layers` it computes

Both are 1x1 convolutions, of one grain, that read planes where they lie, and whose results nothing else reads.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from passes.layers import attrs_of, const_array, is_call, is_const, operator_call, shape_of
from passes.rewriting import Graph, constant, rewrite_function, rewrite_module
from passes.sparse.lowering import problem_of, structure_for
from passes.sparse.operators import SPARSE_CONV2D
from schedules import sparse_chain


def _term(expr: relax.Expr, graph: Graph) -> tuple[relax.Call, list[np.ndarray]] | None:
    """(convolution, what is added to it) of an operand that can be computed with another, else None."""
    biases = []
    while graph.is_read_once(expr):
        value = graph.definition(expr)
        if is_call(value, SPARSE_CONV2D):
            return (value, biases) if _suits(value) else None
        if not is_call(value, "relax.add"):
            return None
        constants = [a for a in value.args if is_const(a)]
        others = [a for a in value.args if not is_const(a)]
        if len(constants) != 1:
            return None
        biases.append(const_array(constants[0]))
        expr = others[0]
    return None


def _suits(conv: relax.Call) -> bool:
    if len(conv.args) != 2:
        return False
    problem = problem_of(conv)
    in_place = structure_for(problem) is sparse_chain and sparse_chain.lies_in_place(problem)
    return in_place and problem.groups == 1


def merged(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """What computes a sum of two convolutions in one, or None."""
    if not is_call(value, "relax.add"):
        return None
    terms = [_term(a, graph) for a in value.args]
    if None in terms:
        return None
    # The input of more channels first, as the kernel wants them.
    terms.sort(key=lambda term: -shape_of(term[0].args[0])[1])
    (one, biases), (other, more) = terms
    if attrs_of(one)["grain"] != attrs_of(other)["grain"] or one.args[0].same_as(other.args[0]):
        return None
    weight = np.concatenate([const_array(c.args[1]) for c in (one, other)], axis=1)
    layers = [attrs_of(c)["name"] for c in (one, other)]
    args = [one.args[0], constant(weight), other.args[0]]
    made = operator_call(SPARSE_CONV2D, args, **attrs_of(one), layers=layers)
    bias = [*biases, *more]
    return relax.op.add(made, constant(sum(bias))) if bias else made


@tvm.transform.module_pass(opt_level=0, name="kerf.MergeShortcuts")
class MergeShortcuts:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(mod, lambda func: rewrite_function(func, [merged]))
