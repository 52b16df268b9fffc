# SPDX-License-Identifier: Apache-2.0
"""ONNX's Einsum of one or two operands as sums, transpositions and one matrix product."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tvm import relax
from tvm.relax import op

from compiler.frontend.support import Refused
from passes.layers import shape_of

if TYPE_CHECKING:
    from compiler.frontend.onnx_convert import Converter


def einsum(c: Converter, *operands: relax.Expr) -> relax.Expr:
    """Raises Refused for an ellipsis, a label twice in one operand, and more than two operands."""
    equation = "".join(c.attr("equation").split())
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    labels = "".join(terms)
    if not arrow:
        result = "".join(sorted(label for label in set(labels) if labels.count(label) == 1))
    once = all(len(set(t)) == len(t) for t in (*terms, result))
    known = all(label.isalpha() for label in labels) and set(result) <= set(labels)
    if not once or not known or len(terms) > 2 or len(terms) != len(operands):
        raise Refused(f"the equation {equation}")
    if len(terms) == 1:
        return _moved(c, *_summed(c, operands[0], terms[0], result), result)
    (a, left), (b, right) = (
        _summed(c, x, term, result + other)
        for x, term, other in zip(operands, terms, reversed(terms))
    )
    size = dict(zip(left, shape_of(a))) | dict(zip(right, shape_of(b)))
    if any(size[label] != extent for label, extent in zip(left, shape_of(a))):
        raise Refused(f"operands of the equation {equation} that broadcast")
    both = [label for label in left if label in right]
    batch = "".join(label for label in both if label in result)
    inner = "".join(label for label in both if label not in result)
    rows = "".join(label for label in left if label not in both)
    columns = "".join(label for label in right if label not in both)

    def matrices(x: relax.Expr, term: str, *groups: str) -> relax.Expr:
        x = _moved(c, x, term, batch + "".join(groups))
        extents = [math.prod(size[label] for label in group) for group in groups]
        return c.emit(op.reshape(x, (*(size[label] for label in batch), *extents)))

    found = c.emit(op.matmul(matrices(a, left, rows, inner), matrices(b, right, inner, columns)))
    made = batch + rows + columns
    return _moved(c, c.emit(op.reshape(found, tuple(size[label] for label in made))), made, result)


def _summed(c: Converter, x: relax.Expr, term: str, wanted: str) -> tuple[relax.Expr, str]:
    """x without the axes that nothing else names."""
    gone = [i for i, label in enumerate(term) if label not in wanted]
    if not gone:
        return x, term
    return c.emit(op.sum(x, gone)), "".join(label for label in term if label in wanted)


def _moved(c: Converter, x: relax.Expr, term: str, wanted: str) -> relax.Expr:
    """x with its axes in the order of `wanted`, which names the same."""
    order = [term.index(label) for label in wanted]
    return x if order == sorted(order) else c.emit(op.permute_dims(x, order))
