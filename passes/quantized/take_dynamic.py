# SPDX-License-Identifier: Apache-2.0
"""Compute layers on bytes whose scale the model finds while it runs (ONNX `DynamicQuantizeLinear`).

    rewrite: dense(steps(q, z), w)  ->  astype(int8_dense(q, w8) - z * sums(w8), "float32") * weight_scale
    requires: canonical, NCHW; `weight_scale` on layers whose weight the model stores as integers
    ensures: the same integers, whatever z is: no recalibration, nothing rounded but what the model rounds

Kernels know their zero point when they are generated; here it comes with the input. So they take 0 for it, and what z adds
to each sum is subtracted: z times the sum of the weights, which is a constant. Behind padding that sum depends on the
pixel, as a pixel outside the image counts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from passes.family import Layer
from passes.layers import CONV2D, attrs_of, is_layer
from passes.numpy_images import conv2d
from passes.quantized import operators
from passes.quantized.imported_weights import imported_weight
from passes.quantized.quantize_layers import QuantizedWeight
from passes.rewriting import Graph, constant, rewrite_function, rewrite_module
from passes.treatment import Treatment


@dataclass
class TakeDynamic:
    """See the module's docstring; `reasons` has the layers of `treatments` on such bytes, with None or why they stay."""

    treatments: Mapping[str, Treatment]
    reasons: dict[str, str | None] = field(default_factory=dict)

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        return rewrite_module(mod, lambda func: rewrite_function(func, (self._take,)))

    def _take(self, value: relax.Expr, graph: Graph) -> relax.Expr | None:
        if not is_layer(value) or attrs_of(value)["name"] not in self.treatments:
            return None
        steps = graph.call(value.args[0], operators.STEPS)
        if steps is None:
            return None
        layer = Layer(value)
        try:
            weight = imported_weight(layer)
        except ValueError as error:
            self.reasons[layer.name] = str(error)
            return None
        self.reasons[layer.name] = None
        q, zero_point = steps.args
        extra = relax.op.multiply(
            relax.op.astype(zero_point, "int32"), constant(_weight_sums(layer, weight))
        )
        floats = relax.op.astype(relax.op.subtract(_sum(layer, q, weight), extra), "float32")
        if (weight.scale == 1).all():
            return floats
        along = (1, -1, 1, 1) if layer.operator == CONV2D else (-1,)
        return relax.op.multiply(floats, constant(weight.scale.reshape(along)))


def _sum(layer: Layer, q: relax.Expr, weight: QuantizedWeight) -> relax.Call:
    w, attrs = constant(weight.values), layer.attrs
    if layer.operator != CONV2D:
        return operators.int8_dense(q, w, name=layer.name, zero_point=0)
    shared = {key: attrs[key] for key in ("strides", "padding", "dilation", "groups", "layout")}
    return operators.int8_conv2d(q, w, name=layer.name, zero_point=0, **shared)


def _weight_sums(layer: Layer, weight: QuantizedWeight) -> np.ndarray:
    """int32: by how much a sum grows for each step of the zero point, [O], [1, O, 1, 1] or [1, O, OH, OW]."""
    w = weight.values.astype("float64")  # exact: sums fit 32 bits
    if layer.operator != CONV2D:
        return w.sum(axis=1).astype("int32")
    if not any(layer.attrs["padding"]):
        return w.sum(axis=(1, 2, 3)).reshape(1, -1, 1, 1).astype("int32")
    ones = np.ones((1, *layer.input_shape[1:]))
    return conv2d(layer.attrs, ones, w).astype("int32")
