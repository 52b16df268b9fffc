# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from tvm import relax

from passes.canonicalize_pooling import CanonicalizePooling

op = relax.op
X = (2, 3, 8, 6)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x: op.nn.adaptive_avg_pool2d(x, (1, 1)), lambda x: op.mean(x, [2, 3], True)),
        (
            lambda x: op.nn.adaptive_avg_pool2d(x, (4, 2)),
            lambda x: op.nn.avg_pool2d(x, (2, 3), (2, 3)),
        ),
        (lambda x: op.abs(op.nn.adaptive_avg_pool2d(x, (8, 6))), lambda x: op.abs(x)),
        (lambda x: op.nn.avg_pool2d(x, (8, 6)), lambda x: op.mean(x, [2, 3], True)),
    ],
    ids=["global", "divisor", "identity", "whole image"],
)
def test_rewrites(rewrites, before, after):
    rewrites(CanonicalizePooling(), [X], lambda _b, x: before(x), lambda _b, x: after(x))


@pytest.mark.parametrize(
    "body",
    [
        lambda x: op.nn.adaptive_avg_pool2d(x, (3, 3)),
        lambda x: op.nn.avg_pool2d(x, (8, 6), padding=(1, 1, 0, 0), count_include_pad=True),
        lambda x: op.nn.avg_pool2d(x, (8, 5)),
        lambda x: op.nn.max_pool2d(x, (8, 6)),
    ],
    ids=["uneven", "padded", "part", "max"],
)
def test_declines(declines, body):
    declines(CanonicalizePooling(), [X], lambda _b, x: body(x))


def test_pools_of_one_dimension_run_as_images_of_height_one(rewrites):
    def before(_b, x):
        y = op.nn.max_pool1d(x, 3, 2, (1, 0), 2, True)
        return op.nn.avg_pool1d(y, 2, 1, (1, 1), 1, False, count_include_pad=True)

    def after(_b, x):
        y = op.reshape(x, (2, 3, 1, 12))
        y = op.nn.max_pool2d(y, (1, 3), (1, 2), (0, 1, 0, 0), (1, 2), True)
        y = op.reshape(op.reshape(y, (2, 3, 5)), (2, 3, 1, 5))
        y = op.nn.avg_pool2d(y, (1, 2), (1, 1), (0, 1, 0, 1), (1, 1), False, count_include_pad=True)
        return op.reshape(y, (2, 3, 6))

    rewrites(CanonicalizePooling(), [(2, 3, 12)], before, after)


def test_the_mean_over_a_sequence(rewrites):
    rewrites(
        CanonicalizePooling(),
        [(2, 3, 12)],
        lambda _b, x: op.nn.adaptive_avg_pool1d(x, 1),
        lambda _b, x: op.mean(x, [2], True),
    )
