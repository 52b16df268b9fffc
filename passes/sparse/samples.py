# SPDX-License-Identifier: Apache-2.0
"""Graphs that weight sparsity takes or declines."""

from __future__ import annotations

import numpy as np
from tvm import relax

from passes.samples import Layers, Sample, graph
from passes.treatment import Treatment


def _with_zeros(layers: Layers, shape: tuple[int, ...], block: int, density: float):
    """A weight of which whole vectors of `block` output channels are zero."""
    weight = layers.rng.standard_normal(shape).astype("float32")
    kept = layers.rng.random((shape[0] // block, *shape[1:])) < density
    return relax.const(weight * np.repeat(kept, block, axis=0))


def _network(block: int, density: float):
    def body(layers: Layers, x):
        y = layers.conv2d("a", x, 64, weight=_with_zeros(layers, (64, 64, 3, 3), block, density))
        y = layers.emit(relax.op.nn.relu(y))
        return layers.conv2d("b", y, 64, weight=_with_zeros(layers, (64, 64, 1, 1), block, density))

    return graph((1, 64, 14, 14), body)


def samples() -> list[Sample]:
    """Zeros by element and by vector, pruning, and weights without zeros."""
    pruned = Treatment("sparse", {"grain": "out:4", "density": 0.1}, prune=True)
    return [
        Sample("element", _network(1, 0.05), dict.fromkeys("ab", Treatment("sparse"))),
        Sample("out:8", _network(8, 0.1), dict.fromkeys("ab", Treatment("sparse"))),
        Sample("pruned", _network(1, 1.0), dict.fromkeys("ab", pruned)),
        Sample("no zeros", _network(1, 1.0), dict.fromkeys("ab", Treatment("sparse")), "no zeros"),
    ]
