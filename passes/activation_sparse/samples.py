# SPDX-License-Identifier: Apache-2.0
"""Graphs whose activations are mostly zero, and one where they are not known to be."""

from __future__ import annotations

from tvm import relax

from passes.samples import Layers, Sample, graph
from passes.treatment import Treatment


def _mlp(activation):
    def body(layers: Layers, x):
        hidden = layers.emit(activation(layers.dense("fc1", x, 512, shift=-2.0)))
        return layers.dense("fc2", hidden, 128)

    return body


def samples() -> list[Sample]:
    """ReLU leaves zeros; a sigmoid leaves none."""
    asked = dict.fromkeys(("fc1", "fc2"), Treatment("activation_sparse", {"density": 0.03}))
    return [
        Sample("relu, one row", graph((1, 128), _mlp(relax.op.nn.relu)), asked),
        Sample("relu, rows", graph((5, 128), _mlp(relax.op.nn.relu)), asked),
        Sample("sigmoid", graph((1, 128), _mlp(relax.op.sigmoid)), asked, "."),
    ]
