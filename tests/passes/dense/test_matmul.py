# SPDX-License-Identifier: Apache-2.0
"""Dense layers, matrix-vector products and products of two activations against float64."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes import layers
from passes.dense.matmul import LOWERINGS
from schedules.target import detect_host


def _random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "shape, outputs",
    [
        ((197, 64), 50), ((1, 100), 1000), ((2, 7, 33), 10), ((1, 2048), 7), ((50, 1500), 100), ((33,), 5), ((128, 1), 1),
        ((3, 17), 17),
    ],
)  # fmt: skip
def test_dense_with_bias(shape, outputs, run, rng):
    x, weight, bias = _random(rng, *shape), _random(rng, outputs, shape[-1]), _random(rng, outputs)
    weight /= np.sqrt(shape[-1])

    def build(bb, a):
        y = bb.emit(layers.dense(a, relax.const(weight), name="layer"))
        return relax.op.add(y, relax.const(bias))

    wanted = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    for target in (detect_host(), detect_host().with_threads(2)):
        got = run(build, [x], LOWERINGS, target)
        assert list(got.loops.values()) == ["contraction"]
        np.testing.assert_allclose(got.output, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "a, b",
    [
        ((2, 3, 17, 33), (2, 3, 33, 40)), ((17, 16), (16, 7)), ((2, 1, 17, 33), (3, 33, 40)), ((4, 17, 5), (5, 100)),
        ((1, 1), (1, 1)), ((2, 7, 33), (2, 33, 1)),
    ],
)  # fmt: skip
def test_product_of_activations(a, b, run, rng, host_tiers):
    x, y = _random(rng, *a), _random(rng, *b) / np.float32(np.sqrt(b[-2]))
    wanted = x.astype(np.float64) @ y.astype(np.float64)
    for target in (*host_tiers, detect_host().with_threads(2)):
        got = run(lambda bb, p, q: relax.op.matmul(p, q), [x, y], LOWERINGS, target)
        assert list(got.loops.values()) == ["batch_matmul"]
        np.testing.assert_allclose(got.output, wanted, rtol=0, atol=2e-5)


def test_product_with_itself(run, rng):
    x = _random(rng, 3, 19, 19)
    got = run(lambda bb, p: relax.op.matmul(p, p), [x], LOWERINGS, detect_host()).output
    np.testing.assert_allclose(got, x.astype(np.float64) @ x.astype(np.float64), rtol=0, atol=1e-4)


def test_a_vector_operand_is_left_to_tvm(run, rng):
    x, y = _random(rng, 5), _random(rng, 5, 7)
    got = run(lambda bb, p, q: relax.op.matmul(p, q), [x, y], LOWERINGS, detect_host())
    assert list(got.loops.values()) == ["generic"]
    np.testing.assert_allclose(got.output, x @ y, rtol=0, atol=1e-5)
