# SPDX-License-Identifier: Apache-2.0
"""Take the layers asked of the family "int8", or say why not: calibrate, plan, quantize.

Layers decline one by one: for their weights, or because what calibration shows of their input has no scale. The plan is
made anew without them until all that is left can be computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import tvm
from tvm import relax

from passes.family import Context, Layer, Observe, Rewritten
from passes.layers import attrs_of
from passes.quantized.fit_weights import add_biases, fit_weights
from passes.quantized.observers import Statistics
from passes.quantized.operators import GRAINS, QUAD
from passes.quantized.parameters import DEFAULTS
from passes.quantized.plan_bytes import BytesPlan, plan_bytes, tensors
from passes.quantized.quantize_layers import QuantizedWeight, QuantizeLayers
from passes.quantized.ranges import NEED_HISTOGRAM, Affine, choose_range
from passes.quantized.rank_sensitivity import joined, most_sensitive, rank_sensitivity
from passes.quantized.store_tables import StoreTables
from passes.quantized.switch_layers import SWITCHES, switch_layers
from passes.quantized.take_imported import is_quantized, take_imported
from passes.quantized.tricks import prepare
from passes.quantized.weights import overflows, quantize_weight
from passes.rewriting import variables
from passes.sparse.grains import Grain, as_4d
from passes.treat_layers import decide, layers_of
from passes.treatment import Decision, Treatment
from schedules.errors import Declined, UserError

# A kernel that skips zeros pays below this share of blocks that are not zero.
_SPARSE_BELOW = 0.6
# The same where a pixel's channels fill no quad: whole rows of a dense kernel leave fewer gaps. Measured on the first layer of
# a ResNet.
_SPARSE_IMAGE_BELOW = 0.25
# A grain is what the zeros support while its blocks hold at most this many times the non-zeros.
_TOLERATED_FILL = 1.05


def rewrite(mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context) -> Rewritten:
    """See `passes.family.Family`. Raises UserError without calibration data."""
    if is_quantized(mod):
        return take_imported(mod, treatments)
    if context.observe is None:
        raise UserError(
            "int8 needs samples of the model's inputs, to see how large activations become",
            where="calibration",
            todo="Give --calibration FILE.npz or a directory; --calibration random only to try out speed",
        )
    calibrated = Calibrated.of(mod, treatments, context)
    for name, noise in calibrated.most_sensitive(context.left).items():
        calibrated.reasons[name] = (
            f"kept in float32: alone it would add noise of {noise:.2g} of the output's power"
        )
    treated = calibrated.quantize()
    tables = StoreTables()
    if treated is not calibrated.mod and any(p["tables"] for p in calibrated.parameters.values()):
        treated = tables(treated)
    decisions = [
        calibrated.decision(layer, treatments[layer.name])
        for layer in layers_of(mod)
        if layer.name in treatments
    ]
    return Rewritten(
        treated, decisions, reference=treated, floats=calibrated.mod, notes=tables.notes
    )


@dataclass
class Calibrated:
    """The float graph after its tricks, weights in bytes, and what was seen of activations so far, by name.

    `reasons` says by layer why it is left float; `notes` what each trick did; `unused` why zeros are multiplied.
    """

    mod: tvm.IRModule
    observe: Observe
    parameters: Mapping[str, Mapping]
    weights: dict[str, QuantizedWeight]
    reasons: dict[str, str]
    notes: Mapping[str, Mapping[str, object]]
    unused: Mapping[str, str]
    seen: dict[str, Statistics] = field(default_factory=dict)

    @staticmethod
    def of(mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context) -> Calibrated:
        parameters = {n: {**DEFAULTS, **t.parameters} for n, t in treatments.items()}
        prepared = prepare(mod, treatments, context)
        layers = {x.name: x for x in layers_of(prepared.mod) if x.name in treatments}
        reasons = {n: why for n, layer in layers.items() if (why := _unsuitable(layer))}
        fitted = fit_weights(
            prepared.mod,
            {n: parameters[n] for n in layers if n not in reasons},
            context.observe,
        )
        grains = {
            n: _grain(w.values, layers[n], parameters[n].get("grain"))
            for n, w in fitted.weights.items()
        }
        unused = {n: g.reason for n, g in grains.items() if isinstance(g, Declined)}
        weights = {
            n: replace(w, grain=None if n in unused else grains[n])
            for n, w in fitted.weights.items()
        }
        notes = {n: {**prepared.notes.get(n, {}), **fitted.notes.get(n, {})} for n in layers}
        corrected = add_biases(prepared.mod, fitted.bias)
        return Calibrated(corrected, context.observe, parameters, weights, reasons, notes, unused)

    def most_sensitive(self, left: Collection[str] = ()) -> dict[str, float]:
        """The layers that the recipe wants kept float, with the noise that each would add: of those with a rule's count, as
        many as it says, those that were `left` float before among them."""
        able: dict[int, set[str]] = {}
        for name, parameters in self.parameters.items():
            if count := int(parameters["keep_float"]):
                able.setdefault(count, set()).add(name)
        if not able:
            return {}
        plan, bytes_of = self._plan(set(self.weights), self.reasons)
        switched, order = switch_layers(self.mod, plan, bytes_of, self.weights)
        names = [var.name for var in variables(switched["main"].body.body)]

        def outputs(chosen: Collection[str]) -> list[np.ndarray]:
            switches = np.array([n in chosen for n in order], "float32")
            return joined(self.observe(switched, names, {SWITCHES: switches}), names)

        found = rank_sensitivity(
            [n for n in order if any(n in names for names in able.values())], outputs
        )
        kept = {n: noise for n, noise in found.items() if n in left}
        for count, names in able.items():
            others = {n: found[n] for n in found if n in names and n not in kept}
            more = most_sensitive(others, max(0, count - len(kept.keys() & names)))
            kept |= {n: found[n] for n in more}
        return kept

    def quantize(self) -> tvm.IRModule:
        """The graph on bytes, but for the layers that have a reason not to be."""
        plan, bytes_of = self._plan(set(self.weights), self.reasons)
        return QuantizeLayers(plan, bytes_of, self.weights)(self.mod) if plan.layers else self.mod

    def _plan(
        self, chosen: set[str], reasons: dict[str, str]
    ) -> tuple[BytesPlan, dict[relax.Var, Affine]]:
        """The plan for these layers and the bytes of its groups; layers that cannot be on bytes get a reason."""
        while True:
            plan = plan_bytes(self.mod, chosen - set(reasons))
            self._observe(plan)
            bytes_of, refused = _ranges(plan, self.seen, self.parameters)
            if not refused:
                return plan, bytes_of
            reasons |= refused

    def _observe(self, plan: BytesPlan) -> None:
        """Statistics of every source of the plan that has none yet."""
        names = [var.name for group in plan.sources().values() for var in group]
        missing = [name for name in dict.fromkeys(names) if name not in self.seen]
        if not missing:
            return
        histogram = any(p["observer"] in NEED_HISTOGRAM for p in self.parameters.values())
        found = {name: Statistics(keep_histogram=histogram) for name in missing}
        for sample in self.observe(self.mod, missing):
            for name in missing:
                found[name].add(sample[name])
        self.seen |= found

    def decision(self, layer: Layer, treatment: Treatment) -> Decision:
        declined = self.reasons.get(layer.name)
        found: dict[str, object] = {}
        if declined is None:
            if (grain := self.weights[layer.name].grain) is not None:
                found["grain"] = grain
            elif layer.name in self.unused:
                found["zeros_unused"] = self.unused[layer.name]
            if notes := self.notes.get(layer.name):
                found["tricks"] = dict(notes)
        return decide(layer, treatment, declined, found=found)


def _unsuitable(layer: Layer) -> str | None:
    """Why a layer's weight cannot be bytes, whatever its input."""
    weight = layer.weight
    if weight.dtype != np.float32:
        return f"weights are {weight.dtype}, int8 takes float32"
    if overflows(weight.shape):
        return f"sums of {math.prod(weight.shape[1:])} products may not fit 32 bits"
    try:
        quantize_weight(weight)
    except ValueError as error:
        return str(error)
    return None


