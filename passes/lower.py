# SPDX-License-Identifier: Apache-2.0
"""Lower every operator to te: the families' own by their lowerings, the rest by TVM's.

    rewrite: y = kerf.conv2d(x, w)  ->  y = call_tir(conv3x3, (x, packed w))

Requires channels-last layout and constants folded. Ensures that no `kerf.*` operator is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax import PyExprMutator, expr_functor

from passes.family import LoweredCall, Lowering
from passes.hoist_constants import handle_of
from passes.layers import is_const, layers_computed_by
from schedules.preparation import Source
from schedules.target import CpuTarget

_INDICES = "kerf.indices"  # attribute of a PrimFunc: which of its parameters are


@dataclass(frozen=True)
class Lowered:
    """The lowered module, the layers that each packed constant belongs to, by `handle_of(constant)`, the handles of
    those that say where values are, not what they are, and what some of them are made of."""

    mod: tvm.IRModule
    layers_of: dict[int, tuple[str, ...]]
    indices: frozenset[int]
    sources: dict[int, Source]


@expr_functor.mutator
class _Lowerer(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, lowerings: Mapping[str, Lowering], target: CpuTarget):
        super().__init__(mod)
        self.lowerings, self.target = lowerings, target
        self.layers_of: dict[int, tuple[str, ...]] = {}
        self.indices: set[int] = set()
        self.sources: dict[int, Source] = {}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        lowering = self.lowerings.get(call.op.name) if isinstance(call.op, tvm.ir.Op) else None
        if lowering is None:
            return call
        lowered = lowering(self.builder_, call, self.target)
        if lowered is None:
            return call
        if isinstance(lowered, LoweredCall):
            self.sources.update(lowered.sources)
            lowered = lowered.call
        if layers_computed_by(call):
            self._claim(lowered, layers_computed_by(call), list(call.args))
        return lowered

    def _claim(self, expr: relax.Expr, layers: tuple[str, ...], outside: list) -> None:
        """Every constant under `expr`, through what the lowering emitted, belongs to `layers`."""
        if any(expr.same_as(a) for a in outside):
            return
        if is_const(expr):
            self.layers_of[handle_of(expr)] = layers
        elif isinstance(expr, relax.Tuple):
            for field in expr.fields:
                self._claim(field, layers, outside)
        elif isinstance(expr, relax.Call):
            self.indices.update(handle_of(arg) for arg in self._index_arguments(expr))
            for arg in expr.args:
                self._claim(arg, layers, outside)
        elif isinstance(expr, relax.Var):
            bound = self.lookup_binding(expr)
            if isinstance(bound, relax.Call):
                self._claim(bound, layers, outside)

    def _index_arguments(self, call: relax.Call) -> list[relax.Expr]:
        """Those arguments of a `call_te` result that its `indices` named."""
        if not (call.args and isinstance(call.args[0], tvm.ir.GlobalVar)):
            return []
        attrs = self.builder_.get()[call.args[0]].attrs
        positions = attrs[_INDICES] if attrs is not None and _INDICES in attrs.keys() else ()
        return [call.args[1].fields[int(i)] for i in positions]


def lower_operators(
    mod: tvm.IRModule, lowerings: Mapping[str, Lowering], target: CpuTarget
) -> Lowered:
    """Apply `{operator: lowering}`, then TVM's legalisation; a lowering may return None to leave its call to the latter."""
    lowerer = _Lowerer(mod, lowerings, target)
    for gv, func in mod.functions_items():
        if isinstance(func, relax.Function):
            lowerer.builder_.update_func(
                gv, relax.analysis.remove_all_unused(lowerer.visit_expr(func))
            )
    legal = relax.transform.LegalizeOps()(lowerer.builder_.get())
    return Lowered(legal, lowerer.layers_of, frozenset(lowerer.indices), lowerer.sources)


def call_te(
    bb: relax.BlockBuilder, define, *args, hint: str, indices: Sequence[int] = ()
) -> relax.Expr:
    """`bb.call_te` of an anchor operator: consumers may fuse into it, producers may not.

    `indices` are the positions in `args` of constants that say where values are: the overhead of a sparse format.
    """
    attrs = {"op_pattern": 4, **({_INDICES: list(indices)} if indices else {})}
    return bb.call_te(define, *args, primfunc_name_hint=hint, primfunc_attrs=attrs)
