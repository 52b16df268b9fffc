# SPDX-License-Identifier: Apache-2.0
"""High-bias absorption: move what is always added to a channel behind its ReLU into the next layer's bias.

    rewrite: conv2d(relu(conv2d(x, w1) + b), w2)  ->  conv2d(relu(conv2d(x, w1) + (b - c)), w2) + w2 . c
    requires: canonical, batch norm folded, NCHW; calibration data
    ensures: the same function wherever a channel stays above its smallest calibrated value c > 0

Equalization can leave channels whose values all lie far from zero and widen the range of the whole
tensor (Nagel et al.). Behind a zero padding the shifted zeros would mean something else, so a padded
consumer ends it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.channel_flow import (
    Consumer,
    Flow,
    Step,
    flows,
    input_columns,
    map_constant,
    replace_values,
)
from passes.family import Observe
from passes.fold_batch_norm import FoldBatchNorm
from passes.layers import DENSE, attrs_of, const_array, is_call, shape_of
from passes.rewriting import constant

# A shift smaller than this share of the channel's range gains nothing.
_SMALLEST_SHARE = 1 / 64
_SHIFTED_BY_MEANS = ("relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.mean", "relax.reshape")


@dataclass(frozen=True)
class Absorbed:
    """`shifts` has what was taken off each output channel, by layer; `reasons` why other layers kept theirs."""

    mod: tvm.IRModule
    shifts: Mapping[str, np.ndarray]
    reasons: Mapping[str, str]


def absorb_biases(
    mod: tvm.IRModule, observe: Observe, layers: Collection[str] | None = None
) -> Absorbed:
    """Absorb in every flow whose producer and consumers are all in `layers` (None: all)."""
    found, reasons = flows(mod)
    candidates: list[tuple[Flow, Step]] = []
    for flow in found:
        names = [attrs_of(call)["name"] for call in (flow.call, *(c.call for c in flow.consumers))]
        if layers is not None and not set(names) <= set(layers):
            continue
        bias = _bias_step(flow)
        if isinstance(bias, str):
            reasons[names[0]] = bias
        else:
            candidates.append((flow, bias))
    ranges = _channel_ranges(mod, [bias for _flow, bias in candidates], observe)
    changes: dict = {}
    shifts: dict[str, np.ndarray] = {}
    for (flow, bias), (low, high) in zip(candidates, ranges):
        shift = np.where(low > _SMALLEST_SHARE * (high - low), np.maximum(low, 0), 0)
        if np.any(shift):
            shifts[attrs_of(flow.call)["name"]] = shift
            _shift(flow, bias, shift, changes)
    done = FoldBatchNorm()(replace_values(mod, changes)) if changes else mod
    return Absorbed(done, shifts, reasons)


def _bias_step(flow: Flow) -> Step | str:
    """The bias of the flow's producer, or why nothing can be absorbed."""
    first = [s for s in flow.steps if any(a.same_as(flow.producer) for a in s.value.args)]
    if len(first) != 1 or first[0].value.op.name != "relax.add":
        return "it has no bias"
    seen_relu = False
    for step in flow.steps:
        name = step.value.op.name
        if step is first[0]:
            continue
        if name == "relax.nn.relu":
            seen_relu = True
        elif name in _SHIFTED_BY_MEANS:
            if any(int(p) for p in getattr(step.value.attrs, "padding", None) or ()):
                return "a padded pooling follows"
        elif name != "relax.minimum":
            return f"{name.split('.')[-1]} follows"
    if not seen_relu:
        return "no ReLU follows"
    for consumer in flow.consumers:
        if any(attrs_of(consumer.call).get("padding", ())):
            return f"{attrs_of(consumer.call)['name']} pads its input"
    return first[0]


def _channel_ranges(
    mod: tvm.IRModule, steps: list[Step], observe: Observe
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The smallest and the largest calibrated value of each channel."""
    if not steps:
        return []
    lows = [np.full(shape_of(s.value)[s.axis.axis], np.inf) for s in steps]
    highs = [-low for low in lows]
    for sample in observe(mod, [s.var.name for s in steps]):
        for step, low, high in zip(steps, lows, highs):
            values = sample[step.var.name]
            others = tuple(i for i in range(values.ndim) if i != step.axis.axis)
            np.minimum(low, values.min(axis=others), out=low)
            np.maximum(high, values.max(axis=others), out=high)
    return list(zip(lows, highs))


def _shift(flow: Flow, bias: Step, shift: np.ndarray, changes: dict) -> None:
    for step in flow.steps:
        if step is bias or step.value.op.name == "relax.minimum":
            spread = step.axis.spread(shift, len(shape_of(step.value)))
            changes[step.var] = lambda value, _graph, s=spread: map_constant(value, lambda c: c - s)
    for consumer in flow.consumers:
        extra = _response(consumer, shift)
        before = changes.get(consumer.var)

        def add(value: relax.Call, graph, extra=extra, before=before) -> relax.Call:
            value = before(value, graph) if before is not None else value
            return relax.op.add(value, constant(extra))

        changes[consumer.var] = add


def _response(consumer: Consumer, shift: np.ndarray) -> np.ndarray:
    """What the layer makes of a constant input, shaped to be added to its result."""
    weight = const_array(consumer.call.args[1]).astype("float64")
    product = weight * input_columns(consumer.call, shift, consumer.inner)
    total = product.reshape(len(weight), -1).sum(axis=1).astype("float32")
    return total if is_call(consumer.call, DENSE) else total.reshape(1, -1, 1, 1)
