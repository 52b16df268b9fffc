# SPDX-License-Identifier: Apache-2.0
"""The experiment: layers of real numbers made binary without training.

rewrite: conv2d(x, w)  ->  conv2d(where(x >= 0, 1, -1), sign(w) * mean |w|)
ensures: the layers named are binary ones, unless something else than their numbers keeps them from it
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from passes.binary.recognize import BinaryLayer, binary_weight, recognize
from passes.channel_flow import Uses
from passes.family import Layer
from passes.layers import is_layer, operator_call
from passes.rewriting import Graph, rewrite_module


def binarize(mod: tvm.IRModule, names: set[str]) -> tvm.IRModule:
    """The named layers that are not binary get sign(x), and sign(w) times the mean |w| per channel."""
    uses = Uses(mod)

    def rewrite(func: relax.Function) -> relax.Function:
        graph = Graph(func)
        for binding in uses.bindings:
            value = graph.substitute(binding.value)
            if is_layer(value) and Layer(value).name in names:
                if not isinstance(recognize(Layer(binding.value), uses), BinaryLayer):
                    value = _made_binary(value)
            graph.define(binding.var, value)
        return graph.finish(func)

    return rewrite_module(mod, rewrite)


def _made_binary(call: relax.Call) -> relax.Call:
    layer, one = Layer(call), relax.const(1.0, "float32")
    weight, x = layer.weight, call.args[0]
    if binary_weight(weight) is None:
        scale = np.abs(weight).reshape(weight.shape[0], -1).mean(1)
        scale = scale.reshape(-1, *[1] * (weight.ndim - 1)).astype(np.float32)
        weight = np.where(weight >= 0, scale, -scale).astype(np.float32)
    positive = relax.op.greater_equal(x, relax.const(0.0, "float32"))
    signs = relax.op.where(positive, one, relax.const(-1.0, "float32"))
    return operator_call(call.op.name, [signs, relax.const(weight)], **layer.attrs)
