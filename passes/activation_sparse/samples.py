# SPDX-License-Identifier: Apache-2.0
"""Graphs whose activations are mostly zero, and one where they are not known to be."""

from __future__ import annotations

from tvm import relax

from passes.samples import Layers, Sample, graph
from passes.treatment import Treatment


def _mlp(activation, shift: float = -2.0):
    def body(layers: Layers, x):
        hidden = layers.emit(activation(layers.dense("fc1", x, 512, shift=shift)))
        return layers.dense("fc2", hidden, 128)

    return body


def _gated(layers: Layers, x):
    gate = layers.emit(relax.op.nn.relu(layers.dense("gate", x, 300, shift=-2.0)))
    hidden = layers.emit(relax.op.multiply(layers.dense("up", x, 300), gate))
    return layers.dense("down", hidden, 70)


def samples() -> list[Sample]:
    """ReLU leaves zeros, with or without a gate; GELU does below a threshold; a sigmoid leaves none."""
    asked = dict.fromkeys(("fc1", "fc2"), Treatment("activation_sparse", {"density": 0.03}))
    gate = dict.fromkeys(("gate", "up", "down"), Treatment("activation_sparse", {"density": 0.03}))
    cut = dict.fromkeys(("fc1", "fc2"), Treatment("activation_sparse", {"threshold_error": 0.3}))

    def in_bytes(*layers: str) -> dict[str, Treatment]:
        parameters = {"density": 0.03, "weights": "int8"}
        return dict.fromkeys(layers, Treatment("activation_sparse", parameters))

    return [
        Sample("relu, one row", graph((1, 128), _mlp(relax.op.nn.relu)), asked),
        Sample("relu, rows", graph((5, 128), _mlp(relax.op.nn.relu, -3.5)), asked),
        Sample("gate", graph((1, 90), _gated), gate),
        Sample("relu, int8", graph((1, 128), _mlp(relax.op.nn.relu)), in_bytes("fc1", "fc2")),
        Sample("gate, int8", graph((1, 90), _gated), in_bytes("gate", "up", "down")),
        Sample("gelu, cut", graph((1, 128), _mlp(relax.op.nn.gelu)), cut),
        Sample("sigmoid", graph((1, 128), _mlp(relax.op.sigmoid)), asked, "."),
    ]
