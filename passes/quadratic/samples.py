# SPDX-License-Identifier: Apache-2.0
"""Graphs that hold quadratic neurons, and one that only looks like it."""

from __future__ import annotations

from tvm import relax

from passes.samples import Layers, Sample, graph
from passes.treatment import Treatment


def _neuron(layer, layers: Layers, x, other):
    product = layers.emit(relax.op.multiply(layer("r", x, 24), layer("g", other, 24)))
    square = layer("b", layers.emit(relax.op.multiply(x, x)), 24)
    return relax.op.nn.relu(layers.emit(relax.op.add(product, square)))


def _conv2d(layers: Layers, x):
    return _neuron(layers.conv2d, layers, x, x)


def _dense(layers: Layers, x):
    return _neuron(layers.dense, layers, x, x)


def _two_inputs(layers: Layers, x):
    product = relax.op.multiply(
        layers.dense("r", x, 24), layers.dense("g", layers.emit(relax.op.nn.relu(x)), 24)
    )
    return product


def samples() -> list[Sample]:
    """Fan's neuron as convolution and as dense layer; a gate, whose factors read different tensors."""
    asked = dict.fromkeys("rgb", Treatment("quadratic"))
    gate = dict.fromkeys("rg", Treatment("quadratic"))
    return [
        Sample("conv2d", graph((1, 20, 9, 9), _conv2d), asked),
        Sample("dense", graph((7, 40), _dense), asked),
        Sample("gate", graph((7, 40), _two_inputs), gate, "."),
    ]
