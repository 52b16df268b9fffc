# SPDX-License-Identifier: Apache-2.0
"""Find quadratic neurons written out as layers, and make one operator of each.

    rewrite: (L_r(x) + s_r) * (L_g(x) + s_g)              ->  quadratic(x, w_r, w_g, shifts)
             R * G + R, R and G such factors               ->  R * (G + 1)
             quadratic(x, w_r, w_g, ...) + L_b(x * x)      ->  quadratic(x, w_r, w_g, w_b, ...)
             quadratic(x, w_r, w_g, ...) + L_l(x)          ->  quadratic(x, w_r, w_g, w_l, ...)
             quadratic(x, ...) * s + t                     ->  quadratic(x, ... * s) + t          (batch norm after it)
             quadratic(x, w_r, w_g = 0, ...)               ->  L(x, w_r * s_g) [+ L_b(x * x)] + s_r * s_g
             quadratic(x, w_r, w_g, w_b = 0, ...)          ->  quadratic(x, w_r, w_g, ...)
             L(x * x) that nothing above took [+ L_l(x)]   ->  quadratic(x, w_b [, w_l])
    requires: the canonical graph: batch norms folded into layers, constants folded, NCHW
    ensures: as many branches in one operator as read the same x with the same geometry

Terms of a sum may stand in any order and have constants or other tensors between them. A layer whose result anything
else reads stays as it is. Layers that were not asked for are not touched.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from passes.fold_batch_norm import affine_of
from passes.layers import (
    CONV2D,
    DENSE,
    DEPTH_TO_SPACE,
    attrs_of,
    const_array,
    is_call,
    is_const,
    shape_of,
)
from passes.quadratic.operators import (
    GEOMETRY,
    QUADRATIC_CONV2D,
    is_quadratic,
    plain_layer,
    quadratic_call,
    shifts_of,
    weights_of,
)
from passes.rewriting import Graph, constant, rewrite_function, rewrite_module, scalar

_SUMS = ("relax.add", "relax.subtract")


@dataclass(frozen=True)
class _Shifted:
    """`layer + shift`: a named layer and a constant float64 [O] after it."""

    layer: relax.Call
    shift: np.ndarray


def channel_axis(call: relax.Call) -> int:
    """The axis of the output channels of a layer or quadratic operator in the canonical graph."""
    return 1 if call.op.name in (CONV2D, QUADRATIC_CONV2D) else len(shape_of(call)) - 1


def outputs_of(call: relax.Call) -> int:
    return shape_of(call.args[1])[0]


def along_channels(values: np.ndarray, call: relax.Call) -> relax.Expr:
    """A constant [O] that broadcasts against the result of `call`."""
    shape = [1] * len(shape_of(call))
    shape[channel_axis(call)] = -1
    full = np.broadcast_to(values, (outputs_of(call),))
    return constant(full.reshape(shape).astype("float32"))


def same_geometry(a: relax.Call, b: relax.Call) -> bool:
    """Whether two layers (or quadratic operators) slide in the same way over inputs of one shape."""
    first, second = attrs_of(a), attrs_of(b)
    is_conv = [call.op.name in (CONV2D, QUADRATIC_CONV2D) for call in (a, b)]
    return (
        is_conv[0] == is_conv[1]
        and shape_of(a.args[1]) == shape_of(b.args[1])
        and all(first.get(k) == second.get(k) for k in GEOMETRY)
    )


def square_of(expr: relax.Expr, graph: Graph) -> relax.Expr | None:
    """x where `expr` is x * x, x ** 2 or square(x), or one of these that was only moved about after."""
    if (call := graph.call(expr, "relax.multiply")) is not None:
        return call.args[0] if call.args[0].same_as(call.args[1]) else None
    if (call := graph.call(expr, "relax.power")) is not None:
        return call.args[0] if scalar(call.args[1]) == 2 else None
    for name in ("relax.reshape", "relax.permute_dims", DEPTH_TO_SPACE):
        if (call := graph.call(expr, name)) is not None:
            inner = square_of(call.args[0], graph)
            if inner is None:
                return None
            return relax.Call(call.op, [inner, *call.args[1:]], call.attrs, ret_ty=call.ty)
    call = graph.call(expr, "relax.square")
    return None if call is None else call.args[0]


def same_value(a: relax.Expr, b: relax.Expr, graph: Graph) -> bool:
    """Whether two expressions are one value: the same variable, the same operation of the same values, or the same
    value reshaped to the same shape, in however many steps."""
    if a.same_as(b):
        return True
    if is_const(a) or is_const(b):
        return False
    sources = [_before_reshapes(expr, graph) for expr in (a, b)]
    if not (sources[0].same_as(a) and sources[1].same_as(b)):
        return shape_of(a) == shape_of(b) and same_value(*sources, graph)
    first, second = graph.definition(a), graph.definition(b)
    if not (isinstance(first, relax.Call) and isinstance(second, relax.Call)):
        return isinstance(a, relax.ShapeExpr) and tvm_ffi.structural_equal(a, b)
    return (
        first.op.same_as(second.op)
        and len(first.args) == len(second.args)
        and tvm_ffi.structural_equal(first.attrs, second.attrs)
        and all(same_value(c, d, graph) for c, d in zip(first.args, second.args))
    )


def _before_reshapes(expr: relax.Expr, graph: Graph) -> relax.Expr:
    """What reshapes, one after the other, made `expr` of."""
    while (call := graph.call(expr, "relax.reshape")) is not None:
        expr = call.args[0]
    return expr


class _Rules:
    """The rules for the layers asked for; `linear` collects layers that became part of a linear one, with its name."""

    def __init__(self, asked: Collection[str]):
        self.asked = asked
        self.linear: dict[str, str] = {}

    # ---- what a value is

    def layer(self, expr: relax.Expr, graph: Graph) -> relax.Call | None:
        """The layer that was asked for and computes `expr`."""
        call = graph.definition(expr)
        if call is None or not (is_call(call, CONV2D) or is_call(call, DENSE)):
            return None
        known = is_const(call.args[1]) and str(call.ty.dtype) == "float32"
        return call if known and attrs_of(call)["name"] in self.asked else None

    def shifted(self, expr: relax.Expr, graph: Graph, shared: bool = False) -> _Shifted | None:
        """`expr` as a layer and a constant per channel, which nothing else reads but, if `shared`, `expr` itself."""

        def is_own(at: relax.Expr) -> bool:
            return graph.is_read_once(at) or (shared and at.same_as(expr))

        for axis in _axes(expr):
            at, shift = expr, np.zeros(1)
            while is_own(at) and self.layer(at, graph) is None:
                value = graph.definition(at)
                step = affine_of(value, axis) if isinstance(value, relax.Call) else None
                if step is None or np.any(step.scale != 1):
                    break
                at, shift = step.x, shift + step.shift
            call = self.layer(at, graph) if is_own(at) else None
            if call is not None and (axis == channel_axis(call) or not shift.any()):
                return _Shifted(call, np.broadcast_to(shift, (outputs_of(call),)))
        return None

    # ---- rules

    def multiply(self, value: relax.Expr, graph: Graph) -> relax.Expr | None:
        """(L_r(x) + s_r) * (L_g(x) + s_g) -> quadratic"""
        if not is_call(value, "relax.multiply") or value.args[0].same_as(value.args[1]):
            return None
        r, g = (self.shifted(a, graph) for a in value.args)
        if r is None or g is None or not self._are_factors(r, g, graph):
            return None
        weights = {b: const_array(s.layer.args[1]) for b, s in (("r", r), ("g", g))}
        layers = [attrs_of(s.layer)["name"] for s in (r, g)]
        return quadratic_call(
            r.layer, r.layer.args[0], weights, np.stack([r.shift, g.shift]), layers
        )

    def distribute(self, value: relax.Expr, graph: Graph) -> relax.Expr | None:
        """R * G + R, or - R, R being read nowhere else -> R * (G + 1), or - 1"""
        if not (is_call(value, _SUMS[0]) or is_call(value, _SUMS[1])):
            return None
        terms = _terms(value, graph)
        for at, (sign, term) in enumerate(terms):
            product = graph.call(term, "relax.multiply")
            if product is None or sign < 0 or not graph.is_read_once(term):
                continue
            for r, g in (product.args, list(product.args)[::-1]):
                again = [i for i, (_, t) in enumerate(terms) if t.same_as(r)]
                if len(again) != 1 or len(graph.readers(r)) != 2 or r.same_as(g):
                    continue
                first, second = self.shifted(r, graph, shared=True), self.shifted(g, graph)
                if first is None or second is None or not self._are_factors(first, second, graph):
                    continue
                one = relax.const(float(terms[again[0]][0]), "float32")
                merged = relax.op.multiply(r, relax.op.add(g, one))
                return _sum(
                    [(1, merged), *(t for i, t in enumerate(terms) if i not in (at, again[0]))]
                )
        return None

    def _are_factors(self, r: _Shifted, g: _Shifted, graph: Graph) -> bool:
        """Whether two layers read the same x with the same geometry."""
        x = r.layer.args[0]
        return same_value(x, g.layer.args[0], graph) and same_geometry(r.layer, g.layer)

    def add_branch(self, value: relax.Expr, graph: Graph) -> relax.Expr | None:
        """A sum with a product of two layers and a layer of x * x, or of x, among its terms, in any order."""
        if not (is_call(value, _SUMS[0]) or is_call(value, _SUMS[1])):
            return None
        terms = _terms(value, graph)
        for at, (sign, term) in enumerate(terms):
            product = graph.definition(term)
            # Where the product itself is subtracted, its sign goes into one of its factors.
            if not is_quadratic(product) or not graph.is_read_once(term):
                continue
            weights = weights_of(product)
            main = {"rg": "r", "b": "b"}.get(attrs_of(product)["form"])
            if main is None:
                continue
            for other, (added_sign, added) in enumerate(terms):
                layer = (
                    self.layer(added, graph) if other != at and graph.is_read_once(added) else None
                )
                branch = self._branch(layer, product, graph)
                if branch is None or branch == main:
                    continue
                shifts, weights[main] = shifts_of(product), sign * weights[main]
                if shifts is not None:
                    shifts = np.stack([sign * shifts[0], shifts[1]])
                weights[branch] = added_sign * const_array(layer.args[1])
                layers = [*attrs_of(product)["layers"], attrs_of(layer)["name"]]
                merged = quadratic_call(product, product.args[0], weights, shifts, layers)
                rest = [t for i, t in enumerate(terms) if i not in (at, other)]
                return _sum([(1, merged), *rest])
        return None

    def _branch(self, layer: relax.Call | None, product: relax.Call, graph: Graph) -> str | None:
        """The branch that a layer is of a product's neuron, if it reads its x, or that squared, with its geometry."""
        if layer is None or not same_geometry(layer, product):
            return None
        x = product.args[0]
        if same_value(layer.args[0], x, graph):
            return "l"
        squared = square_of(layer.args[0], graph)
        return "b" if squared is not None and same_value(squared, x, graph) else None

    def fold_scale(self, value: relax.Expr, graph: Graph) -> relax.Expr | None:
        """A chain of constants per channel after a neuron, ending here: scales go into the weights."""
        if not isinstance(value, relax.Call) or not isinstance(value.ty, relax.TensorType):
            return None
        for axis in _axes(value):
            after = graph.next_readers()
            if len(after) == 1 and affine_of(after[0], axis) is not None:
                continue  # not the end of the chain yet
            scale, shift, at = np.ones(1), np.zeros(1), value
            while (step := affine_of(at, axis)) is not None and graph.is_read_once(step.x):
                scale, shift = scale * step.scale, shift + scale * step.shift
                at = graph.definition(step.x)
                if at is None:
                    break
            if not is_quadratic(at) or axis != channel_axis(at) or shape_of(at) != shape_of(value):
                continue
            if np.all(scale == 1) or not np.all(np.isfinite(scale)):
                continue
            scaled = _scaled(at, scale)
            return relax.op.add(scaled, along_channels(shift, at)) if np.any(shift) else scaled
        return None

    def drop_dead(self, value: relax.Expr, graph: Graph) -> relax.Expr | None:
        """Branches whose weights are all zero; a product of which one factor is constant is no product."""
        if not is_quadratic(value):
            return None
        weights, shifts, layers = weights_of(value), shifts_of(value), attrs_of(value)["layers"]
        dead = {b for b, w in weights.items() if not w.any()}
        if not dead or (len(weights) == 1):
            return None
        kept = {b: w for b, w in weights.items() if b not in dead or b in "rg"}
        if dead.isdisjoint("rg"):
            return quadratic_call(value, value.args[0], kept, shifts, layers)
        # r * s_g, or s_r * g, or s_r * s_g: what is left is linear in x, and the square.
        gone = "g" if "g" in dead else "r"
        other = "r" if gone == "g" else "g"
        factor = shifts["rg".index(gone)].astype("float64")
        shift = shifts["rg".index(other)] * factor
        linear = _along_outputs(kept.pop(other), factor) + kept.pop("l", 0)
        kept.pop(gone)
        x = value.args[0]
        if "b" in kept and linear.any():
            call = quadratic_call(value, x, {"l": linear, **kept}, None, layers)
        elif "b" in kept:
            call = quadratic_call(value, x, kept, None, layers)
        else:
            call = plain_layer(value, x, linear, layers[0])
            self.linear.update(dict.fromkeys(layers, layers[0]))
        return relax.op.add(call, along_channels(shift, value)) if shift.any() else call

    def squares(self, value: relax.Expr, graph: Graph) -> relax.Expr | None:
        """L(x * x) -> quadratic, where no neuron took it."""
        layer = value if is_call(value, CONV2D) or is_call(value, DENSE) else None
        if (
            layer is None
            or not is_const(layer.args[1])
            or attrs_of(layer)["name"] not in self.asked
        ):
            return None
        x = square_of(layer.args[0], graph)
        if x is None or str(layer.ty.dtype) != "float32":
            return None
        weights = {"b": const_array(layer.args[1])}
        return quadratic_call(layer, x, weights, None, [attrs_of(layer)["name"]])


