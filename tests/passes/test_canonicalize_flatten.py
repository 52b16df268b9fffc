# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.canonicalize_flatten import CanonicalizeFlatten
from passes.layers import conv2d, dense
from passes.rewriting import constant

op = relax.op
RNG = np.random.default_rng(5)
KERNEL = RNG.standard_normal((4, 3, 1, 1)).astype("float32")
W = RNG.standard_normal((7, 4 * 3 * 5)).astype("float32")
X = (2, 3, 3, 5)


def image(x):
    return op.nn.relu(conv2d(x, constant(KERNEL), name="conv"))


def test_images_are_flattened_channels_last(rewrites):
    moved = W.reshape(7, 4, 3, 5).transpose(0, 2, 3, 1).reshape(7, 60)
    rewrites(
        CanonicalizeFlatten(), [X],
        lambda _b, x: dense(op.reshape(image(x), (2, 60)), constant(W), name="fc"),
        lambda _b, x: dense(
            op.reshape(op.permute_dims(image(x), [0, 2, 3, 1]), (2, 60)), constant(moved), name="fc"
        ),
    )  # fmt: skip


def test_declines_tensors_that_are_no_images(declines):
    declines(
        CanonicalizeFlatten(), [(2, 4, 3, 5)],
        lambda _b, x: dense(op.reshape(op.nn.relu(x), (2, 60)), constant(W), name="fc"),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 15), (1, 120)], ids=["channels as rows", "batch as columns"])
def test_declines_other_reshapes(declines, shape):
    w = RNG.standard_normal((7, shape[1])).astype("float32")
    declines(
        CanonicalizeFlatten(), [X],
        lambda _b, x: dense(op.reshape(image(x), shape), constant(w), name="fc"),
    )  # fmt: skip


def test_declines_images_of_one_pixel(declines):
    w = RNG.standard_normal((7, 4)).astype("float32")
    declines(
        CanonicalizeFlatten(), [(2, 3, 1, 1)],
        lambda _b, x: dense(op.reshape(image(x), (2, 4)), constant(w), name="fc"),
    )  # fmt: skip


def test_a_square_is_flattened_as_what_it_squares(rewrites):
    moved = W.reshape(7, 4, 3, 5).transpose(0, 2, 3, 1).reshape(7, 60)

    def before(b, x):
        flat = b.emit(op.reshape(b.emit(image(x)), (2, 60)))
        return dense(b.emit(op.multiply(flat, flat)), constant(W), name="fc")

    def after(b, x):
        y = b.emit(image(x))
        last = op.permute_dims(b.emit(op.multiply(y, y)), [0, 2, 3, 1])
        return dense(op.reshape(last, (2, 60)), constant(moved), name="fc")

    rewrites(CanonicalizeFlatten(), [X], before, after)


def test_declines_products_of_different_tensors(declines):
    declines(
        CanonicalizeFlatten(), [X, (2, 60)],
        lambda b, x, y: op.multiply(b.emit(op.reshape(image(x), (2, 60))), y),
    )  # fmt: skip
