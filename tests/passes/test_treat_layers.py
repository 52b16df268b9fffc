# SPDX-License-Identifier: Apache-2.0
"""Treating a graph: what is taken, what declines, and that a layer that declines keeps its weight."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes import family_named
from passes.evaluate import evaluate
from passes.family import Context
from passes.layers import conv2d, dense
from passes.sparse.operators import SPARSE_CONV2D, SPARSE_DENSE
from passes.treat_layers import layers_of, treat_layers
from passes.treatment import Treatment
from schedules.errors import RecipeError
from schedules.target import NAMED

CONTEXT = Context(NAMED["avx512"])
PRUNE = Treatment("sparse", {"grain": "out:4", "density": 0.1}, prune=True)


@pytest.fixture
def network(build, rng):
    """A 1x1 stem too small to pay, two 3x3 convolutions, and a dense layer of one row."""

    def weight(*shape):
        return relax.const(rng.standard_normal(shape).astype("float32"))

    def body(builder, x):
        for name, (o, c, k) in {"stem": (64, 3, 1), "a": (128, 64, 3), "b": (128, 128, 3)}.items():
            x = builder.emit(conv2d(x, weight(o, c, k, k), name=name, padding=(k // 2,) * 4))
            x = builder.emit(relax.op.nn.relu(x))
        x = builder.emit(relax.op.mean(x, axis=[2, 3]))
        return dense(x, weight(10, 128), name="head")

    return build([(1, 3, 28, 28)], body)


def operators(mod) -> list[str]:
    calls = [b.value for block in mod["main"].body.blocks for b in block.bindings]
    return [c.op.name for c in calls if c.op.name.startswith("kerf.")]


def test_takes_the_layers_that_pay_and_leaves_the_others_their_weights(network):
    found = treat_layers(network, dict.fromkeys(("stem", "a", "b", "head"), PRUNE), CONTEXT)
    by_name = {d.layer: d for d in found.decisions}
    assert [d.layer for d in found.decisions] == ["stem", "a", "b", "head"]
    assert {n: d.treatment for n, d in by_name.items()} == {
        "stem": "dense", "a": "sparse", "b": "sparse", "head": "sparse",
    }  # fmt: skip
    assert operators(found.treated) == ["kerf.conv2d", SPARSE_CONV2D, SPARSE_CONV2D, SPARSE_DENSE]
    assert operators(found.reference) == operators(network)
    for before, after in zip(layers_of(network), layers_of(found.reference)):
        taken = by_name[before.name].treatment == "sparse"
        assert np.array_equal(before.weight, after.weight) is not taken
        assert (after.weight == 0).mean() == pytest.approx(0.9 if taken else 0.0, abs=0.02)
        assert by_name[before.name].pruned is taken
        assert bool(by_name[before.name].declined) is not taken


def test_the_treated_graph_computes_what_the_pruned_one_does(network, rng):
    found = treat_layers(network, {"a": PRUNE}, CONTEXT)
    x = [rng.standard_normal((1, 3, 28, 28)).astype("float32")]
    references = family_named("sparse").references
    wanted = evaluate(found.reference, x)[0]
    np.testing.assert_allclose(
        evaluate(found.treated, x, references=references)[0], wanted, rtol=1e-12, atol=1e-12
    )
    assert np.abs(evaluate(network, x)[0] - wanted).max() > 0.1  # pruning did change the network


def test_what_a_family_declines_goes_to_the_next(network):
    """No layer is binary, and the stem is too small to be sparse as well."""
    asked = dict.fromkeys(("stem", "a", "head"), Treatment("binary", otherwise=PRUNE))
    found = treat_layers(network, asked, CONTEXT)
    by_name = {d.layer: d for d in found.decisions}
    assert {n: (d.asked, d.treatment) for n, d in by_name.items()} == {
        "stem": ("sparse", "dense"), "a": ("sparse", "sparse"), "b": ("dense", "dense"),
        "head": ("sparse", "sparse"),
    }  # fmt: skip
    assert "real numbers" in by_name["a"].passed_on["binary"] and by_name["a"].declined is None
    assert by_name["stem"].declined and set(by_name["stem"].passed_on) == {"binary"}
    assert not by_name["b"].passed_on
    direct = treat_layers(network, dict.fromkeys(asked, PRUNE), CONTEXT)
    assert operators(found.treated) == operators(direct.treated)


def test_nothing_asked_nothing_changed(network):
    found = treat_layers(network, {}, CONTEXT)
    assert not found.changes_anything
    assert operators(found.treated) == operators(network)
    assert all(d.treatment == "dense" and d.declined is None for d in found.decisions)


def test_without_pruning_a_layer_without_zeros_declines(network):
    found = treat_layers(network, {"a": Treatment("sparse", {"grain": "element"})}, CONTEXT)
    (declined,) = [d.declined for d in found.decisions if d.layer == "a"]
    assert "zero" in declined
    assert not found.changes_anything


def test_an_unknown_family_lists_those_there_are():
    with pytest.raises(RecipeError, match="dense or sparse"):
        family_named("spares")
