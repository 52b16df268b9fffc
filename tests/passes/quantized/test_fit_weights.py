# SPDX-License-Identifier: Apache-2.0
"""Weights fitted to what their layer sees: clipping, reconstruction, bias correction."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tvm import relax

from passes import layers
from passes.evaluate import evaluate
from passes.quantized.fit_weights import add_biases, clipped_scale, fit_weights
from passes.quantized.rank_sensitivity import joined, most_sensitive, rank_sensitivity
from passes.quantized.round_weights import gram_matrix, round_weight
from passes.quantized.tricks import PARAMETERS, prepare
from passes.quantized.weights import quantize_weight
from passes.treat_layers import layers_of, rewrite_layers
from passes.treatment import Treatment

op = relax.op


def floats(rng, *shape):
    return rng.standard_normal(shape).astype("float32")


def one_conv(build, rng, w, bias=None, groups=1, **attrs):
    def body(b, x):
        y = b.emit(layers.conv2d(x, relax.const(w), name="conv", groups=groups, **attrs))
        return y if bias is None else b.emit(op.add(y, relax.const(bias.reshape(1, -1, 1, 1))))

    return build([(2, w.shape[1] * groups, 7, 6)], body)


def with_weights(mod, weights):
    """The float graph with each layer's weight as its bytes stand for."""

    def change(call):
        name = layers.attrs_of(call)["name"]
        if name not in weights:
            return call
        q = weights[name]
        w = (q.values * q.scale.reshape(-1, *[1] * (q.values.ndim - 1))).astype("float32")
        args = [call.args[0], relax.const(w)]
        return relax.Call(call.op, args, call.attrs, call.ty_args, ret_ty=call.ty)

    return rewrite_layers(mod, change)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_bias_correction_restores_the_mean_of_every_channel(build, rng, observing, groups):
    w = floats(rng, 6, 6 // groups, 3, 3)
    w[:, :, 0, 0] *= 40  # one large tap: all others are rounded coarsely
    attrs = {"padding": (1, 1, 0, 1), "strides": (2, 1), "groups": groups}
    mod = one_conv(build, rng, w, floats(rng, 6), **attrs)
    samples = [[floats(rng, 2, 6, 7, 6) + 3] for _ in range(3)]
    found = fit_weights(mod, {"conv": {"bias_correction": True}}, observing(samples))
    quantized = with_weights(mod, found.weights)
    corrected = add_biases(quantized, found.bias)

    def means(graph):
        return np.mean([evaluate(graph, s)[0] for s in samples], axis=(0, 1, 3, 4))

    shift = np.abs(means(quantized) - means(mod))
    assert shift.max() > 0.1
    np.testing.assert_allclose(means(corrected), means(mod), rtol=0, atol=1e-5)


def test_bias_correction_of_a_dense_layer(build, rng, observing):
    w = floats(rng, 5, 33)
    w[:, 0] *= 100

    def body(b, x):
        return b.emit(layers.dense(x, relax.const(w), name="fc"))

    mod = build([(2, 3, 33)], body)
    samples = [[floats(rng, 2, 3, 33) + 1] for _ in range(2)]
    found = fit_weights(mod, {"fc": {"bias_correction": True}}, observing(samples))
    corrected = add_biases(with_weights(mod, found.weights), found.bias)
    for graph, tolerance in ((corrected, 1e-5), (mod, 1e-12)):
        a = np.mean([evaluate(graph, s)[0] for s in samples], axis=(0, 1, 2))
        b = np.mean([evaluate(mod, s)[0] for s in samples], axis=(0, 1, 2))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def test_reconstruction_finds_what_trying_everything_finds(rng):
    """Four weights: all 16 roundings tried."""
    worse = 0
    for _ in range(20):
        x = rng.standard_normal((50, 4)) @ rng.standard_normal((4, 4))
        w, scale = floats(rng, 3, 4), np.full(3, 0.3, "float32")
        gram = (x.T @ x)[None]
        found = round_weight(w, scale, gram)
        step = w.astype("float64") / scale.astype("float64")[:, None]

        def cost(q, step=step, gram=gram):
            e = q - step
            return np.einsum("oi,ij,oj->o", e, gram[0], e)

        choices = np.stack(
            [
                np.where(np.array(up, bool), np.ceil(step), np.floor(step))
                for up in itertools.product((0, 1), repeat=4)
            ]
        )
        best = np.min([cost(q) for q in choices], axis=0)
        mine, nearest = cost(found.astype("float64")), cost(np.rint(step))
        assert np.all(mine <= nearest * (1 + 1e-9))
        assert np.all((found == np.floor(step)) | (found == np.ceil(step)))
        worse += np.sum(mine > best * (1 + 1e-6))
    assert worse <= 12  # of 60 rows: a descent may end beside the best


@pytest.mark.parametrize("groups", [1, 3])
def test_reconstruction_lowers_the_error_of_a_layer(build, rng, observing, groups):
    w = floats(rng, 6, 6 // groups, 3, 3)
    mod = one_conv(build, rng, w, groups=groups, padding=(1, 1, 1, 1), dilation=(2, 1))
    # Channels that resemble one another leave room to make up for errors.
    mixing = floats(rng, 6, 1) + 0.1 * floats(rng, 6, 6)
    samples = [[np.einsum("nchw,cd->ndhw", floats(rng, 2, 6, 7, 6), mixing)] for _ in range(4)]
    errors = {}
    for rounding in ("nearest", "reconstruct"):
        found = fit_weights(mod, {"conv": {"rounding": rounding}}, observing(samples))
        graph = with_weights(mod, found.weights)
        errors[rounding] = sum(
            np.sum((evaluate(graph, s)[0] - evaluate(mod, s)[0]) ** 2) for s in samples
        )
    assert errors["reconstruct"] < 0.7 * errors["nearest"]


def test_gram_matrix_is_that_of_the_windows(build, rng):
    w = floats(rng, 4, 2, 3, 2)
    attrs = {"groups": 2, "padding": (1, 0, 2, 1), "strides": (2, 1), "dilation": (1, 2)}
    mod = one_conv(build, rng, w, **attrs)
    (layer,) = layers_of(mod)
    x = floats(rng, 2, 4, 7, 6)
    gram = gram_matrix(layer, x)
    assert gram.shape == (2, 12, 12)
    y = evaluate(mod, [x])[0]  # the sum of squares of the outputs is w G w^T
    rows = w.reshape(2, 2, 12).astype("float64")
    wanted = np.einsum("goi,gij,goj->go", rows, gram, rows).reshape(-1)
    np.testing.assert_allclose((y**2).sum(axis=(0, 2, 3)), wanted, rtol=1e-9)


@pytest.mark.parametrize("per_channel", [True, False])
def test_clipping_gives_up_an_outlier_for_all_others(rng, per_channel):
    w = floats(rng, 4, 4608) / 10
    w[2, 7] = 6
    _values, scale = quantize_weight(w, per_channel=per_channel)
    clipped = clipped_scale(w, scale, per_channel=per_channel)

    def error(s):
        steps = np.clip(np.rint(w / s[:, None]), -127, 127)
        return ((steps * s[:, None] - w) ** 2).sum()

    assert error(clipped) < error(scale)
    assert clipped[2] < scale[2] and (per_channel or np.all(clipped == clipped[0]))


def test_rounding_without_data_says_so(build, rng):
    mod = one_conv(build, rng, floats(rng, 3, 3, 1, 1))
    found = fit_weights(mod, {"conv": {"rounding": "reconstruct", "bias_correction": True}}, None)
    assert "no calibration data" in found.notes["conv"]["rounding"]
    assert not found.bias


def test_sensitivity_finds_the_layer_that_bytes_ruin(build, rng, observing):
    w1, w2, w3 = floats(rng, 4, 3, 1, 1), floats(rng, 4, 4, 1, 1), floats(rng, 4, 4, 1, 1)
    w2[:, 0] *= 1000  # its channel is nearly always zero, and decides the scale
    off = np.array([-2000, 0, 0, 0], "float32").reshape(1, -1, 1, 1)

    def body(b, x):
        y = b.emit(op.add(b.emit(layers.conv2d(x, relax.const(w1), name="a")), relax.const(off)))
        y = b.emit(layers.conv2d(b.emit(op.nn.relu(y)), relax.const(w2), name="b"))
        return b.emit(layers.conv2d(b.emit(op.nn.relu(y)), relax.const(w3), name="c"))

    mod = build([(1, 3, 6, 6)], body)

    observe = observing([[floats(rng, 1, 3, 6, 6)]])
    out = [mod["main"].body.body.name]

    def outputs(names):
        fitted = fit_weights(mod, {n: {"per_channel": True} for n in names}, None)
        return joined(observe(with_weights(mod, fitted.weights), out), out)

    found = rank_sensitivity(["a", "b", "c"], outputs)
    assert next(iter(found)) == "b" and found["b"] > 100 * found["c"] > 0
    assert most_sensitive(found, 1) == ["b"]


def test_prepare_applies_what_each_layer_asks_for(build, rng, observing):
    w1, w2 = floats(rng, 4, 3, 1, 1), floats(rng, 4, 4, 1, 1)
    w1[1] *= 100

    def body(b, x):
        y = b.emit(op.nn.relu(b.emit(layers.conv2d(x, relax.const(w1), name="a"))))
        return b.emit(layers.conv2d(y, relax.const(w2), name="b"))

    mod = build([(1, 3, 6, 6)], body)

    class Calibrated:
        observe = staticmethod(observing([[floats(rng, 1, 3, 6, 6)]]))

    class Without:
        observe = None

    off = {name: Treatment("int8", {"equalize": False}) for name in "ab"}
    assert prepare(mod, off, Calibrated).mod is mod
    on = {name: Treatment("int8", {"equalize": True, "smooth": 0.5}) for name in "ab"}
    found = prepare(mod, on, Without)
    assert found.notes["a"]["equalize"] > 1 and found.mod is not mod
    assert found.notes["b"]["smooth"] == "no calibration data"
    # What is asked for and finds nothing to do says so; what is on by itself does not.
    asked = dict.fromkeys(("fold_input_normalization", "absorb_biases"), True)
    treatments = {name: Treatment("int8", {**asked, "smooth": 0.5}) for name in "ab"}
    found = prepare(mod, treatments, Calibrated)
    assert all(found.notes["a"][trick].startswith("nowhere: ") for trick in (*asked, "smooth"))
    alone = prepare(mod, {"b": Treatment("int8", {"equalize": True})}, Calibrated)
    assert alone.notes["b"]["equalize"].startswith("nowhere: ")
    assert prepare(mod, {"b": Treatment("int8")}, Calibrated).notes == {"b": {}}


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("equalize", True, 1),
        ("smooth", 0.5, 2),
        ("rounding", "reconstruct", "up"),
        ("keep_float", 3, -1),
    ],
)
def test_parameters_are_checked(key, good, bad):
    assert PARAMETERS[key](good) == good
    with pytest.raises(ValueError):
        PARAMETERS[key](bad)
