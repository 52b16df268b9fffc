# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
from tvm import relax

from passes.recognize_activation import RecognizeActivation

op = relax.op
# Exporters round sqrt(1/2) and sqrt(2/pi) to float32.
ROUNDED = 1e-6


def const(value):
    return relax.const(value, "float32")


def cube(x):
    return op.multiply(const(0.044715), op.power(x, const(3.0)))


GELU = {
    "onnx": lambda x: op.multiply(
        op.multiply(x, op.add(op.erf(op.divide(x, const(math.sqrt(2)))), const(1.0))), const(0.5)
    ),
    "half first": lambda x: op.multiply(
        op.multiply(const(0.5), x), op.add(const(1.0), op.erf(op.multiply(x, const(0.70710678))))
    ),
    "half inside": lambda x: op.multiply(
        x, op.multiply(op.add(op.erf(op.divide(x, const(1.4142135))), const(1.0)), const(0.5))
    ),
    "divided": lambda x: op.divide(
        op.multiply(x, op.add(op.erf(op.divide(x, const(1.4142135))), const(1.0))), const(2.0)
    ),
}
TANH = {
    "power": lambda x: op.multiply(
        op.multiply(const(0.5), x),
        op.add(const(1.0), op.tanh(op.multiply(const(math.sqrt(2 / math.pi)), op.add(x, cube(x))))),
    ),
    "products": lambda x: op.multiply(
        op.multiply(x, const(0.5)),
        op.add(
            op.tanh(
                op.multiply(
                    op.multiply(x, const(0.7978845608)),
                    op.add(const(1.0), op.multiply(op.multiply(const(0.044715), x), x)),
                )
            ),
            const(1.0),
        ),
    ),
}


@pytest.mark.parametrize("spelling", GELU)
def test_gelu(rewrites, spelling):
    rewrites(
        RecognizeActivation(), [(3, 17)],
        lambda _b, x: GELU[spelling](x), lambda _b, x: op.nn.gelu(x), ROUNDED,
    )  # fmt: skip


@pytest.mark.parametrize("spelling", TANH)
def test_gelu_tanh(rewrites, spelling):
    rewrites(
        RecognizeActivation(), [(3, 17)],
        lambda _b, x: TANH[spelling](x), lambda _b, x: op.nn.gelu_tanh(x), ROUNDED,
    )  # fmt: skip


def test_silu(rewrites):
    rewrites(
        RecognizeActivation(), [(3, 17)],
        lambda _b, x: op.multiply(op.sigmoid(x), x), lambda _b, x: op.nn.silu(x),
    )  # fmt: skip


def times_erf(x, y, divisor=1.4142135, one=1.0, half=0.5):
    inner = op.add(op.erf(op.divide(y, const(divisor))), const(one))
    return op.multiply(op.multiply(x, inner), const(half))


@pytest.mark.parametrize(
    "body",
    [
        lambda _b, x, y: times_erf(x, y),
        lambda _b, x, y: times_erf(x, x, divisor=1.5),
        lambda _b, x, y: times_erf(x, x, one=2.0),
        lambda _b, x, y: times_erf(x, x, half=0.25),
        lambda _b, x, y: op.multiply(x, op.sigmoid(y)),
        lambda _b, x, y: op.multiply(
            op.multiply(x, const(0.5)),
            op.add(op.tanh(op.multiply(const(0.5), op.add(x, cube(x)))), const(1.0)),
        ),
        lambda _b, x, y: op.multiply(
            op.multiply(x, const(0.5)),
            op.add(op.tanh(op.multiply(const(0.7978845608), op.add(x, cube(y)))), const(1.0)),
        ),
    ],
    ids=["two tensors", "scale", "not one", "quarter", "gate", "tanh scale", "tanh of two"],
)
def test_declines(declines, body):
    declines(RecognizeActivation(), [(3, 17), (3, 17)], body)


def test_declines_a_sigmoid_that_is_read_elsewhere(declines):
    def body(b, x):
        gate = b.emit(op.sigmoid(x))
        return op.add(op.multiply(x, gate), gate)

    declines(RecognizeActivation(), [(3, 17)], body)
