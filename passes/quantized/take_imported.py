# SPDX-License-Identifier: Apache-2.0
"""Compute layers of a model that is already quantized on bytes, with the scales it brings.

    rewrite: conv2d(dequantize(quantize(x)), w)  ->  astype(int8_conv2d(quantize(x), w8)) * (x's scale * w's scale)
    requires: canonical, NCHW; `weight_scale` on layers whose weight the model stores as integers
    ensures: the scales and zero points of the model and no others; no calibration

Pairs of quantize and dequantize become marks on what they round, and the plan and the rewriting of calibrated layers do
the rest. Where no kernel needs bytes, the value is not rounded, but it still saturates: quantizers leave out a ReLU whose
work saturation does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.channel_flow import Uses, layer_counts
from passes.family import Layer, Rewritten
from passes.layers import attrs_of, is_call, operator_call, shape_of
from passes.quantized import operators
from passes.quantized.imported_weights import imported_weight
from passes.quantized.plan_bytes import (
    BytesPlan,
    is_carrier,
    is_elementwise,
    is_operator,
    plan_bytes,
    tensors,
)
from passes.quantized.quantize_layers import QuantizedWeight, QuantizeLayers
from passes.quantized.ranges import Affine
from passes.quantized.take_dynamic import TakeDynamic
from passes.rewriting import Graph, bindings_of, constant, rewrite_function, rewrite_module
from passes.treat_layers import decide
from passes.treatment import Treatment

# Operators on one tensor that mean the same on bytes and on floats.
CARRIERS = (
    "relax.nn.max_pool2d",
    "relax.reshape",
    "relax.permute_dims",
    "relax.squeeze",
    "relax.expand_dims",
)


def is_quantized(mod: tvm.IRModule) -> bool:
    """Whether the model itself says how activations are rounded to bytes."""
    marks = (operators.DEQUANTIZE, operators.STEPS)
    return any(is_call(b.value, mark) for b in bindings_of(mod["main"]) for mark in marks)


def take_imported(mod: tvm.IRModule, treatments: Mapping[str, Treatment]) -> Rewritten:
    """The layers of `treatments` on bytes with the model's own scales; the others decline, for a reason of the model's."""
    from passes.treat_layers import layers_of

    all_layers = {layer.name: layer for layer in layers_of(mod) if layer.name in treatments}
    dynamic = TakeDynamic(treatments)
    mod = dynamic(mod)
    lifted = rewrite_module(mod, lambda func: rewrite_function(func, (lift_dequantize,)))
    marked = _mark(lifted, frozenset(), frozenset())
    unheld: set[str] = set()
    while True:
        layers = {layer.name: layer for layer in layers_of(marked.mod) if layer.name in treatments}
        weights, reasons = _eligible(marked, layers, unheld)
        plan = plan_bytes(marked.mod, set(weights))
        held = _held(plan, marked.affine)
        kept = {v.name for v in marked.marks if _must_stay(v, plan, held)} - marked.kept
        clipped = {v.name for v in marked.marks if v not in held} - kept - marked.clipped
        if kept or clipped:
            marked = _mark(lifted, marked.kept | kept, marked.clipped | clipped)
            continue
        lost = {n for n in weights if layers[n].call.args[0] not in held}
        if not lost:
            break
        unheld |= lost
    treated = mod
    if weights:
        bytes_of = {var: marked.affine[var] for var in held}
        plan = _ImportedPlan(plan.uses, plan.layers, held)
        treated = QuantizeLayers(plan, bytes_of, weights)(marked.mod)
        treated = rewrite_module(treated, lambda func: rewrite_function(func, (drop_requantize,)))
    reasons |= dynamic.reasons
    decisions = [
        decide(layer, treatments[name], reasons.get(name)) for name, layer in all_layers.items()
    ]
    return Rewritten(treated, decisions, reference=treated)


class _ImportedPlan(BytesPlan):
    """Whoever reads what the model has in bytes reads those: the floats before have not been rounded, nor saturated."""

    def reads_bytes(self, _reader: relax.Var, operand: relax.Var) -> bool:
        return operand in self.held


@dataclass(frozen=True)
class _Marked:
    """The graph without pairs of quantize and dequantize, but for those after the variables named in `kept`; after those
    named in `clipped` saturation is left. `marks` are the other variables that pairs were taken from, `affine` has all
    that the model has in bytes."""

    mod: tvm.IRModule
    marks: Collection[relax.Var]
    affine: Mapping[relax.Var, Affine]
    kept: frozenset[str]
    clipped: frozenset[str]


def _mark(mod: tvm.IRModule, kept: Collection[str], clipped: Collection[str]) -> _Marked:
    uses = Uses(mod)
    found: dict[str, Affine] = {}
    dropped: dict[relax.Var, Affine | None] = {}
    for var in [*mod["main"].params, *(b.var for b in uses.bindings)]:
        pair = None if var.name in kept else _only_rounded(var, uses)
        if pair is None:
            continue
        affine, floats = pair
        if var.name in clipped:
            found |= {back.name: affine for back in floats}
            dropped |= dict.fromkeys(floats, affine)
        else:
            found[var.name] = affine
            dropped |= dict.fromkeys(floats)

    def rewrite(func: relax.Function) -> relax.Function:
        graph = Graph(func)
        for binding in bindings_of(func):
            value, graph.current = graph.substitute(binding.value), binding.var
            if binding.var in dropped:
                rounded = uses.definitions[binding.var].args[0]
                value = graph.substitute(uses.definitions[rounded].args[0])
                affine = dropped[binding.var]
                if affine is None:
                    graph.alias(binding.var, value)
                else:
                    graph.define(binding.var, _clip(value, affine, graph))
            else:
                graph.define(binding.var, value)
        return graph.finish(func)

    stripped = rewrite_module(mod, rewrite)
    affine = _affine_of(stripped, found)
    unclipped = set(found) - {var.name for var in dropped}
    marks = [var for var in affine if var.name in unclipped]
    return _Marked(stripped, marks, affine, frozenset(kept), frozenset(clipped))


def _clip(value: relax.Expr, affine: Affine, graph: Graph) -> relax.Expr:
    """What rounding to bytes does to values that bytes do not reach."""
    if affine.zero_point:
        above = relax.op.maximum(value, constant(np.float32(affine.low)))
    else:
        is_relu = graph.call(value, "relax.nn.relu") is not None
        above = value if is_relu else relax.op.nn.relu(value)
    return relax.op.minimum(above, constant(np.float32(affine.high)))


def _only_rounded(var: relax.Var, uses: Uses) -> tuple[Affine, set[relax.Var]] | None:
    """How `var` is rounded and the floats read back, if nothing reads it otherwise."""
    readers = uses.readers.get(var, [])
    if (
        not readers
        or var in uses.outputs
        or is_call(uses.definitions.get(var), operators.DEQUANTIZE)
    ):
        return None
    floats: set[relax.Var] = set()
    seen: set[Affine] = set()
    for reader in readers:
        if not is_call(reader.value, operators.QUANTIZE) or reader.var in uses.outputs:
            return None
        seen.add(_of(reader.value))
        for back in uses.readers.get(reader.var, []):
            if not is_call(back.value, operators.DEQUANTIZE) or back.var in uses.outputs:
                return None
            seen.add(_of(back.value))
            floats.add(back.var)
    return (seen.pop(), floats) if len(seen) == 1 and floats else None


def _of(call: relax.Call) -> Affine:
    attrs = attrs_of(call)
    return Affine(float(attrs["scale"]), int(attrs["zero_point"]))


def _affine_of(mod: tvm.IRModule, marks: Mapping[str, Affine]) -> dict[relax.Var, Affine]:
    """Every variable of the stripped graph that the model has in bytes."""
    found = {p: marks[p.name] for p in mod["main"].params if p.name in marks}
    for binding in bindings_of(mod["main"]):
        if binding.var.name in marks:
            found[binding.var] = marks[binding.var.name]
        elif is_call(binding.value, operators.DEQUANTIZE):
            found[binding.var] = _of(binding.value)
        elif is_carrier(binding.value):
            of = {found.get(operand) for operand in tensors(binding.value)}
            if len(of) == 1 and None not in of:
                found[binding.var] = of.pop()
    return found


def _eligible(
    marked: _Marked, layers: Mapping[str, Layer], unheld: Collection[str]
) -> tuple[dict[str, QuantizedWeight], dict[str, str]]:
    """The weights of the layers that can be computed on bytes, and why the others cannot."""
    counts = layer_counts(Uses(marked.mod))
    weights, reasons = {}, {}
    for name, layer in layers.items():
        try:
            if counts[name] > 1:
                raise ValueError("its weight is used in several places")
            if layer.call.args[0] not in marked.affine or name in unheld:
                raise ValueError("the model does not quantize its input to 8 bits per tensor")
            weights[name] = imported_weight(layer)
        except ValueError as error:
            reasons[name] = str(error)
    return weights, reasons


def _held(plan: BytesPlan, affine: Mapping[relax.Var, Affine]) -> dict[relax.Var, relax.Var]:
    """What of the plan the model has in bytes, by groups of one scale."""
    held: dict[relax.Var, relax.Var] = {}
    for var in plan.held:
        value = plan.uses.definitions.get(var)
        if var not in affine:
            continue
        if not is_carrier(value):
            held[var] = var
        elif all(o in held and affine[o] == affine[var] for o in tensors(value)):
            held[var] = _merged(held, tensors(value))
    read = {held[c.args[0]] for c in plan.layers.values() if c.args[0] in held}
    return {v: g for v, g in held.items() if g in read or _comes_from_bytes(v, plan)}


def _comes_from_bytes(var: relax.Var, plan: BytesPlan) -> bool:
    """Whether a layer on bytes makes `var` on its way to memory, so that bytes are what it writes."""
    value = plan.uses.definitions.get(var)
    if var in plan.layers or not is_elementwise(value):
        return var in plan.layers
    return any(_comes_from_bytes(operand, plan) for operand in tensors(value))


def _must_stay(var: relax.Var, plan: BytesPlan, held: Mapping[relax.Var, relax.Var]) -> bool:
    """Whether `var` has to be rounded by operators of its own: a carrier that changes scales makes it, or one reads it
    that does not work on bytes."""
    if var not in held:
        return var in plan.held and is_carrier(plan.uses.definitions.get(var))
    readers = plan.uses.readers.get(var, [])
    return any(
        b.var not in held and any(isinstance(a, relax.Tuple) for a in b.value.args)
        for b in readers
        if isinstance(b.value, relax.Call)
    )


def _merged(held: dict[relax.Var, relax.Var], variables: list[relax.Var]) -> relax.Var:
    """The one group of these variables and all that share a scale with them."""
    groups = {held[v] for v in variables}
    first = held[variables[0]]
    for var, group in held.items():
        if group in groups:
            held[var] = first
    return first


def lift_dequantize(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """Move and pick floats rather than bytes: dequantize(reshape(q)) is reshape(dequantize(q))."""
    if not is_call(value, operators.DEQUANTIZE):
        return None
    moved = graph.definition(value.args[0])
    if not is_operator(moved, CARRIERS) or isinstance(moved.args[0], relax.Tuple):
        return None
    floats = operator_call(operators.DEQUANTIZE, [moved.args[0]], **attrs_of(value))
    return relax.Call(moved.op, [floats, *list(moved.args)[1:]], moved.attrs)


def drop_requantize(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """quantize(dequantize(q)) with the same scale is q."""
    if not is_call(value, operators.QUANTIZE):
        return None
    floats = graph.call(value.args[0], operators.DEQUANTIZE)
    return floats.args[0] if floats is not None and _of(floats) == _of(value) else None


def describe_imported(mod: tvm.IRModule) -> dict[str, dict]:
    """By layer, how a quantized model stores its weight and its input; for `inspect`."""
    found: dict[str, dict] = {}
    uses = Uses(mod)
    for binding in uses.bindings:
        value = binding.value
        scales = attrs_of(value).get("weight_scale") if _has_name(value) else None
        if scales is None:
            continue
        read = uses.definitions.get(value.args[0])
        stored = "int8 per channel" if len(scales) > 1 else "int8 per tensor"
        rounded = "uint8" if is_call(read, operators.DEQUANTIZE) else "float32"
        if is_call(read, operators.STEPS):
            rounded = "uint8 with a scale found at run time"
        found[attrs_of(value)["name"]] = {"imported": f"weight {stored}, input {rounded}"}
    return found


def _has_name(value: relax.Expr) -> bool:
    return (
        isinstance(value, relax.Call)
        and isinstance(value.op, tvm.ir.Op)
        and value.op.name.startswith("kerf.")
        and len(shape_of(value)) > 0
        and "name" in attrs_of(value)
    )
