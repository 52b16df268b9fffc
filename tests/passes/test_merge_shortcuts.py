# SPDX-License-Identifier: Apache-2.0
"""A shortcut's convolution is computed with the one that it is added to, where that is its sums' only use."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes import layers
from passes.evaluate import evaluate
from passes.layers import attrs_of, layers_computed_by, shape_of
from passes.rewriting import bindings_of
from passes.sparse.keep_planes import KeepPlanes
from passes.sparse.merge_shortcuts import MergeShortcuts
from tests.passes.test_keep_planes import REFERENCES, Network, _run

SHAPE = (1, 16, 16, 8)


@pytest.fixture
def network(build, rng):
    """`network(shape, body)`: a module of `body(Network, x)`."""
    return lambda shape, body: build([shape], lambda builder, x: body(Network(builder, rng), x))


def merged(mod) -> list[tuple[str, ...]]:
    """The layers of each operator that computes several."""
    calls = [b.value for b in bindings_of(MergeShortcuts()(KeepPlanes()(mod))["main"])]
    found = [layers_computed_by(c) for c in calls if isinstance(c, relax.Call)]
    return [names for names in found if len(names) > 1]


def dense(net, x, name, outputs):
    """A 1x1 convolution that no family took."""
    weight = net.weight(outputs, shape_of(x)[-1], 1, 1)
    return net.emit(layers.conv2d(x, weight, name=name, layout="NHWC"))


def block(net, x, last=None, shortcut=None, joined=None, behind=None):
    """A residual block: two sparse layers in front of a sum, and one behind it."""
    b = net.relu(net.conv(x, "a", 12, kernel=3))
    a = net.relu(net.conv(b, "b", 20, kernel=3))
    y = last(a) if last else net.conv(a, "last", 24)
    s = shortcut(b) if shortcut else net.add(net.conv(b, "shortcut", 24), net.const(1, 1, 1, 24))
    y = joined(y, s) if joined else net.add(y, s)
    return behind(net.relu(y), s) if behind else net.conv(net.relu(y), "behind", 8)


@pytest.mark.parametrize("shape", [(2, 33, 37, 8), (1, 40, 24, 8)])
def test_a_block_computes_the_same_with_its_shortcut_merged(network, rng, shape):
    def body(net, x):
        return block(net, x, lambda a: net.add(net.const(1, 1, 1, 24), net.conv(a, "last", 24)))

    mod = network(shape, body)
    assert merged(mod) == [("last", "shortcut")]
    x = rng.standard_normal(shape).astype("float32")
    (want,) = evaluate(mod, [x], references=REFERENCES)
    got = _run(MergeShortcuts()(KeepPlanes()(mod)), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_the_input_of_more_channels_comes_first(network):
    def body(net, x):
        b = net.relu(net.conv(x, "a", 28, kernel=3))
        a = net.relu(net.conv(b, "b", 12, kernel=3))
        y = net.add(net.conv(a, "last", 24), net.conv(b, "shortcut", 24))
        return net.conv(y, "behind", 8)

    mod = MergeShortcuts()(KeepPlanes()(network(SHAPE, body)))
    (call,) = [b.value for b in bindings_of(mod["main"]) if len(b.value.args) == 3]
    assert attrs_of(call)["layers"] == ["shortcut", "last"]
    assert [int(x.ty.shape[1]) for x in (call.args[0], call.args[2])] == [28, 12]


def test_a_third_term_is_added_behind(network):
    def body(net, x):
        return block(net, x, joined=lambda y, s: net.add(net.add(y, s), net.conv(x, "third", 24)))

    assert merged(network(SHAPE, body)) == [("last", "shortcut")]


NEAR_MISSES = {
    "a sum that is read as well": lambda n, x: block(
        n, x, behind=lambda y, s: n.conv(n.add(y, s), "behind", 8)
    ),
    "a strided shortcut": lambda n, x: block(
        n, x, lambda a: n.conv(a, "last", 24, kernel=3, stride=2), lambda b: n.conv(b, "shortcut", 24, stride=2)
    ),
    "a larger kernel": lambda n, x: block(n, x, lambda a: n.conv(a, "last", 24, kernel=3)),
    "another grain": lambda n, x: block(n, x, lambda a: n.conv(a, "last", 24, grain="element")),
    "a dense layer": lambda n, x: block(n, x, lambda a: dense(n, a, "last", 24)),
    "an activation between": lambda n, x: block(
        n, x, shortcut=lambda b: n.relu(n.conv(b, "shortcut", 24))
    ),
    "a scale between": lambda n, x: block(
        n, x, shortcut=lambda b: n.emit(relax.op.multiply(n.conv(b, "shortcut", 24), n.const(1, 1, 1, 24)))
    ),
    "a difference": lambda n, x: block(
        n, x, joined=lambda y, s: n.emit(relax.op.subtract(y, s))
    ),
    "a plain residual": lambda n, x: block(n, x, lambda a: n.conv(a, "last", 12), lambda b: b),
    "one input": lambda n, x: block(
        n, x, joined=lambda y, s: n.add(n.conv(y, "c", 24), n.conv(y, "d", 24))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_others_stay_apart(network, name):
    assert merged(network(SHAPE, NEAR_MISSES[name])) == []
