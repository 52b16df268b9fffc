# SPDX-License-Identifier: Apache-2.0
"""Max and average pooling against slow windows in numpy: ceil mode, counting, NaN, dilation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tvm import relax

from passes.dense.pooling import LOWERINGS
from schedules.target import detect_host


def _pool(x, kind, window, stride, padding, shape, count_padding=False, dilation=(1, 1)):
    """Each output from the values of its window that lie inside the image."""
    out = np.zeros(shape)
    for i in range(shape[1]):
        for j in range(shape[2]):
            rows = [i * stride[0] + k * dilation[0] - padding[0] for k in range(window[0])]
            columns = [j * stride[1] + k * dilation[1] - padding[1] for k in range(window[1])]
            rows = [k for k in rows if 0 <= k < x.shape[1]]
            columns = [k for k in columns if 0 <= k < x.shape[2]]
            seen = x.astype(np.float64)[:, rows][:, :, columns]
            if kind == "max":
                out[:, i, j] = seen.max(axis=(1, 2))
            else:
                count = window[0] * window[1] if count_padding else len(rows) * len(columns)
                out[:, i, j] = seen.sum(axis=(1, 2)) / count
    return out


# shape, window, stride, (top, left), ceil mode, dilation
CASES = [
    ((1, 17, 18, 24), (3, 3), (2, 2), (1, 1), False, (1, 1)),
    ((2, 17, 18, 40), (3, 3), (2, 2), (1, 1), True, (1, 1)),
    ((1, 16, 16, 7), (2, 2), (2, 2), (0, 0), False, (1, 1)),
    ((1, 9, 9, 20), (3, 2), (1, 1), (1, 0), False, (1, 1)),
    ((1, 13, 13, 16), (5, 5), (1, 1), (2, 2), False, (1, 1)),
    ((1, 7, 7, 33), (7, 7), (7, 7), (0, 0), False, (1, 1)),
    ((1, 20, 20, 16), (3, 3), (1, 1), (1, 1), False, (2, 2)),
]


def _run_pool(run, x, op, case, target, **attrs):
    _, window, stride, (top, left), ceil, dilation = case

    def build(bb, a):
        return op(a, window, stride, (top, left, top, left), dilation, ceil, layout="NHWC", **attrs)

    return run(build, [x], LOWERINGS, target)


@pytest.mark.parametrize("case", CASES)
def test_max(case, run, rng):
    x = rng.standard_normal(case[0]).astype(np.float32)
    host = detect_host()
    for target in (host, host.with_threads(2), replace(host, l2_bytes=1024)):
        got = _run_pool(run, x, relax.op.nn.max_pool2d, case, target)
        assert list(got.loops.values()) == ["pooling"]
        wanted = _pool(x, "max", case[1], case[2], case[3], got.output.shape, dilation=case[5])
        np.testing.assert_array_equal(got.output, wanted)


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize("case", [c for c in CASES if c[5] == (1, 1)])
def test_average(case, count_padding, run, rng):
    x = rng.standard_normal(case[0]).astype(np.float32)
    got = _run_pool(
        run, x, relax.op.nn.avg_pool2d, case, detect_host(), count_include_pad=count_padding
    )
    if count_padding and case[4]:  # windows past the counted padding: TVM's definition
        assert list(got.loops.values()) == ["generic"]
        return
    assert list(got.loops.values()) == ["pooling"]
    wanted = _pool(x, "average", case[1], case[2], case[3], got.output.shape, count_padding)
    np.testing.assert_allclose(got.output, wanted, rtol=0, atol=1e-6)


def test_nan_and_infinity_in_a_window(run, rng):
    case = CASES[0]
    x = rng.standard_normal(case[0]).astype(np.float32)
    x[0, 3, 2, :], x[0, 9, 9, 1], x[0, :, :, 5] = np.nan, np.inf, -np.inf
    got = _run_pool(run, x, relax.op.nn.max_pool2d, case, detect_host()).output
    wanted = _pool(x, "max", case[1], case[2], case[3], got.shape)
    np.testing.assert_array_equal(got, wanted)
    assert np.isnan(got).any() and np.isinf(got).any()


def test_channels_first_is_left_to_tvm(run, rng):
    x = rng.standard_normal((1, 5, 8, 8)).astype(np.float32)
    got = run(
        lambda bb, a: relax.op.nn.max_pool2d(a, (2, 2), (2, 2)), [x], LOWERINGS, detect_host()
    )
    assert list(got.loops.values()) == ["generic"]
    wanted = x.reshape(1, 5, 4, 2, 4, 2).max(axis=(3, 5))
    np.testing.assert_array_equal(got.output, wanted)