def _grain(values: np.ndarray, layer: Layer, asked: object) -> str | Declined | None:
    """The coarsest grain whose zeros the weight has and that pays; None for a weight with few zeros, of which none are
    asked for, else why its zeros are multiplied like other weights."""
    density = np.count_nonzero(values) / values.size
    if density >= _SPARSE_BELOW:
        few = f"{density:.0%} of the weight are not zero, above the {_SPARSE_BELOW:.0%} up to which skipping pays"
        return Declined(few) if asked else None
    if layer.attrs.get("groups", 1) > 1:
        return Declined("no int8 kernel skips zeros of a convolution in groups")
    _, channels, *kernel = as_4d(values.shape)
    if channels < QUAD and math.prod(kernel) > 1 and density >= _SPARSE_IMAGE_BELOW:
        return Declined(
            f"{channels} input channels fill no quad of 4: from a density of {_SPARSE_IMAGE_BELOW:.0%} on whole kernel "
            "rows are as fast"
        )
    for grain in [str(asked)] if asked else list(reversed(GRAINS)):
        held = Grain.parse(grain).pattern(values).mean()
        if held <= min(_SPARSE_BELOW, density * _TOLERATED_FILL):
            return grain
    return Declined(f"the zeros do not lie in grains of {asked or ' or '.join(GRAINS)}")


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


def prune(weight: np.ndarray, *, density: float | None = None, grain: str = "in:4", **_other):
    """The weight with blocks of zeros that the int8 kernels skip; see `passes.sparse.prune`."""
    from passes.sparse.prune import prune as prune_grain

    return prune_grain(weight, density=density, grain=grain)
