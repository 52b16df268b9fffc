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


def sparse_samples() -> list[Sample]:
    """Both kernels for convolutions (panel rows and padded planes), products, groups, channels that are no multiple of 4."""
    around = (1, 1, 1, 1)
    return [
        _conv((1, 7, 7, 32), (32, 32, 3, 3), 7, padding=around, grain="in:4", density=0.3),
        _conv((1, 7, 7, 32), (64, 32, 3, 3), 7, padding=around, grain="block:4x4", density=0.3),
        _conv(
            (2, 9, 5, 20), (24, 20, 3, 3), 131, (2, 2), (1, 0, 2, 1), grain="block:8x4", density=0.2
        ),
        _conv((1, 7, 7, 17), (20, 17, 1, 1), 0, grain="in:4", density=0.2),
        _conv((1, 8, 8, 64), (48, 64, 1, 1), 3, grain="block:4x4", density=0.1),
        _conv(
            (1, 9, 9, 32),
            (32, 8, 3, 3),
            5,
            padding=around,
            groups=4,
            grain="block:8x4",
            density=0.3,
        ),
        Sample((33, 40), (19, 40), 9, grain="in:4", density=0.2),
        Sample((1, 17, 64), (24, 64), 0, grain="block:8x4", density=0.1),
    ]
