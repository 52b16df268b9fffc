# SPDX-License-Identifier: Apache-2.0
"""Lower every operator to te: the families' own by their lowerings, the rest by TVM's.

    rewrite: y = kerf.conv2d(x, w)  ->  y = call_tir(conv3x3, (x, packed w))

Requires channels-last layout and constants folded. Ensures that no `kerf.*` operator is left.
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm import relax
from tvm.relax import PyExprMutator, expr_functor

from passes.family import Lowering
from schedules.target import CpuTarget


@expr_functor.mutator
class _Lowerer(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, lowerings: Mapping[str, Lowering], target: CpuTarget):
        super().__init__(mod)
        self.lowerings, self.target = lowerings, target

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        lowering = self.lowerings.get(call.op.name) if isinstance(call.op, tvm.ir.Op) else None
        if lowering is None:
            return call
        lowered = lowering(self.builder_, call, self.target)
        return call if lowered is None else lowered


@tvm.transform.module_pass(opt_level=0, name="kerf.LowerOperators")
class LowerOperators:
    """Apply `{operator: lowering}`; a lowering may return None to leave the call to TVM's legalisation."""

    def __init__(self, lowerings: Mapping[str, Lowering], target: CpuTarget):
        self.lowerings, self.target = lowerings, target

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        lowerer = _Lowerer(mod, self.lowerings, self.target)
        for gv, func in mod.functions_items():
            if isinstance(func, relax.Function):
                lowerer.builder_.update_func(gv, relax.analysis.remove_all_unused(lowerer.visit_expr(func)))
        return relax.transform.LegalizeOps()(lowerer.builder_.get())


def call_te(bb: relax.BlockBuilder, define, *args, hint: str) -> relax.Expr:
    """`bb.call_te` of an anchor operator: consumers may fuse into it, producers may not."""
    return bb.call_te(define, *args, primfunc_name_hint=hint, primfunc_attrs={"op_pattern": 4})
