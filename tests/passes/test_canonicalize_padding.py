# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.canonicalize_padding import CanonicalizePadding
from passes.layers import conv2d
from passes.rewriting import constant

op = relax.op
X = (2, 3, 7, 5)
W = np.random.default_rng(1).standard_normal((4, 3, 3, 2)).astype("float32")


def conv(x, padding, w=W):
    return conv2d(x, constant(w), name="stem", strides=(2, 1), padding=padding, dilation=(1, 2))


def test_zero_padding_joins_the_convolutions_own(rewrites):
    rewrites(
        CanonicalizePadding(), [X],
        lambda _b, x: conv(op.nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 3]), (1, 0, 0, 1)),
        lambda _b, x: conv(x, (2, 0, 2, 4)),
    )  # fmt: skip


def test_padding_that_others_read_is_folded_as_well(rewrites):
    def before(b, x):
        padded = b.emit(op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1]))
        return op.add(op.sum(padded), op.sum(conv(padded, (0, 0, 0, 0))))

    def after(b, x):
        padded = b.emit(op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1]))
        return op.add(op.sum(padded), op.sum(conv(x, (1, 1, 1, 1))))

    rewrites(CanonicalizePadding(), [X], before, after)


@pytest.mark.parametrize(
    "pad",
    [
        lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1], pad_value=1.0),
        lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1], "reflect"),
        lambda x: op.nn.pad(x, [1, 0, 0, 0, 1, 1, 1, 1]),
    ],
    ids=["ones", "reflect", "batch"],
)
def test_declines(declines, pad):
    declines(CanonicalizePadding(), [X], lambda _b, x: conv(pad(x), (0, 0, 0, 0)))


def test_declines_padding_of_channels(declines):
    w = np.ones((4, 4, 3, 3), "float32")
    declines(
        CanonicalizePadding(), [X],
        lambda _b, x: conv2d(op.nn.pad(x, [0, 0, 0, 1, 1, 1, 1, 1]), constant(w), name="stem"),
    )  # fmt: skip
