# SPDX-License-Identifier: Apache-2.0
"""Layer norm, RMS norm, softmax: kernels against float64, fused epilogues, what is left to TVM."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.dense.normalization import LOWERINGS


def _softmax(x: np.ndarray, axis: int, log: bool) -> np.ndarray:
    x = x.astype(np.float64)
    shifted = x - x.max(axis, keepdims=True)
    total = np.exp(shifted).sum(axis, keepdims=True)
    return shifted - np.log(total) if log else np.exp(shifted) / total


def _layer_norm(x, gamma, beta, epsilon):
    x = x.astype(np.float64)
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon) * gamma + beta


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 33), (1, 1), (17, 768), (2, 3, 4, 100), (65,)])
def test_layer_norm_equals_float64(run, rng, host_tiers, shape):
    # A mean far from zero: E[x^2] - E[x]^2 would lose every digit of the variance.
    x = (rng.standard_normal(shape) + 1000).astype(np.float32)
    gamma, beta = rng.standard_normal((2, shape[-1])).astype(np.float32)
    for target in host_tiers:
        ran = run(
            lambda bb, x, g, b: relax.op.nn.layer_norm(x, g, b, axes=[-1], epsilon=1e-5),
            [x, gamma, beta],
            LOWERINGS,
            target,
        )
        assert list(ran.loops.values()) == ["layer_norm"]
        # The float32 mean is right to a few ulp of 1000 (6e-5); E[x^2] - E[x]^2 would be wrong by 3e-2.
        np.testing.assert_allclose(ran.output, _layer_norm(x, gamma, beta, 1e-5), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 33, 17), (2, 7, 5), (3, 16, 1), (1, 1, 40), (1, 130, 65)])
@pytest.mark.parametrize("centered", [True, False])
def test_norms_of_planes_equal_float64(run, rng, host_tiers, shape, centered):
    x = (rng.standard_normal(shape) + 10).astype(np.float32)
    gamma, beta = rng.standard_normal((2, shape[1])).astype(np.float32)
    build = {
        True: lambda bb, x, g, b: relax.op.nn.layer_norm(x, g, b, axes=[1], epsilon=1e-5),
        False: lambda bb, x, g: relax.op.nn.rms_norm(x, g, axes=[1], epsilon=1e-5),
    }[centered]
    rows = x.transpose(0, 2, 1).astype(np.float64)
    want = (
        _layer_norm(rows, gamma, beta, 1e-5)
        if centered
        else rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5) * gamma
    )
    for target in host_tiers:
        ran = run(build, [x, gamma, beta][: 3 if centered else 2], LOWERINGS, target)
        assert list(ran.loops.values()) == ["layer_norm"]
        np.testing.assert_allclose(ran.output, want.transpose(0, 2, 1), rtol=0, atol=1e-4)


def test_layer_norm_of_small_numbers_is_accurate(run, rng, host_tiers):
    x = rng.standard_normal((9, 50)).astype(np.float32)
    gamma, beta = rng.standard_normal((2, 50)).astype(np.float32)
    ran = run(
        lambda bb, x, g, b: relax.op.nn.layer_norm(x, g, b, axes=[1]),
        [x, gamma, beta],
        LOWERINGS,
        host_tiers[0],
    )
    np.testing.assert_allclose(ran.output, _layer_norm(x, gamma, beta, 1e-5), rtol=0, atol=2e-6)


def test_layer_norm_with_one_vector_as_gamma_and_beta_and_a_fused_epilogue(run, rng, host_tiers):
    x, other = rng.standard_normal((2, 6, 40)).astype(np.float32)
    scale = rng.standard_normal(40).astype(np.float32)

    def build(bb, x, other, scale):
        y = bb.emit(relax.op.nn.layer_norm(x, scale, scale, axes=[-1]))
        return relax.op.maximum(relax.op.add(y, other), relax.const(0.0, "float32"))

    ran = run(build, [x, other, scale], LOWERINGS, host_tiers[0].with_threads(2))
    assert list(ran.loops.values()) == ["layer_norm"]
    expected = np.maximum(_layer_norm(x, scale, scale, 1e-5) + other, 0)
    np.testing.assert_allclose(ran.output, expected, rtol=0, atol=3e-6)


def test_layer_norm_over_another_axis_is_left_to_tvm(run, rng, host_tiers):
    x = rng.standard_normal((4, 5, 6)).astype(np.float32)
    gamma, beta = rng.standard_normal((2, 5, 6)).astype(np.float32)
    ran = run(
        lambda bb, x, g, b: relax.op.nn.layer_norm(x, g, b, axes=[1, 2]),
        [x, gamma, beta],
        LOWERINGS,
        host_tiers[0],
    )
    assert set(ran.loops.values()) == {"generic"}


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 33), (1, 1), (300, 256)])
def test_rms_norm_equals_float64(run, rng, host_tiers, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    gamma = rng.standard_normal(shape[-1]).astype(np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * gamma
    for target in (*host_tiers, host_tiers[0].with_threads(2)):
        ran = run(
            lambda bb, x, g: relax.op.nn.rms_norm(x, g, axes=[-1], epsilon=1e-6),
            [x, gamma],
            LOWERINGS,
            target,
        )
        assert list(ran.loops.values()) == ["layer_norm"]
        np.testing.assert_allclose(ran.output, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "shape, axis",
    [
        ((3, 7), -1),
        ((2, 1000), 1),
        ((1, 1), 1),
        ((5, 33), 0),
        ((2, 9, 4, 17), 1),
        ((2, 8, 3), 1),
        ((2, 7, 1, 1), 1),
        ((31,), 0),
    ],
)
def test_softmax_equals_float64(run, rng, host_tiers, shape, axis, log):
    x = (rng.standard_normal(shape) * 20).astype(np.float32)
    op = relax.op.nn.log_softmax if log else relax.op.nn.softmax
    for target in (*host_tiers, host_tiers[0].with_threads(2)):
        ran = run(lambda bb, x: op(x, axis=axis), [x], LOWERINGS, target)
        assert list(ran.loops.values()) == ["softmax"]
        np.testing.assert_allclose(
            ran.output, _softmax(x, axis, log), rtol=2e-6, atol=1e-5 if log else 1e-7
        )


@pytest.mark.parametrize("axis", [0, 1])
def test_softmax_of_special_values_equals_torch(run, host_tiers, axis):
    torch = pytest.importorskip("torch")
    x = np.full((20, 20), 1.0, np.float32)
    x[1, 3], x[2, 4], x[3, 5], x[4, :], x[:, 6], x[5, 7] = (
        -np.inf,
        np.inf,
        np.nan,
        -np.inf,
        -np.inf,
        -1e30,
    )
    ran = run(lambda bb, x: relax.op.nn.softmax(x, axis=axis), [x], LOWERINGS, host_tiers[0])
    expected = torch.softmax(torch.tensor(x), axis).numpy()
    np.testing.assert_array_equal(np.isnan(ran.output), np.isnan(expected))
    np.testing.assert_allclose(ran.output, expected, rtol=2e-6)


def test_softmax_with_a_fused_epilogue(run, rng, host_tiers):
    x, other = rng.standard_normal((2, 3, 21)).astype(np.float32)

    def build(bb, x, other):
        return relax.op.multiply(bb.emit(relax.op.nn.softmax(x, axis=-1)), other)

    ran = run(build, [x, other], LOWERINGS, host_tiers[0])
    assert list(ran.loops.values()) == ["softmax"]
    np.testing.assert_allclose(ran.output, _softmax(x, -1, False) * other, rtol=2e-6, atol=1e-7)
