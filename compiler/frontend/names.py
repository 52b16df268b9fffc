# SPDX-License-Identifier: Apache-2.0
"""Layer names: what a weight's owner is called in the model."""

from __future__ import annotations

import re

_TRANSPARENT = re.compile(
    r"\.(weight|kernel|weight_(orig|mask|g|v)|parametrizations\.weight\.original[01]?)$"
)
_ANONYMOUS = re.compile(r"onnx::.*|_?val_\d+|_?const(ant)?_?\d*|t_\d+|\d+")


def layer_name(parameter: str) -> str:
    """`layer1.0.conv1.weight` -> `layer1.0.conv1`; a parameter called otherwise (`lstm.weight_hh_l0`) keeps its name.

    A parametrised weight (`conv.parametrizations.weight.original0`) is its layer's too, and so are the parts of one that
    `torch.nn.utils.prune` masks (`conv.weight_mask`) or `torch.nn.utils.weight_norm` divides.
    """
    return _TRANSPARENT.sub("", parameter) or parameter


def is_anonymous(name: str) -> bool:
    """Whether an exporter made the name up (`onnx::MatMul_17`, `val_3`), so that it says nothing about the model."""
    return not name or _ANONYMOUS.fullmatch(name) is not None


def node_name(name: str) -> str:
    """`/encoder/layer.0/query/MatMul` -> `encoder.layer.0.query`; a name without a path stays."""
    if not name.startswith("/"):
        return name
    parts = name.strip("/").split("/")
    return ".".join(parts[:-1] or parts)
