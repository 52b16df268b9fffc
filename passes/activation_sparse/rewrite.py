# SPDX-License-Identifier: Apache-2.0
"""Turn multilayer perceptrons whose activation leaves zeros into activation-sparse operators, or say why not.

    rewrite: dense(relu(dense(x, w1) + b1), w2)
             ->  activation_sparse_dense(relu(dense(x, w1) + b1), w2)
             dense(relu(dense(x, wg)) * (dense(x, wu) + bu), wd), one row
             ->  activation_sparse_gated(x, relu(dense(x, wg)), wu, bu, wd)
    requires: canonical graph; the density of the zeros: observed on calibration data, or given
    ensures: the same function; with `threshold_error`, that of the graph with small activations set to zero; with int8
        weights, that of the graph with these weights

The first layer of an MLP stays a dense layer; it and the second one are one unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import tvm
from tvm import relax

from passes.activation_sparse.byte_weights import (
    ByteWeight,
    byte_weights,
    with_byte_weights,
)
from passes.activation_sparse.calibrate_threshold import calibrate_threshold, collect_tokens
from passes.activation_sparse.crossover import crossover
from passes.activation_sparse.find_mlps import Mlp, find_mlps
from passes.activation_sparse.fold_zeroth_bias import fold_zeroth_biases
from passes.activation_sparse.measure_density import DensityMeter, measure_density
from passes.activation_sparse.operators import CUT, cut, sparse_dense, sparse_gated
from passes.activation_sparse.zeros import Zeros
from passes.family import Context, Layer, Rewritten
from passes.layers import CONV2D, DENSE, attrs_of, const_array, is_call, is_const, shape_of
from passes.rewriting import Graph, bindings_of, constant, rewrite_function, rewrite_module
from passes.treat_layers import decide
from passes.treatment import Decision, Treatment, parse_density, parse_share
from schedules.errors import Declined

# With more tokens the products take the time: bytes, converted for each, are then no faster to gather (128 tokens: level
# with float32) and slower where the dense loop runs (16 tokens: level, 128: 9 % slower). Measured on Cascade Lake.
_MOST_BYTE_TOKENS = 16


def _parse_weights(value: object) -> str:
    if value not in ("float32", "int8"):
        raise ValueError(f"weights must be float32 or int8, not {value!r}")
    return str(value)


PARAMETERS = {
    "density": parse_density,
    "weights": _parse_weights,
    "threshold_error": lambda value: parse_share(value, "threshold_error", one=False),
}


@dataclass(frozen=True)
class _Taken:
    """An MLP that will run activation-sparse."""

    mlp: Mlp
    density: float
    crossover: float
    threshold: float = 0.0


@dataclass
class _Plan:
    """What is known of each MLP asked for, by the name of its second layer."""

    taken: dict[str, _Taken] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    found: dict[str, dict] = field(default_factory=dict)


def found_in(mod: tvm.IRModule) -> dict[str, dict]:
    """The activation whose zeros a dense layer reads, by layer, where there is one."""
    return {m.name: {"input_zeros": m.zeros.kind} for m in find_mlps(mod) if m.zeros is not None}


def observed_in(mod: tvm.IRModule, context: Context) -> dict[str, dict]:
    """The densities of the inputs of the layers that `found_in` finds, by layer."""
    mlps = {m.name: m for m in find_mlps(mod) if m.zeros is not None}
    if context.observe is None or not mlps:
        return {}
    return {name: meter.to_json() for name, meter in _densities(mod, mlps, context).items()}


def _densities(
    mod: tvm.IRModule, mlps: Mapping[str, Mlp], context: Context
) -> dict[str, DensityMeter]:
    """The density meter of each MLP's second layer, by its name."""
    names = _names(mlps)
    wanted = list(dict.fromkeys(names.values()))
    meters = measure_density(context.observe(mod, wanted), wanted)
    return {layer: meters[name] for layer, name in names.items()}


def rewrite(mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context) -> Rewritten:
    """See the module's docstring. `treatments` are those of this family."""
    asked = {m.name: m for m in find_mlps(mod) if m.name in treatments}
    folded = fold_zeroth_biases(mod, _unit_layers(asked.values(), treatments))
    if folded is not mod:
        asked = {m.name: m for m in find_mlps(folded) if m.name in treatments}
    plan = _Plan()
    thresholds = _thresholds(folded, asked, treatments, context, plan)
    reference = _with_thresholds(folded, thresholds)
    for found in find_mlps(reference) if thresholds else ():
        if found.name in thresholds:
            zeros = Zeros("threshold", found.hidden)
            asked[found.name] = replace(
                asked[found.name], down=found.down, hidden=found.hidden, zeros=zeros, gate=None
            )
    _decide(reference, asked, treatments, thresholds, context, plan)
    units = _units(plan.taken.values(), treatments)
    for mlp in asked.values():
        if mlp.name in plan.declined and mlp.zeros is not None:
            reason = f"its zeros would be skipped in {mlp.name}, but: {plan.declined[mlp.name]}"
            for producer in mlp.producers:
                if producer not in asked or asked[producer].zeros is None:
                    plan.declined[producer] = reason
    # Values that only a declined layer would have dropped stay.
    thresholds = {name: t for name, t in thresholds.items() if name in plan.taken}
    reference = _with_thresholds(folded, thresholds)
    stored = byte_weights(reference, _byte_layers(plan.taken.values(), treatments))
    for name, weight in stored.items():
        plan.found.setdefault(name, {})["int8_weight_error"] = round(weight.error, 5)
    treated = _with_operators(reference, plan.taken, stored)
    reference = with_byte_weights(reference, stored)
    decisions = [
        _decision(name, treatment, mod, plan, units) for name, treatment in treatments.items()
    ]
    return Rewritten(treated, decisions, reference if thresholds or stored else None)


