# SPDX-License-Identifier: Apache-2.0
"""Graphs with layers of signs, and one of real numbers."""

from __future__ import annotations

import numpy as np
from tvm import relax

from passes.samples import Layers, Sample, graph
from passes.treatment import Treatment


def _sign(layers: Layers, x):
    one = relax.const(np.float32(1))
    above = layers.emit(relax.op.greater_equal(x, relax.const(np.float32(0))))
    return layers.emit(relax.op.where(above, one, relax.const(np.float32(-1))))


def _signs(layers: Layers, *shape: int):
    return relax.const(np.where(layers.rng.random(shape) < 0.5, -1, 1).astype("float32"))


def _chain(layers: Layers, x):
    """Two layers with nothing between them that needs the numbers, and a head."""
    y = layers.conv2d("a", _sign(layers, x), 40, weight=_signs(layers, 40, 33, 3, 3))
    y = layers.conv2d("b", _sign(layers, y), 64, 1, weight=_signs(layers, 64, 40, 1, 1))
    y = layers.emit(relax.op.mean(y, axis=[2, 3]))
    return layers.dense("c", _sign(layers, y), 10, weight=_signs(layers, 10, 64))


def _weights_only(layers: Layers, x):
    """Signs as weights of real numbers, one layer with a scale per channel."""
    y = layers.conv2d("a", x, 40, weight=_signs(layers, 40, 33, 3, 3))
    y = layers.emit(relax.op.mean(layers.emit(relax.op.nn.relu(y)), axis=[2, 3]))
    scale = layers.rng.uniform(0.5, 2, (10, 1)).astype("float32")
    signs = _signs(layers, 10, 40).value.numpy()
    return layers.dense("b", y, 10, weight=relax.const(signs * scale))


def _real(layers: Layers, x):
    return layers.conv2d("a", _sign(layers, x), 8)


def samples() -> list[Sample]:
    asked = Treatment("binary")
    return [
        Sample("chain", graph((1, 33, 7, 7), _chain), dict.fromkeys("abc", asked)),
        Sample("signs as weights", graph((1, 33, 7, 7), _weights_only), dict.fromkeys("ab", asked)),
        Sample("real weights", graph((1, 33, 7, 7), _real), {"a": asked}, "."),
    ]
