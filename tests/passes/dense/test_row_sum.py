# SPDX-License-Identifier: Apache-2.0
"""Sums and means along the last axis against float64, with what follows them, and what is left to TVM."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.dense.row_sum import LOWERINGS
from schedules.target import detect_host

op = relax.op
SHAPES = [(1, 440, 49), (2, 3, 1), (5, 7), (3, 16), (2, 2, 2, 33), (7, 200), (1, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keepdims", [False, True])
def test_mean_and_its_epilogue(shape, keepdims, run, rng):
    x = rng.standard_normal(shape).astype(np.float32)

    def build(bb, value):
        mean = bb.emit(op.mean(value, [-1], keepdims))
        return op.add(bb.emit(op.multiply(mean, mean)), relax.const(np.float32(0.5)))

    got = run(build, [x], LOWERINGS, detect_host())
    wanted = x.astype(np.float64).mean(-1, keepdims=keepdims) ** 2 + 0.5
    assert list(got.loops.values()) == ["row_sum"]
    np.testing.assert_allclose(got.output, wanted, rtol=0, atol=1e-6)


def test_sum_on_every_tier_and_in_threads(run, rng, host_tiers):
    x = rng.standard_normal((65, 1000)).astype(np.float32)
    for target in (*host_tiers, detect_host().with_threads(2)):
        got = run(lambda bb, v: op.sum(v, [1]), [x], LOWERINGS, target)
        np.testing.assert_allclose(got.output, x.astype(np.float64).sum(1), rtol=0, atol=1e-4)


def test_infinities_and_nans_stay_in_their_rows(run):
    x = np.ones((5, 19), np.float32)
    x[0, 3], x[1, 18], x[2, 0], x[2, 18], x[3, 17] = np.nan, np.inf, np.inf, -np.inf, -0.0
    got = run(lambda bb, v: op.mean(v, [-1]), [x], LOWERINGS, detect_host()).output
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(np.isnan(got), np.isnan(x.mean(-1)))
    assert got[1] == np.inf and np.isfinite(got[3:]).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: op.mean(x, [1]),
        lambda x: op.mean(x, [1, 2]),
        lambda x: op.sum(x),
        lambda x: op.max(x, [-1]),
    ],
)
def test_other_reductions_are_left(make, run, rng):
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    assert "row_sum" not in run(lambda bb, v: make(v), [x], LOWERINGS, detect_host()).loops.values()
