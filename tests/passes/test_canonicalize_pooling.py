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
