# SPDX-License-Identifier: Apache-2.0
"""Prune whole filters where they can leave the network: the channels that a residual sum couples are pruned together.

    rewrite: kerf.conv2d(x, w, name) + b  ->  kerf.conv2d(x, w', name) + b', filters o of w' and entries o of b' zero
    requires: NCHW, constants folded, batch norm folded
    ensures: every filter that became zero is one that kerf.RemoveDeadFilters removes

A filter's saliency is the sum of its magnitudes over their mean in its layer, summed over the layers that share the channel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import tvm
from tvm import relax

from passes.channel_slots import ChannelSlots
from passes.family import Layer
from passes.layers import const_array, is_call, is_const, is_layer
from passes.rewriting import Graph, bindings_of, constant, rewrite_function, rewrite_module
from passes.sparse.prune import most_salient, saliency
from passes.treat_layers import rewrite_layers


def prune_filters(mod: tvm.IRModule, densities: Mapping[str, float]) -> tvm.IRModule:
    """`mod` with all but the share `densities[layer]` of the most salient filters of these layers zero, bias and all.

    Channels that other layers share, or that are pinned, stay. At least one filter of a layer stays.
    """
    stuck: set[int] = set()
    while True:
        slots = ChannelSlots(mod["main"])
        layers = layer_classes(mod, slots)
        scores = {n: (saliency(w, "filter").reshape(-1), roots) for n, (w, roots) in layers.items()}
        pinned = {slots.root(slot) for slot in slots.pinned}
        dropped = least_salient(scores, densities, pinned | stuck)
        filters = {name: np.isin(roots, list(dropped)) for name, (_, roots) in layers.items()}
        pruned = _without(mod, filters)
        # The structure is the same, so slots have the same numbers.
        after = ChannelSlots(pruned["main"])
        removable = after.removable()
        left = {root for root in dropped if not removable[root]}
        if not left:
            return pruned
        stuck |= left


def layer_classes(
    mod: tvm.IRModule, slots: ChannelSlots
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weight and classes of the output channels of every layer, by name."""
    return {
        Layer(b.value).name: (Layer(b.value).weight, slots.roots(slots.channels[b.var].slots))
        for b in bindings_of(mod["main"])
        if is_layer(b.value)
    }


def least_salient(
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]],
    densities: Mapping[str, float],
    pinned: Collection[int],
) -> set[int]:
    """Classes to prune, of `layers`: saliency and class of each output channel, by name.

    Of the classes that the same layers share, all but the largest density that any of these asks for. A class goes only
    if every layer that has it has a density. Raises ValueError for NaN saliency.
    """
    members: dict[int, set[str]] = {}
    scores: dict[int, float] = {}
    for name, (own, roots) in layers.items():
        if np.isnan(own).any():
            raise ValueError(f"layer {name}: NaN weights have no magnitude to prune by")
        for root, score in zip(roots, own / max(own.mean(), np.finfo(float).tiny)):
            members.setdefault(int(root), set()).add(name)
            scores[int(root)] = scores.get(int(root), 0.0) + score
    groups: dict[frozenset[str], list[int]] = {}
    for root, names in members.items():
        if names <= densities.keys():
            groups.setdefault(frozenset(names), []).append(root)
    dropped: set[int] = set()
    for names, roots in groups.items():
        kept = most_salient(np.array([scores[r] for r in roots]), max(densities[n] for n in names))
        dropped |= {r for r, keep in zip(roots, kept) if not keep}
    return dropped - set(pinned)


def _without(mod: tvm.IRModule, filters: Mapping[str, np.ndarray]) -> tvm.IRModule:
    """`mod` with these filters (bool by output channel) of its layers, and their entries of the biases, zero."""

    def weights(call: relax.Call) -> relax.Expr:
        layer = Layer(call)
        gone = filters[layer.name]
        if not gone.any():
            return call
        weight = layer.weight.copy()
        weight[gone] = 0
        args = [call.args[0], constant(weight)]
        return relax.Call(call.op, args, call.attrs, call.ty_args, ret_ty=call.ty)

    def biases(value: relax.Expr, graph: Graph) -> relax.Expr | None:
        if not is_call(value, "relax.add") or not is_const(value.args[1]):
            return None
        layer = graph.definition(value.args[0])
        if layer is None or not is_layer(layer):
            return None
        gone, bias = filters[Layer(layer).name], const_array(value.args[1])
        axis = bias.ndim - (1 if Layer(layer).weight.ndim == 2 else 3)
        if axis < 0 or bias.shape[axis] != len(gone):
            return None
        here = gone.reshape([-1 if a == axis else 1 for a in range(bias.ndim)])
        if not bias[np.broadcast_to(here, bias.shape)].any():
            return None
        return relax.op.add(value.args[0], constant(np.where(here, bias.dtype.type(0), bias)))

    return rewrite_module(
        rewrite_layers(mod, weights), lambda func: rewrite_function(func, [biases])
    )
