# SPDX-License-Identifier: Apache-2.0
"""Winograd convolution against float64: sizes, paddings, channels, epilogues, threads; the choice and its near misses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tvm import relax

from passes import layers
from passes.dense import winograd as lowering
from passes.dense.activation import LOWERINGS as ACTIVATIONS
from schedules import winograd
from schedules.errors import Declined
from schedules.target import NAMED

# Maximum error of unit-scale outputs seen over many draws, with a factor of two to spare.
_TOLERANCE = {2: 4e-6, 3: 1.5e-5, 4: 2e-5}


def _convolve(x: np.ndarray, w: np.ndarray, padding, stride: int = 1) -> np.ndarray:
    top, left, bottom, right = padding
    padded = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    kernel = w.shape[-1]
    height, width = padded.shape[1] - kernel + 1, padded.shape[2] - kernel + 1
    return sum(
        padded[:, r : r + height : stride, s : s + width : stride]
        @ w[:, :, r, s].astype(np.float64).T
        for r in range(kernel)
        for s in range(kernel)
    )


# Where a kernel's weights are transformed: when they are packed, or as they are used.
POINTS = {"packed": winograd.transformed_point, "used": winograd.transforming_point}


def _forced(m: int, transformed: str, **changes):
    def lower(bb, call, target):
        problem = lowering.problem_of(call)
        point = replace(POINTS[transformed](problem, m, target), **changes)
        return lowering.lower_at(bb, call, problem, point)

    return {layers.CONV2D: lower}


def _weights(rng, o: int, c: int, kernel: int = 3) -> np.ndarray:
    drawn = rng.standard_normal((o, c, kernel, kernel)) / (kernel * np.sqrt(c))
    return drawn.astype(np.float32)


def _conv(x, w, padding=(1, 1, 1, 1), **attrs):
    call = layers.conv2d(x, relax.const(w), name="layer", padding=padding, layout="NHWC", **attrs)
    return call


@pytest.mark.parametrize("plain_weights", [False, True])
@pytest.mark.parametrize("taps, m", [(t, m) for t, sizes in winograd.SIZES.items() for m in sizes])
def test_matrices_compute_the_correlation_exactly(rng, taps, m, plain_weights):
    bt, g, at = winograd.matrices(m, plain_weights, taps)
    for _ in range(5):
        d, f = rng.standard_normal(m + taps - 1), rng.standard_normal(taps)
        expected = [d[i : i + taps] @ f for i in range(m)]
        np.testing.assert_allclose(at @ ((g @ f) * (bt @ d)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("m", winograd.SIZES[3])
@pytest.mark.parametrize(
    "shape, o, padding",
    [
        ((1, 7, 7, 5), 3, (1, 1, 1, 1)),
        ((2, 9, 17, 33), 40, (1, 1, 1, 1)),
        ((1, 3, 3, 1), 1, (0, 0, 0, 0)),
        ((1, 13, 6, 16), 31, (0, 1, 1, 0)),
        ((1, 1, 1, 8), 16, (1, 1, 1, 1)),
    ],
)
def test_convolution_equals_float64(run, rng, host_tiers, m, shape, o, padding):
    x, w = rng.standard_normal(shape).astype(np.float32), _weights(rng, o, shape[3])
    for target in host_tiers:
        ran = run(lambda bb, x: _conv(x, w, padding), [x], _forced(m, "packed"), target)
        assert list(ran.loops.values()) == ["winograd"]
        np.testing.assert_allclose(ran.output, _convolve(x, w, padding), rtol=0, atol=_TOLERANCE[m])


@pytest.mark.parametrize(
    "m, shape, o, padding",
    [(2, (1, 7, 7, 5), 3, (1, 1, 1, 1)), (4, (2, 9, 7, 33), 40, (1, 0, 1, 2))],
)
def test_weights_transformed_as_they_are_used(run, rng, host_tiers, m, shape, o, padding):
    """The other kernel, on every tier: its transform rounds in float32, within the same tolerance."""
    x, w = rng.standard_normal(shape).astype(np.float32), _weights(rng, o, shape[3])
    for target in host_tiers:
        ran = run(lambda bb, x: _conv(x, w, padding), [x], _forced(m, "used"), target)
        np.testing.assert_allclose(ran.output, _convolve(x, w, padding), rtol=0, atol=_TOLERANCE[m])


def _strided(m: int, planes: list, **changes):
    """As `_forced`, of an image whose planes `planes` holds once the graph is built."""

    def lower(bb, call, target):
        problem = lowering.problem_of(call, planar=True)
        point = replace(winograd.transformed_point(problem, m, target), **changes)
        return lowering.lower_at(bb, call, problem, point, planes[0])

    return {layers.CONV2D: lower}


@pytest.mark.parametrize(
    "shape, o, kernel, stride, padding, m, changes",
    [
        ((1, 3, 40, 42), 64, 7, 2, (3, 3, 3, 3), 4, {}),
        ((2, 3, 17, 33), 20, 7, 2, (3, 3, 3, 3), 3, {}),
        ((1, 1, 7, 7), 1, 7, 2, (0, 0, 0, 0), 4, {}),
        ((1, 4, 9, 41), 33, 8, 2, (0, 3, 2, 1), 4, {"block": 4, "rows": 3}),
        ((1, 2, 70, 11), 16, 5, 2, (2, 2, 2, 2), 2, {}),
        ((2, 3, 47, 39), 24, 11, 4, (2, 2, 2, 2), 4, {"order": "entries"}),
        ((1, 3, 20, 36), 17, 7, 3, (6, 7, 8, 9), 4, {}),
    ],
)
def test_strided_convolution_equals_float64(
    run, rng, host_tiers, shape, o, kernel, stride, padding, m, changes
):
    """Kernels that the stride does not divide, more channels than a vector, padding wider than a tile."""
    x, w = rng.standard_normal(shape).astype(np.float32), _weights(rng, o, shape[1], kernel)
    expected = _convolve(x.transpose(0, 2, 3, 1), w, padding, stride)
    for target in host_tiers:
        planes: list = []

        def build(bb, x, planes=planes):
            planes[:] = [x]
            last = bb.emit(relax.op.permute_dims(x, (0, 2, 3, 1)))
            return _conv(last, w, padding, strides=(stride, stride))

        ran = run(build, [x], _strided(m, planes, **changes), target)
        assert "winograd" in ran.loops.values()
        np.testing.assert_allclose(ran.output, expected, rtol=0, atol=_TOLERANCE[m])


@pytest.mark.parametrize("divide", ["tiles", "channels"])
def test_threads_change_nothing_of_a_strided_convolution(run, rng, host_tiers, divide):
    x, w = rng.standard_normal((1, 3, 96, 96)).astype(np.float32), _weights(rng, 160, 3, 7)
    outputs = []
    for threads in (1, 3):
        planes: list = []

        def build(bb, x, planes=planes):
            planes[:] = [x]
            last = bb.emit(relax.op.permute_dims(x, (0, 2, 3, 1)))
            return _conv(last, w, (3, 3, 3, 3), strides=(2, 2))

        forced = _strided(4, planes, divide=divide)
        outputs.append(run(build, [x], forced, host_tiers[0].with_threads(threads)).output)
    np.testing.assert_array_equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    "m, transformed", [(2, "packed"), (3, "packed"), (4, "packed"), (4, "used")]
)
def test_bias_residual_and_activation_join_the_kernel(run, rng, host_tiers, m, transformed):
    x, w = rng.standard_normal((1, 10, 11, 16)).astype(np.float32), _weights(rng, 24, 16)
    residual, bias = (
        rng.standard_normal((1, 10, 11, 24)).astype(np.float32),
        rng.standard_normal(24).astype(np.float32),
    )

    def build(bb, x, residual):
        y = bb.emit(relax.op.add(bb.emit(_conv(x, w)), relax.const(bias)))
        return relax.op.nn.relu(bb.emit(relax.op.add(y, residual)))

    ran = run(build, [x, residual], {**_forced(m, transformed), **ACTIVATIONS}, host_tiers[0])
    assert list(ran.loops.values()) == ["winograd"]
    expected = np.maximum(_convolve(x, w, (1, 1, 1, 1)) + bias + residual, 0)
    np.testing.assert_allclose(ran.output, expected, rtol=0, atol=_TOLERANCE[m])


@pytest.mark.parametrize("order", ["panels", "entries"])
@pytest.mark.parametrize(
    "shape, o", [((1, 10, 9, 20), 72), ((2, 7, 6, 16), 100), ((1, 8, 8, 8), 20)]
)
def test_both_orders_compute_the_same(run, rng, host_tiers, order, shape, o):
    """Panels after entries, entries after panels; with a part of a panel, and nothing but that; blocks that overlap."""
    x, w = rng.standard_normal(shape).astype(np.float32), _weights(rng, o, shape[3])
    forced = _forced(3, "packed", order=order, block=5, rows=3)
    ran = run(lambda bb, x: _conv(x, w), [x], forced, host_tiers[0])
    expected = _convolve(x, w, (1, 1, 1, 1))
    np.testing.assert_allclose(ran.output, expected, rtol=0, atol=_TOLERANCE[3])


@pytest.mark.parametrize("divide", ["tiles", "channels"])
@pytest.mark.parametrize(
    "transformed, changes",
    [
        ("packed", {"block": 40, "rows": 8}),
        ("packed", {"block": 40, "rows": 8, "order": "entries"}),
        ("used", {"block": 8, "rows": 4}),
    ],
)
def test_threads_change_nothing(run, rng, host_tiers, divide, transformed, changes):
    """Whatever is divided among the threads, each output is summed in the same order."""
    x, w = rng.standard_normal((1, 40, 40, 16)).astype(np.float32), _weights(rng, 72, 16)
    forced = _forced(4, transformed, divide=divide, **changes)
    outputs = [
        run(lambda bb, x: _conv(x, w), [x], forced, host_tiers[0].with_threads(n)).output
        for n in (1, 3)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])


@pytest.mark.parametrize("chunk", [5, 17])
def test_chunks_of_channels_sum_to_the_whole(run, rng, host_tiers, chunk):
    """Channels that chunks do not divide, several register tiles in a block, blocks that overlap."""
    x, w = rng.standard_normal((2, 9, 10, 17)).astype(np.float32), _weights(rng, 20, 17)
    forced = _forced(4, "used", block=6, rows=2, chunk=chunk)
    ran = run(lambda bb, x: _conv(x, w), [x], forced, host_tiers[0])
    np.testing.assert_allclose(
        ran.output, _convolve(x, w, (1, 1, 1, 1)), rtol=0, atol=_TOLERANCE[4]
    )


@pytest.mark.parametrize("transformed", POINTS)
def test_definition_by_itself_is_the_convolution(rng, transformed):
    """The unscheduled te computation, which kernels are compared with."""
    import tvm
    from tvm import te

    problem = winograd.Problem(1, 5, 6, 3, 5, (1, 0, 1, 1))
    point = POINTS[transformed](problem, 4, NAMED["generic"])
    x, w = rng.standard_normal((1, 5, 6, 3)).astype(np.float32), _weights(rng, 5, 3)
    packed = winograd.pack_weights(w, point)
    placeholders = [te.placeholder(a.shape, "float32") for a in (x, packed)]
    func = te.create_prim_func(
        [*placeholders, winograd.define_winograd(*placeholders, problem, point)]
    )
    out = tvm.runtime.tensor(np.zeros((1, 5, 5, 5), np.float32))
    tvm.compile(func, NAMED["generic"].tvm())["main"](
        tvm.runtime.tensor(x), tvm.runtime.tensor(packed), out
    )
    np.testing.assert_allclose(
        out.numpy(), _convolve(x, w, (1, 0, 1, 1)), rtol=0, atol=_TOLERANCE[4]
    )


def test_nan_and_infinity_stay_in_the_output_tiles_that_see_them(run, rng, host_tiers):
    x, w = rng.standard_normal((1, 16, 16, 8)).astype(np.float32), _weights(rng, 8, 8)
    x[0, 6, 6, 3] = np.nan
    ran = run(lambda bb, x: _conv(x, w), [x], _forced(2, "packed"), host_tiers[0])
    assert np.isnan(ran.output[0, 5:8, 5:8]).all()
    clean = np.ones((16, 16), bool)
    clean[4:8, 4:8] = False  # the 2x2 tiles whose 4x4 inputs hold the pixel
    assert np.isfinite(ran.output[0][clean]).all()


def _var(shape) -> relax.Var:
    return relax.Var("x", relax.TensorType(shape, "float32"))


@pytest.mark.parametrize(
    "attrs, weight_shape, reason",
    [
        ({"strides": (2, 2)}, (8, 8, 3, 3), "strides"),
        ({"dilation": (2, 2)}, (8, 8, 3, 3), "dilation"),
        ({"groups": 2}, (8, 4, 3, 3), "groups"),
        ({}, (8, 8, 1, 1), "1x1"),
        ({}, (8, 8, 5, 3), "5x3"),
    ],
)
def test_near_misses_are_declined(attrs, weight_shape, reason):
    call = _conv(_var((1, 56, 56, 8)), np.zeros(weight_shape, np.float32), **attrs)
    declined = lowering.problem_of(call)
    assert isinstance(declined, Declined) and reason in declined.reason


def test_the_winograd_attribute_forbids_it():
    call = _conv(_var((1, 56, 56, 64)), np.zeros((64, 64, 3, 3), np.float32))
    assert isinstance(lowering.problem_of(call), winograd.Problem)
    forbidden = layers.operator_call(
        layers.CONV2D, call.args, **layers.attrs_of(call), winograd="never"
    )
    declined = lowering.problem_of(forbidden)
    assert isinstance(declined, Declined) and "forbidden" in declined.reason


@pytest.mark.parametrize(
    "h, channels, expected, transformed",
    [
        (56, 64, 4, "packed"),
        (28, 128, 4, "packed"),
        (14, 256, 3, "packed"),
        (224, 64, 4, "packed"),
        (7, 512, 4, "used"),
        (8, 512, 4, "used"),
    ],
)
def test_choice_for_common_layers_on_avx512(h, channels, expected, transformed):
    problem = winograd.Problem(1, h, h, channels, channels, (1, 1, 1, 1))
    target = NAMED["avx512"]
    assert lowering.choose(problem, target) == expected
    point = winograd.default_point(problem, expected, target)
    assert point == POINTS[transformed](problem, expected, target)


@pytest.mark.parametrize(
    "kernel, stride, o, expected", [(7, 2, 64, 4), (8, 2, 64, 4), (5, 2, 64, 4), (7, 2, 16, 4)]
)
def test_choice_for_first_layers_on_avx512(kernel, stride, o, expected):
    problem = winograd.Problem(1, 224, 224, 3, o, (3, 3, 3, 3), kernel, stride)
    assert lowering.choose(problem, NAMED["avx512"]) == expected


@pytest.mark.parametrize(
    "attrs, weight_shape, planar, reason",
    [
        ({"strides": (2, 2)}, (8, 3, 7, 7), False, "channels last"),
        ({"strides": (2, 1)}, (8, 3, 7, 7), True, "strides"),
        ({"strides": (2, 2)}, (8, 3, 3, 3), True, "3x3"),
        ({"strides": (16, 16)}, (8, 3, 16, 16), True, "16x16"),
        ({"strides": (2, 2)}, (8, 3, 7, 5), True, "7x5"),
        ({}, (8, 3, 4, 4), True, "4x4"),
    ],
)
def test_near_misses_of_strided_ones_are_declined(attrs, weight_shape, planar, reason):
    call = _conv(_var((1, 56, 56, 3)), np.zeros(weight_shape, np.float32), **attrs)
    declined = lowering.problem_of(call, planar)
    assert isinstance(declined, Declined) and reason in declined.reason
    assert isinstance(
        lowering.problem_of(
            _conv(_var((1, 56, 56, 3)), np.zeros((8, 3, 7, 7), np.float32), strides=(2, 2)), True
        ),
        winograd.Problem,
    )


@pytest.mark.parametrize("h, c, o", [(224, 3, 64), (28, 8, 8), (1, 64, 64)])
def test_few_channels_or_pixels_stay_direct(h, c, o):
    declined = lowering.choose(winograd.Problem(1, h, h, c, o, (1, 1, 1, 1)), NAMED["avx512"])
    assert isinstance(declined, Declined) and "of direct" in declined.reason


def test_a_point_survives_json():
    problem = winograd.Problem(2, 9, 17, 33, 40, (1, 0, 1, 2))
    assert winograd.Problem.from_dict({**problem.to_dict(), "padding": [1, 0, 1, 2]}) == problem
    for make in POINTS.values():
        point = make(problem, 4, NAMED["avx2"])
        assert winograd.Point.from_dict(point.to_dict()) == point
