# SPDX-License-Identifier: Apache-2.0
"""Give each named layer the operator of the family its recipe asks for, or record why not.

    rewrite: kerf.conv2d(x, w, name="l")  ->  kerf.sparse_conv2d(x, ..., name="l")   if the family takes layer l

Each family rewrites the graph that those before it in `families()` left. Where the user asked for pruning, a layer's weight
is pruned first, and only if its family takes it then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import tvm
from tvm import relax
from tvm.relax import PyExprMutator, expr_functor

from passes import families, family_named
from passes.family import Context, Family, Layer, Rewrite, Rewritten
from passes.layers import is_layer
from passes.treatment import Decision, Treatment
from schedules.errors import Declined, KerfError, UserError
from schedules.target import CpuTarget


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


def describe_graph(mod: tvm.IRModule) -> dict[str, dict]:
    """What every family sees in a canonical graph, merged, by layer."""
    found: dict[str, dict] = {}
    for each in families():
        if each.found_in is not None:
            for layer, facts in each.found_in(mod).items():
                found.setdefault(layer, {}).update(facts)
    return found


@dataclass(frozen=True)
class Treated:
    """What treating made of a graph.

    `reference` is what `treated` must compute, as a graph that numpy can evaluate: for families that change no values the
    dense graph with the weights that pruning leaves. Both are the graph given where nothing was changed. `decisions` has
    one entry per layer, in program order.
    """

    reference: tvm.IRModule
    treated: tvm.IRModule
    decisions: list[Decision]
    floats: tvm.IRModule | None = None  # see `Rewritten.floats`
    notes: tuple[str, ...] = ()  # see `Rewritten.notes`

    @property
    def changes_anything(self) -> bool:
        return any(d.treatment != "dense" for d in self.decisions)


def treat_layers(
    mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context
) -> Treated:
    """Treat every layer as asked, family by family. A layer that is declined keeps its operator and its weight, unless
    its treatment says what is asked for otherwise: then all layers are treated anew, so."""
    shown = describe_graph(mod)
    passed_on: dict[str, dict[str, str]] = {}
    now = dict(treatments)
    while True:
        found = _treat_once(mod, now, context)
        declined = {d.layer: d.declined for d in found.decisions if d.declined}
        further = {n: why for n, why in declined.items() if now[n].otherwise is not None}
        if not further:
            break
        for name, reason in further.items():
            passed_on.setdefault(name, {})[now[name].family] = reason
            now[name] = now[name].otherwise
    decisions = [
        replace(
            d, found={**d.found, **shown.get(d.layer, {})}, passed_on=passed_on.get(d.layer, {})
        )
        for d in found.decisions
    ]
    return replace(found, decisions=decisions)


def _treat_once(
    mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context
) -> Treated:
    """Every family's rewriting in turn, with what is asked first of each layer."""
    found = Treated(mod, mod, [decide(layer, Treatment()) for layer in layers_of(mod)])
    for family in families():
        asked = {n: t for n, t in treatments.items() if t.family == family.name}
        if family.rewrite is not None and asked:
            found = _rewrite_graph(found, family, asked, context)
    return found


def each_layer(treat: Callable[[Layer, Mapping, CpuTarget], relax.Expr | Declined]) -> Rewrite:
    """The rewriting of a family that looks at one layer at a time.

    `treat(layer, parameters, target)` returns what computes the layer instead, or why it stays as it is.
    """

    def rewrite(
        mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context
    ) -> Rewritten:
        decisions = []

        def take(call: relax.Call) -> relax.Expr:
            layer = Layer(call)
            if layer.name not in treatments:
                return call
            treatment = treatments[layer.name]
            outcome = treat(layer, treatment.parameters, context.target)
            declined = outcome.reason if isinstance(outcome, Declined) else None
            decisions.append(decide(layer, treatment, declined))
            return call if declined else outcome

        return Rewritten(rewrite_layers(mod, take), decisions)

    return rewrite


def decide(
    layer: Layer,
    treatment: Treatment,
    declined: str | None = None,
    *,
    found: Mapping | None = None,
    unit: str | None = None,
    pruned: bool = False,
) -> Decision:
    """The decision to do with a layer what was asked, or not to, for the reason `declined`; `found` is added to what its
    weight shows."""
    return Decision(
        layer=layer.name,
        operator=layer.operator,
        weight_shape=tuple(layer.weight.shape),
        asked=treatment.family,
        treatment="dense" if declined else treatment.family,
        declined=declined,
        found={**describe_weight(layer.weight), **(found or {})},
        parameters=dict(treatment.parameters),
        unit=unit,
        pruned=pruned,
    )


def _rewrite_graph(
    before: Treated, family: Family, asked: Mapping[str, Treatment], context: Context
) -> Treated:
    """One family's rewriting. Only layers that it takes, and whose zeros it makes use of, keep a pruned weight, so it may have
    to look twice."""
    keep = {name for name, treatment in asked.items() if treatment.prune}
    reasons: dict[str, str | None] = {}
    left: set[str] = set()
    while True:
        pruned = {name: asked[name] for name in keep}
        now = {name: replace(t, prune=name in keep) for name, t in asked.items()}
        seen = replace(context, left=frozenset(left))
        done = family.rewrite(_prune_layers(before.treated, pruned), now, seen)
        missing = set(asked) ^ {d.layer for d in done.decisions}
        if missing:
            raise KerfError(
                f"the family {family.name!r} did not decide", found=", ".join(sorted(missing))
            )
        refused = {d.layer: d.declined for d in done.decisions if d.treatment == "dense"}
        in_vain = {d.layer: d.found.get("zeros_unused") for d in done.decisions}
        refused |= {name: why for name, why in in_vain.items() if why}
        refused = {name: why for name, why in refused.items() if name in keep}
        if not refused:
            break
        # Without its pruned weight a layer declines for another reason than the one that counts.
        reasons |= refused
        left |= {d.layer for d in done.decisions if d.treatment == "dense" and d.layer in refused}
        keep -= reasons.keys()
    reference = done.reference
    if reference is None:
        reference = _prune_layers(before.reference, pruned)
    own = {d.layer: replace(d, pruned=d.pruned or d.layer in keep) for d in done.decisions}
    for name, reason in reasons.items():
        if own[name].treatment == "dense":
            own[name] = replace(own[name], declined=reason)
        else:
            found = {k: v for k, v in own[name].found.items() if k != "zeros_unused"}
            own[name] = replace(own[name], found={**found, "not_pruned": reason})
    decisions = [own.get(d.layer, d) for d in before.decisions]
    notes = (*before.notes, *done.notes)
    return Treated(reference, done.treated, decisions, done.floats or before.floats, notes)


def _prune_layers(mod: tvm.IRModule, treatments: Mapping[str, Treatment]) -> tvm.IRModule:
    """`mod` with the weights of these layers pruned as their treatments say."""
    if not treatments:
        return mod

    def prune(call: relax.Call) -> relax.Expr:
        layer = Layer(call)
        return _pruned(layer, treatments[layer.name]) if layer.name in treatments else call

    return rewrite_layers(mod, prune)


def _pruned(layer: Layer, treatment: Treatment) -> relax.Call:
    try:
        weight = family_named(treatment.family).prune(layer.weight, **treatment.parameters)
    except ValueError as error:
        raise UserError("cannot be pruned", where=f"layer {layer.name}", found=str(error)) from None
    call = layer.call
    return relax.Call(
        call.op, [call.args[0], relax.const(weight)], call.attrs, call.ty_args, ret_ty=call.ty
    )
