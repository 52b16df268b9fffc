# SPDX-License-Identifier: Apache-2.0
"""The quadratic family on a whole graph: which neurons it takes, and of every other layer why not."""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm import relax

from passes.family import Context, Layer, Rewritten
from passes.layers import CONV2D, DENSE, attrs_of, is_call, is_const, layers_computed_by, shape_of
from passes.quadratic.operators import is_quadratic
from passes.quadratic.quadratize import quadratize
from passes.quadratic.recognize import recognize
from passes.rewriting import bindings_of, variables
from passes.treat_layers import decide
from passes.treatment import Treatment, parse_share

_SHIFTS = ("relax.add", "relax.subtract")
# What may follow the sums of another family's layer until they are what the layer computes.
_RESCALING = (*_SHIFTS, "relax.multiply", "relax.astype", "kerf.dequantize")


def rewrite(mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context) -> Rewritten:
    """Every quadratic neuron made of layers that were asked for as one operator, exact but for rounding; before that,
    where the recipe says so, blocks of layers replaced by fitted neurons."""
    outcome = quadratize(mod, treatments, context)
    found = recognize(outcome.mod, treatments)
    units = _units(found.mod)
    reasons = _Reasons(mod, treatments)
    decisions = []
    for layer in _asked(mod, treatments):
        form, unit = units.get(layer.name, (None, None))
        if layer.name in found.linear:
            form, unit = "linear", found.linear[layer.name]
        declined = None if form else outcome.declined.get(layer.name) or reasons.of(layer)
        fitted = outcome.fitted.get(layer.name)
        decisions.append(decide(layer, treatments[layer.name], declined, found=fitted, unit=unit))
    return Rewritten(found.mod, decisions, outcome.mod if outcome.fitted else None)


def parse_fit_error(value: object) -> float:
    """A squared error relative to the variance, in (0, 1). Raises ValueError."""
    return parse_share(value, "fit_error", one=False)


PARAMETERS = {"fit_error": parse_fit_error}


def found_in(mod: tvm.IRModule) -> dict[str, dict]:
    """For every layer of a quadratic neuron, the neuron's form and the layers it is made of."""
    if not _may_hold_neurons(mod):
        return {}
    names = {layer.name for layer in _layers(mod)}
    found = recognize(mod, names)
    facts: dict[str, dict] = {}
    for binding in bindings_of(found.mod["main"]):
        if is_quadratic(binding.value):
            attrs = attrs_of(binding.value)
            for name in attrs["layers"]:
                facts[name] = {"quadratic": attrs["form"], "neuron": ", ".join(attrs["layers"])}
    for name, unit in found.linear.items():
        facts[name] = {
            "quadratic": "linear: its other factor and its square are zero",
            "neuron": unit,
        }
    return facts


def _may_hold_neurons(mod: tvm.IRModule) -> bool:
    """Whether anything is multiplied by another activation at all."""
    products = ("relax.multiply", "relax.power", "relax.square")
    return any(
        is_call(b.value, name)
        and not any(is_const(a) and name == products[0] for a in b.value.args)
        for b in bindings_of(mod["main"])
        for name in products
    )


def _layers(mod: tvm.IRModule) -> list[Layer]:
    calls = [b.value for b in bindings_of(mod["main"])]
    return [
        Layer(c) for c in calls if (is_call(c, CONV2D) or is_call(c, DENSE)) and is_const(c.args[1])
    ]


def _asked(mod: tvm.IRModule, treatments: Mapping[str, Treatment]) -> list[Layer]:
    return [layer for layer in _layers(mod) if layer.name in treatments]


def _units(mod: tvm.IRModule) -> dict[str, tuple[str, str | None]]:
    """(form, name of the operator if it stands for several) of every layer that a quadratic operator computes."""
    units = {}
    for binding in bindings_of(mod["main"]):
        if is_quadratic(binding.value):
            layers = layers_computed_by(binding.value)
            for name in layers:
                units[name] = (
                    attrs_of(binding.value)["form"],
                    layers[0] if len(layers) > 1 else None,
                )
    return units


class _Reasons:
    """Why a layer is no part of a quadratic neuron, from what its result meets."""

    def __init__(self, mod: tvm.IRModule, asked: Mapping[str, Treatment]):
        self.asked = asked
        self.definitions: dict[relax.Var, relax.Expr] = {}
        self.readers: dict[relax.Var, list[tuple[relax.Var, relax.Expr]]] = {}
        self.var_of: dict[str, relax.Var] = {}
        for binding in bindings_of(mod["main"]):
            self.definitions[binding.var] = binding.value
            for read in set(variables(binding.value)):
                self.readers.setdefault(read, []).append((binding.var, binding.value))
            is_a_call = isinstance(binding.value, relax.Call)
            for name in layers_computed_by(binding.value) if is_a_call else ():
                self.var_of[name] = binding.var

    def of(self, layer: Layer) -> str:
        var = self.var_of[layer.name]
        while True:
            readers = self.readers.get(var, [])
            if len(readers) != 1:
                if not readers:
                    return "no quadratic neuron: its result is an output of the model"
                return f"no quadratic neuron: its result is read by {len(readers)} others"
            after, value = readers[0]
            if isinstance(value, relax.Var):  # another name for it
                var = after
                continue
            if is_call(value, "relax.multiply"):
                return self._of_product(layer, var, value)
            constant_shift = any(is_call(value, n) for n in _SHIFTS) and any(
                is_const(a) for a in value.args
            )
            if not constant_shift:
                break
            var = after
        return "no quadratic neuron: its result is neither a factor of a product nor added to one of the same input"

    def _of_product(self, layer: Layer, var: relax.Var, value: relax.Call) -> str:
        if value.args[0].same_as(value.args[1]):
            return "the square of one layer (T3) needs one sum: the dense kernel squares it as it stores it"
        other = value.args[0] if value.args[1].same_as(var) else value.args[1]
        names = self._computed_by(other)
        if not names:
            return "no quadratic neuron: it is multiplied by something that is not a layer"
        partner, call = names
        if not (is_call(call, CONV2D) or is_call(call, DENSE)):
            return f"its other factor {partner} is computed by {call.op.name}; the fused kernel takes dense float32 weights"
        if partner not in self.asked:
            return f"its other factor {partner} was not asked to be quadratic"
        if shape_of(call.args[1]) != tuple(layer.weight.shape):
            return f"its other factor {partner} has a weight of another shape"
        return f"its other factor {partner} reads another input, has another geometry or is read elsewhere"

    def _computed_by(self, expr: relax.Expr) -> tuple[str, relax.Call] | None:
        """The layer behind an expression, and constants it was shifted or scaled by."""
        while isinstance(expr, relax.Var) and expr in self.definitions:
            value = self.definitions[expr]
            if not isinstance(value, relax.Call):
                return None
            if names := layers_computed_by(value):
                return names[0], value
            inner = [a for a in value.args if not is_const(a)]
            if not any(is_call(value, n) for n in _RESCALING) or len(inner) != 1:
                return None
            expr = inner[0]
        return None
