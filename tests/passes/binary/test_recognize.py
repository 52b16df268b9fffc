# SPDX-License-Identifier: Apache-2.0
"""Spellings of sign, as thresholds; binary weights; and what only looks like them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from passes.binary.recognize import SignWeights, binary_weight, found_in, recognize
from passes.binary.steps import chains, float_steps, integer_steps
from passes.channel_flow import Uses
from passes.family import Layer
from passes.layers import conv2d, is_layer
from passes.rewriting import bindings_of
from schedules.errors import Declined
from tests.passes.conftest import build_function

OP = relax.op
SHAPE = (1, 4, 3, 3)


def _c(value):
    return relax.const(np.float32(value))


def _where(condition):
    return OP.where(condition, _c(1), _c(-1))


def _per_channel(*values):
    return relax.const(np.array(values, np.float32).reshape(-1, 1, 1))


# name -> (sign of x, the same in numpy): what frameworks and papers write.
SPELLINGS = {
    "where >=": (lambda x: _where(OP.greater_equal(x, _c(0))), lambda x: np.where(x >= 0, 1, -1)),
    "where >": (lambda x: _where(OP.greater(x, _c(0))), lambda x: np.where(x > 0, 1, -1)),
    "where <": (
        lambda x: OP.where(OP.less(x, _c(0)), _c(-1), _c(1)), lambda x: np.where(x < 0, -1, 1),
    ),
    "0 <= x": (lambda x: _where(OP.less_equal(_c(0), x)), lambda x: np.where(x >= 0, 1, -1)),
    "twice the truth": (
        lambda x: OP.subtract(
            OP.multiply(OP.astype(OP.greater_equal(x, _c(0)), "float32"), _c(2)), _c(1)
        ),
        lambda x: np.where(x >= 0, 1, -1),
    ),
    "clamp and round": (
        lambda x: OP.subtract(
            OP.multiply(
                OP.round(OP.clip(OP.divide(OP.add(x, _c(1)), _c(2)), 0, 1)), _c(2)
            ), _c(1),
        ),
        lambda x: np.rint(np.clip((x + np.float32(1)) / np.float32(2), 0, 1)) * 2 - 1,
    ),
    "sign of sign and a bit": (
        lambda x: OP.sign(OP.add(OP.sign(x), _c(0.1))), lambda x: np.where(x >= 0, 1, -1),
    ),
    "hard tanh first": (
        lambda x: _where(OP.greater_equal(OP.clip(x, -1, 1), _c(0))),
        lambda x: np.where(x >= 0, 1, -1),
    ),
    "scaled and shifted, falling in a channel": (
        lambda x: _where(
            OP.greater_equal(
                OP.add(OP.multiply(x, _per_channel(1, -2, 3, 0.5)), _per_channel(0.3, 0.3, -1, 7)),
                _c(0),
            )
        ),
        lambda x: np.where(
            x * np.array([1, -2, 3, 0.5], np.float32).reshape(-1, 1, 1)
            + np.array([0.3, 0.3, -1, 7], np.float32).reshape(-1, 1, 1) >= 0, 1, -1,
        ),
    ),
    "sign": (OP.sign, np.sign),
    "three steps, 0 a wide one": (
        lambda x: OP.round(OP.clip(x, -1, 1)), lambda x: np.rint(np.clip(x, -1, 1)),
    ),
    "half of sign": (lambda x: OP.multiply(OP.sign(x), _c(0.5)), lambda x: np.sign(x) / 2),
}  # fmt: skip

NOT_SIGNS = {
    "0 and 1": lambda x: OP.astype(OP.greater_equal(x, _c(0)), "float32"),
    "five steps": lambda x: OP.round(OP.clip(x, -2, 2)),
    "not steps": lambda x: OP.clip(x, -1, 1),
    "another size per channel": lambda x: OP.multiply(
        _where(OP.greater_equal(x, _c(0))), _per_channel(1, 2, 1, 1)
    ),
    "a threshold per pixel": lambda x: _where(
        OP.greater_equal(x, relax.const(np.arange(9, dtype=np.float32).reshape(3, 3)))
    ),
}


def _uses(body, shape=SHAPE):
    mod = build_function([shape], lambda _b, x: body(x))
    uses = Uses(mod)
    return uses, uses.bindings[-1].var


def _steps(body):
    uses, result = _uses(body)
    found = [s for c in chains(uses, result, 1) if (s := float_steps(c)) is not None]
    return found[-1] if found else None


def _hard_values(rng):
    special = np.array([0, -0.0, 1e-45, -1e-45, 6e-8, -6e-8, 1e-9, 3e38, -3e38, np.inf, -np.inf])
    near = np.float32([-0.3, 0.15, 1 / 3, -14, -0.15, 7])
    near = np.concatenate(
        [near, np.nextafter(near, np.float32(9)), np.nextafter(near, np.float32(-9))]
    )
    values = np.concatenate([special.astype(np.float32), near, rng.standard_normal(103)])
    return values.astype(np.float32)[: 4 * 30].reshape(1, 4, 5, 6)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_become_thresholds(name, rng):
    body, meaning = SPELLINGS[name]
    steps = _steps(body)
    assert steps is not None
    x = np.concatenate([_hard_values(rng), np.roll(_hard_values(rng), 1, axis=1)])
    planes = [
        np.where((x >= p.threshold.reshape(-1, 1, 1)) != p.flip.reshape(-1, 1, 1), 1.0, -1.0)
        for p in steps.planes
    ]
    with np.errstate(all="ignore"):
        wanted = meaning(x)
    np.testing.assert_array_equal(np.mean(planes, 0) * steps.size, wanted)
    assert len(steps.planes) == (2 if (wanted == 0).any() else 1)


@pytest.mark.parametrize("name", NOT_SIGNS)
def test_what_only_looks_like_a_sign(name):
    assert _steps(NOT_SIGNS[name]) is None


def test_a_sign_of_what_is_not_monotone_begins_behind_it():
    uses, result = _uses(lambda x: _where(OP.greater_equal(OP.abs(x), _c(1))))
    found = [float_steps(chain) is not None for chain in chains(uses, result, 1)]
    assert found == [False, True, False]  # of truth values, of |x|, of x


def test_integer_thresholds_are_where_the_float_function_changes(rng):
    gain, shift = (
        rng.standard_normal(4).astype(np.float32),
        rng.standard_normal(4).astype(np.float32),
    )

    def body(x):
        y = OP.add(OP.multiply(x, _per_channel(*gain)), _per_channel(*(3 * shift)))
        return _where(OP.greater_equal(OP.tanh(y), _c(0.25)))

    uses, result = _uses(body)
    *_, chain = chains(uses, result, 1)
    scale = np.array([0.1, 0.7, 1.3, 0.01], np.float32)
    steps = integer_steps(chain, scale, 36, None)
    sums = np.arange(-36, 37, dtype=np.int32)[:, None]
    roots = sums.astype(np.float32) * scale
    wanted = np.tanh(roots * gain + 3 * shift) >= np.float32(0.25)
    (plane,) = steps.planes
    np.testing.assert_array_equal((sums >= plane.threshold) != plane.flip, wanted)


def test_sums_at_which_the_sign_is_zero_do_not_fold():
    uses, result = _uses(OP.sign)
    (chain,) = chains(uses, result, 1)
    ones = np.ones(4, np.float32)
    assert "0 at a sum" in integer_steps(chain, ones, 8, None)
    assert "0 at a sum" in integer_steps(chain, ones, 8, 0)
    (plane,) = integer_steps(chain, ones, 9, 1).planes  # an odd number of +-1 is never 0
    assert (plane.threshold == 1).all()


def test_a_sign_that_changes_twice_does_not_fold():
    uses, result = _uses(lambda x: _where(OP.greater_equal(OP.abs(x), _c(3))))
    *_, chain = chains(uses, result, 1)
    assert "changes 2 times" in integer_steps(chain, np.ones(4, np.float32), 9, None)


def test_weights_of_one_size_per_channel(rng):
    signs = np.where(rng.random((3, 5, 3, 3)) < 0.5, -1, 1)
    scale = np.array([0.1, 2.0, 0.0], np.float32).reshape(-1, 1, 1, 1)
    found = binary_weight((signs * scale).astype(np.float32))
    np.testing.assert_array_equal(found.signs[:2], signs[:2])
    np.testing.assert_array_equal(found.scale, scale.ravel())


@pytest.mark.parametrize("value", [0.0, 0.3, np.nan])
def test_one_other_weight_is_enough_to_decline(value):
    weight = np.full((2, 8), 0.25, np.float32)
    weight[1, 3] = value
    assert binary_weight(weight) is None


def _layer(body, weight, **attrs):
    def graph(builder, x):
        return conv2d(builder.emit(body(x)), relax.const(weight), name="layer", **attrs)

    mod = build_function([SHAPE], graph)
    (call,) = (b.value for b in bindings_of(mod["main"]) if is_layer(b.value))
    return mod, recognize(Layer(call), Uses(mod))


def test_reasons_say_what_is_missing(rng):
    real = rng.standard_normal((5, 4, 3, 3)).astype(np.float32)
    signs = np.where(real >= 0, 1, -1).astype(np.float32)
    sign = SPELLINGS["where >="][0]
    reasons = {
        "must be trained": _layer(OP.nn.relu, real),
        "its weights are not": _layer(sign, real),
        "neither 0 nor a sign": _layer(
            lambda x: OP.nn.pad(sign(x), [0, 0, 0, 0, 1, 1, 1, 1], "constant", 0.5), signs
        ),
        "padded twice": _layer(
            lambda x: OP.nn.pad(sign(x), [0, 0, 0, 0, 1, 1, 1, 1], "constant", 1.0), signs,
            padding=(1, 1, 1, 1),
        ),
    }  # fmt: skip
    for words, (_, outcome) in reasons.items():
        padded = "pad" in words or "neither" in words  # their weights are binary all the same
        assert isinstance(outcome, SignWeights if padded else Declined) and words in outcome.reason


def test_binary_weights_with_real_inputs(rng):
    real = rng.standard_normal((5, 4, 3, 3)).astype(np.float32)
    signs = np.where(real >= 0, 0.5, -0.5).astype(np.float32)
    _, outcome = _layer(OP.nn.relu, signs)
    assert isinstance(outcome, SignWeights) and "not signs of anything" in outcome.reason
    np.testing.assert_array_equal(outcome.weight.scale, np.full(5, 0.5, np.float32))
    signs[0, 0, 0, 0] = 0.25
    assert isinstance(_layer(OP.nn.relu, signs)[1], Declined)


def test_inspection_names_what_is_there(rng):
    real = rng.standard_normal((5, 4, 3, 3)).astype(np.float32)
    signs = np.where(real >= 0, 0.5, -0.5).astype(np.float32)
    sign = SPELLINGS["where >="][0]
    for body, weight, wanted in (
        (sign, signs, {"layer": {"binary": "weights and inputs"}}),
        (OP.nn.relu, signs, {"layer": {"binary": "weights"}}),
        (sign, real, {"layer": {"binary": "inputs"}}),
        (OP.nn.relu, real, {}),
    ):
        mod, _ = _layer(body, weight)
        assert isinstance(mod, tvm.IRModule) and found_in(mod) == wanted
