# SPDX-License-Identifier: Apache-2.0
"""A transformer's activations in planes: what `keep_planes` does, through norms and attention.

    rewrite: n = layer_norm(x); q, k, v = kerf.sparse_dense(n, w...); a = attention(heads of q, k, v); y = x + kerf.sparse_dense(a, w)
             ->  the same with everything from x on [1, C, rows] instead of [B, S, C], x copied into planes once
    requires: channels last
    ensures: as `keep_planes`; what a network computes otherwise, and reads otherwise, lies in rows, copied between the two

Between the sparse layers of a transformer stand norms over channels, attention, which takes channels apart into heads, and
residual additions: one stream from the first layer to the last norm. It begins with a tensor that some other layer makes,
may be added to what some other layer makes, and ends where something else reads a norm: there it is copied, which pays if it
serves several sparse layers.
"""

from __future__ import annotations

import math

from tvm import relax

from passes.layers import is_call, shape_of
from passes.rewriting import Graph, axes_of, bindings_of, variables
from passes.sparse.attention_planes import attention_in_planes, is_attention
from passes.sparse.operators import planes_to_rows, rows_to_planes
from passes.sparse.planner import FEWEST_PIXELS, Planner, is_integer, is_sparse, is_tensor

_NORMS = ("relax.nn.layer_norm", "relax.nn.rms_norm")
_SERVED = 3  # sparse layers that read or write planes for each copy, at least


def _is_norm(value) -> bool:
    if not any(is_call(value, name) for name in _NORMS):
        return False
    rank = len(shape_of(value.args[0]))
    return rank in (2, 3) and axes_of(value.attrs.axes, rank) == [rank - 1]


def _is_of_heads(value) -> bool:
    """Whether a reshape takes the channels of rows apart into heads, or puts them together."""
    if not is_call(value, "relax.reshape"):
        return False
    one, other = sorted((shape_of(value.args[0]), shape_of(value)), key=len)
    if (len(one), len(other)) != (3, 4):
        return False
    return one == (*other[:2], other[2] * other[3])


def may_hold_stream(func: relax.Function) -> bool:
    """Whether a function has norms, and no layers of bytes, whose planes are others."""
    values = [b.value for b in bindings_of(func)]
    return any(_is_norm(v) for v in values) and not any(is_integer(v) for v in values)


