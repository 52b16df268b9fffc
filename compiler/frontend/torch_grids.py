# SPDX-License-Identifier: Apache-2.0
"""The integer weights of a program that torch's PT2E flow has quantized: their scales and their names."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from passes.name_layers import Grid

_DEQUANTIZE = re.compile(r"dequantize_per_(tensor|channel)\.\w+")
# What convert_pt2e calls weights that it has quantized.
_FROZEN = re.compile(r"_frozen_param\d+")


def is_dequantize(node: fx.Node) -> bool:
    return _DEQUANTIZE.fullmatch(getattr(node.target, "__name__", "")) is not None


def grid_of(node: fx.Node, constants: dict[fx.Node, Any]) -> Grid | None:
    """The scales of a weight that `node`, a dequantization of constants, computes; None where they are no float32 numbers."""
    scale = node.args[1]
    scale = constants.get(scale) if isinstance(scale, fx.Node) else torch.tensor(scale)
    if not isinstance(scale, torch.Tensor) or not bool((scale > 0).all()):
        return None
    array = scale.detach().reshape(-1).to(torch.float32).numpy()
    return Grid(array, int(node.args[3]) if "per_channel" in node.target.__name__ else None)


def weight_name(node: fx.Node, name: str, names: dict[fx.Node, str]) -> str:
    """A frozen weight's layer, known from its bias, else by the module that calls it."""
    if not _FROZEN.fullmatch(name):
        return name
    for user in node.users:
        bias = user.args[2] if len(user.args) > 2 else None
        if isinstance(bias, fx.Node) and names.get(bias, "").endswith(".bias"):
            return names[bias].removesuffix(".bias")
        stack = user.meta.get("nn_module_stack") or {}
        path = next((str(p) for p, _ in reversed(stack.values()) if p), "")
        if path:
            return path.removeprefix("L['self'].")
    return name
