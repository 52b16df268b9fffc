# SPDX-License-Identifier: Apache-2.0
"""Tricks that change the float graph and not its function: each on a network built to need it."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes import layers
from passes.evaluate import evaluate
from passes.layers import attrs_of
from passes.quantized.absorb_biases import absorb_biases
from passes.quantized.equalize_channels import equalize_channels
from passes.quantized.fold_input_normalization import fold_input_normalization
from passes.quantized.migrate_outliers import migrate_outliers
from passes.treat_layers import layers_of

op = relax.op


def conv(b, x, w, name, bias=None, **attrs):
    y = b.emit(layers.conv2d(x, relax.const(w), name=name, **attrs))
    return y if bias is None else b.emit(op.add(y, relax.const(bias.reshape(1, -1, 1, 1))))


def dense(b, x, w, name, bias=None):
    y = b.emit(layers.dense(x, relax.const(w), name=name))
    return y if bias is None else b.emit(op.add(y, relax.const(bias)))


def floats(rng, *shape):
    return rng.standard_normal(shape).astype("float32")


def wild(rng, *shape):
    """Weights whose output channels differ in size by a factor of up to 2 ** 12."""
    size = 2.0 ** rng.uniform(-6, 6, (shape[0],) + (1,) * (len(shape) - 1))
    return (rng.standard_normal(shape) * size).astype("float32")


def weights(mod):
    return {layer.name: layer.weight for layer in layers_of(mod)}


def spread(weight, axis=0):
    """The ratio of the largest to the smallest range among the channels along an axis."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    ranges = np.abs(weight).max(axis=others)
    return ranges.max() / ranges.min()


def same_bits(a, b, inputs):
    for dtype in ("float32", "float64"):
        for x, y in zip(evaluate(a, inputs, dtype=dtype), evaluate(b, inputs, dtype=dtype)):
            np.testing.assert_array_equal(x, y)


def mobile_block(build, rng, ceiling=True):
    """1x1 -> ReLU6 -> depthwise 3x3 -> ReLU6 -> 1x1, channels wild in one layer and wild the other way in the next."""
    s, t = 2.0 ** rng.uniform(-6, 6, 9), 2.0 ** rng.uniform(-6, 6, 9)
    along = (-1, 1, 1, 1)
    w1 = (floats(rng, 9, 3, 1, 1) * s.reshape(along)).astype("float32")
    w2 = (floats(rng, 9, 1, 3, 3) * (t / s).reshape(along)).astype("float32")
    w3 = (floats(rng, 5, 9, 1, 1) / t.reshape(1, -1, 1, 1)).astype("float32")
    b1, b2 = floats(rng, 9), floats(rng, 9)

    def activation(b, y):
        y = b.emit(op.nn.relu(y))
        return b.emit(op.minimum(y, relax.const(6.0, "float32"))) if ceiling else y

    def body(b, x):
        y = activation(b, conv(b, x, w1, "expand", b1))
        y = activation(b, conv(b, y, w2, "depthwise", b2, groups=9, padding=(1, 1, 1, 1)))
        return conv(b, y, w3, "project")

    return build([(2, 3, 7, 5)], body)


@pytest.mark.parametrize("ceiling", [True, False], ids=["relu6", "relu"])
def test_equalization_levels_channels_and_keeps_every_bit(build, rng, ceiling):
    mod = mobile_block(build, rng, ceiling)
    found = equalize_channels(mod)
    before, after = weights(mod), weights(found.mod)
    assert set(found.scales) == {"expand", "depthwise"}
    for name in ("expand", "depthwise"):
        assert spread(before[name]) > 50 and spread(after[name]) < 10
    same_bits(mod, found.mod, [5 * floats(rng, 2, 3, 7, 5)])


def test_equalization_balances_what_makes_a_channel_against_what_reads_it(build, rng):
    mod = mobile_block(build, rng)
    w = weights(equalize_channels(mod).mod)
    made = np.abs(w["depthwise"]).max(axis=(1, 2, 3))
    read = np.abs(w["project"]).max(axis=(0, 2, 3))
    # Equal but for rounding two factors to powers of two, one of which counts on both sides.
    assert np.all(made / read < 2**1.5) and np.all(read / made < 2**1.5)


