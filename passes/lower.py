# SPDX-License-Identifier: Apache-2.0
"""Lower every operator to te: the families' own by their lowerings, the rest by TVM's.

    rewrite: y = kerf.conv2d(x, w)  ->  y = call_tir(conv3x3, (x, packed w))

Requires channels-last layout and constants folded. Ensures that no `kerf.*` operator is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax import PyExprMutator, expr_functor

from passes.family import Lowering
from passes.hoist_constants import handle_of
from passes.layers import is_const, layers_computed_by
from schedules.target import CpuTarget


@dataclass(frozen=True)
class Lowered:
    """The lowered module, and the layers that each packed constant belongs to, by `handle_of(constant)`."""

    mod: tvm.IRModule
    layers_of: dict[int, tuple[str, ...]]


@expr_functor.mutator
class _Lowerer(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, lowerings: Mapping[str, Lowering], target: CpuTarget):
        super().__init__(mod)
        self.lowerings, self.target = lowerings, target
        self.layers_of: dict[int, tuple[str, ...]] = {}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        lowering = self.lowerings.get(call.op.name) if isinstance(call.op, tvm.ir.Op) else None
        if lowering is None:
            return call
        lowered = lowering(self.builder_, call, self.target)
        if lowered is None:
            return call
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
            for arg in expr.args:
                self._claim(arg, layers, outside)
        elif isinstance(expr, relax.Var):
            bound = self.lookup_binding(expr)
            if isinstance(bound, relax.Call):
                self._claim(bound, layers, outside)


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
    return Lowered(relax.transform.LegalizeOps()(lowerer.builder_.get()), lowerer.layers_of)


def call_te(bb: relax.BlockBuilder, define, *args, hint: str) -> relax.Expr:
    """`bb.call_te` of an anchor operator: consumers may fuse into it, producers may not."""
    return bb.call_te(define, *args, primfunc_name_hint=hint, primfunc_attrs={"op_pattern": 4})
