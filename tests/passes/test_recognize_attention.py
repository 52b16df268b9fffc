# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from passes.canonicalize_shapes import CanonicalizeShapes
from passes.channels_last import layout_changes
from passes.layers import is_call
from passes.recognize_attention import RecognizeAttention
from passes.rewriting import bindings_of, constant

op = relax.op
HEADS = (2, 3, 5, 4)  # [B, H, S, D]
QKV = [HEADS, HEADS, (2, 3, 5, 7)]
NONE = np.float32(-np.inf)
CAUSAL = np.where(np.tril(np.ones((5, 5), bool)), 0, NONE).astype("float32")
BIAS = np.random.default_rng(2).standard_normal((3, 5, 5)).astype("float32")


def scores(q, k, scale=0.3):
    return op.multiply(op.matmul(q, op.permute_dims(k, [0, 1, 3, 2])), relax.const(scale))


def attend(q, k, v, mask=lambda s: s):
    return op.matmul(op.nn.softmax(mask(scores(q, k)), -1), v)


PASS = tvm.transform.Sequential([RecognizeAttention(), CanonicalizeShapes()])


def recognized(q, k, v, bias=None, scale=0.3, **options):
    swap = [0, 2, 1, 3]
    scale = tvm.tirx.FloatImm("float32", float(np.float32(scale)))
    y = op.nn.attention(
        op.permute_dims(q, swap),
        op.permute_dims(k, swap),
        op.permute_dims(v, swap),
        bias,
        scale=scale,
        **options,
    )
    return op.permute_dims(y, swap)


@pytest.mark.parametrize(
    ("mask", "bias", "options"),
    [
        (lambda s: s, None, {}),
        (lambda s: op.add(s, constant(BIAS)), np.broadcast_to(BIAS, (1, 3, 5, 5)), {}),
        (lambda s: op.add(constant(np.zeros((5, 5), "float32")), s), None, {}),
        (lambda s: op.add(s, constant(CAUSAL)), None, {"causal_mask": "TopLeft"}),
        (
            lambda s: op.where(constant(CAUSAL == 0), s, relax.const(np.finfo("float32").min)),
            None,
            {"causal_mask": "TopLeft"},
        ),
        (
            lambda s: op.where(constant(np.arange(5) < 4), s, relax.const(NONE)),
            np.broadcast_to(np.where(np.arange(5) < 4, 0, NONE), (1, 1, 5, 5)).astype("float32"),
            {},
        ),
    ],
    ids=["none", "bias", "zeros", "causal", "causal by where", "padding"],
)
def test_masks(rewrites, mask, bias, options):
    rewrites(
        PASS,
        QKV,
        lambda _b, q, k, v: attend(q, k, v, mask),
        lambda _b, q, k, v: recognized(
            q, k, v, None if bias is None else constant(bias), **options
        ),
    )


def test_scales_on_every_factor_are_multiplied(rewrites):
    def before(_b, q, k, v):
        q = op.multiply(q, relax.const(0.5))
        k = op.divide(op.permute_dims(k, [0, 1, 3, 2]), relax.const(4.0))
        return op.matmul(op.nn.softmax(op.divide(op.matmul(q, k), relax.const(2.0)), -1), v)

    rewrites(PASS, QKV, before, lambda _b, q, k, v: recognized(q, k, v, scale=0.0625))


def test_a_mask_given_as_input_is_added(rewrites):
    rewrites(
        PASS,
        [*QKV, (2, 1, 1, 5)],
        lambda _b, q, k, v, m: attend(q, k, v, lambda s: op.add(s, m)),
        lambda _b, q, k, v, m: recognized(q, k, v, op.broadcast_to(m, (2, 1, 5, 5))),
    )


def test_three_axes_count_as_one_head(build, same_values):
    def body(_b, q, k, v):
        weights = op.nn.softmax(op.matmul(q, op.permute_dims(k, [0, 2, 1])), 2)
        return op.matmul(weights, v)

    found = same_values(PASS, build([(6, 5, 4), (6, 8, 4), (6, 8, 7)], body))
    calls = [b.value for b in bindings_of(found["main"]) if is_call(b.value, "relax.nn.attention")]
    assert len(calls) == 1 and layout_changes(found) == []


