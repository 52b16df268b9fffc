# SPDX-License-Identifier: Apache-2.0
"""What the rewriting makes of small binary networks: the same values, bits between layers, reasons where not."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

import passes
from passes.binary.operators import (
    BINARY_CONV2D,
    BINARY_CONV2D_BITS,
    BINARY_DENSE,
    BINARY_MAX_POOL2D,
    BINARY_PACK,
    SIGN_CONV2D,
    SIGN_DENSE,
)
from passes.binary.parameters import parse_binarize, parse_zero
from passes.binary.treat_graph import rewrite
from passes.channels_last import ChannelsLast
from passes.evaluate import evaluate
from passes.family import Context
from passes.layers import conv2d, dense
from passes.rewriting import bindings_of
from passes.treatment import Treatment
from schedules.target import NAMED
from tests.passes.conftest import build_function

OP = relax.op
CONTEXT = Context(NAMED["avx512"])


def _sign(builder, x):
    positive = builder.emit(OP.greater_equal(x, relax.const(np.float32(0))))
    return builder.emit(OP.where(positive, relax.const(np.float32(1)), relax.const(np.float32(-1))))


class Weights:
    def __init__(self, rng):
        self.rng = rng

    def __call__(self, *shape):
        scale = self.rng.uniform(0.05, 0.2, (shape[0], *[1] * (len(shape) - 1)))
        signs = np.where(self.rng.random(shape) < 0.5, -1, 1)
        return relax.const((signs * scale.astype(np.float32)).astype(np.float32))

    def channels(self, size):
        return relax.const(self.rng.standard_normal((size, 1, 1)).astype(np.float32))


def _operators(mod) -> list[str]:
    values = [b.value for b in bindings_of(mod["main"])]
    return [
        v.op.name for v in values if isinstance(v, relax.Call) and v.op.name.startswith("kerf.")
    ]


def _check(mod, inputs, **parameters):
    """The rewritten graph, having checked its values in both layouts, and the decisions by layer."""
    names = [b.value.attrs["name"] for b in bindings_of(mod["main"]) if _is_named(b.value)]
    treatments = {n: Treatment("binary", parameters) for n in names}
    found = rewrite(mod, treatments, CONTEXT)
    references = {n: f for family in passes.families() for n, f in family.references.items()}
    (wanted,) = evaluate(mod, inputs)
    for graph in (found.treated, ChannelsLast()(found.treated)):
        (got,) = evaluate(graph, inputs, references=references)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    return found.treated, {d.layer: d for d in found.decisions}


def _is_named(value) -> bool:
    return isinstance(value, relax.Call) and value.op.name in ("kerf.conv2d", "kerf.dense")


def _images(rng, *shape):
    return [rng.standard_normal(shape).astype(np.float32)]


def test_batch_norm_and_activation_between_two_layers_become_thresholds(rng):
    w = Weights(rng)

    def body(b, x):
        y = conv2d(_sign(b, x), w(40, 16, 3, 3), name="a", padding=(1, 1, 1, 1))
        y = b.emit(OP.multiply(b.emit(y), w.channels(40)))
        y = b.emit(OP.clip(b.emit(OP.add(y, w.channels(40))), -1, 1))
        return b.emit(conv2d(_sign(b, y), w(8, 40, 3, 3), name="b", padding=(1, 1, 1, 1)))

    mod = build_function([(1, 16, 6, 5)], body)
    treated, decisions = _check(mod, _images(rng, 1, 16, 6, 5))
    assert _operators(treated) == [BINARY_PACK, BINARY_CONV2D_BITS, BINARY_CONV2D]
    assert decisions["b"].found["signs"] == "bits of a, thresholds folded"


def test_a_residual_connection_keeps_the_numbers(rng):
    w = Weights(rng)

    def body(b, x):
        y = b.emit(conv2d(_sign(b, x), w(16, 16, 3, 3), name="a", padding=(1, 1, 1, 1)))
        y = b.emit(OP.add(y, x))
        z = b.emit(conv2d(_sign(b, y), w(16, 16, 3, 3), name="b", padding=(1, 1, 1, 1)))
        return b.emit(OP.add(z, y))

    mod = build_function([(1, 16, 6, 5)], body)
    treated, decisions = _check(mod, _images(rng, 1, 16, 6, 5))
    assert _operators(treated) == [BINARY_PACK, BINARY_CONV2D] * 2
    assert "add lies between" in decisions["b"].found["signs"]


def test_numbers_that_something_else_reads_do_not_fold(rng):
    w = Weights(rng)

    def body(b, x):
        y = b.emit(conv2d(_sign(b, x), w(16, 16, 1, 1), name="a"))
        z = b.emit(conv2d(_sign(b, y), w(16, 16, 1, 1), name="b"))
        return b.emit(OP.add(z, y))

    treated, decisions = _check(build_function([(1, 16, 3, 3)], body), _images(rng, 1, 16, 3, 3))
    assert BINARY_CONV2D_BITS not in _operators(treated)
    assert "residual" in decisions["b"].found["signs"]


def test_two_layers_that_read_one_sign_share_its_bits(rng):
    w = Weights(rng)

    def body(b, x):
        s = _sign(b, b.emit(OP.add(x, w.channels(16))))
        return b.emit(
            OP.add(
                b.emit(conv2d(s, w(8, 16, 1, 1), name="a")),
                b.emit(conv2d(s, w(8, 16, 3, 3), name="b", padding=(1, 1, 1, 1))),
            )
        )

    treated, _ = _check(build_function([(2, 16, 4, 3)], body), _images(rng, 2, 16, 4, 3))
    assert _operators(treated) == [BINARY_PACK, BINARY_CONV2D, BINARY_CONV2D]


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_pooled_signs_padded_with_signs(value, rng):
    w = Weights(rng)

    def body(b, x):
        s = b.emit(OP.nn.max_pool2d(_sign(b, x), [2, 2], [2, 2]))
        s = b.emit(OP.nn.pad(s, [0, 0, 0, 0, 1, 2, 0, 1], "constant", value))
        return b.emit(conv2d(s, w(7, 33, 3, 3), name="a"))

    treated, _ = _check(build_function([(1, 33, 8, 6)], body), _images(rng, 1, 33, 8, 6))
    assert _operators(treated) == [BINARY_PACK, BINARY_MAX_POOL2D, BINARY_CONV2D]


@pytest.mark.parametrize("before", [True, False], ids=["norm before pooling", "nothing before"])
def test_pooling_between_sums_and_sign_pools_bits(before, rng):
    """XNOR-Net's order; where a norm's factor is negative the sign of a maximum is the smallest sign."""
    w = Weights(rng)

    def body(b, x):
        y = b.emit(conv2d(_sign(b, x), w(40, 33, 3, 3), name="a", padding=(1, 1, 1, 1)))
        if before:
            y = b.emit(
                OP.nn.relu(b.emit(OP.add(b.emit(OP.multiply(y, w.channels(40))), w.channels(40))))
            )
        y = b.emit(OP.nn.max_pool2d(y, [3, 3], [2, 2], padding=[1, 1, 1, 1]))
        y = b.emit(OP.add(b.emit(OP.multiply(y, w.channels(40))), w.channels(40)))
        return b.emit(conv2d(_sign(b, y), w(8, 40, 3, 3), name="b", padding=(1, 1, 1, 1)))

    treated, decisions = _check(build_function([(1, 33, 9, 8)], body), _images(rng, 1, 33, 9, 8))
    assert _operators(treated) == [
        BINARY_PACK, BINARY_CONV2D_BITS, BINARY_MAX_POOL2D, BINARY_CONV2D,
    ]  # fmt: skip
    assert decisions["b"].found["signs"] == "bits of a, thresholds folded"


@pytest.mark.parametrize("what", ["sums", "pooled", "not monotone", "average"])
def test_pooling_that_something_else_reads_or_that_is_no_maximum_does_not_fold(what, rng):
    w = Weights(rng)

    def body(b, x):
        sums = y = b.emit(conv2d(_sign(b, x), w(32, 32, 1, 1), name="a"))
        pool = OP.nn.avg_pool2d if what == "average" else OP.nn.max_pool2d
        pooled = y = b.emit(pool(y, [2, 2], [2, 2]))
        if what == "not monotone":
            y = b.emit(OP.subtract(b.emit(OP.abs(y)), w.channels(32)))
        z = b.emit(conv2d(_sign(b, y), w(8, 32, 1, 1), name="b"))
        if what == "sums":
            z = b.emit(OP.add(z, b.emit(OP.max(sums, [1, 2, 3], True))))
        if what == "pooled":
            z = b.emit(OP.add(z, b.emit(OP.max(pooled, [1, 2, 3], True))))
        return z

    treated, decisions = _check(build_function([(1, 32, 6, 4)], body), _images(rng, 1, 32, 6, 4))
    assert BINARY_CONV2D_BITS not in _operators(treated)
    assert decisions["b"].found["signs"].startswith("packed from float32")


def test_scales_of_zero_and_below_and_thresholds_no_sum_reaches(rng):
    """Channels whose sign is constant, rises and falls with the sum."""
    w = Weights(rng)
    factor = np.array([0, -1, 1, -2, 3, 0, 1, -1] * 4, np.float32).reshape(-1, 1, 1)
    shift = np.array([0, 0, 0, 1e6, -1e6, -1, 1e6, 0.5] * 4, np.float32).reshape(-1, 1, 1)

    def body(b, x):
        y = b.emit(conv2d(_sign(b, x), w(32, 16, 3, 3), name="a"))
        y = b.emit(OP.add(b.emit(OP.multiply(y, relax.const(factor))), relax.const(shift)))
        return b.emit(conv2d(_sign(b, y), w(8, 32, 1, 1), name="b"))

    treated, _ = _check(build_function([(1, 16, 6, 5)], body), _images(rng, 1, 16, 6, 5))
    assert _operators(treated) == [BINARY_PACK, BINARY_CONV2D_BITS, BINARY_CONV2D]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -0.0])
def test_special_inputs_have_the_sign_that_the_model_gives_them(value, rng):
    w = Weights(rng)

    def body(b, x):
        return b.emit(conv2d(_sign(b, x), w(8, 32, 1, 1), name="a"))

    x = _images(rng, 1, 32, 3, 3)
    x[0][0, 1:4] = value
    _check(build_function([(1, 32, 3, 3)], body), x)


def test_a_border_that_repeats_pixels_stays_exact(rng):
    """No padding that the kernels know: the signs of the padded image are packed."""
    w = Weights(rng)

    def body(b, x):
        y = b.emit(OP.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1], "reflect"))
        return b.emit(conv2d(_sign(b, y), w(8, 32, 3, 3), name="a"))

    mod = build_function([(1, 32, 5, 4)], body)
    treated, decisions = _check(mod, _images(rng, 1, 32, 5, 4))
    assert _operators(treated) == [BINARY_PACK, BINARY_CONV2D]

    def declined(b, x):
        y = b.emit(OP.nn.pad(_sign(b, x), [0, 0, 0, 0, 1, 1, 1, 1], "reflect"))
        return b.emit(conv2d(y, w(8, 32, 3, 3), name="a"))

    treated, decisions = _check(
        build_function([(1, 32, 5, 4)], declined), _images(rng, 1, 32, 5, 4)
    )
    assert "weights only" in decisions["a"].found["signs"]
    assert "not signs of anything" in decisions["a"].found["signs"]
    assert _operators(treated) == [SIGN_CONV2D]


def test_signs_laid_flat_for_a_dense_layer(rng):
    w = Weights(rng)

    def body(b, x):
        s = _sign(b, b.emit(OP.add(x, w.channels(5))))
        return b.emit(dense(b.emit(OP.reshape(s, (2, 60))), w(9, 60), name="fc"))

    treated, _ = _check(build_function([(2, 5, 4, 3)], body), _images(rng, 2, 5, 4, 3))
    assert _operators(treated) == [BINARY_PACK, BINARY_DENSE]


def test_weights_of_signs_meet_real_inputs(rng):
    """Convolution and dense layer, a scale per channel of which one is 0; a batch norm behind it."""
    w = Weights(rng)
    second = w(7, 20).value.numpy()
    second[3] = 0

    def body(b, x):
        y = b.emit(conv2d(x, w(20, 9, 3, 3), name="a", padding=(1, 1, 1, 1), strides=(2, 1)))
        y = b.emit(OP.add(b.emit(OP.multiply(y, w.channels(20))), w.channels(20)))
        y = b.emit(OP.mean(b.emit(OP.nn.relu(y)), [2, 3]))
        return b.emit(dense(y, relax.const(second), name="b"))

    treated, decisions = _check(build_function([(2, 9, 6, 5)], body), _images(rng, 2, 9, 6, 5))
    assert _operators(treated) == [SIGN_CONV2D, SIGN_DENSE]
    assert all("weights only" in d.found["signs"] for d in decisions.values())


def test_weights_of_signs_stay_dense_where_they_cannot_be_packed(rng):
    """Depthwise: no channels to look up together; aarch64: no permutation of floats."""
    w = Weights(rng)
    few = build_function(
        [(1, 16, 4, 4)], lambda _b, x: conv2d(x, w(16, 1, 3, 3), name="a", groups=16)
    )
    (decision,) = rewrite(few, {"a": Treatment("binary")}, CONTEXT).decisions
    assert "groups of 1" in decision.declined
    plain = build_function([(1, 16, 4, 4)], lambda _b, x: conv2d(x, w(8, 16, 3, 3), name="a"))
    found = rewrite(plain, {"a": Treatment("binary")}, Context(NAMED["aarch64"]))
    assert "no permutation" in found.decisions[0].declined
    assert _operators(found.treated) == ["kerf.conv2d"]


def _with_zeros(rng, *shape):
    x = rng.standard_normal(shape).astype(np.float32)
    x[rng.random(shape) < 0.3] = 0
    return [x]


def test_sign_of_zero_is_zero_where_the_model_says_so(rng):
    w = Weights(rng)

    def body(b, x):
        s = b.emit(OP.sign(x))
        return b.emit(conv2d(s, w(8, 32, 3, 3), name="a", padding=(1, 1, 1, 1)))

    mod = build_function([(1, 32, 4, 4)], body)
    treated, decisions = _check(mod, _with_zeros(rng, 1, 32, 4, 4))
    assert _operators(treated) == [BINARY_PACK, BINARY_PACK, BINARY_CONV2D]
    assert "two planes" in decisions["a"].found["sign_of_zero"]


def test_sign_of_zero_declines_where_it_cannot_be_exact_unless_told_otherwise(rng):
    w = Weights(rng)
    mod = build_function(
        [(1, 20, 4, 4)], lambda b, x: conv2d(b.emit(OP.sign(x)), w(8, 20, 3, 3), name="a")
    )
    (declined,) = rewrite(mod, {"a": Treatment("binary")}, CONTEXT).decisions
    assert "sign of 0" in declined.declined and declined.treatment == "dense"
    for zero, value in (("+1", 1), ("-1", -1)):
        x = _with_zeros(rng, 1, 20, 4, 4)[0]
        treated = rewrite(mod, {"a": Treatment("binary", {"zero": zero})}, CONTEXT).treated
        references = {n: f for family in passes.families() for n, f in family.references.items()}
        (found,) = evaluate(treated, [x], references=references)
        (wanted,) = evaluate(mod, [np.where(x == 0, np.float32(value), x)])
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_float_layer_is_refused_unless_the_experiment_is_asked_for(rng):
    weight = relax.const(rng.standard_normal((8, 16, 3, 3)).astype(np.float32))
    mod = build_function([(1, 16, 4, 4)], lambda _b, x: conv2d(x, weight, name="a"))
    refused = rewrite(mod, {"a": Treatment("binary")}, CONTEXT)
    assert "must be trained" in refused.decisions[0].declined
    assert _operators(refused.treated) == ["kerf.conv2d"]
    tried = rewrite(mod, {"a": Treatment("binary", {"binarize": True})}, CONTEXT)
    (decision,) = tried.decisions
    assert decision.treatment == "binary" and decision.pruned
    assert _operators(tried.treated) == [BINARY_PACK, BINARY_CONV2D]


def test_the_experiment_leaves_what_it_declines_as_it_was(rng):
    weight = relax.const(rng.standard_normal((16, 1, 3, 3)).astype(np.float32))
    mod = build_function([(1, 16, 4, 4)], lambda _b, x: conv2d(x, weight, name="a", groups=16))
    found = rewrite(mod, {"a": Treatment("binary", {"binarize": True})}, CONTEXT)
    assert found.decisions[0].declined and _operators(found.treated) == ["kerf.conv2d"]
    x = _images(rng, 1, 16, 4, 4)
    np.testing.assert_array_equal(evaluate(found.treated, x)[0], evaluate(mod, x)[0])


@pytest.mark.parametrize(
    "parse, value", [(parse_zero, 2), (parse_zero, "0"), (parse_binarize, "x")]
)
def test_parameters_are_checked(parse, value):
    with pytest.raises(ValueError, match="must be"):
        parse(value)
