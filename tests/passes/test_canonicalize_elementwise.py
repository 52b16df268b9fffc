# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from tvm import relax

from passes.canonicalize_elementwise import CanonicalizeElementwise
from passes.rewriting import constant

op = relax.op


def const(value):
    return relax.const(value, "float32")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x: op.clip(x, 0, 6), lambda x: op.minimum(op.nn.relu(x), const(6.0))),
        (lambda x: op.clip(x, 0, math.inf), lambda x: op.nn.relu(x)),
        (lambda x: op.clip(x, 0, 3.4028234663852886e38), lambda x: op.nn.relu(x)),
        (
            lambda x: op.clip(x, -0.5, 0.25),
            lambda x: op.minimum(op.maximum(x, const(-0.5)), const(0.25)),
        ),
        (lambda x: op.clip(x, -math.inf, 1), lambda x: op.minimum(x, const(1.0))),
        (lambda x: op.maximum(const(0.0), x), lambda x: op.nn.relu(x)),
        (
            lambda x: op.add(x, constant(np.full((1, 1), 3, "float32"))),
            lambda x: op.add(x, const(3.0)),
        ),
    ],
    ids=["relu6", "relu", "relu to the largest", "bounds", "above", "maximum", "scalar"],
)
def test_rewrites(rewrites, before, after):
    rewrites(
        CanonicalizeElementwise(), [(3, 17)], lambda _b, x: before(x), lambda _b, x: after(x), 0
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda _b, x: op.add(x, constant(np.zeros((3, 1), "float32"))),
        lambda _b, x: op.subtract(x, const(0.0)),
        lambda _b, x: op.multiply(constant(np.ones(5, "float32")), x),
        lambda _b, x: op.divide(x, const(1.0)),
        lambda _b, x: op.where(constant(np.ones((3, 5), bool)), x, const(7.0)),
        lambda _b, x: op.where(constant(np.zeros((3, 5), bool)), const(7.0), x),
        lambda _b, x: op.astype(x, "float32"),
        lambda b, x: b.emit(op.nn.dropout(x))[0],
    ],
    ids=["add", "subtract", "multiply", "divide", "where", "where not", "cast", "dropout"],
)
def test_what_changes_nothing_disappears(rewrites, change):
    rewrites(
        CanonicalizeElementwise(), [(3, 5)],
        lambda b, x: op.abs(change(b, x)), lambda _b, x: op.abs(x), 0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        lambda x: op.add(x, constant(np.zeros((4, 3, 5), "float32"))),  # broadcasts x
        lambda x: op.subtract(const(0.0), x),
        lambda x: op.divide(const(1.0), x),
        lambda x: op.add(x, constant(np.array([0, 0, 0, 0, 1e-30], "float32"))),
        lambda x: op.maximum(x, const(1e-30)),
        lambda x: op.maximum(x, const(-0.0)),
        lambda x: op.where(constant(np.arange(5) > 0), x, const(7.0)),
        lambda x: op.astype(x, "float64"),
    ],
    ids=["broadcast", "negation", "reciprocal", "nearly 0", "not 0", "-0", "some", "cast"],
)
def test_declines(declines, body):
    declines(CanonicalizeElementwise(), [(3, 5)], lambda _b, x: body(x))


def test_declines_bounds_of_integers(declines):
    declines(CanonicalizeElementwise(), [((4,), "int32")], lambda _b, x: op.clip(x, 0, 6))


def attend(mask, **options):
    return lambda _b, q, k, v: op.nn.attention(q, k, v, constant(mask), **options)


QKV = [(2, 5, 3, 4)] * 3


def test_a_mask_of_zeros_disappears(rewrites):
    rewrites(
        CanonicalizeElementwise(), QKV, attend(np.zeros((1, 1, 5, 5), "float32")),
        lambda _b, q, k, v: op.nn.attention(q, k, v),
    )  # fmt: skip


def test_a_mask_with_one_entry_stays(declines):
    mask = np.zeros((1, 1, 5, 5), "float32")
    mask[..., 2, 3] = -1
    declines(CanonicalizeElementwise(), QKV, attend(mask))