def test_split_and_merged_heads_need_no_permute(build, same_values):
    def split(x):
        return op.permute_dims(op.reshape(x, (2, 5, 3, 4)), [0, 2, 1, 3])

    def body(_b, q, k, v):
        y = attend(split(q), split(k), split(v))
        return op.reshape(op.permute_dims(y, [0, 2, 1, 3]), (2, 5, 12))

    found = same_values(PASS, build([(2, 5, 12)] * 3, body))
    assert layout_changes(found) == []
    assert [b.value.op.name for b in bindings_of(found["main"])].count("relax.nn.attention") == 1


def guarded(q, k, v, b, mask):
    """As torch's decomposition: a query that may attend to nothing gets zeros."""
    s = b.emit(mask(scores(q, k)))
    p = b.emit(op.nn.softmax(s, -1))
    some = op.max(op.astype(op.logical_not(op.equal(s, relax.const(NONE))), "int8"), [-1], True)
    return op.matmul(
        op.where(op.logical_not(op.astype(some, "bool")), op.full_like(p, relax.const(0.0)), p), v
    )


def test_a_guard_that_never_acts_disappears(rewrites):
    rewrites(
        PASS,
        QKV,
        lambda b, q, k, v: guarded(q, k, v, b, lambda s: op.add(s, constant(CAUSAL))),
        lambda _b, q, k, v: recognized(q, k, v, causal_mask="TopLeft"),
    )


def test_a_guard_by_nan_that_never_acts_disappears(rewrites):
    def before(b, q, k, v):
        p = b.emit(op.nn.softmax(scores(q, k), -1))
        return op.matmul(op.where(op.isnan(p), relax.const(0.0), p), v)

    rewrites(PASS, QKV, before, lambda _b, q, k, v: recognized(q, k, v))


def test_a_guard_that_acts_stays(declines):
    blocked = CAUSAL.copy()
    blocked[2] = NONE
    declines(
        RecognizeAttention(),
        QKV,
        lambda b, q, k, v: guarded(q, k, v, b, lambda s: op.add(s, constant(blocked))),
    )


def test_declines_scores_that_are_read_elsewhere(declines):
    def body(b, q, k, v):
        s = b.emit(scores(q, k))
        return op.add(op.sum(s), op.matmul(op.nn.softmax(s, -1), v))

    declines(RecognizeAttention(), QKV, body)


def test_declines_probabilities_that_are_read_elsewhere(declines):
    def body(b, q, k, v):
        p = b.emit(op.nn.softmax(scores(q, k), -1))
        return op.add(op.sum(p), op.matmul(p, v))

    declines(RecognizeAttention(), QKV, body)


@pytest.mark.parametrize(
    "body",
    [
        lambda q, k, v: op.matmul(op.nn.softmax(scores(q, k), 2), v),
        lambda q, k, v: op.matmul(op.nn.relu(scores(q, k)), v),
        lambda q, k, v: attend(q, k, v, lambda s: op.multiply(s, constant(BIAS))),
        lambda q, k, v: attend(
            q, k, v, lambda s: op.where(constant(CAUSAL == 0), s, relax.const(-10.0))
        ),
        lambda q, k, v: attend(
            q, k, v, lambda s: op.multiply(op.add(s, constant(BIAS)), relax.const(2.0))
        ),
    ],
    ids=["other axis", "no softmax", "gate", "replaced scores", "scaled mask"],
)
def test_declines(declines, body):
    declines(RecognizeAttention(), QKV, lambda _b, q, k, v: body(q, k, v))


def test_declines_heads_that_broadcast(declines):
    declines(
        RecognizeAttention(),
        [HEADS, (2, 1, 5, 4), (2, 1, 5, 7)],
        lambda _b, q, k, v: attend(q, k, v),
    )


@pytest.mark.parametrize("change", ["soft", "future", "shifted"])
def test_a_bias_that_is_not_causal_stays(declines, change):
    bias = np.broadcast_to(CAUSAL, (1, 1, 5, 5)).copy()
    if change == "soft":
        bias[bias != 0] = -5
    elif change == "future":
        bias[..., 0, 1] = 0
    else:
        bias[..., 3, 0] = -1
    declines(
        RecognizeAttention(),
        [(2, 5, 3, 4)] * 3,
        lambda _b, q, k, v: op.nn.attention(q, k, v, constant(bias)),
    )
