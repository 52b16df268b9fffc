# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.recognize_normalization import RecognizeNormalization
from passes.rewriting import constant

op = relax.op
RNG = np.random.default_rng(11)
GAMMA, BETA = (RNG.standard_normal(17).astype("float32") for _ in range(2))
ONES, ZEROS = np.ones(17, "float32"), np.zeros(17, "float32")
EPSILON = relax.const(1e-5, "float32")
X = (2, 5, 17)


def centred(b, x, axis=-1):
    return b.emit(op.subtract(x, op.mean(x, [axis], True)))


def norm(d, square=lambda d: op.power(d, relax.const(2.0)), axis=-1):
    return op.divide(d, op.sqrt(op.add(op.mean(square(d), [axis], True), EPSILON)))


def layer_norm(x, gamma=ONES, beta=ZEROS):
    return op.nn.layer_norm(
        x, constant(gamma), constant(beta), axes=[-1], epsilon=float(np.float32(1e-5))
    )


@pytest.mark.parametrize(
    "square",
    [lambda d: op.power(d, relax.const(2.0)), lambda d: op.multiply(d, d), op.square],
    ids=["power", "product", "square"],
)
def test_layer_norm(rewrites, square):
    rewrites(
        RecognizeNormalization(), [X],
        lambda b, x: norm(centred(b, x), square), lambda _b, x: layer_norm(x),
    )  # fmt: skip


def test_layer_norm_takes_its_scale_and_shift(rewrites):
    def before(b, x):
        scaled = op.multiply(constant(GAMMA), norm(centred(b, x)))
        return op.add(scaled, constant(BETA.reshape(1, 1, 17)))

    rewrites(RecognizeNormalization(), [X], before, lambda _b, x: layer_norm(x, GAMMA, BETA))


def test_layer_norm_by_reciprocal_root(rewrites):
    def before(b, x):
        d = centred(b, x)
        return op.multiply(d, op.rsqrt(op.add(op.mean(op.multiply(d, d), [-1], True), EPSILON)))

    rewrites(RecognizeNormalization(), [X], before, lambda _b, x: layer_norm(x))


def test_rms_norm(rewrites):
    def before(_b, x):
        root = op.sqrt(op.add(op.mean(op.multiply(x, x), [-1], True), EPSILON))
        return op.multiply(op.multiply(x, op.divide(relax.const(1.0), root)), constant(GAMMA))

    def after(_b, x):
        return op.nn.rms_norm(x, constant(GAMMA), axes=[-1], epsilon=float(np.float32(1e-5)))

    rewrites(RecognizeNormalization(), [X], before, after)


def exponentials(b, x, axis):
    return b.emit(op.exp(op.subtract(x, op.max(x, [axis], True))))


def test_softmax(rewrites):
    def before(b, x):
        e = exponentials(b, x, 1)
        return op.divide(e, op.sum(e, [1], True))

    rewrites(RecognizeNormalization(), [X], before, lambda _b, x: op.nn.softmax(x, 1))


def softmax_of_two_axes(b, x):
    e = exponentials(b, x, 1)
    return op.divide(e, op.sum(e, [2], True))


def unequal(b, x):
    return op.divide(x, op.sqrt(op.add(op.mean(op.square(centred(b, x)), [-1], True), EPSILON)))


@pytest.mark.parametrize(
    "body",
    [
        lambda b, x: norm(centred(b, x, 1), axis=1),
        lambda b, x: norm(centred(b, x), lambda d: op.power(d, relax.const(3.0))),
        unequal,
        softmax_of_two_axes,
        lambda b, x: op.multiply(layer_norm(x, GAMMA, BETA), constant(GAMMA)),
        lambda b, x: op.add(layer_norm(x), constant(np.ones((5, 1), "float32"))),
    ],
    ids=["other axis", "cube", "not centred", "softmax axes", "scaled already", "shift by row"],
)
def test_declines(declines, body):
    declines(RecognizeNormalization(), [X], body)


def test_a_norm_that_is_read_elsewhere_keeps_its_scale_outside(declines):
    def body(b, x):
        y = b.emit(layer_norm(x))
        return op.add(op.multiply(y, constant(GAMMA)), y)

    declines(RecognizeNormalization(), [X], body)
