# SPDX-License-Identifier: Apache-2.0
"""Activations are known by what they compute, however they are spelled; their near misses are not."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.activation_sparse.zeros import zeros_of
from passes.rewriting import bindings_of

op = relax.op
number = lambda value: relax.const(value, "float32")  # noqa: E731


def relu(bb, x):
    return bb.emit(op.nn.relu(x))


def j_squared_by_sum(bb, x):
    r = relu(bb, x)
    square = bb.emit(op.multiply(r, r))
    return op.add(r, bb.emit(op.multiply(number(0.5), square)))


def j_squared_by_product(bb, x):
    r = relu(bb, x)
    slope = bb.emit(op.add(number(1.0), bb.emit(op.multiply(r, number(0.5)))))
    return op.multiply(slope, r)


def j_squared_by_where(bb, x):
    half = bb.emit(op.divide(bb.emit(op.power(x, number(2.0))), number(2.0)))
    inside = bb.emit(op.add(x, half))
    positive = bb.emit(op.greater_equal(x, number(0.0)))
    return op.where(positive, inside, relax.const(np.zeros((3, 8), np.float32)))


def j_squared_by_where_below(bb, x):
    half = bb.emit(op.multiply(bb.emit(op.multiply(x, x)), number(0.5)))
    inside = bb.emit(op.add(half, x))
    return op.where(bb.emit(op.less(x, number(0.0))), number(0.0), inside)


FOUND = {
    "relu": (lambda bb, x: op.nn.relu(x), "relu"),
    "scaled relu": (lambda bb, x: op.multiply(relu(bb, x), number(3.0)), "relu"),
    "relu * relu": (lambda bb, x: op.multiply(r := relu(bb, x), r), "relu^2"),
    "relu * x": (lambda bb, x: op.multiply(relu(bb, x), x), "relu^2"),
    "relu ** 2": (lambda bb, x: op.power(relu(bb, x), number(2.0)), "relu^2"),
    "square(relu)": (lambda bb, x: op.square(relu(bb, x)), "relu^2"),
    "j squared by sum": (j_squared_by_sum, "j-squared-relu"),
    "j squared by product": (j_squared_by_product, "j-squared-relu"),
    "j squared by where": (j_squared_by_where, "j-squared-relu"),
    "j squared by where below": (j_squared_by_where_below, "j-squared-relu"),
    "cut relu": (lambda bb, x: op.minimum(relu(bb, x), number(6.0)), "function of relu"),
    "cubed relu": (lambda bb, x: op.power(relu(bb, x), number(3.0)), "function of relu"),
    "reshaped relu": (lambda bb, x: op.reshape(relu(bb, x), (1, 24)), "relu"),
    "gated": (lambda bb, x: op.multiply(relu(bb, x), bb.emit(op.tanh(x))), "gated relu"),
}

NOT_FOUND = {
    "nothing": lambda bb, x: op.tanh(x),
    "gelu": lambda bb, x: op.nn.gelu(x),
    "leaky": lambda bb, x: op.nn.leakyrelu(x, 0.1),
    "shifted": lambda bb, x: op.add(relu(bb, x), number(1.0)),
    "exp of relu": lambda bb, x: op.exp(relu(bb, x)),
    "to the power 0": lambda bb, x: op.power(relu(bb, x), number(0.0)),
    "sum of two sides": lambda bb, x: op.add(relu(bb, x), relu(bb, bb.emit(op.negative(x)))),
    "maximum above 0": lambda bb, x: op.maximum(x, number(0.1)),
    "minimum below 0": lambda bb, x: op.minimum(relu(bb, x), number(-1.0)),
    "where with one": lambda bb, x: op.where(bb.emit(op.greater(x, number(0.0))), x, number(1.0)),
    "relu plus another": lambda bb, x: op.add(relu(bb, x), x),
    "divided by relu": lambda bb, x: op.divide(x, relu(bb, x)),
}


def find(build, body):
    mod = build([(3, 8)], body)
    bindings = bindings_of(mod["main"])
    return zeros_of(mod["main"].body.body, {b.var: b.value for b in bindings})


@pytest.mark.parametrize("name", FOUND)
def test_zeros_are_found(build, name):
    body, kind = FOUND[name]
    found = find(build, body)
    assert found is not None and found.kind == kind
    assert found.base.name == "x0"


@pytest.mark.parametrize("name", NOT_FOUND)
def test_near_misses_have_none(build, name):
    assert find(build, NOT_FOUND[name]) is None
