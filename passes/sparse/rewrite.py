# SPDX-License-Identifier: Apache-2.0
"""Weight sparsity on a whole graph: dead filters leave first, then each layer's zeros are used or left alone.

rewrite: a graph with zeros  ->  kerf.RemoveDeadFilters  ->  kerf.sparse_conv2d, kerf.sparse_dense where they pay
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm import relax

from passes.family import Context, Layer, Rewritten
from passes.remove_dead_filters import LayerChannels, compact
from passes.sparse.detect import found
from passes.sparse.prune_filters import prune_filters
from passes.sparse.treat import treat
from passes.treat_layers import layers_of, rewrite_layers
from passes.treatment import Decision, Treatment
from schedules.errors import Declined


def rewrite(mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context) -> Rewritten:
    """See `Family.rewrite`. A layer that lost output channels counts as taken, even where what is left of it is dense, if
    that is what was asked, or if its zeros were there already: pruning at another grain has to pay for itself.

    A layer is judged alone first: what its neighbours lose may depend on prunings that are yet to be refused.
    """
    densities = {
        name: t.parameters["density"]
        for name, t in treatments.items()
        if t.prune and t.parameters.get("grain") == "filter"
    }
    mod = prune_filters(mod, densities) if densities else mod
    compacted, channels = compact(mod)
    asked = [layer for layer in layers_of(mod) if layer.name in treatments]
    outcomes = {a.name: treat(a, treatments[a.name].parameters, context.target) for a in asked}
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
    decisions = [
        _decision(layer, treatments[layer.name], outcomes[layer.name], channels[layer.name])
        for layer in asked
    ]
    return Rewritten(treated, decisions, reference=mod if densities else None)


def smaller_as_asked(treatment: Treatment, channels: LayerChannels) -> bool:
    """Whether a layer lost channels, and was meant to."""
    grain = treatment.parameters.get("grain")
    if treatment.prune and grain not in ("filter", "channel"):
        return False
    before, after = channels.inputs if grain == "channel" else channels.outputs
    return after < before


def _decision(
    layer: Layer, treatment: Treatment, outcome: relax.Call | Declined, channels: LayerChannels
) -> Decision:
    taken = not isinstance(outcome, Declined) or smaller_as_asked(treatment, channels)
    facts = dict(found(layer.weight))
    if channels.changed:
        facts |= {"inputs": list(channels.inputs), "outputs": list(channels.outputs)}
    declined = None if taken else outcome.reason
    if channels.reason:
        facts["dead_filters_stay"] = channels.reason
        if declined is not None and facts["grain"] == "filter":
            declined = f"its dead filters stay: {channels.reason}"
    return Decision(
        layer=layer.name,
        operator=layer.operator,
        weight_shape=tuple(layer.weight.shape),
        asked=treatment.family,
        treatment="sparse" if taken else "dense",
        declined=declined,
        found=facts,
        parameters=dict(treatment.parameters),
    )
