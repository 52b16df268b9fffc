# SPDX-License-Identifier: Apache-2.0
"""Attention in one kernel against float64: lengths, depths, biases, causal masks, fully masked rows, epilogues."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.dense.attention import LOWERINGS
from schedules import attention_queries
from schedules.attention_problem import Problem
from schedules.target import parse_target

KERNELS = {"attention", "attention_queries"}


def _attention(q, k, v, bias=0.0, scale=None, causal=None):
    q, k, v = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (q, k, v))
    logits = q @ k.transpose(0, 1, 3, 2) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    if causal is not None:
        reach = 0 if causal == "TopLeft" else abs(k.shape[2] - q.shape[2])
        seen = np.tril(np.ones(logits.shape[2:], bool), reach)
        logits = np.where(seen, logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isneginf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    return ((weights / np.where(total == 0, 1, total)) @ v).transpose(0, 2, 1, 3)


def _random(rng, batch, q_len, k_len, heads, depth, value_depth):
    return (
        rng.standard_normal((batch, q_len, heads, depth)).astype(np.float32),
        rng.standard_normal((batch, k_len, heads, depth)).astype(np.float32),
        rng.standard_normal((batch, k_len, heads, value_depth)).astype(np.float32),
    )


@pytest.mark.parametrize(
    "batch, q_len, k_len, heads, depth, value_depth",
    [
        (1, 197, 197, 2, 64, 64),
        (2, 7, 7, 3, 33, 33),
        (1, 1, 1, 1, 1, 1),
        (1, 1, 50, 2, 16, 24),
        (2, 17, 33, 1, 5, 40),
        (1, 64, 16, 2, 32, 7),
    ],
)
def test_attention_equals_float64(
    run, rng, host_tiers, batch, q_len, k_len, heads, depth, value_depth
):
    q, k, v = _random(rng, batch, q_len, k_len, heads, depth, value_depth)
    for target in host_tiers:
        ran = run(lambda bb, q, k, v: relax.op.nn.attention(q, k, v), [q, k, v], LOWERINGS, target)
        assert set(ran.loops.values()) < KERNELS
        np.testing.assert_allclose(ran.output, _attention(q, k, v), rtol=0, atol=2e-6)


@pytest.mark.parametrize("threads", [2, 5])
def test_attention_on_threads_equals_one_thread(run, rng, host_tiers, threads):
    q, k, v = _random(rng, 1, 130, 65, 2, 16, 16)
    outputs = [
        run(
            lambda bb, q, k, v: relax.op.nn.attention(q, k, v),
            [q, k, v],
            LOWERINGS,
            host_tiers[0].with_threads(n),
        ).output
        for n in (1, threads)
    ]
    np.testing.assert_array_equal(outputs[1], outputs[0])


@pytest.mark.parametrize(
    "bias_shape", [(2, 3, 20, 37), (1, 1, 1, 37), (2, 1, 1, 37), (1, 3, 20, 37)]
)
def test_attention_bias_equals_float64(run, rng, host_tiers, bias_shape):
    q, k, v = _random(rng, 2, 20, 37, 3, 16, 16)
    bias = rng.standard_normal(bias_shape).astype(np.float32)
    for target in host_tiers:
        ran = run(
            lambda bb, q, k, v, b: relax.op.nn.attention(q, k, v, b, 0.5),
            [q, k, v, bias],
            LOWERINGS,
            target,
        )
        assert set(ran.loops.values()) < KERNELS
        np.testing.assert_allclose(ran.output, _attention(q, k, v, bias, 0.5), rtol=0, atol=2e-6)


@pytest.mark.parametrize("q_len, k_len", [(40, 40), (9, 33), (33, 9)])
@pytest.mark.parametrize("causal", ["TopLeft", "BottomRight"])
def test_causal_attention_equals_float64(run, rng, host_tiers, q_len, k_len, causal):
    q, k, v = _random(rng, 1, q_len, k_len, 2, 16, 16)
    for target in host_tiers:
        ran = run(
            lambda bb, q, k, v: relax.op.nn.attention(q, k, v, causal_mask=causal),
            [q, k, v],
            LOWERINGS,
            target,
        )
        assert set(ran.loops.values()) < KERNELS
        np.testing.assert_allclose(
            ran.output, _attention(q, k, v, causal=causal), rtol=0, atol=2e-6
        )


def test_masked_rows_and_special_values_equal_torch(run, rng, host_tiers):
    torch = pytest.importorskip("torch")
    q, k, v = _random(rng, 1, 20, 20, 1, 16, 16)
    bias = np.zeros((1, 1, 20, 20), np.float32)
    bias[..., 3, :], bias[..., 4, ::2], bias[..., 5, 1] = -np.inf, -np.inf, np.nan
    q[0, 7, 0, 3] = np.nan
    ran = run(
        lambda bb, q, k, v, b: relax.op.nn.attention(q, k, v, b),
        [q, k, v, bias],
        LOWERINGS,
        host_tiers[0],
    )
    heads_first = [torch.tensor(x).permute(0, 2, 1, 3) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=torch.tensor(bias)
    )
    np.testing.assert_allclose(ran.output, expected.permute(0, 2, 1, 3).numpy(), rtol=0, atol=2e-6)
    assert not ran.output[0, 3].any()


def test_scores_beyond_the_range_of_exp_do_not_overflow(run, rng, host_tiers):
    q, k, v = _random(rng, 1, 9, 40, 1, 16, 16)
    q *= 1000
    ran = run(
        lambda bb, q, k, v: relax.op.nn.attention(q, k, v), [q, k, v], LOWERINGS, host_tiers[0]
    )
    # Scores near 1000 carry 6e-5 of float32 rounding each.
    np.testing.assert_allclose(ran.output, _attention(q, k, v), rtol=0, atol=5e-3)


def test_one_tensor_as_query_key_and_value_with_a_fused_epilogue(run, rng, host_tiers):
    x = rng.standard_normal((1, 19, 2, 16)).astype(np.float32)

    def build(bb, x):
        y = bb.emit(relax.op.nn.attention(x, x, x))
        return relax.op.add(y, x)

    ran = run(build, [x], LOWERINGS, host_tiers[0])
    assert set(ran.loops.values()) < KERNELS
    np.testing.assert_allclose(ran.output, _attention(x, x, x) + x, rtol=0, atol=2e-6)


def test_a_constant_bias_of_zeros_is_dropped(run, rng, host_tiers):
    q, k, v = _random(rng, 1, 8, 8, 1, 8, 8)
    zero = relax.const(np.zeros((1, 1, 8, 8), np.float32))
    ran = run(
        lambda bb, q, k, v: relax.op.nn.attention(q, k, v, zero),
        [q, k, v],
        LOWERINGS,
        host_tiers[0],
    )
    assert list(ran.loops) == ["attention_8_8_1x8"]
    np.testing.assert_allclose(ran.output, _attention(q, k, v), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "q_len, k_len, bias, kernel",
    [
        (197, 197, (), "attention_queries"),
        (128, 128, (1, 1, 1, 128), "attention_queries"),
        (128, 128, (1, 1, 128, 128), "attention"),  # a bias of each query
        (1, 197, (), "attention"),
        (17, 197, (), "attention"),  # lanes of the second vector would idle
    ],
)
def test_vectors_hold_queries_where_there_are_many(q_len, k_len, bias, kernel):
    problem = Problem(1, q_len, k_len, 2, 64, 64, 0.125, "", bias)
    assert attention_queries.suits(problem, parse_target("avx512")) == (
        kernel == "attention_queries"
    )
