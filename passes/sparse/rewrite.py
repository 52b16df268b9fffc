# SPDX-License-Identifier: Apache-2.0
"""Weight sparsity on a whole graph: dead filters leave first, then each layer's zeros are used or left alone.

rewrite: a graph with zeros  ->  kerf.RemoveDeadFilters  ->  kerf.sparse_conv2d, kerf.sparse_dense where they pay
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import replace

import numpy as np
import tvm
from tvm import relax

from passes.channel_slots import ChannelSlots
from passes.family import Context, Layer, Rewritten
from passes.layers import attrs_of, is_layer
from passes.remove_dead_filters import LayerChannels, block_vars, compact
from passes.rewriting import bindings_of
from passes.sparse.format import ELEMENT, best_grain, block_of
from passes.sparse.grains import Grain
from passes.sparse.prune import one_is_kept
from passes.sparse.prune_filters import prune_filters
from passes.sparse.treat import treat
from passes.treat_layers import decide, layers_of, rewrite_layers
from passes.treatment import Decision, Treatment
from schedules.errors import Declined


def rewrite(mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context) -> Rewritten:
    """See `Family.rewrite`. A layer that lost channels counts as taken, even where what is left of it is dense. One that was
    pruned at a grain that does not take channels must have been worth taking before it lost them.

    A layer is judged alone first: what its neighbours lose may depend on prunings that are yet to be refused. Refused, it
    would be the whole dense layer again, not what is left of it.
    """
    densities = {
        name: t.parameters["density"]
        for name, t in treatments.items()
        if t.prune and t.parameters.get("grain") == "filter"
    }
    mod = prune_filters(mod, densities) if densities else mod
    asked = [layer for layer in layers_of(mod) if layer.name in treatments]
    outcomes = {a.name: treat(a, treatments[a.name].parameters, context.target) for a in asked}
    blocks = {a.name: size for a in asked if (size := _filters_at_once(a, outcomes[a.name])) > 1}
    compacted, channels = compact(mod, blocks)
    refused = {
        name
        for name, outcome in outcomes.items()
        if isinstance(outcome, Declined) and not smaller_as_asked(treatments[name], channels[name])
    }
    settled = not any(treatments[name].prune for name in refused)

    def take(call: relax.Call) -> relax.Expr:
        layer = Layer(call)
        if layer.name not in treatments or layer.name in refused:
            return call
        outcome = treat(layer, treatments[layer.name].parameters, context.target)
        if settled:
            outcomes[layer.name] = outcome
        return call if isinstance(outcome, Declined) else outcome

    treated = rewrite_layers(compacted, take)
    smaller = {a.name for a in asked if a.name not in refused and channels[a.name].changed}
    decisions = [
        _decision(
            layer,
            treatments[layer.name],
            outcomes[layer.name],
            channels[layer.name],
            layer.name in smaller,
        )
        for layer in asked
    ]
    units = units_of(mod, smaller, blocks) if smaller else {}
    decisions = [replace(d, unit=units.get(d.layer)) for d in decisions]
    return Rewritten(treated, decisions, reference=mod if densities else None)


def _filters_at_once(layer: Layer, outcome: relax.Call | Declined) -> int:
    """How many neighbouring filters of a layer may only leave together, since its zeros lie in blocks of as many that one
    filter less would shift. Zeros that all filters have in the same places shift nothing."""
    if isinstance(outcome, Declined):
        return 1
    nonzero = layer.weight != 0
    return block_of(attrs_of(outcome)["grain"]) if np.any(nonzero != nonzero[:1]) else 1


def smaller_as_asked(treatment: Treatment, channels: LayerChannels) -> bool:
    """Whether a layer lost channels on either side, and was meant to."""
    pruned_otherwise = treatment.prune and treatment.parameters.get("grain") not in (
        "filter",
        "channel",
    )
    return channels.changed and not pruned_otherwise


def units_of(mod: tvm.IRModule, names: Set[str], blocks: Mapping[str, int]) -> dict[str, str]:
    """The unit of each of these layers: what one of them loses, its neighbours gain, so those that lose the same channels
    are timed and kept together, under the name of the first. Layers on their own have none."""
    slots = ChannelSlots(mod["main"])
    going = slots.removable(block_vars(mod["main"], blocks))
    unit = {name: name for name in names}
    owner: dict[int, str] = {}
    for binding in bindings_of(mod["main"]):
        if not is_layer(binding.value) or Layer(binding.value).name not in names:
            continue
        name = Layer(binding.value).name
        for tensor in (binding.value.args[0], binding.var):
            found = slots.channels.get(tensor)
            lost = [] if found is None else np.unique(slots.roots(found.slots[going[found.slots]]))
            for slot in lost:
                before, now = unit[owner.setdefault(int(slot), name)], unit[name]
                unit = {n: before if u == now else u for n, u in unit.items()}
    return {n: u for n, u in unit.items() if sum(u == other for other in unit.values()) > 1}


def _decision(
    layer: Layer,
    treatment: Treatment,
    outcome: relax.Call | Declined,
    channels: LayerChannels,
    smaller: bool,
) -> Decision:
    taken = not isinstance(outcome, Declined) or smaller
    decision = decide(layer, treatment, None if taken else outcome.reason)
    facts, declined = dict(decision.found), decision.declined
    if isinstance(outcome, relax.Call):
        facts |= _packed(layer, attrs_of(outcome)["grain"])
    if treatment.prune and (note := _nearly_empty(layer, treatment)):
        facts["one_grain_kept"] = note
    if channels.changed:
        facts |= {"inputs": list(channels.inputs), "outputs": list(channels.outputs)}
    if channels.reason:
        facts["dead_filters_stay"] = channels.reason
        if declined and "filter" in (facts.get("grain"), treatment.parameters.get("grain")):
            declined = f"its dead filters stay: {channels.reason}"
    return replace(decision, found=facts, declined=declined)


def _packed(layer: Layer, runs_as: str) -> dict:
    """What packing adds where the grain does not fit the channels: a block never straddles two groups of a convolution, so
    it is stored finer; the last block is padded."""
    facts: dict = {}
    if layer.attrs.get("groups", 1) > 1 and runs_as != best_grain(layer.weight):
        facts["runs_as"] = runs_as
    if padded := -len(layer.weight) % block_of(runs_as):
        facts["padded_outputs"] = padded
    return facts


def _nearly_empty(layer: Layer, treatment: Treatment) -> str | None:
    grain, density = (
        Grain.parse(treatment.parameters.get("grain", ELEMENT)),
        treatment.parameters.get("density"),
    )
    grains = math.prod(grain.grid(layer.weight.shape))
    if grain.of or density is None or round(density * grains) >= 1:
        return None
    return one_is_kept(grain, grains, density)
