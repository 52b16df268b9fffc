# SPDX-License-Identifier: Apache-2.0
"""Take the layers asked of the family "int8", or say why not: calibrate, plan, quantize.

Layers decline one by one: for their weights, or because what calibration shows of their input has no scale. The plan is
made anew without them until all that is left can be computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tvm
from tvm import relax

from passes.family import Context, Layer, Rewritten
from passes.layers import attrs_of
from passes.quantized.observers import Statistics
from passes.quantized.operators import GRAINS
from passes.quantized.parameters import DEFAULTS
from passes.quantized.plan_bytes import BytesPlan, plan_bytes, tensors
from passes.quantized.quantize_layers import QuantizedWeight, QuantizeLayers
from passes.quantized.ranges import NEED_HISTOGRAM, Affine, choose_range
from passes.quantized.weights import overflows, quantize_weight
from passes.sparse.grains import Grain
from passes.treatment import Decision, Treatment
from schedules.errors import UserError

# A kernel that skips zeros pays below this share of blocks that are not zero.
_SPARSE_BELOW = 0.6
# A grain is what the zeros support while its blocks hold at most this many times the non-zeros.
_TOLERATED_FILL = 1.05


def rewrite(mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context) -> Rewritten:
    """See `passes.family.Family`. Raises UserError without calibration data."""
    from passes.treat_layers import layers_of

    if context.observe is None:
        raise UserError(
            "int8 needs samples of the model's inputs, to see how large activations become",
            where="calibration",
            todo="Give --calibration FILE.npz or a directory; --calibration random only to try out speed",
        )
    layers = {layer.name: layer for layer in layers_of(mod) if layer.name in treatments}
    parameters = {name: {**DEFAULTS, **t.parameters} for name, t in treatments.items()}
    reasons: dict[str, str] = {}
    weights: dict[str, QuantizedWeight] = {}
    for name, layer in layers.items():
        try:
            weights[name] = _weight(layer, parameters[name])
        except ValueError as error:
            reasons[name] = str(error)
    seen: dict[str, Statistics] = {}
    while True:
        plan = plan_bytes(mod, set(weights) - set(reasons))
        _observe(mod, plan, seen, parameters, context)
        bytes_of, refused = _ranges(plan, seen, parameters)
        if not refused:
            break
        reasons |= refused
    treated = QuantizeLayers(plan, bytes_of, weights)(mod) if plan.layers else mod
    decisions = [
        _decision(layer, treatments[name], reasons.get(name), weights.get(name))
        for name, layer in layers.items()
    ]
    return Rewritten(treated, decisions, reference=treated)


def _weight(layer: Layer, parameters: Mapping) -> QuantizedWeight:
    """The layer's weight in bytes. Raises ValueError with the reason why it cannot be."""
    weight = layer.weight
    if weight.dtype != np.float32:
        raise ValueError(f"weights are {weight.dtype}, int8 takes float32")
    if overflows(weight.shape):
        raise ValueError(f"sums of {int(np.prod(weight.shape[1:]))} products may not fit 32 bits")
    values, scale = quantize_weight(weight, per_channel=bool(parameters["per_channel"]))
    return QuantizedWeight(values, scale, _grain(values, layer, parameters.get("grain")))


def _grain(values: np.ndarray, layer: Layer, asked: object) -> str | None:
    """The coarsest grain whose zeros the weight has and that pays, None if it is to be computed dense."""
    density = np.count_nonzero(values) / values.size
    if density >= _SPARSE_BELOW or layer.attrs.get("groups", 1) > 1:
        return None
    for grain in [str(asked)] if asked else list(reversed(GRAINS)):
        stored = Grain.parse(grain).stored(values) / values.size
        if stored <= min(_SPARSE_BELOW, density * _TOLERATED_FILL):
            return grain
    return None


def _observe(
    mod: tvm.IRModule,
    plan: BytesPlan,
    seen: dict[str, Statistics],
    parameters: Mapping[str, Mapping],
    context: Context,
) -> None:
    """Statistics of every source of the plan that has none yet, by name."""
    names = [var.name for group in plan.sources().values() for var in group]
    missing = [name for name in dict.fromkeys(names) if name not in seen]
    if not missing:
        return
    histogram = any(p["observer"] in NEED_HISTOGRAM for p in parameters.values())
    found = {name: Statistics(keep_histogram=histogram) for name in missing}
    for sample in context.observe(mod, missing):
        for name in missing:
            found[name].add(sample[name])
    seen |= found


def _ranges(
    plan: BytesPlan, seen: Mapping[str, Statistics], parameters: Mapping[str, Mapping]
) -> tuple[dict[relax.Var, Affine], dict[str, str]]:
    """The bytes of every group, and the layers that read a group without any, with the reason."""
    readers: dict[relax.Var, list[str]] = {}
    for call in plan.layers.values():
        readers.setdefault(plan.group(call.args[0]), []).append(attrs_of(call)["name"])
    default = next(iter(parameters.values()))
    bytes_of, refused = {}, {}
    for group, sources in plan.sources().items():
        names = readers.get(group, [])
        chosen = parameters[names[0]] if names else default
        try:
            bytes_of[group] = choose_range(
                [seen[var.name] for var in sources],
                chosen["observer"],
                symmetric=chosen["symmetric"],
                percentile=chosen["percentile"],
            )
        except ValueError as error:
            refused |= {name: f"its input has no bytes: {error}" for name in names}
            if not names:  # held for the sake of an addition; its readers' layers decide
                refused |= _behind(plan, sources, str(error))
    return bytes_of, refused


def _behind(plan: BytesPlan, sources: Sequence[relax.Var], error: str) -> dict[str, str]:
    """The layers whose results these sources are made of: what is left float cannot be held."""
    found: dict[str, str] = {}
    pending, done = list(sources), set()
    while pending and not found:
        var = pending.pop()
        if var in done:
            continue
        done.add(var)
        if var in plan.layers:
            found[attrs_of(plan.layers[var])["name"]] = f"its result has no bytes: {error}"
        value = plan.uses.definitions.get(var)
        if value is not None:
            pending += tensors(value)
    return found


def _decision(
    layer: Layer, treatment: Treatment, declined: str | None, weight: QuantizedWeight | None
) -> Decision:
    from passes.treat_layers import describe_weight

    taken = declined is None
    found = describe_weight(layer.weight)
    if taken and weight is not None and weight.grain is not None:
        found = {**found, "grain": weight.grain}
    return Decision(
        layer=layer.name,
        operator=layer.operator,
        weight_shape=tuple(layer.weight.shape),
        asked=treatment.family,
        treatment=treatment.family if taken else "dense",
        declined=declined,
        found=found,
        parameters=dict(treatment.parameters),
    )


def prune(weight: np.ndarray, *, density: float | None = None, grain: str = "in:4", **_other):
    """The weight with blocks of zeros that the int8 kernels skip; see `passes.sparse.prune`."""
    from passes.sparse.prune import prune as prune_grain

    return prune_grain(weight, density=density, grain=grain)
