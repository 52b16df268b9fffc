# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.fold_batch_norm import FoldBatchNorm
from passes.layers import CONV2D, attrs_of, conv2d, dense, is_call
from passes.rewriting import bindings_of, constant

op = relax.op
RNG = np.random.default_rng(7)
# Folded weights are rounded to float32 once: 2**-24 of each product, which may add up over a sum.
ROUNDED = 1e-6


def array(*shape):
    return RNG.standard_normal(shape).astype("float32")


X, W = (2, 6, 5, 7), array(9, 2, 3, 3)
GAMMA, BETA, MEAN, VARIANCE = array(9), array(9), array(9), np.abs(array(9)) + 0.1


def conv(x, w=W):
    return conv2d(x, constant(w), name="stem", groups=3, padding=(1, 1, 1, 1))


def norm(b, x, training=False, **options):
    parameters = [constant(p) for p in (GAMMA, BETA, MEAN, VARIANCE)]
    return b.emit(op.nn.batch_norm(x, *parameters, axis=1, training=training, **options))[0]


def folded(scale, shift):
    def body(_b, x):
        w = (W.astype("float64") * scale.reshape(-1, 1, 1, 1)).astype("float32")
        return op.add(conv(x, w), constant(shift.reshape(1, -1, 1, 1).astype("float32")))

    return body


def scale_and_shift():
    scale = GAMMA.astype("float64") / np.sqrt(VARIANCE.astype("float64") + 1e-5)
    return scale, BETA - MEAN * scale


def test_batch_norm_folds_into_a_grouped_convolution(rewrites):
    found = rewrites(
        FoldBatchNorm(),
        [X],
        lambda b, x: norm(b, b.emit(conv(x))),
        folded(*scale_and_shift()),
        ROUNDED,
    )
    (call,) = [b.value for b in bindings_of(found["main"]) if is_call(b.value, CONV2D)]
    assert attrs_of(call)["name"] == "stem"


def test_batch_norm_folds_past_a_bias(rewrites):
    bias = array(9)
    scale, shift = scale_and_shift()
    rewrites(
        FoldBatchNorm(), [X],
        lambda b, x: norm(b, b.emit(op.add(conv(x), constant(bias.reshape(1, -1, 1, 1))))),
        folded(scale.astype("float32").astype("float64"),
               bias * scale.astype("float32").astype("float64") + shift.astype("float32")),
        ROUNDED,
    )  # fmt: skip


def test_batch_norm_spelled_as_arithmetic_folds_at_once(rewrites):
    g, m, d, c = (v.reshape(9, 1, 1) for v in (GAMMA, MEAN, VARIANCE, BETA))

    def before(_b, x):
        centred = op.divide(op.subtract(conv(x), constant(m)), constant(d))
        return op.add(op.multiply(constant(g), centred), constant(c))

    scale = 1 / d.astype("float64") * g
    shift = -m.astype("float64") * (1 / d.astype("float64")) * g + c
    rewrites(FoldBatchNorm(), [X], before, folded(scale.reshape(-1), shift.reshape(-1)), ROUNDED)


def test_a_layer_scale_folds_into_dense(rewrites):
    w, bias, scale = array(5, 8), array(5), array(5)

    def before(_b, x):
        return op.multiply(
            op.add(dense(x, constant(w), name="fc"), constant(bias)), constant(scale)
        )

    def after(_b, x):
        s = scale.astype("float64")
        new = dense(x, constant((w * s[:, None]).astype("float32")), name="fc")
        return op.add(new, constant((bias * s).reshape(1, 1, 5).astype("float32")))

    rewrites(FoldBatchNorm(), [(2, 3, 8)], before, after, ROUNDED)


def test_batch_norm_without_a_layer_becomes_scale_and_shift(rewrites):
    scale, shift = (v.reshape(1, 9, 1, 1).astype("float32") for v in scale_and_shift())
    rewrites(
        FoldBatchNorm(), [(1, 9, 2, 3)], lambda b, x: norm(b, x),
        lambda _b, x: op.add(op.multiply(x, constant(scale)), constant(shift)), ROUNDED,
    )  # fmt: skip


def test_a_convolution_read_twice_keeps_its_weight(same_values, build):
    def body(b, x):
        y = b.emit(conv(x))
        return op.add(norm(b, y), op.nn.relu(y))

    found = same_values(FoldBatchNorm(), build([X], body), ROUNDED)
    names = [b.value.op.name for b in bindings_of(found["main"])]
    assert names.count("kerf.conv2d") == 1 and "relax.multiply" in names
    assert "relax.nn.batch_norm" not in names


def test_a_bias_read_twice_keeps_the_scale_behind_it(declines):
    def body(b, x):
        y = b.emit(op.add(conv(x), constant(array(1)[0] + np.ones((9, 1, 1), "float32"))))
        return op.add(op.multiply(y, constant(2 * np.ones((9, 1, 1), "float32"))), y)

    RNG_state = RNG.bit_generator.state
    source = body

    def same(b, x):
        RNG.bit_generator.state = RNG_state
        return source(b, x)

    declines(FoldBatchNorm(), [X], same)


@pytest.mark.parametrize(
    "after",
    [
        lambda y: op.multiply(y, constant(np.full((1, 1, 5, 1), 2, "float32"))),  # along height
        lambda y: op.multiply(
            y, constant(np.full((1, 9, 5, 7), 2, "float32"))
        ),  # element by element
        lambda y: op.multiply(op.nn.relu(y), constant(np.full((9, 1, 1), 2, "float32"))),
        lambda y: op.divide(constant(np.full((9, 1, 1), 2, "float32")), y),
        lambda y: op.divide(y, constant(np.zeros((9, 1, 1), "float32"))),  # infinite
        lambda y: op.add(y, constant(np.ones((9, 1, 1), "float32"))),  # a bias alone is a bias
    ],
    ids=["axis", "elements", "relu", "reciprocal", "infinite", "bias"],
)
def test_declines(declines, after):
    declines(FoldBatchNorm(), [X], lambda _b, x: after(conv(x)))


def test_declines_training(declines):
    declines(FoldBatchNorm(), [X], lambda b, x: norm(b, b.emit(conv(x)), training=True))