def test_equalization_passes_grouped_layers_pooling_and_flattening(build, rng):
    w1, w2, w3 = wild(rng, 8, 3, 3, 3), wild(rng, 12, 4, 1, 1), floats(rng, 5, 12 * 4)
    b1, b2 = floats(rng, 8), floats(rng, 12)

    def body(b, x):
        y = b.emit(op.nn.leakyrelu(conv(b, x, w1, "first", b1), alpha=0.125))
        y = b.emit(op.nn.max_pool2d(y, (2, 2), strides=(2, 2)))
        y = b.emit(op.nn.relu(conv(b, y, w2, "grouped", b2, groups=2)))
        y = b.emit(op.reshape(y, (1, 48)))
        return dense(b, y, w3, "head")

    mod = build([(1, 3, 6, 6)], body)
    found = equalize_channels(mod)
    assert set(found.scales) == {"first", "grouped"}
    same_bits(mod, found.mod, [floats(rng, 1, 3, 6, 6)])


def test_equalization_leaves_channels_that_meet_others(build, rng):
    w1, w2 = wild(rng, 4, 4, 1, 1), floats(rng, 4, 4, 1, 1)

    def residual(b, x):
        y = conv(b, x, w1, "first")
        return b.emit(op.add(conv(b, b.emit(op.nn.relu(y)), w2, "second"), y))

    def gelu(b, x):
        return conv(b, b.emit(op.nn.gelu(conv(b, x, w1, "first"))), w2, "second")

    def output(b, x):
        y = conv(b, x, w1, "first")
        return b.emit(relax.Tuple([y, conv(b, y, w2, "second")]))

    def shared(b, x):
        return conv(b, conv(b, x, w1, "first"), w1, "first")

    reasons = {}
    for body in (residual, gelu, output, shared):
        mod = build([(1, 4, 3, 3)], body)
        found = equalize_channels(mod)
        assert found.mod is mod and not found.scales
        reasons[body.__name__] = found.reasons["first"]
    assert "add" in reasons["residual"] and "gelu" in reasons["gelu"]
    assert "output" in reasons["output"]


def test_equalization_ignores_dead_channels_and_layers_not_asked_for(build, rng):
    w1, w2 = wild(rng, 4, 3, 1, 1), floats(rng, 4, 4, 1, 1)
    w1[1], w2[:, 2] = 0, 0

    def body(b, x):
        return conv(b, b.emit(op.nn.relu(conv(b, x, w1, "first"))), w2, "second")

    mod = build([(1, 3, 3, 3)], body)
    found = equalize_channels(mod)
    assert found.scales["first"][1] == 1 == found.scales["first"][2]
    same_bits(mod, found.mod, [floats(rng, 1, 3, 3, 3)])
    assert equalize_channels(mod, {"first"}).mod is mod


def test_absorption_moves_a_high_bias_behind_the_relu(build, rng, observing):
    w1, w2 = floats(rng, 6, 3, 3, 3) / 5, floats(rng, 4, 6, 1, 1)
    b1 = np.array([40, 0, 100, -1, 0, 60], "float32")
    b2 = floats(rng, 4)

    def body(b, x):
        y = b.emit(op.nn.relu(conv(b, x, w1, "first", b1, padding=(1, 1, 1, 1))))
        return conv(b, b.emit(op.minimum(y, relax.const(1000.0))), w2, "second", b2)

    mod = build([(1, 3, 6, 6)], body)
    samples = [[floats(rng, 1, 3, 6, 6)] for _ in range(8)]
    found = absorb_biases(mod, observing(samples))
    assert np.flatnonzero(found.shifts["first"]).tolist() == [0, 2, 5]
    for sample in samples:
        a, b = evaluate(mod, sample)[0], evaluate(found.mod, sample)[0]
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())

    def range_of(graph):
        name = next(
            x.var.name
            for block in graph["main"].body.blocks
            for x in block.bindings
            if layers.is_call(x.value, "relax.minimum")
        )
        return max(v[name].max() for v in observing(samples)(graph, [name]))

    assert range_of(found.mod) < range_of(mod) / 5


