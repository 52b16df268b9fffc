# SPDX-License-Identifier: Apache-2.0
"""Give each named layer the operator of the family its recipe asks for, or record why not.

    rewrite: kerf.conv2d(x, w, name="l")  ->  kerf.sparse_conv2d(x, ..., name="l")   if the family takes layer l

Where the user asked for pruning, a layer's weight is pruned first, and only if its family takes it then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax import PyExprMutator, expr_functor

from passes import families, family_named
from passes.family import Layer
from passes.layers import CONV2D, DENSE, is_call, is_const
from passes.treatment import Decision, Treatment
from schedules.errors import Declined
from schedules.target import CpuTarget


def is_layer(call) -> bool:
    """Whether a call is a dense named layer with a constant weight: what a treatment may replace."""
    return (is_call(call, CONV2D) or is_call(call, DENSE)) and is_const(call.args[1])


@expr_functor.mutator
class _LayerMutator(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, rewrite: Callable[[relax.Call], relax.Expr]):
        super().__init__(mod)
        self.rewrite = rewrite

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        return self.rewrite(call) if is_layer(call) else call


def rewrite_layers(mod: tvm.IRModule, rewrite: Callable[[relax.Call], relax.Expr]) -> tvm.IRModule:
    """`mod` with every dense named layer replaced by `rewrite(call)`."""
    mutator = _LayerMutator(mod, rewrite)
    for gv, func in mod.functions_items():
        if isinstance(func, relax.Function):
            mutator.builder_.update_func(gv, mutator.visit_expr(func))
    return mutator.builder_.get()


def layers_of(mod: tvm.IRModule) -> list[Layer]:
    """The dense named layers of `main` in program order."""
    found = [b.value for block in mod["main"].body.blocks for b in block.bindings]
    return [Layer(call) for call in found if is_layer(call)]


def describe_weight(weight) -> dict:
    """What every family sees in a weight, merged."""
    found: dict = {}
    for each in families():
        if each.found is not None:
            found.update(each.found(weight))
    return found


@dataclass(frozen=True)
class Treated:
    """What treating made of a graph.

    `pruned` has the weights that pruning leaves and dense operators: what `treated` must compute. Both are the graph
    given where nothing was changed. `decisions` has one entry per layer, in program order.
    """

    pruned: tvm.IRModule
    treated: tvm.IRModule
    decisions: list[Decision]

    @property
    def changes_anything(self) -> bool:
        return any(d.treatment != "dense" for d in self.decisions)


def treat_layers(
    mod: tvm.IRModule, treatments: Mapping[str, Treatment], target: CpuTarget
) -> Treated:
    """Treat every layer as asked. A layer that its family declines keeps its operator and its weight."""
    decisions: list[Decision] = []

    def prune(call: relax.Call) -> relax.Expr:
        layer = Layer(call)
        treatment = treatments.get(layer.name, Treatment())
        candidate = _pruned(layer, treatment) if treatment.prune else call
        outcome = _treat(candidate, treatment, target)
        declined = outcome.reason if isinstance(outcome, Declined) else None
        kept = call if declined else candidate
        decisions.append(
            Decision(
                layer=layer.name,
                operator=layer.operator,
                weight_shape=tuple(layer.weight.shape),
                asked=treatment.family,
                treatment="dense" if declined else treatment.family,
                declined=declined,
                found=describe_weight(Layer(kept).weight),
                parameters=dict(treatment.parameters),
                pruned=kept is not call,
            )
        )
        return kept

    pruned = rewrite_layers(mod, prune)
    taken = iter(decisions)  # both rewrites see the layers in program order

    def treat(call: relax.Call) -> relax.Expr:
        if next(taken).treatment == "dense":
            return call
        return _treat(call, treatments[Layer(call).name], target)

    return Treated(pruned, rewrite_layers(pruned, treat), decisions)


def _pruned(layer: Layer, treatment: Treatment) -> relax.Call:
    weight = family_named(treatment.family).prune(layer.weight, **treatment.parameters)
    call = layer.call
    return relax.Call(
        call.op, [call.args[0], relax.const(weight)], call.attrs, call.ty_args, ret_ty=call.ty
    )


def _treat(call: relax.Call, treatment: Treatment, target: CpuTarget) -> relax.Expr | Declined:
    treat = family_named(treatment.family).treat
    return call if treat is None else treat(Layer(call), treatment.parameters, target)
