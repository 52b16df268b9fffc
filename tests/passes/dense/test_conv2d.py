# SPDX-License-Identifier: Apache-2.0
"""Direct and depthwise convolution against float64: awkward sizes, epilogues, instruction sets, threads, special values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tvm import relax

from passes import layers
from passes.dense.conv2d import lower_conv2d, problem_of
from passes.numpy_images import conv2d as conv2d_reference
from schedules.errors import ScheduleError
from schedules.target import detect_host

LOWERINGS = {layers.CONV2D: lower_conv2d}

# n, h, w, c, o, (r, s), stride, padding, dilation, groups
CASES = {
    "3x3 one tile": (1, 14, 14, 32, 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "3x3 batch, overlapped": (2, 7, 17, 20, 40, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "stem 7x7 s2": (1, 17, 33, 3, 24, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1), 1),
    "one pixel": (1, 1, 1, 96, 4, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "one channel": (3, 7, 5, 1, 1, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "1x1 prime": (1, 17, 33, 48, 10, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "1x1 s2": (2, 17, 33, 17, 7, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1),
    "1x1 padded": (1, 5, 5, 8, 16, (1, 1), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "dilated": (1, 30, 30, 16, 16, (3, 3), (1, 1), (4, 4, 4, 4), (4, 4), 1),
    "taps all outside": (1, 5, 5, 16, 16, (3, 3), (1, 1), (6, 6, 6, 6), (6, 6), 1),
    "uneven": (1, 9, 12, 5, 6, (2, 3), (1, 2), (0, 2, 1, 0), (1, 1), 1),
    "1d": (1, 1, 37, 5, 6, (1, 3), (1, 1), (0, 1, 0, 1), (1, 1), 1),
    "long sum": (1, 7, 9, 300, 40, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),
    "groups of 24": (1, 14, 14, 48, 48, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2),
    "groups of 8 s2": (1, 14, 14, 48, 48, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 6),
    "groups of 8, half a vector left": (
        2,
        9,
        17,
        104,
        104,
        (3, 3),
        (1, 1),
        (1, 1, 1, 1),
        (1, 1),
        13,
    ),
    "groups of 4": (1, 7, 33, 36, 36, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 9),
    "groups of 2, 5x5 s2 dilated": (1, 15, 17, 38, 38, (5, 5), (2, 2), (4, 4, 4, 4), (2, 2), 19),
    "groups of 8, 1x1": (1, 5, 7, 16, 16, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 2),
    "depthwise x2": (1, 14, 14, 12, 24, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 12),
    "depthwise": (1, 14, 14, 40, 40, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 40),
    "depthwise 5x5 s2": (2, 15, 15, 37, 37, (5, 5), (2, 2), (2, 2, 2, 2), (1, 1), 37),
    "depthwise 7x7": (1, 9, 9, 96, 96, (7, 7), (1, 1), (3, 3, 3, 3), (1, 1), 96),
    "depthwise 1x1": (1, 9, 9, 16, 16, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 16),
    "depthwise dilated": (1, 13, 11, 33, 33, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 33),
}
SEVERAL_TARGETS = [
    "3x3 batch, overlapped",
    "stem 7x7 s2",
    "1x1 prime",
    "groups of 24",
    "groups of 4",
    "depthwise",
]


def _layer(case, rng):
    n, h, w, c, o, (r, s), stride, padding, dilation, groups = case
    weight = (rng.standard_normal((o, c // groups, r, s)) / np.sqrt(c // groups * r * s)).astype(
        np.float32
    )
    attrs = {"strides": stride, "padding": padding, "dilation": dilation, "groups": groups}
    attrs |= {"layout": "NHWC"}
    return rng.standard_normal((n, h, w, c)).astype(np.float32), weight, attrs


def _exact(x, weight, attrs):
    return conv2d_reference(attrs, x.astype(np.float64), weight.astype(np.float64))


def _conv(x, weight, attrs):
    """The layer with Winograd's algorithm forbidden: these tests are of the direct kernel."""
    call = layers.conv2d(x, relax.const(weight), name="layer", **attrs)
    return layers.operator_call(layers.CONV2D, call.args, **layers.attrs_of(call), winograd="never")