def _along_outputs(weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """weight [O, ...] * factor [O], in float64."""
    return weight * np.broadcast_to(factor, len(weight)).reshape(-1, *[1] * (weight.ndim - 1))


def _scaled(call: relax.Call, scale: np.ndarray) -> relax.Call:
    """A quadratic operator whose result is scaled per channel: one factor and every added branch."""
    shifts = shifts_of(call)
    weights = {
        b: w if b == "g" else _along_outputs(w.astype("float64"), scale)
        for b, w in weights_of(call).items()
    }
    if shifts is not None:
        shifts = np.stack([shifts[0] * scale, shifts[1]])
    return quadratic_call(call, call.args[0], weights, shifts, attrs_of(call)["layers"])


def _axes(expr: relax.Expr) -> tuple[int, ...]:
    """Where the channels of a layer with this result may lie: of a convolution, of a dense layer."""
    rank = len(shape_of(expr))
    return (1, 3) if rank == 4 else (rank - 1,)


def _terms(
    value: relax.Expr, graph: Graph, sign: int = 1, top: bool = True
) -> list[tuple[int, relax.Expr]]:
    """The terms of a sum with their signs, through sums that nothing else reads; all of the sum's shape or constants."""
    call = graph.definition(value)
    is_sum = call is not None and (is_call(call, _SUMS[0]) or is_call(call, _SUMS[1]))
    if not is_sum or not (top or graph.is_read_once(value)):
        return [(sign, value)]
    left, right = call.args
    second = sign if is_call(call, _SUMS[0]) else -sign
    return _terms(left, graph, sign, False) + _terms(right, graph, second, False)


def _sum(terms: list[tuple[int, relax.Expr]]) -> relax.Expr:
    """The sum of signed terms, the first of which is positive."""
    total = terms[0][1]
    for sign, term in terms[1:]:
        total = relax.op.add(total, term) if sign > 0 else relax.op.subtract(total, term)
    return total


@dataclass(frozen=True)
class Recognized:
    """`mod` with quadratic operators; `linear` the layers of neurons that turned out linear, with what is left of them."""

    mod: tvm.IRModule
    linear: dict[str, str]


def recognize(mod: tvm.IRModule, asked: Collection[str]) -> Recognized:
    """The quadratic neurons made of the layers in `asked`, as one operator each."""
    rules = _Rules(frozenset(asked))
    neurons = (
        rules.distribute,
        rules.multiply,
        rules.add_branch,
        rules.fold_scale,
        rules.drop_dead,
    )
    squares = (rules.squares, rules.add_branch, rules.fold_scale, rules.drop_dead)
    for table in (neurons, squares):
        mod = rewrite_module(mod, lambda func, table=table: rewrite_function(func, table))
    return Recognized(mod, rules.linear)