def _unit_layers(mlps, treatments: Mapping[str, Treatment]) -> set[str]:
    """The layers of MLPs with zeros that may be rewritten."""
    layers = {name for m in mlps if m.zeros is not None for name in (*m.producers, m.name)}
    return layers & set(treatments)


# ---- thresholds


def _thresholds(
    mod: tvm.IRModule,
    asked: Mapping[str, Mlp],
    treatments: Mapping[str, Treatment],
    context: Context,
    plan: _Plan,
) -> dict[str, float]:
    """A threshold for the input of each layer that one is asked for."""
    wanted = {
        n: m
        for n, m in asked.items()
        if "threshold_error" in treatments[n].parameters and (m.zeros is not None or m.producers)
    }
    if not wanted:
        return {}
    if context.observe is None:
        reason = "a threshold needs calibration data: give --calibration"
        plan.declined.update(dict.fromkeys(wanted, reason))
        return {}
    names = _names(wanted)
    variables = list(dict.fromkeys(names.values()))
    tokens = collect_tokens(context.observe(mod, variables), variables)
    found = {}
    for name, mlp in wanted.items():
        bound = treatments[name].parameters["threshold_error"]
        weight = const_array(mlp.down.args[1])
        threshold = calibrate_threshold(tokens[names[name]], weight, bound)
        if threshold > 0:
            found[name] = threshold
            plan.found[name] = {"activation_threshold": threshold}
    return found


def _names(mlps: Mapping[str, Mlp]) -> dict[str, str]:
    """The name of the variable or input that each MLP's second layer reads."""
    return {name: mlp.hidden.name for name, mlp in mlps.items()}


def _with_thresholds(mod: tvm.IRModule, thresholds: Mapping[str, float]) -> tvm.IRModule:
    """The input of each of these layers with its small values set to zero."""
    if not thresholds:
        return mod

    def put(value: relax.Expr, graph: Graph) -> relax.Expr | None:
        if not (is_call(value, DENSE) and attrs_of(value)["name"] in thresholds):
            return None
        hidden, weight = value.args
        if graph.call(hidden, CUT) is not None:
            return None
        kept = cut(hidden, thresholds[attrs_of(value)["name"]])
        return relax.Call(value.op, [kept, weight], value.attrs)

    return rewrite_module(mod, lambda func: rewrite_function(func, (put,)))


# ---- which


def _decide(
    mod: tvm.IRModule,
    asked: Mapping[str, Mlp],
    treatments: Mapping[str, Treatment],
    thresholds: Mapping[str, float],
    context: Context,
    plan: _Plan,
) -> None:
    """Fill in the plan: measure where possible, then compare with the crossover."""
    sparse = {n: m for n, m in asked.items() if m.zeros is not None and n not in plan.declined}
    meters = {}
    if context.observe is not None and sparse:
        meters = _densities(mod, sparse, context)
        for name, meter in meters.items():
            plan.found.setdefault(name, {}).update(meter.to_json())
    for name, mlp in asked.items():
        if name in plan.declined:
            continue
        if name not in sparse:
            plan.declined[name] = _no_zeros(mod, mlp, treatments[name])
            continue
        given = treatments[name].parameters.get("density")
        density = meters[name].density if meters else given
        outcome = _judge(mlp, density, _in_bytes(treatments[name]), context)
        if isinstance(outcome, Declined):
            plan.declined[name] = outcome.reason
        else:
            plan.taken[name] = _Taken(mlp, density, outcome, thresholds.get(name, 0.0))


def _judge(mlp: Mlp, density: float | None, in_bytes: bool, context: Context) -> float | Declined:
    """The crossover of an MLP's second layer, or why it stays dense."""
    weight = const_array(mlp.down.args[1])
    if weight.dtype != np.float32 or str(mlp.hidden.ty.dtype) != "float32":
        return Declined(f"weights are {weight.dtype}, the kernel takes float32")
    if not np.isfinite(weight).all():
        return Declined("the weight holds NaN or infinity, which a skipped product would hide")
    if density is None:
        return Declined(
            "how many activations are zero is not known: give --calibration, or the density"
        )
    if in_bytes and not weight.any():
        return Declined("every weight is zero, so that int8 weights have no scale")
    if in_bytes and mlp.tokens > _MOST_BYTE_TOKENS:
        return Declined(
            f"int8 weights pay where reading weights takes the time, up to {_MOST_BYTE_TOKENS} tokens, not with "
            f'{mlp.tokens}: ask for weights = "float32", or for int8 as the treatment'
        )
    dtype = "int8" if in_bytes else "float32"
    limit = crossover(mlp.tokens, mlp.width, weight.shape[0], context.target, density, dtype)
    if density >= limit:
        return Declined(
            f"{density:.0%} of the activations are not zero; dense is faster above {limit:.0%}"
        )
    return limit