def _check(run, case, rng, target):
    x, weight, attrs = _layer(case, rng)
    wanted = _exact(x, weight, attrs)
    bias = rng.standard_normal(wanted.shape[-1]).astype(np.float32)
    residual = rng.standard_normal(wanted.shape).astype(np.float32)

    def build(bb, image, other):
        y = bb.emit(_conv(image, weight, attrs))
        y = bb.emit(relax.op.add(y, relax.const(bias.reshape(1, 1, 1, -1))))
        return relax.op.nn.relu(bb.emit(relax.op.add(y, other)))

    got = run(build, [x, residual], LOWERINGS, target)
    assert len(got.loops) == 1, "the epilogue was not fused"
    assert set(got.loops.values()) <= {"contraction", "depthwise", "grouped"}
    np.testing.assert_allclose(
        got.output, np.maximum(wanted + bias + residual, 0), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("name", CASES)
def test_matches_float64_with_bias_residual_and_relu(name, run, rng):
    _check(run, CASES[name], rng, detect_host())


@pytest.mark.parametrize("name", SEVERAL_TARGETS)
def test_narrower_instruction_sets(name, run, rng, host_tiers):
    for target in host_tiers[1:]:
        _check(run, CASES[name], rng, target)


@pytest.mark.parametrize("name", [*SEVERAL_TARGETS, "long sum"])
def test_two_threads(name, run, rng):
    _check(run, CASES[name], rng, detect_host().with_threads(2))


@pytest.mark.parametrize("name", ["depthwise 5x5 s2", "depthwise dilated", "groups of 4"])
def test_images_beyond_the_cache(name, run, rng):
    """Rows below are fetched ahead, past the image's end too."""
    _check(run, CASES[name], rng, replace(detect_host(), l2_bytes=1024))


# n, h, w, c, o, kernel, stride, padding, dilation
PLANAR = {
    "7x7 s2": (1, 30, 31, 3, 64, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1)),
    "3x3 s2": (2, 17, 19, 3, 20, (3, 3), (2, 2), (0, 0, 1, 1), (1, 1)),
    "dilated": (1, 13, 13, 4, 33, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    "patches": (1, 32, 20, 3, 24, (4, 4), (4, 4), (0, 0, 0, 0), (1, 1)),
    "one channel": (1, 28, 28, 1, 8, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1)),
}


def _run_planar(run, case, rng, target, axes=(0, 2, 3, 1)):
    x, weight, attrs = _layer((*case, 1), rng)
    wanted = np.maximum(_exact(x, weight, attrs), 0)
    planes = np.ascontiguousarray(x.transpose(np.argsort(axes)))

    def build(bb, image):
        last = bb.emit(relax.op.permute_dims(image, axes))
        return relax.op.nn.relu(bb.emit(_conv(last, weight, attrs)))

    got = run(build, [planes], LOWERINGS, target)
    np.testing.assert_allclose(got.output, wanted, rtol=0, atol=2e-5)
    return got


@pytest.mark.parametrize("name", PLANAR)
def test_an_image_in_planes_is_read_as_it_is(name, run, rng):
    for target in (detect_host(), detect_host().with_threads(2)):
        got = _run_planar(run, PLANAR[name], rng, target)
        assert list(got.loops.values()) == ["contraction"]


def test_what_is_no_image_in_planes_is_transposed(run, rng):
    case = PLANAR["3x3 s2"]
    for changed, axes in (
        ((*case[:3], 5, *case[4:]), (0, 2, 3, 1)),  # more channels
        ((*case[:5], (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)), (0, 2, 3, 1)),  # all pixels flat
        (case, (0, 3, 2, 1)),  # columns first
    ):
        got = _run_planar(run, changed, rng, detect_host(), axes)
        assert sorted(got.loops.values()) == ["contraction", "generic"]


def test_without_epilogue_and_with_odd_ones(run, rng):
    x, weight, attrs = _layer(CASES["1x1 prime"], rng)
    wanted = _exact(x, weight, attrs)
    other = rng.standard_normal(wanted.shape).astype(np.float32)
    op = relax.op
    builds = [
        (lambda bb, a, b: op.nn.relu(bb.emit(_conv(a, weight, attrs))), np.maximum(wanted, 0)),
        (
            lambda bb, a, b: op.add(bb.emit(_conv(a, weight, attrs)), bb.emit(op.nn.relu(b))),
            wanted + np.maximum(other, 0),
        ),
        (
            lambda bb, a, b: op.add(
                bb.emit(op.multiply(bb.emit(_conv(a, weight, attrs)), b)), bb.emit(op.nn.relu(b))
            ),
            wanted * other + np.maximum(other, 0),
        ),
    ]
    for build, exact in builds:
        got = run(build, [x, other], LOWERINGS, detect_host()).output
        np.testing.assert_allclose(got, exact, rtol=0, atol=2e-5)
    got = run(lambda bb, a: _conv(a, weight, attrs), [x], LOWERINGS, detect_host()).output
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["1x1 prime", "3x3 one tile", "groups of 4", "depthwise"])
def test_infinities_and_nans_reach_the_pixels_that_see_them(name, run, rng):
    x, weight, attrs = _layer(CASES[name], rng)
    x[0, 3, 2, 1], x[0, 0, 5, 3] = np.nan, np.inf
    got = run(lambda bb, a: _conv(a, weight, attrs), [x], LOWERINGS, detect_host()).output
    with np.errstate(invalid="ignore"):
        wanted = _exact(x, weight, attrs)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(wanted))
    finite = np.isfinite(wanted)
    np.testing.assert_allclose(got[finite], wanted[finite], rtol=0, atol=2e-5)


def test_another_layout_is_refused(rng):
    weight = rng.standard_normal((8, 4, 1, 1)).astype(np.float32)
    x = relax.Var("x", relax.TensorType((1, 4, 5, 5), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        call = builder.normalize(
            layers.conv2d(x, relax.const(weight), name="features.0", layout="NCHW")
        )
        builder.emit_func_output(x)
    with pytest.raises(ScheduleError, match=r"features\.0: .*channels last; found NCHW"):
        problem_of(call)
