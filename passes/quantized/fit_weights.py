# SPDX-License-Identifier: Apache-2.0
"""Weights as signed bytes, fitted to what the layer sees: clipping, rounding by reconstruction, bias correction.

    clip_weights      the scale with the least squared error of rounding and clipping, not the one that holds the largest
    rounding          "nearest", or "reconstruct": up or down so that the layer's outputs change least (`round_weights.py`)
    bias_correction   the mean change of each output channel is taken off its bias

All per layer and independent of the kernels. What a layer sees is observed on the float graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from passes.channel_flow import Uses, replace_values
from passes.family import Layer, Observe
from passes.fold_batch_norm import FoldBatchNorm
from passes.layers import CONV2D, DENSE, attrs_of, is_call, is_layer
from passes.numpy_images import conv2d
from passes.quantized.quantize_layers import QuantizedWeight
from passes.quantized.round_weights import gram_matrix, round_weight
from passes.quantized.weights import LARGEST, quantize_weight
from passes.rewriting import constant

# Candidates for a clipped scale: of n weights an outlier is worth cutting by about n / 100,000 of itself.
_SHRINKS = 1 - 0.7 * np.linspace(0, 1, 57) ** 2
# Products of inputs are kept per input channel and tap: a matrix of this many rows at most.
_LARGEST_GRAM = 4608


@dataclass(frozen=True)
class Fitted:
    """`bias` is what to add to a layer's bias, `notes` what was done or why not; both by layer."""

    weights: Mapping[str, QuantizedWeight]
    bias: Mapping[str, np.ndarray]
    notes: Mapping[str, Mapping[str, object]]


@dataclass
class LayerInputs:
    """What a layer's input was on the calibration data: its mean, and the products of its entries."""

    samples: int = 0
    total: np.ndarray | float = 0.0
    gram: np.ndarray | None = None
    reasons: list[str] = field(default_factory=list)

    @property
    def mean(self) -> np.ndarray:
        """The mean input, [C, H, W] or [K]."""
        return self.total / self.samples


def fit_weights(
    mod: tvm.IRModule, parameters: Mapping[str, Mapping], observe: Observe | None
) -> Fitted:
    """The weights of the layers named in `parameters`. Raises ValueError, as `quantize_weight`, naming the layer."""
    uses = Uses(mod)
    layers = {attrs_of(b.value)["name"]: b for b in uses.bindings if is_layer(b.value)}
    inputs = _observe_inputs(mod, {n: layers[n].value for n in parameters}, parameters, observe)
    weights, bias, notes = {}, {}, {}
    for name, of in parameters.items():
        layer = Layer(layers[name].value)
        seen = inputs.get(name)
        weights[name], notes[name] = _fit(layer, of, seen)
        if of.get("bias_correction") and seen is not None:
            bias[name] = mean_error(layer, weights[name], seen.mean)
            notes[name]["bias_correction"] = float(np.abs(bias[name]).max())
    return Fitted(weights, bias, notes)


def _fit(layer: Layer, of: Mapping, seen: LayerInputs | None) -> tuple[QuantizedWeight, dict]:
    weight, notes = layer.weight, {}
    values, scale = quantize_weight(weight, per_channel=of.get("per_channel", True))
    if of.get("clip_weights"):
        scale = clipped_scale(weight, scale, per_channel=of.get("per_channel", True))
        values = _nearest(weight, scale)
        notes["clip_weights"] = float(np.mean(np.abs(values) == LARGEST))
    if of.get("rounding") == "reconstruct":
        if seen is None or seen.gram is None:
            notes["rounding"] = (
                "; ".join(seen.reasons) if seen is not None else "no calibration data"
            )
        else:
            groups = layer.attrs.get("groups", 1)
            before = values
            values = round_weight(weight, scale, seen.gram, groups)
            notes["rounding"] = float(np.mean(values != before))
    return QuantizedWeight(values, scale), notes


