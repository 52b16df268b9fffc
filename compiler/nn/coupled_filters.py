# SPDX-License-Identifier: Apache-2.0
"""Which filters of a torch network must go together, found by importing it as the compiler does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)


@dataclass(frozen=True)
class FilterCoupling:
    """`classes`: by layer, the class of each output channel; `pinned` classes stay. `norms`: by layer, the norm that reads it."""

    classes: Mapping[str, np.ndarray]
    pinned: frozenset[int]
    norms: Mapping[str, str]

    @staticmethod
    def of(model: nn.Module, example: tuple) -> FilterCoupling:
        """The coupling of a model on example inputs. Loads TVM; raises what importing the model raises."""
        from compiler.frontend import import_model
        from compiler.pipeline import canonicalize
        from passes.channel_slots import ChannelSlots
        from passes.sparse.prune_filters import layer_classes

        training = model.training
        try:
            imported = import_model(model.eval(), example=example)
            norms = norms_behind(model, example)
        finally:
            model.train(training)
        mod = canonicalize(imported.mod)
        slots = ChannelSlots(mod["main"])
        classes = {name: roots for name, (_, roots) in layer_classes(mod, slots).items()}
        pinned = frozenset(slots.root(slot) for slot in slots.pinned)
        return FilterCoupling(classes, pinned, norms)

    def keep(
        self, scores: Mapping[str, np.ndarray], densities: Mapping[str, float]
    ) -> dict[str, np.ndarray]:
        """bool [O] by layer: the filters to keep of those layers that have densities."""
        from passes.sparse.prune_filters import least_salient

        known = {n: (s, self.classes[n]) for n, s in scores.items() if n in self.classes}
        # A class that a layer without a score shares cannot be pruned.
        others = {int(r) for n, roots in self.classes.items() if n not in scores for r in roots}
        dropped = least_salient(known, densities, self.pinned | others)
        whole = {n: np.ones(len(s), bool) for n, s in scores.items()}
        return whole | {n: ~np.isin(roots, list(dropped)) for n, (_, roots) in known.items()}

    @torch.no_grad()
    def silence(self, model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        """Zero the bias, and the scale and shift of the norm, behind every filter that is masked as a whole."""
        modules = dict(model.named_modules())
        for name, mask in masks.items():
            dead = ~mask.reshape(len(mask), -1).any(dim=1)
            behind = [modules[name].bias]
            if name in self.norms:
                norm = modules[self.norms[name]]
                behind += [norm.weight, norm.bias]
            for parameter in behind:
                if parameter is not None:
                    parameter.masked_fill_(dead, 0)


def norms_behind(model: nn.Module, example: tuple) -> dict[str, str]:
    """By layer, the normalisation that reads its output directly, seen in one run of the model."""
    produced: list[
        tuple[torch.Tensor, str]
    ] = []  # tensors are kept, so that no other takes their place
    found: dict[str, str] = {}
    handles = []

    def after(name):
        return lambda _m, _args, output: produced.append((output, name))

    def before(name):
        def look(_module, args):
            found.update({p: name for tensor, p in produced if tensor is args[0]})

        return look

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv1d)):
            handles.append(module.register_forward_hook(after(name)))
        elif isinstance(module, _NORMS) and module.affine:
            handles.append(module.register_forward_pre_hook(before(name)))
    try:
        with torch.no_grad():
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return found
