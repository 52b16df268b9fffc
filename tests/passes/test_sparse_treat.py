# SPDX-License-Identifier: Apache-2.0
"""Which layers the sparse family takes and why it declines the others."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes import layers
from passes.family import Layer
from passes.sparse import FAMILY
from passes.sparse import treat as rules
from passes.sparse.cost import estimate
from passes.sparse.detect import found
from passes.sparse.operators import SPARSE_CONV2D, SPARSE_DENSE
from passes.sparse.prune import prune
from passes.sparse.treat import choose_grain, layer_problem, parse_density
from schedules.errors import Declined
from schedules.target import NAMED

TARGET = NAMED["avx512"]


def conv_layer(weight, size=28, **attrs) -> Layer:
    channels = weight.shape[1] * attrs.get("groups", 1)
    x = relax.Var("x", relax.TensorType((1, channels, size, size), "float32"))
    return Layer(typed(layers.conv2d(x, relax.const(weight), name="l", **attrs)))


def dense_layer(weight, rows=128) -> Layer:
    x = relax.Var("x", relax.TensorType((1, rows, weight.shape[1]), "float32"))
    return Layer(typed(layers.dense(x, relax.const(weight), name="l")))


def typed(call):
    return relax.BlockBuilder().normalize(call)


def sparse(rng, shape, grain="element", density=0.1):
    return prune(rng.standard_normal(shape).astype(np.float32), density=density, grain=grain)


def treat(layer, **parameters):
    return rules.treat(layer, parameters, TARGET)


def reason(outcome) -> str:
    assert isinstance(outcome, Declined), outcome
    return outcome.reason


@pytest.mark.parametrize("grain", ["element", "out:4", "out:8", "out:16"])
def test_takes_a_convolution_and_keeps_its_attributes(rng, grain):
    layer = conv_layer(sparse(rng, (128, 128, 3, 3), grain), padding=(1, 1, 1, 1), strides=(2, 2))
    call = treat(layer)
    assert call.op.name == SPARSE_CONV2D
    attrs = layers.attrs_of(call)
    assert attrs == {**layer.attrs, "grain": grain}
    assert layers.shape_of(typed(call)) == layer.output_shape == (1, 128, 14, 14)


def test_takes_a_matrix_product(rng):
    call = treat(dense_layer(sparse(rng, (256, 192), "out:4")), grain="out:4", density=0.1)
    assert call.op.name == SPARSE_DENSE
    assert layers.attrs_of(call) == {"name": "l", "grain": "out:4"}
    assert layers.shape_of(typed(call)) == (1, 128, 256)


def test_declines_a_weight_without_zeros(rng):
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    assert "no zeros" in reason(treat(dense_layer(weight)))


def test_declines_a_weight_of_zeros_only():
    assert "every weight is zero" in reason(treat(dense_layer(np.zeros((64, 64), np.float32))))


def test_declines_a_depthwise_convolution(rng):
    layer = conv_layer(sparse(rng, (64, 1, 3, 3), density=0.3), groups=64, padding=(1, 1, 1, 1))
    assert "depthwise" in reason(treat(layer))


def test_takes_the_first_convolution_of_an_image(rng):
    layer = conv_layer(sparse(rng, (64, 3, 7, 7)), size=56, strides=(2, 2), padding=(3, 3, 3, 3))
    assert not isinstance(treat(layer), Declined)


def test_declines_a_short_reduction_but_not_a_longer_one(rng):
    assert "too few" in reason(treat(conv_layer(sparse(rng, (64, 8, 1, 1), density=0.3))))
    assert not isinstance(treat(conv_layer(sparse(rng, (128, 128, 1, 1), density=0.1))), Declined)


def test_takes_one_row_of_activations_unless_it_is_dense(rng):
    assert not isinstance(treat(dense_layer(sparse(rng, (256, 512)), rows=1)), Declined)
    dense = sparse(rng, (256, 512), density=0.9)
    assert "as slow as dense" in reason(treat(dense_layer(dense, rows=1)))


def test_declines_a_high_density_and_says_where_it_breaks_even(rng):
    why = reason(treat(dense_layer(sparse(rng, (256, 256), density=0.9))))
    assert "density 90 %" in why.replace("%", " %") and "break even" in why
    assert not isinstance(treat(dense_layer(sparse(rng, (256, 256), density=0.1))), Declined)


def test_declines_a_grain_that_the_zeros_do_not_support(rng):
    why = reason(treat(dense_layer(sparse(rng, (256, 256), "element")), grain="out:8"))
    assert "out:8" in why and "element" in why


def test_stores_a_coarser_grain_than_asked_when_the_zeros_support_it(rng):
    assert choose_grain(sparse(rng, (64, 64), "out:8"), "element") == "out:8"
    assert choose_grain(sparse(rng, (64, 64), "out:8"), "out:8") == "out:8"
    assert choose_grain(sparse(rng, (64, 64), "element"), None) == "element"


def test_a_block_never_straddles_two_groups(rng):
    weight = sparse(rng, (64, 64, 3, 3), "out:8")
    call = treat(
        conv_layer(np.concatenate([weight] * 2)[:, :, :, :], groups=2, padding=(1, 1, 1, 1))
    )
    assert layers.attrs_of(call)["grain"] == "out:8"
    odd = sparse(rng, (36, 64, 3, 3), "out:4")  # 12 channels a group: out:8 would straddle
    call = treat(conv_layer(odd, groups=3, padding=(1, 1, 1, 1)))
    assert isinstance(call, Declined) or layers.attrs_of(call)["grain"] == "out:4"


def test_the_estimate_knows_winograd_and_density(rng):
    layer = conv_layer(sparse(rng, (128, 128, 3, 3)), padding=(1, 1, 1, 1))
    strided = conv_layer(
        sparse(rng, (128, 128, 3, 3)), size=56, padding=(1, 1, 1, 1), strides=(2, 2)
    )
    winograd = estimate(layer_problem(layer, "element"), TARGET)
    direct = estimate(layer_problem(strided, "element"), TARGET)
    assert winograd.dense < direct.dense / 1.5
    denser = conv_layer(sparse(rng, (128, 128, 3, 3), density=0.2), padding=(1, 1, 1, 1))
    assert estimate(layer_problem(denser, "element"), TARGET).sparse > winograd.sparse


def test_parameters_are_parsed_or_refused():
    parse = FAMILY.parameters
    assert parse["density"](0.1) == 0.1 and parse["grain"]("out:4") == "out:4"
    for name, value in (("density", 0), ("density", "x"), ("density", 1.01), ("grain", "out:3")):
        with pytest.raises(ValueError):
            parse[name](value)


def test_found_describes_what_treat_decides_by(rng):
    weight = sparse(rng, (64, 64), "out:4")
    assert found(weight)["grain"] == choose_grain(weight, None)


@pytest.mark.parametrize("value", [0, 1.01, -0.5, float("nan"), True, False, "0.25"])
def test_a_density_is_a_number_above_zero_and_at_most_one(value):
    with pytest.raises(ValueError, match="density must be in"):
        parse_density(value)
    assert parse_density(0.25) == 0.25 and parse_density(1) == 1.0