def _rows(scale: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return scale.astype("float64").reshape(-1, *[1] * (weight.ndim - 1))


def _nearest(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    steps = np.rint(weight.astype("float64") / _rows(scale, weight))
    return np.clip(steps, -LARGEST, LARGEST).astype("int8")


def clipped_scale(weight: np.ndarray, scale: np.ndarray, *, per_channel: bool = True) -> np.ndarray:
    """The scale [O], at most as large as the one given, with the least squared error, per channel or for all."""
    flat = weight.reshape(len(weight), -1).astype("float64")
    losses = []
    for shrink in _SHRINKS:
        tried = (scale * np.float32(shrink)).astype("float64")[:, None]
        error = np.clip(np.rint(flat / tried), -LARGEST, LARGEST) * tried - flat
        losses.append((error**2).sum(axis=1))
    losses = np.array(losses)
    if not per_channel:
        losses = np.broadcast_to(losses.sum(axis=1, keepdims=True), losses.shape)
    return scale * _SHRINKS[losses.argmin(axis=0)].astype("float32")


def mean_error(layer: Layer, weight: QuantizedWeight, mean_input: np.ndarray) -> np.ndarray:
    """What to add to each output channel so that its mean is what the float weight gives.

    The layer is linear, so that the mean change of its outputs is its response, to the mean input, of the change of the
    weight; borders included.
    """
    error = layer.weight - weight.values * _rows(weight.scale, layer.weight)
    if layer.operator == DENSE:
        return (error @ mean_input).astype("float32")
    response = conv2d(layer.attrs, mean_input[None].astype("float64"), error)
    return response.mean(axis=(0, 2, 3)).astype("float32")


def _observe_inputs(
    mod: tvm.IRModule, calls: Mapping[str, relax.Call], parameters: Mapping, observe: Observe | None
) -> dict[str, LayerInputs]:
    """The inputs of the layers that need to know them."""
    wanted = {n: c for n, c in calls.items() if _needs_inputs(parameters[n])}
    if observe is None or not wanted:
        return {}
    found = {name: LayerInputs() for name in wanted}
    names = list(dict.fromkeys(c.args[0].name for c in wanted.values()))
    for sample in observe(mod, names):
        for name, call in wanted.items():
            _add_sample(found[name], Layer(call), sample[call.args[0].name], parameters[name])
    return {name: inputs for name, inputs in found.items() if inputs.samples}


def _needs_inputs(of: Mapping) -> bool:
    return bool(of.get("bias_correction")) or of.get("rounding") == "reconstruct"


def _add_sample(into: LayerInputs, layer: Layer, x: np.ndarray, of: Mapping) -> None:
    x = x if is_call(layer.call, CONV2D) else x.reshape(-1, x.shape[-1])
    into.samples += len(x)
    into.total = into.total + x.sum(axis=0, dtype="float64")
    if of.get("rounding") != "reconstruct":
        return
    size = int(np.prod(layer.weight.shape[1:]))
    if size > _LARGEST_GRAM:
        into.reasons = [f"{size} weights per output are more than {_LARGEST_GRAM}"]
        return
    gram = gram_matrix(layer, x)
    into.gram = gram if into.gram is None else into.gram + gram


def add_biases(mod: tvm.IRModule, bias: Mapping[str, np.ndarray]) -> tvm.IRModule:
    """`mod` with a vector added to the result of each of these layers; merged with the bias that is there."""

    def change(extra: np.ndarray):
        def add(call: relax.Call, _graph) -> relax.Call:
            shaped = extra.reshape(1, -1, 1, 1) if is_call(call, CONV2D) else extra
            return relax.op.add(call, constant(shaped))

        return add

    changes = {
        b.var: change(bias[name])
        for b in Uses(mod).bindings
        if is_layer(b.value) and np.any(bias.get(name := attrs_of(b.value)["name"], 0))
    }
    return FoldBatchNorm()(replace_values(mod, changes)) if changes else mod
