# SPDX-License-Identifier: Apache-2.0
"""Polynomial elementary functions against float64: random bit patterns, dense ranges, special values, every tier."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tvm
from tvm import te

from schedules import vector_math

_VECTOR = 16
_SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1e-45,
    -1e-45,
    2.0**-126,
    -(2.0**-126),
    1.0,
    -1.0,
    3.4e38,
    -3.4e38,
]
_SPECIAL += [88.722, 88.723, 88.73, 89.5, -87.33, -87.34, -103.97, -103.98, -104.5]  # ends of exp


def _inputs(rng) -> np.ndarray:
    bits = rng.integers(0, 2**32, size=60_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    ranges = [np.linspace(-low, high, 60_000) for low, high in ((110, 95), (10, 10), (1, 1))]
    values = np.concatenate([bits, *(np.asarray(v, np.float32) for v in (*ranges, _SPECIAL))])
    return np.resize(values, (-(-len(values) // _VECTOR), _VECTOR))


def _run(function, x: np.ndarray, target) -> np.ndarray:
    placeholder = te.placeholder(x.shape, "float32")
    func = te.create_prim_func(
        [placeholder, te.compute(x.shape, lambda *i: function(placeholder(*i)), name="y")]
    )
    sch = tvm.s_tir.Schedule(func)
    sch.vectorize(sch.get_loops(sch.get_sblock("y"))[1])
    out = tvm.runtime.tensor(np.zeros_like(x))
    tvm.compile(sch.mod, target.tvm())["main"](tvm.runtime.tensor(x), out)
    return out.numpy()


def _erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1 + e)


# name: (float64 reference, ulp of the result, ulp of the greater of |x| and |result|); None where cancellation rules it out.
_FUNCTIONS = {
    "exp": (np.exp, 2, None),
    "log": (np.log, 2, None),
    "erf": (_erf, 8, None),
    "tanh": (np.tanh, 9, None),
    "sigmoid": (_sigmoid, None, 2),
    "silu": (lambda x: x * _sigmoid(x), None, 2),
    "gelu": (lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))), None, 4),
    "gelu_tanh": (
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        None,
        4,
    ),
    "softplus": (lambda x: np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 30)))), None, 5),
    "mish": (lambda x: x * np.tanh(np.logaddexp(0, x)), None, 3),
}


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_error_against_float64(rng, host_tiers, name):
    reference, result_ulp, scaled_ulp = _FUNCTIONS[name]
    x = _inputs(rng)
    with np.errstate(all="ignore"):
        exact = reference(x.astype(np.float64))
        rounded = exact.astype(np.float32)
    for target in host_tiers:
        y = _run(getattr(vector_math, name), x, target)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(rounded), err_msg=target.name)
        infinite = np.isinf(x) | np.isinf(rounded)
        np.testing.assert_array_equal(y[infinite], rounded[infinite], err_msg=target.name)
        assert not np.isinf(y[~infinite]).any(), target.name
        finite = np.isfinite(rounded) & np.isfinite(x)
        error = np.abs(y[finite] - exact[finite])
        size = np.abs(rounded[finite])
        if scaled_ulp is not None:
            size = np.maximum(np.maximum(size, np.abs(x[finite])), np.float32(2.0**-126))
        limit = (result_ulp or scaled_ulp) * np.spacing(np.maximum(size, np.float32(1e-45))).astype(
            np.float64
        )
        worst = int((error - limit).argmax())
        assert error[worst] <= limit[worst], (
            target.name,
            x[finite][worst],
            y[finite][worst],
            exact[finite][worst],
        )


def test_exp_nonpositive_is_zero_where_the_result_is_denormal(host_tiers):
    x = np.resize(
        np.array([0, -1, -87.3, -87.4, -1e30, -np.inf, np.nan, -0.0], np.float32), (1, _VECTOR)
    )
    with np.errstate(under="ignore"):
        expected = np.exp(x.astype(np.float64))
    expected[expected < 2.0**-126] = 0
    for target in host_tiers:
        y = _run(vector_math.exp_nonpositive, x, target)
        np.testing.assert_allclose(y, expected, rtol=2.5e-7)
        assert y[0, 5] == 0 and np.isnan(y[0, 6])


def test_softmax_weight_is_exact_at_zero_and_its_error_grows_with_the_argument(rng, host_tiers):
    drawn = [np.linspace(-87, 0, 60_000), -np.logspace(-10, 1.9, 60_000)]
    special = [0.0, -0.0, -88.0, -1e4, -3.4e38, -np.inf, np.nan, np.nan]
    x = np.concatenate([*drawn, special]).astype(np.float32)
    x = np.resize(x, (-(-len(x) // _VECTOR), _VECTOR))
    exact = np.exp(x.astype(np.float64))
    near = x >= -87
    for target in host_tiers:
        y = _run(vector_math.softmax_weight, x, target)
        limit = (2 + np.abs(x)) * np.spacing(exact.astype(np.float32))
        assert (np.abs(y - exact)[near] <= limit[near]).all(), target.name
        assert (y[x == 0] == 1).all() and not y[x < -87.7].any()
        np.testing.assert_array_equal(np.isnan(y), np.isnan(x))


@pytest.mark.parametrize(
    "function, expected",
    [
        (vector_math.relu, lambda x: np.maximum(x, np.float32(0))),
        (lambda x: vector_math.minimum(x, 6.0), lambda x: np.minimum(x, np.float32(6))),
        (lambda x: vector_math.maximum(x, -2.0), lambda x: np.maximum(x, np.float32(-2))),
    ],
)
def test_bounds_keep_nan(host_tiers, function, expected):
    x = np.resize(
        np.array([np.nan, np.inf, -np.inf, -3, 7, 0.5, -0.0, 0.0], np.float32), (1, _VECTOR)
    )
    for target in host_tiers:
        np.testing.assert_array_equal(_run(function, x, target), expected(x))


def test_saturated_gelu_is_exact(host_tiers):
    x = np.resize(np.array([-1e6, -100, -6, 1e6, 100, 6, np.inf, -3e38], np.float32), (1, _VECTOR))
    for target in host_tiers:
        for function in (vector_math.gelu, vector_math.gelu_tanh):
            np.testing.assert_array_equal(
                _run(function, x, target), np.maximum(x, np.float32(0)) * np.where(x > 0, 1, -1)
            )


@pytest.mark.parametrize("beta, threshold", [(1.0, 20.0), (2.0, 20.0), (0.5, 1.0)])
def test_softplus_parameters_equal_torch(host_tiers, beta, threshold):
    torch = pytest.importorskip("torch")
    x = np.linspace(-50, 50, 40 * _VECTOR, dtype=np.float32).reshape(40, _VECTOR)
    expected = torch.nn.functional.softplus(torch.tensor(x).double(), beta, threshold).numpy()
    y = _run(lambda e: vector_math.softplus(e, beta, threshold), x, host_tiers[0])
    np.testing.assert_allclose(y, expected, rtol=6e-7, atol=1e-30)