class StreamPlanner(Planner):
    """Decides which variables lie in planes, or in both layouts, and rewrites the function with these."""

    def __init__(self, func: relax.Function):
        self.begun: set[relax.Var] = set()  # in rows, and copied into planes
        self.planar: dict[relax.Var, relax.Var] = {}  # of those in both layouts
        super().__init__(func)

    @property
    def pays(self) -> bool:
        """Whether the copies serve enough layers."""
        layers = [
            var
            for var, value in self.values.items()
            if is_sparse(value) and (var in self.planes or value.args[0] in self.planes)
        ]
        copies = [v for v in self.planes if v in self.begun or self._is_read_in_rows(v)]
        return len(layers) >= _SERVED * len(copies)

    def _is_read_in_rows(self, var: relax.Var) -> bool:
        if not _is_norm(self.values[var]):
            return False
        readers = self._readers(var)
        return var in self.outputs or not all(self._takes_planes(var, *r) for r in readers)

    def _considered(self, var: relax.Var, value) -> int | None:
        found = super()._considered(var, value)
        if found is None and self._begins(var, value):
            self.begun.add(var)
            return 1
        return found

    def _begins(self, var: relax.Var, value) -> bool:
        """Whether a variable is where a stream may begin, or be joined: a norm reads it, or a layer and its residual, or what
        adds it to the stream."""
        if not is_tensor(var) or is_sparse(value) or str(var.ty.dtype) != "float32":
            return False
        shape = shape_of(var)
        if len(shape) not in (2, 3) or math.prod(shape[:-1]) < FEWEST_PIXELS:
            return False
        readers = [read for _, read in self._readers(var)]
        layers = [is_sparse(read) for read in readers]
        joins = any(_is_norm(read) or self._is_joined(read, shape) for read in readers)
        return joins or (any(layers) and not all(layers))

    def _is_joined(self, value, shape: tuple[int, ...]) -> bool:
        """Whether a sum has a term of that shape which may lie in planes."""
        if not is_call(value, "relax.add"):
            return False
        return any(self.together.get(a) == 1 and shape_of(a) == shape for a in value.args)

    def _together(self, value) -> int | None:
        if is_attention(value):
            return 1 if all(self.together.get(a) == 1 for a in value.args[:3]) else None
        if _is_norm(value) or _is_of_heads(value):
            return 1 if self.together.get(value.args[0]) == 1 else None
        return super()._together(value)

    def _may_lie_in_planes(self, var: relax.Var, value) -> bool:
        if var in self.begun or _is_norm(value):
            return var in self.together
        if is_attention(value) or _is_of_heads(value):
            return var in self.together and var not in self.outputs
        return super()._may_lie_in_planes(var, value)

    def _fits(self, var: relax.Var) -> bool:
        value, readers = self.values[var], self._readers(var)
        taken = [self._takes_planes(var, *r) for r in readers]
        if var in self.begun:
            return any(yes and not is_sparse(r[1]) for yes, r in zip(taken, readers))
        if _is_norm(value):
            return value.args[0] in self.planes
        if is_attention(value):
            return all(a in self.planes for a in value.args[:3]) and all(taken)
        if _is_of_heads(value):
            return value.args[0] in self.planes and all(taken)
        return super()._fits(var)

    def _takes_planes(self, var: relax.Var, reader: relax.Var, read) -> bool:
        if reader in self.begun:
            return False
        if is_attention(read):
            bias = [v for a in read.args[3:] for v in variables(a)]
            return reader in self.planes and var not in bias
        if _is_norm(read) or _is_of_heads(read):
            return reader in self.planes
        return super()._takes_planes(var, reader, read)

    def _reads(self, value: relax.Call) -> bool:
        if is_sparse(value):
            x = value.args[0]
            return x in self.planes and self._takes_planes(x, x, value)
        both = [a for a in value.args if a in self.begun or _is_norm(self.values.get(a))]
        return not both and super()._reads(value)

    def _rewritten(self, graph: Graph, var: relax.Var, value) -> relax.Expr:
        if var in self.begun:  # in rows; its copy is made where it is placed
            return graph.substitute(value)
        if var not in self.planes:
            return super()._rewritten(graph, var, value)
        if _is_of_heads(value):
            return self._planar(graph, value.args[0])
        if is_attention(value):
            planes = [self._planar(graph, a) for a in value.args[:3]]
            return attention_in_planes(
                value, [*planes, *(graph.substitute(a) for a in value.args[3:])]
            )
        if _is_norm(value):
            x, *scale = value.args
            operands = [self._planar(graph, x), *(graph.substitute(a) for a in scale)]
            if is_call(value, "relax.nn.rms_norm"):
                return relax.op.nn.rms_norm(*operands, axes=[1], epsilon=value.attrs.epsilon)
            a = value.attrs
            return relax.op.nn.layer_norm(
                *operands, axes=[1], epsilon=a.epsilon, center=a.center, scale=a.scale
            )
        return super()._rewritten(graph, var, value)

    def _planar(self, graph: Graph, expr: relax.Expr) -> relax.Expr:
        return self.planar[expr] if expr in self.planar else super()._planar(graph, expr)

    def _place(self, graph: Graph, var: relax.Var, new: relax.Var) -> None:
        if var in self.planes and var in self.begun:
            self.planar[var] = graph.bind(f"{var.name}_planes", rows_to_planes(new))
        elif var in self.planes and self._is_read_in_rows(var):
            self.planar[var] = new
            new = graph.bind(f"{var.name}_rows", planes_to_rows(new, shape_of(var)))
        super()._place(graph, var, new)
