# SPDX-License-Identifier: Apache-2.0
"""Transposed convolutions as convolutions of their phases: the same values, and what follows moves before the interleaving."""

from __future__ import annotations

import numpy as np
import pytest
from tvm.relax import op

from passes.channels_last import ChannelsLast
from passes.evaluate import evaluate
from passes.fold_batch_norm import FoldBatchNorm
from passes.layers import attrs_of, shape_of
from passes.name_layers import NameLayers
from passes.rewriting import bindings_of, constant

RNG = np.random.default_rng(3)


def random(*shape):
    return constant(RNG.standard_normal(shape).astype("float32"))


def operators(mod) -> list[str]:
    return [b.value.op.name.split(".")[-1] for b in bindings_of(mod["main"])]


def values(mod, inputs):
    return evaluate(mod, inputs)[0]


# kernel, stride, padding, output padding, groups; an image of 4 x 5 x 7
PHASES = {
    "one tap per phase": ((2, 2), (2, 2), (0, 0), (0, 0), 1),
    "two taps, cropped": ((4, 4), (2, 2), (1, 1), (0, 0), 2),
    "three taps in two phases": ((3, 3), (2, 2), (1, 1), (1, 1), 1),
    "a last row of its own": ((3, 3), (2, 2), (0, 0), (0, 0), 1),
    "another stride each way": ((5, 4), (3, 2), (2, 3), (1, 0), 1),
    "fewer taps than phases": ((1, 2), (3, 2), (0, 0), (2, 1), 2),
    "one phase": ((3, 5), (1, 1), (1, 2), (0, 0), 2),
}


def transposed(x, weight, geometry):
    _, stride, padding, more, groups = geometry
    return op.nn.conv2d_transpose(
        x, weight, strides=stride, padding=padding, output_padding=more, groups=groups
    )


@pytest.mark.parametrize("name", PHASES)
def test_phases_compute_the_same(name, build, rng):
    geometry = PHASES[name]
    weight = random(4, 6 // geometry[4], *geometry[0])
    before = build([(2, 4, 5, 7)], lambda b, x: transposed(x, weight, geometry))
    after = NameLayers({weight: "up"})(before)
    found = operators(after)
    assert found == ["conv2d", "depth_to_space"][: 1 if geometry[1] == (1, 1) else 2]
    assert attrs_of(bindings_of(after["main"])[0].value)["name"] == "up"
    x = [rng.standard_normal((2, 4, 5, 7))]
    wanted = values(before, x)
    for mod in (after, ChannelsLast()(after)):
        np.testing.assert_allclose(values(mod, x), wanted, atol=1e-12)


def test_one_dimension(build, rng):
    weight = random(4, 6, 5)
    before = build(
        [(2, 4, 9)], lambda b, x: op.nn.conv1d_transpose(x, weight, strides=2, padding=2, output_padding=1)
    )  # fmt: skip
    after = NameLayers()(before)
    assert operators(after) == ["reshape", "conv2d", "depth_to_space", "reshape"]
    x = [rng.standard_normal((2, 4, 9))]
    np.testing.assert_allclose(values(after, x), values(before, x), atol=1e-12)


@pytest.mark.parametrize("padding", [(2, 1), (1, 2)])
def test_an_image_that_is_not_read_whole_stays(padding, build):
    geometry = ((2, 2), (2, 2), padding, (0, 0), 1)
    mod = build([(2, 4, 5, 7)], lambda b, x: transposed(x, random(4, 6, 2, 2), geometry))
    assert operators(NameLayers()(mod)) == ["conv2d_transpose"]


def both(b, x, follow, groups=1):
    """`follow(emit, first, second)` of two transposed convolutions of x."""
    geometry = ((4, 4), (2, 2), (1, 1), (0, 0), groups)
    made = [b.emit(transposed(x, random(4, 6 // groups, 4, 4), geometry)) for _ in range(2)]
    return follow(b.emit, *made)


MOVED = {
    "bias, scale, relu": lambda e, p, q: op.nn.relu(
        e(op.multiply(e(op.add(p, random(1, 6, 1, 1))), random(6, 1, 1)))
    ),
    "product and one factor again": lambda e, p, q: op.add(e(op.multiply(p, q)), p),
    "number": lambda e, p, q: op.multiply(p, constant(np.float32(2).reshape(()))),
    "square": lambda e, p, q: op.multiply(p, p),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", MOVED)
def test_what_follows_moves_before_the_interleaving(name, groups, build, rng):
    before = build([(1, 4, 5, 7)], lambda b, x: both(b, x, MOVED[name], groups))
    after = FoldBatchNorm()(NameLayers()(before))
    found = operators(after)
    assert found[-1] == "depth_to_space" and found.count("depth_to_space") == 1
    x = [rng.standard_normal((1, 4, 5, 7))]
    np.testing.assert_allclose(values(after, x), values(before, x), rtol=1e-5, atol=1e-5)


STAYED = {
    "a constant of another shape": lambda e, p, q: op.add(p, random(1, 1, 10, 14)),
    "a vector along the width": lambda e, p, q: op.add(p, random(14)),
    "another tensor": lambda e, p, q: op.add(p, e(op.nn.relu(random(1, 6, 10, 14)))),
    "other phases": lambda e, p, q: op.add(
        p, e(op.nn.conv2d_transpose(e(op.nn.relu(random(1, 4, 4, 6))), random(4, 6, 4, 4), strides=(2, 2)))
    ),
    "no elementwise operator": lambda e, p, q: op.nn.softmax(p, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYED)
def test_anything_else_stays_behind_it(name, build, rng):
    before = build([(1, 4, 5, 7)], lambda b, x: both(b, x, STAYED[name]))
    after = FoldBatchNorm()(NameLayers()(before))
    assert operators(after)[-1] != "depth_to_space"
    x = [rng.standard_normal((1, 4, 5, 7))]
    np.testing.assert_allclose(values(after, x), values(before, x), rtol=1e-6, atol=1e-6)
    assert shape_of(after["main"].body.body) == shape_of(before["main"].body.body)
