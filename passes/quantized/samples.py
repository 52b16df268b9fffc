# SPDX-License-Identifier: Apache-2.0
"""Graphs that int8 takes or declines."""

from __future__ import annotations

from tvm import relax

from passes.samples import Layers, Sample, graph
from passes.treatment import Treatment


def _residual(layers: Layers, x):
    y = layers.emit(relax.op.nn.relu(layers.conv2d("a", x, 32)))
    y = layers.emit(relax.op.add(layers.conv2d("b", y, 32), layers.emit(relax.op.nn.relu(x))))
    y = layers.emit(relax.op.mean(layers.emit(relax.op.nn.relu(y)), axis=[2, 3]))
    return layers.dense("head", y, 10)


def _zero(layers: Layers, x):
    return layers.dense(
        "a", x, 16, weight=relax.const(layers.rng.standard_normal((16, 24)).astype("float32") * 0)
    )


def samples() -> list[Sample]:
    """A residual block with a head, pruned as well; a layer without anything to scale."""
    plain = Treatment("int8")
    pruned = Treatment("int8", {"grain": "in:4", "density": 0.25}, prune=True)
    network = graph((1, 32, 9, 9), _residual)
    return [
        Sample("residual", network, dict.fromkeys(("a", "b", "head"), plain)),
        Sample("pruned", network, {"a": pruned, "b": pruned}),
        Sample("zero", graph((5, 24), _zero), {"a": plain}, "zero"),
    ]
