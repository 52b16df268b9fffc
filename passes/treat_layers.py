# SPDX-License-Identifier: Apache-2.0
"""Give each named layer the operator of the family its recipe asks for, or record why not.

    rewrite: kerf.conv2d(x, w, name="l")  ->  kerf.sparse_conv2d(x, ..., name="l")   if the family takes layer l

`prune_layers` comes first and changes weights, only where the user asked for it; `treat_layers` changes none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tvm
from tvm import relax
from tvm.relax import PyExprMutator, expr_functor

from passes import families, family_named
from passes.family import Layer
from passes.layers import CONV2D, DENSE, const_array, is_call, is_const
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


def prune_layers(mod: tvm.IRModule, treatments: Mapping[str, Treatment]) -> tvm.IRModule:
    """Give each layer whose treatment says `prune` the weight that its family's `prune` makes of it."""

    def rewrite(call: relax.Call) -> relax.Expr:
        treatment = treatments.get(Layer(call).name)
        if treatment is None or not treatment.prune:
            return call
        prune = family_named(treatment.family).prune
        if prune is None:
            return call
        weight = prune(const_array(call.args[1]), **treatment.parameters)
        return relax.Call(call.op, [call.args[0], relax.const(weight)], attrs=call.attrs)

    return rewrite_layers(mod, rewrite)


def describe_weight(weight) -> dict:
    """What every family sees in a weight, merged."""
    found: dict = {}
    for each in families():
        if each.found is not None:
            found.update(each.found(weight))
    return found


def treat_layers(
    mod: tvm.IRModule, treatments: Mapping[str, Treatment], target: CpuTarget
) -> tuple[tvm.IRModule, list[Decision]]:
    """The treated module and one decision per layer, in program order."""
    decisions: list[Decision] = []

    def rewrite(call: relax.Call) -> relax.Expr:
        layer = Layer(call)
        treatment = treatments.get(layer.name, Treatment())
        outcome = call
        if (treat := family_named(treatment.family).treat) is not None:
            outcome = treat(layer, treatment.parameters, target)
        declined = outcome.reason if isinstance(outcome, Declined) else None
        decisions.append(
            Decision(
                layer=layer.name,
                operator=layer.operator,
                weight_shape=tuple(layer.weight.shape),
                asked=treatment.family,
                treatment="dense" if declined else treatment.family,
                declined=declined,
                found=describe_weight(layer.weight),
                parameters=dict(treatment.parameters),
                pruned=treatment.prune,
            )
        )
        return call if declined else outcome

    return rewrite_layers(mod, rewrite), decisions