def _no_zeros(mod: tvm.IRModule, mlp: Mlp, treatment: Treatment) -> str:
    definitions = {b.var: b.value for b in bindings_of(mod["main"])}
    value = definitions.get(mlp.hidden)
    name = value.op.name.split(".")[-1] if isinstance(value, relax.Call) else "an input"
    if mlp.producers:
        if "threshold_error" in treatment.parameters:
            return f"no threshold keeps the error of {name} within bounds"
        return f"{name} leaves no zeros; threshold_error would drop small values"
    return "its input is not the output of ReLU, ReLU^2, J-SquaredReLU or a gated ReLU"


# ---- the graph


def _byte_layers(taken, treatments: Mapping[str, Treatment]) -> set[str]:
    """The layers that skip zeros and were asked to have int8 weights."""
    skip = {f.mlp.name for f in taken} | {f.mlp.gate.up for f in taken if _runs_gated(f)}
    return {name for name in skip if name in treatments and _in_bytes(treatments[name])}


def _in_bytes(treatment: Treatment) -> bool:
    return treatment.parameters.get("weights") == "int8"


def _with_operators(
    mod: tvm.IRModule, taken: Mapping[str, _Taken], stored: Mapping[str, ByteWeight]
) -> tvm.IRModule:
    """The second layer of every MLP taken replaced by its operator, on the weights that are `stored` as bytes."""
    if not taken:
        return mod

    def put(value: relax.Expr, graph: Graph) -> relax.Expr | None:
        if not (is_call(value, DENSE) and is_const(value.args[1])):
            return None
        found = taken.get(attrs_of(value)["name"])
        if found is None:
            return None
        weight, scale = _stored(value, stored)
        if not _runs_gated(found):
            result = sparse_dense(value, weight, found.density, found.crossover)
            return result if scale is None else relax.op.multiply(result, constant(scale))
        factors = list(graph.call(value.args[0], "relax.multiply").args)
        gate, other = factors if found.mlp.gate.first else factors[::-1]
        added = graph.call(other, "relax.add")
        sides = [other] if added is None else list(added.args)
        up = next(c for side in sides if (c := graph.call(side, DENSE)) is not None)
        rows, factor = _stored(up, stored)
        factor = np.ones(shape_of(rows)[0], np.float32) if factor is None else factor
        result = sparse_gated(
            up.args[0], gate, rows, constant(factor), constant(found.mlp.gate.bias), weight,
            layers=[found.mlp.gate.up, found.mlp.name], density=found.density,
        )  # fmt: skip
        return result if scale is None else relax.op.multiply(result, constant(scale))

    return rewrite_module(mod, lambda func: rewrite_function(func, (put,)))


def _stored(
    call: relax.Call, stored: Mapping[str, ByteWeight]
) -> tuple[relax.Expr, np.ndarray | None]:
    """The weight of a dense layer as its operator takes it, and the scale of its outputs if it is in bytes."""
    found = stored.get(attrs_of(call)["name"])
    return (call.args[1], None) if found is None else (constant(found.values), found.scale)


def _runs_gated(found: _Taken) -> bool:
    """Several rows of activations need most of up's rows between them, so up is computed densely then."""
    mlp = found.mlp
    return mlp.gate is not None and mlp.tokens == 1


# ---- decisions


def _units(taken, treatments: Mapping[str, Treatment]) -> dict[str, str]:
    """The unit of each layer: an MLP's second layer, and the layers before it that are in no unit yet."""
    units: dict[str, str] = {}
    for found in taken:
        members = [n for n in found.mlp.producers if n in treatments and n not in units]
        members.append(found.mlp.name)
        units.update({m: members[0] for m in members if m not in units})
    return units


def _decision(
    name: str,
    treatment: Treatment,
    mod: tvm.IRModule,
    plan: _Plan,
    units: Mapping[str, str],
) -> Decision:
    call = _layer_call(mod, name)
    taken = name in units
    declined = None if taken else plan.declined.get(name) or _not_an_mlp(call)
    found = plan.found.get(name)
    return decide(Layer(call), treatment, declined, found=found, unit=units.get(name))


def _layer_call(mod: tvm.IRModule, name: str) -> relax.Call:
    return next(
        b.value
        for b in bindings_of(mod["main"])
        if (is_call(b.value, DENSE) or is_call(b.value, CONV2D))
        and attrs_of(b.value)["name"] == name
    )


def _not_an_mlp(call: relax.Call) -> str:
    if is_call(call, CONV2D):
        return "a convolution: zeros of activations are skipped in dense layers only"
    return "its input is not the output of ReLU, ReLU^2, J-SquaredReLU or a gated ReLU"
