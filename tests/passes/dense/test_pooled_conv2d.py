# SPDX-License-Identifier: Apache-2.0
"""A first layer and the pooling behind it in one kernel against float64, and in two where one does not apply."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes import layers
from passes.dense import pooled_conv2d
from passes.dense.activation import LOWERINGS as ACTIVATIONS
from schedules import winograd_pooled
from schedules.windows import Problem as Windows
from schedules.winograd import Problem

LOWERINGS = {layers.POOLED_CONV2D: pooled_conv2d.lower}


def _pool(size=3, strides=2, padding=(1, 1, 1, 1), dilation=1) -> dict:
    return {
        "pool_size": [size, size], "pool_strides": [strides, strides], "pool_dilation": [dilation, dilation],
        "pool_padding": list(padding), "flops": 1,
    }  # fmt: skip


def _call(x, w, padding, pool: dict, **attrs) -> relax.Call:
    conv = layers.conv2d(
        x, relax.const(w), name="layer", padding=padding, layout="NHWC",
        strides=(2, 2),
    )  # fmt: skip
    return layers.operator_call(
        layers.POOLED_CONV2D, list(conv.args), **layers.attrs_of(conv), **pool, **attrs
    )


def _expected(x, w, padding, pool: dict, bias=0.0, **attrs) -> np.ndarray:
    given = {
        "strides": [2, 2], "padding": list(padding), "dilation": [1, 1], "groups": 1, "layout": "NHWC",
        **attrs, **pool,
    }  # fmt: skip
    last = x.astype(np.float64).transpose(0, 2, 3, 1)
    return np.maximum(pooled_conv2d.reference(given, last, w.astype(np.float64)) + bias, 0)


def _run(run, x, w, padding, pool: dict, target, bias=0.0, **attrs):
    def build(bb, x):
        last = bb.emit(relax.op.permute_dims(x, (0, 2, 3, 1)))
        y = bb.emit(_call(last, w, padding, pool, **attrs))
        shifted = bb.emit(relax.op.add(y, relax.const(np.full(w.shape[0], bias, np.float32))))
        return relax.op.nn.relu(shifted)

    return run(build, [x], {**LOWERINGS, **ACTIVATIONS}, target)


def _drawn(rng, shape, o: int, kernel: int):
    w = rng.standard_normal((o, shape[1], kernel, kernel)) / (kernel * np.sqrt(shape[1]))
    return rng.standard_normal(shape).astype(np.float32), w.astype(np.float32)


@pytest.mark.parametrize(
    "shape, o, kernel, padding, pool",
    [
        ((1, 3, 96, 96), 64, 7, (3, 3, 3, 3), _pool()),
        ((2, 3, 71, 93), 48, 7, (3, 3, 3, 3), _pool(2, 2, (0, 0, 0, 0))),
        ((1, 3, 70, 75), 33, 7, (2, 3, 3, 2), _pool(3, 2, (0, 0, 1, 1))),
        ((1, 4, 80, 66), 64, 8, (3, 3, 3, 3), _pool(3, 1)),
        ((1, 3, 72, 70), 64, 5, (2, 2, 2, 2), _pool(5, 2, (2, 2, 2, 2))),
    ],
)
def test_one_kernel_equals_float64(run, rng, host_tiers, shape, o, kernel, padding, pool):
    """Bias and ReLU behind it; channels, columns and rows that vectors, tiles and windows do not divide."""
    x, w = _drawn(rng, shape, o, kernel)
    expected = _expected(x, w, padding, pool, 0.25)
    for target in host_tiers:
        ran = _run(run, x, w, padding, pool, target, 0.25)
        assert list(ran.loops.values()) == ["winograd"]
        np.testing.assert_allclose(ran.output, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pool", [_pool(3, 3), _pool(dilation=2), _pool(9, 2)])
def test_windows_that_rows_of_tiles_do_not_complete_take_two(run, rng, host_tiers, pool):
    x, w = _drawn(rng, (1, 3, 64, 64), 32, 7)
    ran = _run(run, x, w, (3, 3, 3, 3), pool, host_tiers[0])
    assert sorted(ran.loops.values()) == ["pooling", "winograd"]
    expected = _expected(x, w, (3, 3, 3, 3), pool)
    np.testing.assert_allclose(ran.output, expected, rtol=0, atol=2e-5)


def test_without_winograd_it_takes_two(run, rng, host_tiers):
    x, w = _drawn(rng, (1, 3, 64, 64), 32, 7)
    ran = _run(run, x, w, (3, 3, 3, 3), _pool(), host_tiers[0], winograd="never")
    assert sorted(ran.loops.values()) == ["contraction", "pooling"]
    expected = _expected(x, w, (3, 3, 3, 3), _pool())
    np.testing.assert_allclose(ran.output, expected, rtol=0, atol=2e-5)


def test_threads_change_nothing(run, rng, host_tiers):
    """Each begins with the row of tiles before its own; more threads than rows."""
    x, w = _drawn(rng, (2, 3, 90, 160), 64, 7)
    outputs = [
        _run(run, x, w, (3, 3, 3, 3), _pool(), host_tiers[0].with_threads(n)).output
        for n in (1, 3, 24)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


def test_nan_stays_in_the_windows_that_see_its_tiles(run, rng, host_tiers):
    x, w = _drawn(rng, (1, 3, 96, 96), 16, 7)
    x[0, 1, 50, 50] = np.nan
    output = _run(run, x, w, (3, 3, 3, 3), _pool(), host_tiers[0]).output
    assert np.isnan(output[0, 12, 12]).all()
    far = np.ones(output.shape[1:3], bool)
    far[9:17, 9:17] = False
    assert np.isfinite(output[0][far]).all()


@pytest.mark.parametrize(
    "pool, found",
    [
        ((3, 2, 1, 0), (0, 2)),
        ((3, 2, 0, 0), (-1, 2)),
        ((2, 2, 0, 0), (0, 2)),
        ((3, 1, 1, 1), (-1, 4)),
        ((3, 3, 1, 1), None),  # strides that tiles are no multiple of
        ((9, 2, 0, 0), None),  # further back than one row of tiles
        ((3, 2, 1, 2), (0, 2)),
        ((3, 2, 1, 4), None),  # nothing of the image in the last window
    ],
)
def test_which_windows_a_row_of_tiles_completes(pool, found):
    size, stride, before, behind = pool
    problem = Problem(1, 224, 224, 3, 64, (3, 3, 3, 3), 7, 2)
    taken = Windows(
        1, 112, 112, 64, 64, size, size, (stride, stride), (before, before, behind, behind), (1, 1), 64
    )  # fmt: skip
    assert winograd_pooled.windows_of_row(problem, 4, taken) == found


def test_what_is_no_strided_first_layer_is_left_apart():
    def suits(shape, w, **attrs):
        x = relax.Var("x", relax.TensorType(shape, "float32"))
        call = layers.conv2d(x, relax.const(np.zeros(w, np.float32)), name="layer", **attrs)
        return pooled_conv2d.suits(call, {})

    assert suits((1, 3, 64, 64), (16, 3, 7, 7), strides=(2, 2))
    for shape, w, attrs in [
        ((1, 8, 64, 64), (16, 8, 7, 7), {"strides": (2, 2)}),
        ((1, 3, 64, 64), (16, 3, 3, 3), {}),
        ((1, 3, 64, 64), (16, 3, 3, 3), {"strides": (2, 2)}),
        ((1, 3, 64, 64), (16, 3, 7, 7), {"strides": (2, 2), "dilation": (2, 2)}),
    ]:
        assert not suits(shape, w, **attrs)
