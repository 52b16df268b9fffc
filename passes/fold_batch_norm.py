# SPDX-License-Identifier: Apache-2.0
"""Fold inference batch norm, and any other per-channel scale and shift, into the layer before it.

    rewrite: batch_norm(kerf.conv2d(x, w))                  ->  kerf.conv2d(x, w * s) + b
             (kerf.dense(x, w) + c) * s                     ->  kerf.dense(x, w * s) + c * s
             ((kerf.conv2d(x, w) - m) / d) * g + c -> kerf.conv2d(x, w * g/d) + (c - m * g/d)
             batch_norm(x), x no layer's only reader        ->  x * s + b
    requires: NCHW, shapes canonical, constants folded
    ensures: no inference `relax.nn.batch_norm` is left; a layer's result is scaled in its weight

A whole chain is folded at once with its factors in float64, so weights are rounded once. A layer
whose unscaled result is read elsewhere keeps its weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.canonicalize_shapes import merge_reshapes, sink_reshape
from passes.layers import (
    CONV2D,
    DENSE,
    attrs_of,
    const_array,
    is_call,
    is_const,
    operator_call,
    shape_of,
)
from passes.rewriting import Graph, constant, rewrite_function, rewrite_module
from passes.transposed_convolution import sink_depth_to_space

_AFFINE = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide")


@dataclass(frozen=True)
class _Affine:
    """`scale * x + shift` of one operand x: float64 vectors over the channels, or single values."""

    x: relax.Expr
    scale: np.ndarray
    shift: np.ndarray


def _channel_axis(shape: tuple[int, ...], layer: relax.Call) -> int:
    return 1 if is_call(layer, CONV2D) else len(shape) - 1


def _per_channel(expr: relax.Expr, shape: tuple[int, ...], axis: int) -> np.ndarray | None:
    """A constant that varies along `axis` of `shape` only, in float64: a vector or one value."""
    if not is_const(expr) or "float" not in str(expr.ty.dtype):
        return None
    own = shape_of(expr)
    full = (1,) * (len(shape) - len(own)) + own
    if len(full) > len(shape) or any(d != 1 for i, d in enumerate(full) if i != axis):
        return None
    return const_array(expr).astype("float64").reshape(-1)


def affine_of(value: relax.Expr, axis: int) -> _Affine | None:
    """An elementwise operation with a per-channel constant, as scale and shift."""
    if not (
        isinstance(value, relax.Call)
        and isinstance(value.op, tvm.ir.Op)
        and value.op.name in _AFFINE
    ):
        return None
    left, right = value.args
    shape, one, zero = shape_of(value), np.ones(1), np.zeros(1)
    for x, other, swapped in ((left, right, False), (right, left, True)):
        if is_const(x) or shape_of(x) != shape:
            continue
        c = _per_channel(other, shape, axis)
        if c is None:
            continue
        name = value.op.name
        if name == "relax.add":
            return _Affine(x, one, c)
        if name == "relax.multiply":
            return _Affine(x, c, zero)
        if name == "relax.subtract":
            return _Affine(x, -one, c) if swapped else _Affine(x, one, -c)
        if not swapped and np.all(c != 0):
            return _Affine(x, 1 / c, zero)
    return None


def decompose(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """The first result of an inference batch norm as `x * scale + shift`; its statistics as what
    they were.
    """
    if not isinstance(value, relax.TupleGetItem):
        return None
    norm = graph.call(value.tuple_value, "relax.nn.batch_norm")
    if norm is None or norm.attrs.training:
        return None
    if value.index:
        return list(norm.args)[2 + value.index]
    x, *parameters = norm.args
    if not all(is_const(p) for p in parameters):
        return None
    gamma, beta, mean, variance = (const_array(p).astype("float64") for p in parameters)
    scale = (gamma if norm.attrs.scale else 1.0) / np.sqrt(variance + float(norm.attrs.epsilon))
    shift = (beta if norm.attrs.center else 0.0) - mean * scale
    axis, shape = int(norm.attrs.axis) % len(shape_of(x)), [1] * len(shape_of(x))
    shape[axis] = -1
    layer = graph.definition(x)
    if (
        layer is not None
        and (is_call(layer, CONV2D) or is_call(layer, DENSE))
        and graph.is_read_once(x)
    ):
        if axis == _channel_axis(shape_of(x), layer) and is_const(layer.args[1]):
            return _scaled_layer(layer, shape_of(x), scale, shift)
    dtype = str(x.ty.dtype)
    scaled = relax.op.multiply(x, constant(scale.reshape(shape).astype(dtype)))
    return relax.op.add(scaled, constant(shift.reshape(shape).astype(dtype)))


def _scaled_layer(
    layer: relax.Call, shape: tuple[int, ...], scale: np.ndarray, shift: np.ndarray
) -> relax.Expr:
    """The layer with its output channels scaled and shifted."""
    w = const_array(layer.args[1])
    channels = w.shape[0]
    scale = np.broadcast_to(scale, (channels,))
    new = np.empty_like(w)  # rounded once: the product is taken in float64, a buffer at a time
    along = scale.reshape((channels,) + (1,) * (w.ndim - 1))
    np.multiply(w, along, out=new, dtype="float64", casting="same_kind")
    call = (
        operator_call(layer.op.name, [layer.args[0], constant(new)], **attrs_of(layer))
        if np.any(scale != 1)
        else layer
    )
    if not np.any(shift):
        return call
    along = [1] * len(shape)
    along[_channel_axis(shape, layer)] = channels
    return relax.op.add(
        call, constant(np.broadcast_to(shift, (channels,)).reshape(along).astype(w.dtype))
    )


def fold_scale(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """A chain of per-channel operations that ends here and begins at a layer, as that layer plus
    one shift.
    """
    if not isinstance(value.ty, relax.TensorType) or len(shape_of(value)) < 2:
        return None
    for axis in (1, len(shape_of(value)) - 1):
        after = graph.next_readers()
        if len(after) == 1 and affine_of(after[0], axis) is not None:
            continue  # not the end of the chain yet
        steps: list[_Affine] = []
        at: relax.Expr | None = value
        while at is not None and (step := affine_of(at, axis)) is not None:
            if not graph.is_read_once(step.x):
                break
            steps.append(step)
            at = graph.definition(step.x)
        if (
            at is None
            or not (is_call(at, CONV2D) or is_call(at, DENSE))
            or not is_const(at.args[1])
        ):
            continue
        if axis != _channel_axis(shape_of(value), at) or not _worth_folding(steps):
            continue
        scale, shift = np.ones(1), np.zeros(1)
        for step in reversed(steps):
            scale, shift = scale * step.scale, shift * step.scale + step.shift
        if np.all(np.isfinite(scale)):
            return _scaled_layer(at, shape_of(value), scale, shift)
    return None


def _worth_folding(steps: list[_Affine]) -> bool:
    """One shift alone is what a bias is; anything more has something to fold."""
    return len(steps) > 1 or any(np.any(s.scale != 1) for s in steps)


@tvm.transform.module_pass(opt_level=0, name="kerf.FoldBatchNorm")
class FoldBatchNorm:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(
            mod,
            lambda func: rewrite_function(
                func,
                (decompose, sink_reshape, merge_reshapes, sink_depth_to_space, fold_scale),
            ),
        )
