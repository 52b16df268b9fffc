# SPDX-License-Identifier: Apache-2.0
"""The sparse family on a graph: filters leave, other grains are judged by what pays, and only what is taken is pruned."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.evaluate import evaluate
from passes.family import Context
from passes.layers import attrs_of, const_array, conv2d, dense
from passes.treat_layers import layers_of, rewrite_layers, treat_layers
from passes.treatment import Treatment
from schedules.errors import UserError
from schedules.target import NAMED

CONTEXT = Context(NAMED["avx512"])
NAMES = ("stem", "a", "b", "c", "head")


@pytest.fixture
def network(build, rng):
    """A stem, a residual block of two 3x3 convolutions, a 1x1 convolution and a classifier."""

    def weight(*shape):
        return relax.const(rng.standard_normal(shape).astype("float32") / np.sqrt(shape[1]))

    def conv(builder, x, name, shape):
        bias = relax.const(rng.standard_normal((1, shape[0], 1, 1)).astype("float32"))
        pad = (shape[2] // 2,) * 4
        y = builder.emit(conv2d(x, weight(*shape), name=name, padding=pad))
        return builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(y, bias))))

    def body(builder, x):
        stem = conv(builder, x, "stem", (64, 3, 3, 3))
        y = conv(builder, conv(builder, stem, "a", (64, 64, 3, 3)), "b", (64, 64, 3, 3))
        y = conv(builder, builder.emit(relax.op.add(stem, y)), "c", (96, 64, 1, 1))
        return dense(builder.emit(relax.op.mean(y, axis=[2, 3])), weight(10, 96), name="head")

    return build([(1, 3, 14, 14)], body)


def treat(network, names=NAMES, **parameters):
    asked = Treatment("sparse", parameters, prune="density" in parameters)
    found = treat_layers(network, dict.fromkeys(names, asked), CONTEXT)
    return found, {d.layer: d for d in found.decisions}


def shapes(mod) -> dict:
    return {layer.name: layer.weight.shape for layer in layers_of(mod)}


def test_filters_are_pruned_and_leave_where_they_can(network, rng):
    found, by_name = treat(network, grain="filter", density=0.75)
    # stem and b meet in a sum and lose the same channels; the head's are the output
    assert shapes(found.treated) == {
        "stem": (48, 3, 3, 3), "a": (48, 48, 3, 3), "b": (48, 48, 3, 3), "c": (72, 48, 1, 1), "head": (10, 72),
    }  # fmt: skip
    taken = {n for n, d in by_name.items() if d.treatment == "sparse"}
    assert taken == set(NAMES)  # the head has fewer inputs
    assert by_name["a"].found["outputs"] == [64, 48] and by_name["a"].found["inputs"] == [64, 48]
    # What one layer loses, its neighbours gain: they are timed and kept together.
    assert {d.unit for d in found.decisions} == {"stem"}
    for before, after in zip(layers_of(network), layers_of(found.reference)):
        assert np.array_equal(before.weight, after.weight) is (before.name == "head")
    x = [rng.standard_normal((1, 3, 14, 14)).astype("float32")]
    wanted, got = (evaluate(mod, x)[0] for mod in (found.reference, found.treated))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_channels_that_are_shared_with_a_layer_nobody_asked_to_prune_stay(network):
    found, by_name = treat(network, names=("a", "b", "c"), grain="filter", density=0.5)
    assert shapes(found.treated) == {
        "stem": (64, 3, 3, 3), "a": (32, 64, 3, 3), "b": (64, 32, 3, 3), "c": (48, 64, 1, 1), "head": (10, 48),
    }  # fmt: skip
    assert by_name["stem"].treatment == "dense" and by_name["stem"].unit is None
    assert by_name["b"].found["inputs"] == [64, 32]
    assert by_name["a"].unit == by_name["b"].unit == "a" and by_name["c"].unit is None


def test_dead_filters_that_are_there_leave_without_being_asked_for(network):
    layer = layers_of(network)[1]
    weight = layer.weight.copy()
    weight[::2] = 0
    from passes.treat_layers import rewrite_layers

    def replace(call):
        return conv2d(call.args[0], relax.const(weight), name="a", padding=(1,) * 4) if call.attrs["name"] == "a" else call  # fmt: skip

    dead = rewrite_layers(network, replace)
    found, by_name = treat(dead)
    assert by_name["a"].treatment == "sparse" and not by_name["a"].pruned
    assert by_name["a"].found["grain"] == "filter"
    # biases of the dead filters that survive ReLU meet the padding of b and stay
    assert 32 <= shapes(found.treated)["a"][0] < 64


@pytest.mark.parametrize(("alike", "filters"), [(True, 32), (False, 64)])
def test_filters_that_nobody_reads_leave_a_layer_with_zeros_where_these_do_not_shift(
    network, rng, alike, filters
):
    """All filters of `a` have zeros in the same places (grain `channel`), or those of each 16 their own (`out:16`)."""
    unread = rng.permutation(64)[:32]
    own = rng.random((4, 64)) < 0.8
    own[:] = own[:1] if alike else own

    def zero(call):
        weight = const_array(call.args[1]).copy()
        if attrs_of(call)["name"] == "a":
            weight[np.repeat(own, 16, axis=0)] = 0
        if attrs_of(call)["name"] == "b":
            weight[:, unread] = 0
        return relax.Call(call.op, [call.args[0], relax.const(weight)], call.attrs, ret_ty=call.ty)

    _, by_name = treat(rewrite_layers(network, zero), ("a", "b"))
    assert by_name["a"].found["grain"] == ("channel" if alike else "out:16")
    assert by_name["a"].treatment == "sparse"
    assert by_name["a"].found.get("outputs", [64, 64]) == [64, filters]


@pytest.mark.parametrize(
    ("grain", "runs"), [("row", "element"), ("kernel", "element"), ("block:8x8", "out:8")]
)
def test_grains_without_a_kernel_run_as_one_that_represents_them(network, grain, runs):
    _found, by_name = treat(network, names=("b",), grain=grain, density=0.1)
    decision = by_name["b"]
    assert decision.treatment == "sparse" and decision.found["grain"] == grain
    assert decision.found["runs_as"] == runs


def test_what_declines_says_why_with_its_pruned_weight_not_with_its_own(network):
    _, by_name = treat(network, grain="element", density=0.9)
    assert by_name["b"].treatment == "dense" and not by_name["b"].pruned
    assert "density 90%" in by_name["b"].declined


def test_what_is_left_of_a_layer_stays_dense_but_small_where_its_zeros_no_longer_pay(build, rng):
    """19 kernels of 192 are left, in 7 filters: the layer was worth taking whole, and would be that again if refused."""

    def body(builder, x):
        stem = rng.standard_normal((64, 3, 7, 7)).astype("float32")
        stem[:7] *= 10
        y = builder.emit(conv2d(x, relax.const(stem), name="stem", padding=(3,) * 4))
        pointwise = relax.const(rng.standard_normal((64, 64, 1, 1)).astype("float32"))
        return conv2d(y, pointwise, name="next")

    found, by_name = treat(
        build([(1, 3, 56, 56)], body), names=("stem",), grain="kernel", density=0.1
    )
    decision = by_name["stem"]
    assert decision.treatment == "sparse" and decision.pruned and decision.declined is None
    assert decision.found["outputs"] == [64, 7]
    # Both are dense operators.
    assert shapes(found.treated) == {"stem": (7, 3, 7, 7), "next": (64, 7, 1, 1)}
    assert np.count_nonzero(layers_of(found.treated)[0].weight) == 19 * 49


def test_weights_that_are_not_numbers_cannot_be_pruned(build):
    weight = np.full((64, 64, 3, 3), np.nan, np.float32)
    mod = build([(1, 64, 8, 8)], lambda _b, x: conv2d(x, relax.const(weight), name="l"))
    with pytest.raises(UserError, match="layer l: cannot be pruned; found NaN weights"):
        treat(mod, names=("l",), grain="element", density=0.1)


def test_padding_finer_blocks_and_nearly_empty_layers_are_told(build, rng):
    def vectors(shape, block, density):
        weight = rng.standard_normal(shape).astype("float32")
        kept = rng.random((-(-shape[0] // block), *shape[1:])) < density
        return relax.const(weight * np.repeat(kept, block, axis=0)[: shape[0]])

    def body(builder, x):
        x = builder.emit(
            conv2d(x, vectors((96, 24, 3, 3), 48, 0.1), name="grouped", padding=(1,) * 4, groups=4)
        )
        return conv2d(x, vectors((90, 96, 1, 1), 4, 0.1), name="padded")

    mod = build([(1, 96, 28, 28)], body)
    _, by_name = treat(mod, names=("grouped", "padded"))
    # 24 output channels a group are no multiple of the 16 that share their zeros
    assert by_name["grouped"].treatment == "sparse"
    assert by_name["grouped"].found["runs_as"] == "out:8"
    assert by_name["padded"].found["padded_outputs"] == 2
    assert "padded_outputs" not in by_name["grouped"].found
    alone = build(
        [(1, 256, 28, 28)], lambda _b, x: conv2d(x, vectors((256, 256, 1, 1), 1, 1), name="l")
    )
    _, by_name = treat(alone, names=("l",), grain="kernel", density=1e-6)
    assert by_name["l"].treatment == "sparse" and by_name["l"].found["one_grain_kept"] == (
        "density 1e-06 would leave none of its 65536 grains (kernel); one is kept"
    )


def test_filters_that_are_dead_already_are_pruned_like_others(network):
    """A dead filter whose bias is not zero stays, as zero padding meets it; pruned, its bias is zero as well."""

    def kill(call):
        weight = const_array(call.args[1]).copy()
        weight[:8] = 0
        if attrs_of(call)["name"] != "a":
            return call
        return conv2d(call.args[0], relax.const(weight), name="a", padding=(1,) * 4)

    found, by_name = treat(
        rewrite_layers(network, kill), names=("a",), grain="filter", density=0.75
    )
    assert by_name["a"].found["outputs"] == [64, 48]
    assert shapes(found.treated)["a"] == (48, 64, 3, 3)
