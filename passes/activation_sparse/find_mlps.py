# SPDX-License-Identifier: Apache-2.0
"""The dense layers whose input has zeros that an activation left there, and the layers that made it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.activation_sparse.zeros import Definitions, Zeros, definition, zeros_of
from passes.layers import DENSE, attrs_of, const_array, is_call, is_const, shape_of
from passes.rewriting import bindings_of, variables

_SHIFTS = ("add", "subtract")
_PASSED = ("relax.reshape",)


@dataclass(frozen=True)
class Gate:
    """h = gate * (dense(x, up) + bias), read by nothing but the layer `down`: `up` is needed where the gate is open only.

    `first` says whether the gate is the first operand of the product.
    """

    up: str
    bias: np.ndarray
    first: bool


@dataclass(frozen=True)
class Mlp:
    """A dense layer `down` that reads `hidden` [..., K], whose zeros are `zeros` (None: not known to have any).

    `producers` are the dense layers that compute what the activation is applied to, and the other factor of a gated one.
    """

    name: str
    down: relax.Call
    hidden: relax.Expr
    zeros: Zeros | None
    producers: tuple[str, ...]
    gate: Gate | None = None

    @property
    def tokens(self) -> int:
        """Rows of `hidden`."""
        return int(np.prod(shape_of(self.hidden)[:-1]))

    @property
    def width(self) -> int:
        return shape_of(self.hidden)[-1]


def find_mlps(mod: tvm.IRModule) -> list[Mlp]:
    """Every dense layer with a constant weight, in program order, with what makes its input."""
    bindings = bindings_of(mod["main"])
    definitions = {b.var: b.value for b in bindings}
    reads = Counter(v for b in bindings for v in variables(b.value))
    reads.update(variables(mod["main"].body.body))
    found = []
    for binding in bindings:
        call = binding.value
        if not (is_call(call, DENSE) and is_const(call.args[1])):
            continue
        hidden = call.args[0]
        zeros = zeros_of(hidden, definitions)
        name = attrs_of(call)["name"]
        if zeros is None:
            found.append(Mlp(name, call, hidden, None, producers_of(hidden, definitions)))
            continue
        producers = producer_of(zeros.base, definitions)
        gate = _gate(hidden, zeros, definitions, reads)
        if zeros.other is not None:
            producers += producer_of(zeros.other, definitions)
        found.append(Mlp(name, call, hidden, zeros, tuple(dict.fromkeys(producers)), gate))
    return found


def producer_of(expr: relax.Expr, definitions: Definitions) -> tuple[str, ...]:
    """The dense layer that computes `expr`, behind constants added or subtracted and reshapes; none if something else does."""
    while True:
        value = definition(expr, definitions)
        if is_call(value, DENSE):
            return (attrs_of(value)["name"],)
        if any(is_call(value, f"relax.{n}") for n in _SHIFTS) and any(map(is_const, value.args)):
            expr = next((a for a in value.args if not is_const(a)), None)
        elif isinstance(value, relax.Call) and getattr(value.op, "name", "") in _PASSED:
            expr = value.args[0]
        else:
            return ()
        if expr is None:
            return ()


def producers_of(hidden: relax.Expr, definitions: Definitions) -> tuple[str, ...]:
    """The layer before an activation without zeros: one elementwise function of one operand."""
    value = definition(hidden, definitions)
    if isinstance(value, relax.Call) and len(value.args) == 1:
        return producer_of(value.args[0], definitions)
    return ()


def _gate(hidden, zeros: Zeros, definitions: Definitions, reads: Counter) -> Gate | None:
    """The gated form, where hidden is exactly gate * (dense [+ bias]), all of it finite, and nobody else reads the product
    or that factor."""
    if zeros.gate is None or reads[hidden] != 1 or reads[zeros.other] != 1:
        return None
    value, bias = definition(zeros.other, definitions), None
    if is_call(value, "relax.add"):
        bias = next((a for a in value.args if is_const(a)), None)
        inner = next((a for a in value.args if not is_const(a)), None)
        if bias is None or inner is None or reads[inner] != 1:
            return None
        value = definition(inner, definitions)
    if not (is_call(value, DENSE) and is_const(value.args[1])):
        return None
    if not np.isfinite(const_array(value.args[1])).all():
        return None  # a product that is skipped would hide it
    width = shape_of(hidden)[-1]
    if bias is None:
        array = np.zeros(width, np.float32)
    elif np.prod(shape_of(bias)) == shape_of(bias)[-1] == width:
        array = const_array(bias).reshape(width)
    else:
        return None
    if not np.isfinite(array).all():
        return None
    first = definition(hidden, definitions).args[0].same_as(zeros.gate)
    return Gate(attrs_of(value)["name"], array, first)
