# SPDX-License-Identifier: Apache-2.0
"""Where a value is exactly zero because an activation is: ReLU and what is computed from it.

A value is followed upstream to a base z that a ReLU (or a `where` with a zero branch) cuts off. Relative to z it either
vanishes where the activation does, or not; where it is a polynomial of z on the other side, the polynomial names the
activation: r is ReLU, r^2 squared ReLU, r + r^2 / 2 J-SquaredReLU, however they are spelled. A product with anything
else is a gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from tvm import relax

from passes.layers import const_array, is_call, is_const
from passes.rewriting import scalar

# Values whose zeros are those of their operand, position by position or moved.
_SAME_ZEROS = ("relax.reshape", "relax.permute_dims", "relax.squeeze", "relax.expand_dims")
_NAMES = {((1, 1.0),): "relu", ((2, 1.0),): "relu^2", ((1, 1.0), (2, 0.5)): "j-squared-relu"}
_DEEP = 32  # steps upstream: activations are short

Definitions = Mapping[relax.Var, relax.Expr]


@dataclass(frozen=True)
class Zeros:
    """`kind` of the activation; `base` what it is applied to; `gate` and `other` the two factors of a gated one."""

    kind: str
    base: relax.Expr
    gate: relax.Expr | None = None
    other: relax.Expr | None = None


@dataclass(frozen=True)
class _Piece:
    """A value relative to a base z: whether it is 0 where the activation is, and its polynomial in z elsewhere."""

    vanishes: bool
    polynomial: dict[int, float] | None = None


def definition(expr: relax.Expr, definitions: Definitions) -> relax.Expr:
    """What computes a variable; the expression itself if nothing in the graph does."""
    return definitions.get(expr, expr) if isinstance(expr, relax.Var) else expr


def zeros_of(expr: relax.Expr, definitions: Definitions) -> Zeros | None:
    """Why `expr` has exact zeros, or None if no ReLU-like activation gives it any."""
    for base in _bases(expr, definitions):
        piece = _piece(expr, base, definitions)
        if not piece.vanishes:
            continue
        if piece.polynomial is None:
            gate = _gate(expr, base, definitions)
            return Zeros("gated relu" if gate else "function of relu", base, *(gate or ()))
        terms = tuple(sorted((k, c) for k, c in piece.polynomial.items() if c))
        scaled = _NAMES.get(tuple((k, c / terms[0][1]) for k, c in terms)) if terms else None
        named = _NAMES.get(terms) or (scaled if len(terms) == 1 else None)
        return Zeros(named or "function of relu", base)
    return None


def _bases(expr: relax.Expr, definitions: Definitions, depth: int = 0) -> Iterator[relax.Expr]:
    """What the activations that `expr` is elementwise computed from are applied to, nearest first."""
    value = definition(expr, definitions)
    if depth > _DEEP or not isinstance(value, relax.Call):
        return
    name = value.op.name if hasattr(value.op, "name") else ""
    if name in ("relax.nn.relu", "relax.nn.relu6"):
        yield value.args[0]
    elif name == "relax.where":
        condition = definition(value.args[0], definitions)
        if isinstance(condition, relax.Call) and condition.args:
            yield condition.args[0]
    elif name in (*_SAME_ZEROS, "relax.power", "relax.square", "relax.divide", "relax.minimum"):
        yield from _bases(value.args[0], definitions, depth + 1)
    elif name in ("relax.multiply", "relax.add"):
        for arg in value.args:
            yield from _bases(arg, definitions, depth + 1)


def _piece(expr: relax.Expr, base: relax.Expr, definitions: Definitions, depth: int = 0) -> _Piece:
    """`expr` relative to `base`."""
    if expr.same_as(base):
        return _Piece(False, {1: 1.0})
    if is_const(expr):
        number = scalar(expr)
        return _Piece(_is_zero(expr), None if number is None else {0: number})
    value = definition(expr, definitions)
    if depth > _DEEP or not isinstance(value, relax.Call) or not hasattr(value.op, "name"):
        return _Piece(False)
    name = value.op.name
    if name in ("relax.nn.relu", "relax.nn.relu6"):
        return _rectified(name, value, base)
    parts = [
        _piece(a, base, definitions, depth + 1)
        for a in value.args
        if not isinstance(a, relax.ShapeExpr)
    ]
    if name in _SAME_ZEROS:
        return parts[0]
    if name == "relax.where":
        return _selected(value, base, parts, definitions)
    if name == "relax.minimum":
        bound = scalar(value.args[1])
        return _Piece(parts[0].vanishes and bound is not None and bound >= 0)
    if name in ("relax.multiply", "relax.square"):
        return _product(parts[0], parts[-1])
    if name == "relax.divide":
        number = scalar(value.args[1])
        return _product(parts[0], _Piece(False, None if not number else {0: 1.0 / number}))
    if name == "relax.power":
        exponent = scalar(value.args[1])
        if exponent is None or exponent <= 0:
            return _Piece(False)
        return _product(*parts[:1] * 2) if exponent == 2 else _Piece(parts[0].vanishes)
    if name == "relax.add":
        return _sum(*parts)
    return _Piece(False)


def _rectified(name: str, value: relax.Call, base: relax.Expr) -> _Piece:
    if not value.args[0].same_as(base):
        return _Piece(False)
    return _Piece(True, {1: 1.0} if name == "relax.nn.relu" else None)


def _selected(value, base, parts: list[_Piece], definitions: Definitions) -> _Piece:
    """where(z > 0, f(z), 0) and where(z <= 0, 0, f(z)); other conditions leave zeros too, but no polynomial."""
    condition = definition(value.args[0], definitions)
    _, yes, no = parts
    zero = [_is_zero(a) for a in value.args[1:]]
    if not any(zero):
        return _Piece(yes.vanishes and no.vanishes)
    above = any(is_call(condition, f"relax.{n}") for n in ("greater", "greater_equal"))
    below = any(is_call(condition, f"relax.{n}") for n in ("less", "less_equal"))
    at_zero = (above or below) and _is_zero(condition.args[1])
    on_base = at_zero and condition.args[0].same_as(base)
    kept = yes if zero[1] else no
    if on_base and above == zero[1]:
        return _Piece(True, kept.polynomial)
    return _Piece(True)


def _is_zero(expr: relax.Expr) -> bool:
    return is_const(expr) and not np.any(const_array(expr))


def _product(a: _Piece, b: _Piece) -> _Piece:
    vanishes = a.vanishes or b.vanishes
    if a.polynomial is None or b.polynomial is None:
        return _Piece(vanishes)
    terms: dict[int, float] = {}
    for i, c in a.polynomial.items():
        for j, d in b.polynomial.items():
            terms[i + j] = terms.get(i + j, 0.0) + c * d
    return _Piece(vanishes, terms)


def _sum(a: _Piece, b: _Piece) -> _Piece:
    vanishes = a.vanishes and b.vanishes
    if a.polynomial is None or b.polynomial is None:
        return _Piece(vanishes)
    terms = dict(a.polynomial)
    for i, c in b.polynomial.items():
        terms[i] = terms.get(i, 0.0) + c
    return _Piece(vanishes, terms)


def _gate(
    expr: relax.Expr, base: relax.Expr, definitions: Definitions
) -> tuple[relax.Expr, relax.Expr] | None:
    """(what vanishes, what it is multiplied with) if `expr` is such a product of two computed values."""
    value = definition(expr, definitions)
    if not is_call(value, "relax.multiply"):
        return None
    for gate, other in (list(value.args), list(value.args)[::-1]):
        if is_const(gate) or is_const(other):
            continue
        if (
            _piece(gate, base, definitions).vanishes
            and not _piece(other, base, definitions).vanishes
        ):
            return gate, other
    return None
