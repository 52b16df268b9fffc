# SPDX-License-Identifier: Apache-2.0
"""One float graph in which every layer can be switched to what its bytes make of it, to measure each alone.

    rewrite: y = conv2d(x, w)
             ->  z = conv2d(dequantize(quantize(x)), w8 * scale);  y = conv2d(x, w) + switch[i] * (z - conv2d(x, w))
    requires: canonical graph, the plan and the bytes of its groups
    ensures: with all switches 0 the same function; a further last input `switches`, float32 [layers]

A graph is compiled once for all layers, rather than once for each.
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm import relax

from passes.layers import CONV2D, attrs_of, is_call, operator_call, shape_of
from passes.quantized import operators
from passes.quantized.plan_bytes import BytesPlan
from passes.quantized.quantize_layers import QuantizedWeight
from passes.quantized.ranges import Affine
from passes.rewriting import Graph, bindings_of, constant, rewrite_module

SWITCHES = "switches"


def switch_layers(
    mod: tvm.IRModule,
    plan: BytesPlan,
    bytes_of: Mapping[relax.Var, Affine],
    weights: Mapping[str, QuantizedWeight],
) -> tuple[tvm.IRModule, list[str]]:
    """The graph, and the layers in the order of their switches."""
    names = [attrs_of(call)["name"] for call in plan.layers.values()]
    switches = relax.Var(SWITCHES, relax.TensorType((len(names),), "float32"))

    def rewrite(func: relax.Function) -> relax.Function:
        func = relax.Function(
            [*func.params, switches], func.body, func.ret_ty, is_pure=func.is_pure, attrs=func.attrs
        )
        graph = Graph(func)
        order = {var: i for i, var in enumerate(plan.layers)}
        for binding in bindings_of(func):
            value, graph.current = graph.substitute(binding.value), binding.var
            if (i := order.get(binding.var)) is not None:
                of = bytes_of[plan.group(binding.value.args[0])]
                value = _switched(graph, value, of, weights[names[i]], switches, i)
            graph.define(binding.var, value)
        return graph.finish(func)

    return rewrite_module(mod, rewrite), names


def _switched(
    graph: Graph,
    call: relax.Call,
    of: Affine,
    weight: QuantizedWeight,
    switches: relax.Var,
    index: int,
) -> relax.Call:
    attrs = attrs_of(call)
    along = (-1,) + (1,) * (weight.values.ndim - 1)
    w = (weight.values * weight.scale.astype("float64").reshape(along)).astype("float32")
    x = operators.quantize(call.args[0], scale=of.scale, zero_point=of.zero_point)
    x = operators.dequantize(x, scale=of.scale, zero_point=of.zero_point)
    rounded = operator_call(
        call.op.name, [x, constant(w)], **{**attrs, "name": f"{attrs['name']} in bytes"}
    )
    exact = graph.emit(call)
    switch = relax.op.strided_slice(switches, [0], [index], [index + 1])
    if is_call(call, CONV2D):
        switch = relax.op.reshape(switch, (1,) * len(shape_of(call)))
    difference = relax.op.subtract(graph.emit(rounded), exact)
    return relax.op.add(exact, relax.op.multiply(difference, switch))
