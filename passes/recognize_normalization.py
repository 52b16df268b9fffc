# SPDX-License-Identifier: Apache-2.0
"""Put layer norm, RMS norm and softmax that an exporter spelled out back together.

rewrite: (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps)  ->  layer_norm(x, 1, 0, eps)
         x * rsqrt(mean(x ** 2) + eps)                         ->  rms_norm(x, 1, eps)
         layer_norm(x, 1, 0) * g + b                           ->  layer_norm(x, g, b)
         rms_norm(x, 1) * g                                    ->  rms_norm(x, g)
         exp(x - max(x)) / sum(exp(x - max(x)))                ->  softmax(x)
requires: constants folded
ensures: norms over the last axis only, also where something else reads their parts; a scale or a
  shift is taken into a norm only where nothing else reads it
"""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax

from passes.layers import const_array, is_call, is_const, shape_of
from passes.rewriting import Graph, axes_of, constant, rewrite_function, rewrite_module, scalar


def _over_last(call: relax.Call | None) -> bool:
    """A reduction over the last axis that keeps it."""
    return (
        call is not None
        and bool(call.attrs.keepdims)
        and axes_of(call.attrs.axis, len(shape_of(call))) == [len(shape_of(call)) - 1]
    )


def _square_of(expr: relax.Expr, graph: Graph) -> relax.Expr | None:
    """d of d**2, d*d or square(d)."""
    value = graph.definition(expr)
    if value is None:
        return None
    if is_call(value, "relax.square") or (
        is_call(value, "relax.power") and scalar(value.args[1]) == 2
    ):
        return value.args[0]
    if is_call(value, "relax.multiply") and value.args[0].same_as(value.args[1]):
        return value.args[0]
    return None


def _deviation(expr: relax.Expr, graph: Graph) -> tuple[relax.Expr, float] | None:
    """(d, eps) of sqrt(mean(d**2) + eps) over the last axis."""
    root = graph.call(expr, "relax.sqrt")
    total = graph.call(root.args[0], "relax.add") if root is not None else None
    if total is None:
        return None
    for mean, epsilon in (list(total.args), list(total.args)[::-1]):
        reduced = graph.call(mean, "relax.mean")
        if scalar(epsilon) is None or not _over_last(reduced):
            continue
        d = _square_of(reduced.args[0], graph)
        if d is not None:
            return d, scalar(epsilon)
    return None


def _quotient(value: relax.Expr, graph: Graph) -> tuple[relax.Expr, relax.Expr, float] | None:
    """(y, d, eps) of y / sqrt(mean(d**2) + eps), also spelled with rsqrt or 1 / sqrt."""
    if is_call(value, "relax.divide"):
        found = _deviation(value.args[1], graph)
        return (value.args[0], *found) if found is not None else None
    if not is_call(value, "relax.multiply"):
        return None
    for y, other in (list(value.args), list(value.args)[::-1]):
        inverse = graph.definition(other)
        found = None
        if (
            inverse is not None
            and is_call(inverse, "relax.divide")
            and scalar(inverse.args[0]) == 1
        ):
            found = _deviation(inverse.args[1], graph)
        if inverse is not None and is_call(inverse, "relax.rsqrt"):
            found = _deviation(relax.op.sqrt(inverse.args[0]), graph)
        if found is not None:
            return (y, *found)
    return None


def recognize_norm(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """The quotient as a layer norm or RMS norm without scale and shift."""
    found = _quotient(value, graph)
    if found is None or not found[0].same_as(found[1]):
        return None
    d, _, epsilon = found
    size, dtype = shape_of(d)[-1], str(d.ty.dtype)
    ones, zeros = constant(np.ones(size, dtype)), constant(np.zeros(size, dtype))
    centred = graph.call(d, "relax.subtract")
    if centred is not None:
        mean = graph.call(centred.args[1], "relax.mean")
        if _over_last(mean) and mean.args[0].same_as(centred.args[0]):
            return relax.op.nn.layer_norm(centred.args[0], ones, zeros, axes=[-1], epsilon=epsilon)
    return relax.op.nn.rms_norm(d, ones, axes=[-1], epsilon=epsilon)


def _last_axis_constant(expr: relax.Expr, size: int) -> np.ndarray | None:
    if (
        not is_const(expr)
        or math.prod(shape_of(expr)) != size
        or (shape_of(expr) or (1,))[-1] != size
    ):
        return None
    return const_array(expr).reshape(-1)


def take_scale(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """layer_norm(x, 1, 0) * g, layer_norm(x, g, 0) + b and rms_norm(x, 1) * g into the norm."""
    if not is_call(value, "relax.multiply") and not is_call(value, "relax.add"):
        return None
    for y, other in (list(value.args), list(value.args)[::-1]):
        norm = graph.definition(y)
        if norm is None or shape_of(y) != shape_of(value) or not graph.is_read_once(y):
            continue
        c = _last_axis_constant(other, shape_of(value)[-1]) if shape_of(value) else None
        if c is None or not (
            is_call(norm, "relax.nn.layer_norm") or is_call(norm, "relax.nn.rms_norm")
        ):
            continue
        if axes_of(norm.attrs.axes, len(shape_of(y))) != [len(shape_of(y)) - 1]:
            continue
        x, gamma, *beta = norm.args
        scaling = is_call(value, "relax.multiply")
        if scaling and not (is_const(gamma) and np.all(const_array(gamma) == 1)):
            continue
        if beta and not (is_const(beta[0]) and not const_array(beta[0]).any()):
            continue
        epsilon = float(norm.attrs.epsilon)
        if is_call(norm, "relax.nn.rms_norm"):
            return (
                relax.op.nn.rms_norm(x, constant(c), axes=[-1], epsilon=epsilon)
                if scaling
                else None
            )
        pair = (constant(c), beta[0]) if scaling else (gamma, constant(c))
        return relax.op.nn.layer_norm(x, *pair, axes=[-1], epsilon=epsilon)
    return None


def recognize_softmax(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """exp(x - max(x)) / sum(..) over one axis -> softmax(x)"""
    if not is_call(value, "relax.divide"):
        return None
    total, power = graph.call(value.args[1], "relax.sum"), graph.call(value.args[0], "relax.exp")
    if (
        total is None
        or power is None
        or not total.args[0].same_as(value.args[0])
        or not total.attrs.keepdims
    ):
        return None
    rank = len(shape_of(value))
    axes = axes_of(total.attrs.axis, rank)
    shifted = graph.call(power.args[0], "relax.subtract")
    largest = graph.call(shifted.args[1], "relax.max") if shifted is not None else None
    if (
        largest is None
        or len(axes) != 1
        or not largest.attrs.keepdims
        or axes_of(largest.attrs.axis, rank) != axes
    ):
        return None
    x = shifted.args[0]
    return relax.op.nn.softmax(x, axes[0]) if largest.args[0].same_as(x) else None


@tvm.transform.module_pass(opt_level=0, name="kerf.RecognizeNormalization")
class RecognizeNormalization:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(
            mod,
            lambda func: rewrite_function(func, (recognize_norm, take_scale, recognize_softmax)),
        )
