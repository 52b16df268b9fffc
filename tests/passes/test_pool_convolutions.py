# SPDX-License-Identifier: Apache-2.0
"""Max pooling moves before what never falls, into the convolution behind it; and stays where that would change a value."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes import pool_convolutions
from passes.evaluate import evaluate
from passes.layers import attrs_of, conv2d, is_call, shape_of
from passes.pool_convolutions import PoolConvolutions, left_apart
from passes.rewriting import bindings_of
from passes.sparse.family import FAMILY
from passes.sparse.operators import SPARSE_POOLED_CONV2D, sparse_call
from tests.passes.conftest import build_function

op = relax.op
X = (2, 3, 9, 11)
OUTPUTS = 8


pytestmark = pytest.mark.usefixtures("every_image_is_far")


def weights() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((OUTPUTS, 3, 3, 3)) * (rng.random((OUTPUTS, 3, 3, 3)) < 0.4)).astype("float32")  # fmt: skip


def conv(b, x, padding=1, strides=(1, 1)):
    call = conv2d(x, relax.const(weights()), name="stem", padding=(padding,) * 4, strides=strides)
    return b.emit(sparse_call(call, "element"))


def of_channels(low: float, high: float, rank: int = 4) -> relax.Expr:
    return relax.const(
        np.linspace(low, high, OUTPUTS, dtype="float32").reshape((1, -1, 1, 1)[4 - rank :])
    )


def largest(x, size=(3, 3), strides=(2, 2), padding=(1, 1, 1, 1), **more):
    return op.nn.max_pool2d(x, size, strides, padding, **more)


def module(between, pool=largest):
    def body(b, x):
        return b.emit(pool(between(b, conv(b, x))))

    return build_function([X], body)


def names(mod) -> list[str]:
    return [b.value.op.name for b in bindings_of(mod["main"]) if isinstance(b.value, relax.Call)]


CHAINS = {
    "alone": lambda b, y: y,
    "bias, relu": lambda b, y: b.emit(op.nn.relu(b.emit(op.add(y, of_channels(-1, 1))))),
    "bias first": lambda b, y: b.emit(op.add(of_channels(-1, 1, rank=3), y)),
    "scale": lambda b, y: b.emit(op.multiply(b.emit(op.divide(y, relax.const(0.3))), of_channels(0.1, 2))),
    "less, bounded": lambda b, y: b.emit(op.minimum(b.emit(op.maximum(b.emit(op.subtract(y, of_channels(-1, 1))), relax.const(-0.5))), relax.const(0.5))),
    "infinite bound": lambda b, y: b.emit(op.minimum(y, relax.const(np.float32(np.inf)))),
    "leaky": lambda b, y: b.emit(op.nn.leakyrelu(y, 0.1)),
}  # fmt: skip
POOLS = {
    "halves": lambda y: largest(y, (2, 2), padding=(0, 0, 0, 0)),
    "overlapping": lambda y: largest(y, strides=(1, 1)),
    "uneven": lambda y: largest(y, (2, 3), (1, 2), (0, 1, 1, 0)),
    "ceil": lambda y: largest(y, (2, 2), padding=(0, 0, 0, 0), ceil_mode=True),
    "dilated": lambda y: largest(y, (2, 2), (1, 1), (1, 1, 1, 1), dilation=(2, 2)),
}


def check(mod, rng) -> None:
    found = PoolConvolutions()(mod)
    relax.analysis.well_formed(found)
    assert left_apart(mod) == []
    assert SPARSE_POOLED_CONV2D in names(found) and "relax.nn.max_pool2d" not in names(found)
    call = next(
        b.value for b in bindings_of(found["main"]) if is_call(b.value, SPARSE_POOLED_CONV2D)
    )
    assert shape_of(call) == shape_of(mod["main"].body.body)
    conv_pixels = 9 * 11 * 2
    assert attrs_of(call)["flops"] == 2 * 27 * OUTPUTS * conv_pixels
    x = rng.standard_normal(X).astype("float32")
    for special in (None, np.nan, np.inf, -np.inf):
        if special is not None:
            x[1, 2, 4, 5] = special
        before, after = (evaluate(m, [x], references=FAMILY.references)[0] for m in (mod, found))
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", CHAINS)
def test_chains(rng, name):
    check(module(CHAINS[name]), rng)


@pytest.mark.parametrize("name", POOLS)
def test_windows(rng, name):
    check(module(CHAINS["bias, relu"], POOLS[name]), rng)


def per_pixel() -> relax.Expr:
    return relax.const(np.zeros((1, OUTPUTS, 9, 11), "float32"))


STAYS = {
    "negative scale": lambda b, y: b.emit(op.multiply(y, of_channels(-1, 1))),
    "scale of zero": lambda b, y: b.emit(op.multiply(y, of_channels(0, 1))),
    "divided into": lambda b, y: b.emit(op.divide(of_channels(1, 2), y)),
    "taken from": lambda b, y: b.emit(op.subtract(of_channels(-1, 1), y)),
    "infinite bias": lambda b, y: b.emit(op.add(y, relax.const(np.float32(np.inf)))),
    "bound that is NaN": lambda b, y: b.emit(op.maximum(y, relax.const(np.float32(np.nan)))),
    "bias by pixel": lambda b, y: b.emit(op.add(y, per_pixel())),
    "residual": lambda b, y: b.emit(op.add(y, b.emit(op.abs(y)))),
    "silu": lambda b, y: b.emit(op.nn.silu(y)),
    "falls below zero": lambda b, y: b.emit(op.nn.leakyrelu(y, -0.1)),
    "flat below zero": lambda b, y: b.emit(op.nn.leakyrelu(y, 0.0)),
    "square": lambda b, y: b.emit(op.multiply(y, y)),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_may_fall_stays_before_the_maximum(declines, name):
    declines(PoolConvolutions(), [X], lambda b, x: b.emit(largest(STAYS[name](b, conv(b, x)))))


@pytest.mark.parametrize("relu_too", [False, True])
def test_what_others_read_is_written_whole(declines, relu_too):
    def body(b, x):
        y = conv(b, x)
        z = b.emit(op.nn.relu(y))
        return relax.Tuple([b.emit(largest(z)), z if relu_too else y])

    declines(PoolConvolutions(), [X], body)
    assert "others read" in left_apart(build_function([X], body))[0]


def reason(between, pool) -> str:
    (found,) = left_apart(module(between, pool))
    return found


def test_windows_beside_the_image_stay(declines):
    def beside(y):
        return largest(y, (2, 2), (2, 2), (2, 2, 2, 2))

    declines(PoolConvolutions(), [X], lambda b, x: b.emit(beside(conv(b, x))))
    assert "nothing of the image" in reason(CHAINS["alone"], beside)


def test_small_images_and_other_poolings_stay(declines, monkeypatch):
    def average(y):
        return op.nn.avg_pool2d(y, (3, 3), (2, 2), (1, 1, 1, 1))

    declines(PoolConvolutions(), [X], lambda b, x: b.emit(average(conv(b, x))))
    monkeypatch.setattr(pool_convolutions, "_NEAR", 4 * 2 * OUTPUTS * 9 * 11)
    declines(PoolConvolutions(), [X], lambda b, x: b.emit(largest(conv(b, x))))
    assert "stays near" in reason(CHAINS["alone"], largest)


def test_single_output_channels_over_many_channels_stay(declines):
    def body(groups, grain):
        def of(b, x):
            kept = np.arange(6 // groups).reshape(1, -1, 1, 1) % 2
            weight = relax.const(np.ones((8, 1, 1, 1), "float32") * kept.astype("float32"))
            call = conv2d(x, weight, name="stem", groups=groups)
            return b.emit(largest(b.emit(sparse_call(call, grain))))

        return of

    image = (1, 6, 9, 9)
    declines(PoolConvolutions(), [image], body(1, "element"))
    for groups, grain in ((2, "element"), (1, "out:4")):
        found = PoolConvolutions()(build_function([image], body(groups, grain)))
        assert SPARSE_POOLED_CONV2D in names(found)


def test_dense_convolutions_stay(declines):
    def body(b, x):
        y = b.emit(conv2d(x, relax.const(weights()), name="stem", padding=(1,) * 4))
        return b.emit(largest(b.emit(op.nn.relu(y))))

    declines(PoolConvolutions(), [X], body)
