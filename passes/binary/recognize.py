# SPDX-License-Identifier: Apache-2.0
"""Find the binary layers of a canonical graph: weights of +-s per output channel, and inputs that are a sign.

    kerf.conv2d(sign(x), w), |w[o]| one number s[o]; with padding of zeros, or of +-1 by relax.nn.pad before it
    kerf.conv2d(max_pool2d(sign(x)), w);   kerf.dense(reshape(sign(x)), w)
    kerf.conv2d(x, w), of which the weights alone are binary

A latent weight's sign, XNOR-Net's mean |w| and a folded batch norm are all in the constant w by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax

from passes.binary.steps import Chain, Plane, Steps, chains, float_steps
from passes.channel_flow import Uses
from passes.family import Layer
from passes.layers import is_call, is_layer, shape_of
from passes.rewriting import ints
from schedules.bit_words import WORD_BITS
from schedules.errors import Declined


@dataclass(frozen=True)
class BinaryWeight:
    """signs int8 +-1 in the weight's shape, scale float32 [O]: weight = signs * scale."""

    signs: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class BinaryInput:
    """What a layer reads: `chain` makes signs of its root, then perhaps max pooling, padding or reshaping follow.

    `pool` is the call of max_pool2d, `padding` (top, left, bottom, right) of `pad_value` 0 or +-1, `flat` the shape it is
    reshaped to.
    """

    chain: Chain
    steps: Steps
    pool: relax.Call | None = None
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    pad_value: int = 0
    flat: tuple[int, ...] | None = None


@dataclass(frozen=True)
class BinaryLayer:
    layer: Layer
    weight: BinaryWeight
    input: BinaryInput


@dataclass(frozen=True)
class SignWeights:
    """A layer of binary weights whose inputs are real numbers, for `reason`."""

    layer: Layer
    weight: BinaryWeight
    reason: str


def binary_weight(weight: np.ndarray) -> BinaryWeight | None:
    """A weight whose entries have one absolute value per output channel; None for any other. A scale of 0 is allowed."""
    rows = np.abs(weight).reshape(weight.shape[0], -1)
    if weight.dtype != np.float32 or rows.shape[1] == 0 or not np.isfinite(rows).all():
        return None
    scale = rows[:, 0]
    if not (rows == scale[:, None]).all() or not scale.any():
        return None
    return BinaryWeight(np.where(weight >= 0, 1, -1).astype(np.int8), scale.copy())


def _is_pad(value) -> bool:
    return is_call(value, "relax.nn.pad") and str(value.attrs.pad_mode) == "constant"


