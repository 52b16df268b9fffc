# SPDX-License-Identifier: Apache-2.0
"""An ONNX graph being imported: nodes, constants, static types and names."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

import numpy as np
import onnx

from compiler.frontend import Shape
from compiler.frontend.names import node_name
from passes.name_layers import Grid


@dataclass
class OnnxGraph:
    """`types` maps every value to (shape, numpy dtype); `names` maps constants to what the model calls them; `grids` weights
    that the model stores as integers to their scales."""

    where: str
    opsets: list
    nodes: list
    inputs: dict[str, tuple[Shape, np.dtype]]
    outputs: list[str]
    constants: dict[str, np.ndarray]
    names: dict[str, str] = field(default_factory=dict)
    types: dict[str, tuple[Shape, np.dtype]] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        return next((o.version for o in self.opsets if o.domain in ("", "ai.onnx")), 1)


def scope_of(node: onnx.NodeProto) -> str:
    """The module a node was exported from, else the node's own name."""
    properties = {p.key: p.value for p in node.metadata_props}
    try:
        scopes = ast.literal_eval(properties.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        scopes = []
    path = next((s for s in reversed(scopes[:-1]) if s), "") if isinstance(scopes, list) else ""
    return path or node_name(node.name)
