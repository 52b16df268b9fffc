# SPDX-License-Identifier: Apache-2.0
"""Attention between planes against float64: lengths, depths, batches, biases, causal masks, fully masked queries, NaN."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.layers import operator_call
from passes.sparse.attention_planes import (
    ATTENTION_PLANES,
    attention_of_planes,
    is_attention,
    lower_attention_planes,
    register,
)

LOWERINGS = {ATTENTION_PLANES: lower_attention_planes}


class Sizes:
    """Planes of q, k and v, and the attributes that say what they hold."""

    def __init__(self, rng, batch, q_len, k_len, heads, depth, value_depth, padded=True):
        shapes = [(heads * depth, q_len), (heads * depth, k_len), (heads * value_depth, k_len)]
        arrays = [rng.standard_normal((1, c, batch * n)).astype("float32") for c, n in shapes]
        if padded:
            arrays = [np.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % 16)), "edge") for a in arrays]
        self.arrays = arrays
        self.attrs = {
            "batch": batch, "q_len": q_len, "k_len": k_len, "heads": heads,
            "scale": depth**-0.5, "causal": "",
        }  # fmt: skip


def _attend(run, target, arrays, attrs):
    register()
    ran = run(lambda bb, *x: operator_call(ATTENTION_PLANES, x, **attrs), arrays, LOWERINGS, target)
    assert list(ran.loops.values()) == ["attention_planes"]
    return ran.output, attention_of_planes(attrs, *(a.astype("float64") for a in arrays))


@pytest.mark.parametrize(
    "batch, q_len, k_len, heads, depth, value_depth",
    [
        (1, 197, 197, 2, 64, 64),
        (2, 17, 33, 3, 33, 33),
        (3, 16, 1, 1, 1, 1),
        (1, 50, 7, 2, 16, 24),
        (2, 31, 48, 1, 5, 7),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_attention_of_planes_equals_float64(
    run, rng, host_tiers, padded, batch, q_len, k_len, heads, depth, value_depth
):
    sizes = Sizes(rng, batch, q_len, k_len, heads, depth, value_depth, padded)
    for target in host_tiers:
        got, want = _attend(run, target, sizes.arrays, sizes.attrs)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "causal, q_len, k_len",
    [("top_left", 33, 33), ("top_left", 40, 17), ("bottom_right", 17, 40), ("top_left", 17, 40)],
)
def test_causal_queries_see_no_later_keys(run, rng, host_tiers, causal, q_len, k_len):
    sizes = Sizes(rng, 2, q_len, k_len, 2, 8, 8)
    for target in host_tiers:
        got, want = _attend(run, target, sizes.arrays, sizes.attrs | {"causal": causal})
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 21), (2, 1, 1, 21), (2, 3, 1, 21), (1, 3, 1, 21)])
def test_a_bias_per_key_is_added(run, rng, host_tiers, shape):
    sizes = Sizes(rng, 2, 19, 21, 3, 8, 8)
    bias = rng.standard_normal(shape).astype("float32")
    bias[..., 5] = -np.inf
    for target in host_tiers:
        got, want = _attend(run, target, [*sizes.arrays, bias], sizes.attrs)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_queries_whose_keys_are_all_masked_give_zeros(run, rng, host_tiers):
    sizes = Sizes(rng, 2, 16, 9, 1, 4, 4)
    bias = np.zeros((2, 1, 1, 9), "float32")
    bias[1] = -np.inf
    for target in host_tiers:
        with np.errstate(invalid="ignore"):
            got, _ = _attend(run, target, [*sizes.arrays, bias], sizes.attrs)
        assert not got[..., 16:].any() and np.isfinite(got).all() and got[..., :16].all()


def test_nan_reaches_its_own_query_only(run, rng, host_tiers):
    sizes = Sizes(rng, 1, 20, 12, 1, 4, 4)
    sizes.arrays[0][0, 2, 7] = np.nan
    for target in host_tiers:
        got, _ = _attend(run, target, sizes.arrays, sizes.attrs)
        assert np.isnan(got[..., 7]).all()
        assert np.isfinite(np.delete(got, 7, axis=2)).all()


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_compute_the_same(run, rng, host_tiers, threads):
    sizes = Sizes(rng, 1, 130, 65, 2, 16, 16)
    one, _ = _attend(run, host_tiers[0], sizes.arrays, sizes.attrs)
    several, _ = _attend(run, host_tiers[0].with_threads(threads), sizes.arrays, sizes.attrs)
    np.testing.assert_array_equal(several, one)


def _call(shape=(1, 20, 2, 8), bias=None, **options):
    q, k, v = (relax.Var(n, relax.TensorType(shape, "float32")) for n in "qkv")
    b = relax.Var("b", relax.TensorType(bias, "float32")) if bias else None
    bb = relax.BlockBuilder()
    return bb.normalize(relax.op.nn.attention(q, k, v, b, **options))


def test_what_the_kernel_serves():
    assert is_attention(_call()) and is_attention(_call(causal_mask="TopLeft"))
    assert is_attention(_call(bias=(1, 1, 1, 20)))
    assert not is_attention(_call(bias=(1, 1, 20, 20)))  # another number for each query
    assert not is_attention(_call(shape=(1, 15, 2, 8)))  # less than a vector of queries
    assert not is_attention(_call(causal_mask="TopLeft", window_size=4))