def _image_padding(call: relax.Call) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) of a pad of an NCHW image; None if it pads other axes."""
    widths = ints(call.attrs.pad_width)
    if len(widths) != 8 or any(widths[:4]) or any(w < 0 for w in widths):
        return None
    top, bottom, left, right = widths[4:]
    return top, left, bottom, right


def binary_input(layer: Layer, uses: Uses) -> BinaryInput | Declined:
    """How the input of a layer is a sign, or why it is not one."""
    var = layer.call.args[0]
    attrs, definition = layer.attrs, uses.definitions.get
    padding, pad, pool, flat = tuple(attrs.get("padding", (0, 0, 0, 0))), 0.0, None, None
    if _is_pad(definition(var)) and (around := _image_padding(definition(var))):
        if any(padding):
            return Declined("it is padded twice, by a constant and by zeros")
        padding, pad = around, float(definition(var).attrs.pad_value)
        var = definition(var).args[0]
    if is_call(definition(var), "relax.reshape") and layer.weight.ndim == 2:
        flat = shape_of(var)
        var = definition(var).args[0]
    if is_call(definition(var), "relax.nn.max_pool2d"):
        pool = definition(var)
        var = pool.args[0]
    if not isinstance(var, relax.Var):
        return Declined("its input is a constant")
    axis = len(shape_of(var)) - 1 if len(shape_of(var)) != 4 else 1
    if layer.weight.ndim == 2 and flat is None:
        axis = len(shape_of(var)) - 1
    found = _sign(var, uses, axis)
    if found is None:
        return Declined("its inputs are not signs of anything: +-1 per element")
    chain, steps = found
    if pad not in (0.0, steps.size, -steps.size):
        return Declined(f"it is padded with {pad:g}, which is neither 0 nor a sign")
    if flat is not None and (flat[0] != shape_of(var)[0] or len(flat) != 2):
        return Declined("its input is reshaped to other rows")
    return BinaryInput(chain, steps, pool, padding, int(np.sign(pad)), flat)


def _sign(var: relax.Var, uses: Uses, axis: int) -> tuple[Chain, Steps] | None:
    """The longest chain to look through: as far up as nothing else reads what is skipped."""
    found = None
    for chain in chains(uses, var, axis):
        if found is not None and not found[0].is_only_reader():
            break
        steps = float_steps(chain)
        if steps is not None:
            found = (chain, steps)
        elif found is not None:
            break
    return found


def recognize(
    layer: Layer, uses: Uses, zero: str = "exact"
) -> BinaryLayer | SignWeights | Declined:
    """A layer as a binary one, as one whose weights alone are binary, or what keeps it from being either.

    `zero`: where the model has sign(0) = 0, compute that ("exact") or take it for "+1" or "-1".
    """
    weight = binary_weight(layer.weight)
    given = binary_input(layer, uses)
    if zero != "exact" and not isinstance(given, Declined):
        # Of the two comparisons the first holds at 0 where the sign rises; where it falls, the second.
        planes = given.steps.planes
        given = replace(given, steps=replace(given.steps, planes=(_one_of(planes, zero == "+1"),)))
    if weight is None and isinstance(given, Declined):
        return Declined(
            "weights and inputs are real numbers: a network must be trained to be binary; "
            "binarize = true tries it all the same"
        )
    if weight is None:
        return Declined("its inputs are signs, its weights are not +-s per output channel")
    groups = layer.attrs.get("groups", 1)
    if groups > 1 and layer.weight.shape[1] < 8:
        return Declined(f"groups of {layer.weight.shape[1]} channels fill no words of {WORD_BITS}")
    if isinstance(given, Declined):
        return SignWeights(layer, weight, given.reason)
    return BinaryLayer(layer, weight, given)


def two_planes(layer: BinaryLayer) -> str | None:
    """Why a layer whose inputs are also 0 cannot be computed as one of twice the channels; None if it can, or need not."""
    if len(layer.input.steps.planes) < 2:
        return None
    todo = "zero = '+1' or '-1' takes it for one of the two"
    if layer.layer.weight.shape[1] % WORD_BITS:
        return f"the sign of 0 is 0 in this model, exact only for multiples of {WORD_BITS} channels; {todo}"
    if layer.layer.attrs.get("groups", 1) > 1:
        return f"the sign of 0 is 0 in this model, exact only without groups; {todo}"
    return None


def _one_of(planes: tuple[Plane, ...], positive: bool) -> Plane:
    """The plane, channel by channel, that is +1 (or -1) at the numbers between two planes' thresholds."""
    first, last = planes[0], planes[-1]
    threshold = np.where(first.flip != positive, first.threshold, last.threshold)
    return Plane(threshold.astype(first.threshold.dtype), first.flip)


def found_in(mod: tvm.IRModule) -> Mapping[str, Mapping]:
    """What the graph shows of binary layers, by name: 'binary' is weights, inputs or both."""
    uses = Uses(mod)
    found = {}
    for binding in uses.bindings:
        if not is_layer(binding.value):
            continue
        layer = Layer(binding.value)
        weights = binary_weight(layer.weight) is not None
        inputs = not isinstance(binary_input(layer, uses), Declined)
        if weights or inputs:
            kinds = [name for name, there in (("weights", weights), ("inputs", inputs)) if there]
            found[layer.name] = {"binary": " and ".join(kinds)}
    return found