def test_absorption_stops_at_padding_and_without_a_relu(build, rng, observing):
    w1, w2 = floats(rng, 3, 3, 1, 1) / 9, floats(rng, 3, 3, 3, 3)
    b1 = np.full(3, 50, "float32")

    def padded(b, x):
        y = b.emit(op.nn.relu(conv(b, x, w1, "first", b1)))
        return conv(b, y, w2, "second", padding=(1, 1, 1, 1))

    def leaky(b, x):
        y = b.emit(op.nn.leakyrelu(conv(b, x, w1, "first", b1)))
        return conv(b, y, w2, "second")

    for body, word in ((padded, "pads"), (leaky, "leakyrelu")):
        mod = build([(1, 3, 4, 4)], body)
        found = absorb_biases(mod, observing([[floats(rng, 1, 3, 4, 4)]]))
        assert not found.shifts and word in found.reasons["first"]


@pytest.mark.parametrize("padding", [0, 1])
def test_input_normalization_goes_into_the_first_layer(build, rng, padding):
    mean = np.array([0.4, 0.5, 0.6], "float32").reshape(1, 3, 1, 1)
    deviation = np.array([0.25, 0.01, 4.0], "float32").reshape(1, 3, 1, 1)
    w, bias = floats(rng, 5, 3, 3, 3), floats(rng, 5)

    def body(b, x):
        y = b.emit(op.divide(b.emit(op.subtract(x, relax.const(mean))), relax.const(deviation)))
        return conv(b, y, w, "stem", bias, padding=[padding] * 4)

    mod = build([(2, 3, 6, 5)], body)
    found, folded = fold_input_normalization(mod)
    assert folded == ["stem"]
    operators = [b.value.op.name for blk in found["main"].body.blocks for b in blk.bindings]
    assert "relax.divide" not in operators
    assert operators.count("relax.add") == 1 + padding  # padded, the mean stays
    x = rng.random((2, 3, 6, 5)).astype("float32")
    a, b = evaluate(mod, [x])[0], evaluate(found, [x])[0]
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(a).max())


def test_input_normalization_stays_where_something_else_reads_it(build, rng):
    w = floats(rng, 3, 3, 1, 1)

    def body(b, x):
        y = b.emit(op.multiply(x, relax.const(2.0)))
        return b.emit(op.add(conv(b, y, w, "stem"), y))

    mod = build([(1, 3, 4, 4)], body)
    found, folded = fold_input_normalization(mod)
    assert not folded and found is mod


def test_migration_takes_outliers_out_of_a_norm_and_keeps_every_bit(build, rng, observing):
    gamma, beta = floats(rng, 16), floats(rng, 16)
    gamma[3], gamma[9] = 100, -60
    w1, w2 = floats(rng, 24, 16), floats(rng, 16, 24)

    def body(b, x):
        y = b.emit(op.nn.layer_norm(x, relax.const(gamma), relax.const(beta), axes=[-1]))
        h = b.emit(op.nn.relu(dense(b, y, w1, "up", floats(rng, 24))))
        return b.emit(op.add(dense(b, h, w2, "down"), y))  # the residual reads the norm as well

    mod = build([(1, 7, 16)], body)
    samples = [[floats(rng, 1, 7, 16)] for _ in range(4)]
    found = migrate_outliers(mod, observing(samples))
    assert set(found.scales) == {"up"}
    same_bits(mod, found.mod, samples[0])

    def step_share(graph):
        """Range of the norm against its typical channel: what one scale for all of them loses."""
        name = next(
            x.var.name
            for block in graph["main"].body.blocks
            for x in block.bindings
            if layers.is_call(x.value, "relax.nn.layer_norm")
        )
        values = np.concatenate([v[name] for v in observing(samples)(graph, [name])], axis=1)
        ranges = np.abs(values).max(axis=(0, 1))
        return ranges.max() / np.median(ranges)

    assert step_share(found.mod) < step_share(mod) / 4
    assert spread(weights(found.mod)["up"], axis=1) > spread(w1, axis=1)
    assert {attrs_of(layer.call)["name"] for layer in layers_of(found.mod)} == {"up", "down"}
