# SPDX-License-Identifier: Apache-2.0
"""Fold a normalisation of the model's input into the first layer, so that raw pixels are quantized.

    rewrite: conv2d((x - m) / d, w)             ->  conv2d(x, w / d) + shift        without padding
             conv2d((x - m) / d, w), padded     ->  conv2d(x - m, w / d)
    requires: canonical, NCHW; per-channel constants; nothing else reads the normalised input
    ensures: the same function up to the rounding of the weights

Where the convolution pads, the mean stays: zeros outside the normalised image are not zeros outside
the raw one.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import tvm
from tvm import relax

from passes.channel_flow import Uses, input_columns, layer_counts, replace_values, with_weight
from passes.fold_batch_norm import FoldBatchNorm
from passes.layers import (
    CONV2D,
    DENSE,
    attrs_of,
    const_array,
    is_call,
    is_const,
    is_layer,
    shape_of,
)
from passes.rewriting import constant

_AFFINE = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide")


def fold_input_normalization(
    mod: tvm.IRModule, layers: Collection[str] | None = None
) -> tuple[tvm.IRModule, list[str]]:
    """The graph and the names of the layers that took a normalisation, of those in `layers` (None: all)."""
    uses = Uses(mod)
    counts = layer_counts(uses)
    changes: dict = {}
    folded = []
    for param in mod["main"].params:
        found = _chain(param, uses)
        if found is None:
            continue
        layer, scale, shift = found
        name = attrs_of(layer.value)["name"]
        if counts[name] > 1 or (layers is not None and name not in layers):
            continue
        changes[layer.var] = _folded(param, scale, shift)
        folded.append(name)
    return (FoldBatchNorm()(replace_values(mod, changes)) if changes else mod), folded


def _chain(param: relax.Var, uses: Uses):
    """(binding of the first layer, scale, shift) with the layer reading scale * x + shift; None if there is nothing to fold."""
    at, scale, shift = param, np.ones(1), np.zeros(1)
    while True:
        readers = uses.readers.get(at, [])
        if at in uses.outputs or len(readers) != 1:
            return None
        value = readers[0].value
        if is_layer(value):
            unchanged = at is param or (np.all(scale == 1) and np.all(shift == 0))
            return None if unchanged else (readers[0], scale, shift)
        step = _affine(value, at)
        if step is None:
            return None
        scale, shift = scale * step[0], shift * step[0] + step[1]
        at = readers[0].var


def _affine(value: relax.Expr, operand: relax.Var):
    """(scale, shift) per channel of an elementwise operation with a constant, in float64."""
    if not any(is_call(value, name) for name in _AFFINE):
        return None
    left, right = value.args
    other = right if left.same_as(operand) else left
    shape = shape_of(value)
    if not is_const(other) or shape != shape_of(operand) or "float" not in str(operand.ty.dtype):
        return None
    axis = 1 if len(shape) == 4 else len(shape) - 1
    own = (1,) * (len(shape) - len(shape_of(other))) + shape_of(other)
    if len(own) > len(shape) or any(d != 1 for i, d in enumerate(own) if i != axis):
        return None
    c = const_array(other).astype("float64").reshape(-1)
    if is_call(value, "relax.add"):
        return np.ones(1), c
    if is_call(value, "relax.multiply"):
        return c, np.zeros(1)
    if is_call(value, "relax.subtract"):
        return (np.ones(1), -c) if left.same_as(operand) else (-np.ones(1), c)
    return (1 / c, np.zeros(1)) if left.same_as(operand) and np.all(c != 0) else None


def _folded(param: relax.Var, scale: np.ndarray, shift: np.ndarray):
    def change(call: relax.Call, _graph) -> relax.Expr:
        weight = const_array(call.args[1])
        rank = len(shape_of(param))
        axis = 1 if is_call(call, CONV2D) else rank - 1
        channels = shape_of(param)[axis]
        scaled = weight.astype("float64") * input_columns(call, np.broadcast_to(scale, channels))
        moved = with_weight(call, scaled.astype(weight.dtype))
        if not np.any(shift):
            return _reading(moved, param)
        if any(attrs_of(call).get("padding", ())):
            along = [1] * rank
            along[axis] = -1
            mean = constant((shift / scale).reshape(along).astype("float32"))
            return _reading(moved, relax.op.add(param, mean))
        response = weight.astype("float64") * input_columns(call, np.broadcast_to(shift, channels))
        total = response.reshape(len(weight), -1).sum(axis=1).astype("float32")
        total = total if is_call(call, DENSE) else total.reshape(1, -1, 1, 1)
        return relax.op.add(_reading(moved, param), constant(total))

    return change


def _reading(call: relax.Call, x: relax.Expr) -> relax.Call:
    return relax.Call(call.op, [x, *call.args[1:]], call.attrs)
