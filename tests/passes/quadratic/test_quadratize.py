# SPDX-License-Identifier: Apache-2.0
"""Blocks of two layers are replaced by fitted quadratic ones where errors hold, and declined with figures elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes import layers
from passes.evaluate import evaluate
from passes.family import Context
from passes.layers import attrs_of
from passes.quadratic import FAMILY, quadratize
from passes.quadratic.fit import fit_additive, refine, relative_error
from passes.quadratic.operators import is_quadratic
from passes.rewriting import bindings_of
from passes.treatment import Treatment
from schedules.target import NAMED

op = relax.op


def test_an_additive_neuron_is_fitted_exactly(rng):
    x = rng.standard_normal((200, 5))
    y = x @ rng.standard_normal((5, 3)) + (x * x) @ rng.standard_normal((5, 3)) + 7
    assert relative_error(fit_additive(x[:150], y[:150])(x[150:]), y[150:]) < 1e-9


def test_a_product_is_found_by_refining(rng):
    x = rng.standard_normal((3000, 6))
    r, g = (rng.standard_normal((6, 4)) for _ in range(2))
    y = (x @ r + 1) * (x @ (0.3 * g) + 1)
    start = fit_additive(x[:2400], y[:2400])
    before = relative_error(start(x[2400:]), y[2400:])
    after = relative_error(refine(start, x[:2400], y[:2400])(x[2400:]), y[2400:])
    assert before > 0.1 and after < 0.02


def observing(samples: list, names_seen: list | None = None):
    """`Context.observe` in numpy."""

    def observe(mod, names):
        for sample in samples:
            values = dict(zip((p.name for p in mod["main"].params), sample))
            evaluate(
                mod, sample, references=FAMILY.references,
                observe=lambda name, value, values=values: values.update({name: value}),
            )  # fmt: skip
            yield {name: values[name] for name in names}

    return observe


def dense_block(rng, hidden=64, lift=12.0):
    """x [2, 20, 8] -> dense, relu, dense, tanh; with a large bias the ReLU lets nearly everything pass."""

    def body(b, x):
        w1, w2 = (
            relax.const((0.5 * rng.standard_normal(s)).astype("float32")) for s in ((hidden, 8), (8, hidden))
        )  # fmt: skip
        h = b.emit(
            op.add(
                b.emit(layers.dense(x, w1, name="up")),
                relax.const(np.full(hidden, lift, "float32")),
            )
        )
        y = b.emit(layers.dense(b.emit(op.nn.relu(h)), w2, name="down"))
        return op.tanh(
            b.emit(
                op.multiply(
                    b.emit(op.add(y, relax.const(np.ones(8, "float32")))), relax.const(0.01)
                )
            )
        )

    return [(2, 20, 8)], body


def conv_block(rng):
    """x [1, 3, 9, 9] -> 3x3, relu, 1x1 of stride 2."""

    def body(b, x):
        w1, w2 = (
            relax.const((0.3 * rng.standard_normal(s)).astype("float32")) for s in ((96, 3, 3, 3), (4, 96, 1, 1))
        )  # fmt: skip
        first = b.emit(layers.conv2d(x, w1, name="up", padding=(1, 1, 1, 1)))
        h = b.emit(op.add(first, relax.const(np.full((1, 96, 1, 1), 9, "float32"))))
        return layers.conv2d(b.emit(op.nn.relu(h)), w2, name="down", strides=(2, 2))

    return [(1, 3, 9, 9)], body


def run(build, rng, made, count=40, limit=0.01, observe=True):
    """(graph, what became of it, samples)"""
    inputs, body = made
    mod = build(inputs, body)
    samples = [[rng.standard_normal(s).astype("float32") for s in inputs] for _ in range(count)]
    asked = {n: Treatment("quadratic", {"fit_error": limit}) for n in ("up", "down")}
    context = Context(NAMED["avx512"], observing(samples) if observe else None)
    return mod, FAMILY.rewrite(mod, asked, context), samples


@pytest.mark.parametrize("made", [dense_block, conv_block], ids=["dense", "conv"])
def test_a_nearly_linear_block_becomes_one_layer(made, build, rng):
    mod, done, samples = run(build, rng, made(rng))
    (call,) = [b.value for b in bindings_of(done.treated["main"]) if is_quadratic(b.value)]
    assert attrs_of(call)["layers"] == ["up", "down"] and attrs_of(call)["form"] == "bl"
    for decision in done.decisions:
        assert decision.treatment == "quadratic" and decision.unit == "up"
        assert decision.found["fit_error"] < 0.01 and decision.found["output_error"] < 0.01
        before, after = map(int, decision.found["weights"].split(" -> "))
        assert after < before
    for sample in samples[:2]:  # the reference is the fitted graph, and the fit holds
        found = evaluate(done.treated, sample, references=FAMILY.references)[0]
        meant = evaluate(done.reference, sample, references=FAMILY.references)[0]
        np.testing.assert_allclose(found, meant, rtol=1e-4, atol=1e-6)  # weights are rounded
        assert relative_error(found.reshape(-1, 1), evaluate(mod, sample)[0].reshape(-1, 1)) < 0.1
    if made is conv_block:
        assert attrs_of(call)["strides"] == [2, 2] and attrs_of(call)["padding"] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("made", "options", "reason"),
    [
        (lambda rng: dense_block(rng, lift=0.0), {}, r"fits with an error of \d+\.\d+% with 128 weights, \d+\.\d+% with 192"),
        (lambda rng: dense_block(rng, hidden=6), {}, "a quadratic layer would have 128 weights, the block has 96"),
        (dense_block, {"count": 1}, "rows of calibration data for 17 coefficients"),
        (dense_block, {"observe": False}, "needs calibration data"),
    ],
    ids=["error", "size", "rows", "no data"],
)  # fmt: skip
def test_declined_with_figures(made, options, reason, build, rng):
    mod, done, _ = run(build, rng, made(rng), **{"count": 12, **options})
    assert done.treated is mod and done.reference is None
    for decision in done.decisions:
        assert decision.treatment == "dense"
        import re

        assert re.search(reason, decision.declined), decision.declined


def test_blocks_are_given_back_where_the_outputs_do_not_hold(build, rng, monkeypatch):
    monkeypatch.setattr(quadratize, "_output_error", lambda *_: 0.25)
    mod, done, _ = run(build, rng, dense_block(rng))
    assert done.treated is mod
    for decision in done.decisions:
        assert "the model's outputs would be off by 25.00% (at most 1.00%)" in decision.declined


def test_without_the_parameter_nothing_is_fitted(build, rng):
    inputs, body = dense_block(rng)
    mod = build(inputs, body)
    asked = {n: Treatment("quadratic") for n in ("up", "down")}
    done = FAMILY.rewrite(mod, asked, Context(NAMED["avx512"], observing([])))
    assert done.treated is mod and all(
        d.declined.startswith("no quadratic neuron") for d in done.decisions
    )


def test_near_misses_are_no_blocks(build, rng):
    w = relax.const(rng.standard_normal((8, 8)).astype("float32"))

    def hidden_read_twice(b, x):
        h = b.emit(op.nn.relu(b.emit(layers.dense(x, w, name="up"))))
        return op.add(b.emit(layers.dense(h, w, name="down")), h)

    def no_activation(b, x):
        return layers.dense(b.emit(layers.dense(x, w, name="up")), w, name="down")

    for body in (hidden_read_twice, no_activation):
        assert quadratize.find_blocks(build([(4, 8)], body), {"up": 0.1, "down": 0.1}) == []


@pytest.mark.parametrize("value", [0, 1, -0.1, True, "x"])
def test_bad_limits_are_refused(value):
    with pytest.raises(ValueError):
        FAMILY.parameters["fit_error"](value)
