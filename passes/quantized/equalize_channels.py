# SPDX-License-Identifier: Apache-2.0
"""Cross-layer equalization: give the channels between two layers weights of similar size.

    rewrite: conv2d(relu(conv2d(x, w1) + b), w2)  ->  conv2d(relu(conv2d(x, w1 / s) + b / s), w2 * s)
             minimum(relu(...), 6)                ->  minimum(relu(...), 6 / s)       ReLU6 keeps its meaning
    requires: canonical, batch norm folded, NCHW
    ensures: the same function bit by bit; every s is a power of two

With s = sqrt(r1 / r2), where r1 and r2 are the largest weights that make and read a channel, both
become equal (Nagel et al., "Data-Free Quantization through Weight Equalization and Bias
Correction"). Pairs share layers, depthwise ones both of theirs, so sweeps are repeated until they
settle. Rounding s to a power of two costs at most a factor of sqrt(2) in balance and makes the
rewriting exact in floating point.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.channel_flow import (
    Flow,
    Step,
    flows,
    input_columns,
    input_ranges,
    map_constant,
    output_rows,
    replace_values,
    with_weight,
)
from passes.layers import attrs_of, const_array

_SWEEPS = 50
_SETTLED = 2.0**-6
# Beyond this a channel is as good as dead, and its bias would dwarf every other.
_LARGEST_EXPONENT = 16


@dataclass(frozen=True)
class Equalized:
    """`scales` has the factor of each output channel of each layer that was changed, `reasons` why others were not."""

    mod: tvm.IRModule
    scales: Mapping[str, np.ndarray]
    reasons: Mapping[str, str]


def equalize_channels(mod: tvm.IRModule, layers: Collection[str] | None = None) -> Equalized:
    """Equalize every pair of layers whose producer and consumers are all in `layers` (None: all)."""
    found, reasons = flows(mod)
    chosen = [f for f in found if layers is None or set(_names(f)) <= set(layers)]
    exponents = _balance(chosen)
    changed = [(f, 2.0**e) for f, e in zip(chosen, exponents) if np.any(e)]
    scales = {attrs_of(f.call)["name"]: s for f, s in changed}
    return Equalized(apply_scales(mod, changed), scales, reasons)


def apply_scales(mod: tvm.IRModule, scaled: Sequence[tuple[Flow, np.ndarray]]) -> tvm.IRModule:
    """`mod` with each flow's channels divided by `s` where they are made and multiplied where they are read."""
    factors: dict[relax.Var, np.ndarray] = {}
    changes: dict = {}

    def multiply(var: relax.Var, factor: np.ndarray) -> None:
        factors[var] = factors[var] * factor if var in factors else factor
        changes[var] = lambda call, _graph: with_weight(call, _scaled(call, factors[var]))

    for flow, s in scaled:
        multiply(flow.producer, output_rows(flow.call, 1 / s))
        for consumer in flow.consumers:
            multiply(consumer.var, input_columns(consumer.call, s, consumer.inner))
        for step in flow.steps:
            if step.has_constant:
                changes[step.var] = _divide_constant(step, s)
    return replace_values(mod, changes)


def _scaled(call: relax.Call, factor: np.ndarray) -> np.ndarray:
    weight = const_array(call.args[1])
    return (weight * factor).astype(weight.dtype)


def _divide_constant(step: Step, s: np.ndarray):
    spread = step.axis.spread(s, len(step.value.ty.shape))

    def change(value: relax.Call, _graph) -> relax.Call:
        # A zero, as in maximum(x, 0), is the same for every channel.
        return map_constant(value, lambda c: c / spread if np.any(c) else c)

    return change


def _names(flow: Flow) -> list[str]:
    return [attrs_of(call)["name"] for call in (flow.call, *(c.call for c in flow.consumers))]


def _balance(chosen: Sequence[Flow]) -> list[np.ndarray]:
    """The exponent of two of every channel's factor, one vector per flow."""
    weights = {}
    for flow in chosen:
        for call in (flow.call, *(c.call for c in flow.consumers)):
            weights[attrs_of(call)["name"]] = np.abs(const_array(call.args[1]).astype("float64"))
    totals = [np.zeros(flow.channels) for flow in chosen]
    for _ in range(_SWEEPS):
        largest = 0.0
        for flow, total in zip(chosen, totals):
            step = _log_factors(flow, weights)
            step = np.clip(total + step, -_LARGEST_EXPONENT, _LARGEST_EXPONENT) - total
            total += step
            _apply(flow, weights, 2.0**step)
            largest = max(largest, np.abs(step).max(initial=0))
        if largest < _SETTLED:
            break
    return [np.rint(total) for total in totals]


def _log_factors(flow: Flow, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """log2 of sqrt(r1 / r2) per channel; 0 for a channel that one side does not use."""
    made = weights[attrs_of(flow.call)["name"]].reshape(flow.channels, -1).max(axis=1)
    read = np.max(
        [input_ranges(c.call, weights[attrs_of(c.call)["name"]], c.inner) for c in flow.consumers],
        axis=0,
    )
    used = (made > 0) & (read > 0)
    return 0.5 * np.log2(np.where(used, made, 1) / np.where(used, read, 1))


def _apply(flow: Flow, weights: dict[str, np.ndarray], s: np.ndarray) -> None:
    name = attrs_of(flow.call)["name"]
    weights[name] = weights[name] * output_rows(flow.call, 1 / s)
    for consumer in flow.consumers:
        name = attrs_of(consumer.call)["name"]
        weights[name] = weights[name] * input_columns(consumer.call, s, consumer.inner)
