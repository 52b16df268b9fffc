# SPDX-License-Identifier: Apache-2.0
"""Activations: values as torch's, NaN included, fused behind what produces their argument, other dtypes left alone."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.dense.activation import LOWERINGS
from passes.dense.normalization import LOWERINGS as NORMALIZATIONS


def _values() -> np.ndarray:
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 30.0, -30.0, 100.0, -100.0]
    return np.concatenate([special, np.linspace(-8, 8, 203)]).astype(np.float32).reshape(3, -1)


def _cases():
    torch = pytest.importorskip("torch")
    op, f = relax.op, torch.nn.functional
    return {
        "exp": (op.exp, torch.exp),
        "log": (op.log, torch.log),
        "erf": (op.erf, torch.erf),
        "tanh": (op.tanh, torch.tanh),
        "sigmoid": (op.sigmoid, torch.sigmoid),
        "silu": (op.nn.silu, f.silu),
        "gelu": (op.nn.gelu, f.gelu),
        "gelu_tanh": (op.nn.gelu_tanh, lambda x: f.gelu(x, approximate="tanh")),
        "relu": (op.nn.relu, torch.relu),
        "relu6": (op.nn.relu6, f.relu6),
        "leakyrelu": (lambda x: op.nn.leakyrelu(x, 0.1), lambda x: f.leaky_relu(x, 0.1)),
        "softplus": (lambda x: op.nn.softplus(x, 2.0, 15.0), lambda x: f.softplus(x, 2.0, 15.0)),
        "clip": (lambda x: op.clip(x, -1.5, 2.5), lambda x: torch.clip(x, -1.5, 2.5)),
    }


_NAMES = [
    "exp",
    "log",
    "erf",
    "tanh",
    "sigmoid",
    "silu",
    "gelu",
    "gelu_tanh",
    "relu",
    "relu6",
    "leakyrelu",
    "softplus",
    "clip",
]


@pytest.mark.parametrize("name", _NAMES)
def test_activation_equals_torch(run, host_tiers, name):
    import torch

    build, reference = _cases()[name]
    x = _values()
    ran = run(lambda bb, x: build(x), [x], LOWERINGS, host_tiers[0])
    expected = reference(torch.tensor(x).double()).float().numpy()
    np.testing.assert_allclose(ran.output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_extremum_of_two_tensors_keeps_nan_and_broadcasts(run, host_tiers, name):
    a = np.array([[np.nan, 1, 2, -np.inf], [np.inf, np.nan, -1, 0]], np.float32)
    b = np.array([1, np.nan, 2, 0], np.float32)
    for x, y in ((a, b), (b, a)):
        ran = run(lambda bb, x, y: getattr(relax.op, name)(x, y), [x, y], LOWERINGS, host_tiers[0])
        np.testing.assert_array_equal(ran.output, getattr(np, name)(x, y))


@pytest.mark.parametrize("name", ["gelu", "silu", "relu", "tanh"])
def test_activation_joins_the_kernel_before_it(run, rng, host_tiers, name):
    import torch

    build, reference = _cases()[name]
    x = rng.standard_normal((5, 37)).astype(np.float32)
    for target in host_tiers:
        ran = run(
            lambda bb, x: build(bb.emit(relax.op.nn.softmax(x))),
            [x],
            {**LOWERINGS, **NORMALIZATIONS},
            target,
        )
        assert list(ran.loops.values()) == ["softmax"]
        expected = reference(torch.softmax(torch.tensor(x).double(), -1)).numpy()
        np.testing.assert_allclose(ran.output, expected, rtol=2e-6, atol=1e-7)


def test_float64_is_left_to_tvm(run, host_tiers):
    x = np.linspace(-3, 3, 30)
    ran = run(lambda bb, x: relax.op.tanh(x), [x], LOWERINGS, host_tiers[0])
    np.testing.assert_allclose(ran.output, np.tanh(x), rtol=1e-12)
