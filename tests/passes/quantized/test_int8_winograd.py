# SPDX-License-Identifier: Apache-2.0
"""Winograd's algorithm on integers: every bit of the direct sums; its choice, and the near misses that stay direct."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tvm import relax

from passes.quantized import lowering_winograd
from passes.quantized import operators as int8
from passes.quantized.problems import SampleProblem
from schedules import int8_winograd
from schedules.errors import Declined
from schedules.int8_winograd import Problem
from schedules.target import NAMED
from schedules.winograd_matrices import integer_matrices
from tests.passes.quantized.test_kernels import (
    assembly,
    check,
    check_samples,
    each_tier,
    graph,
    layer,
    scheduled,
    tiers,
)

AROUND = (1, 1, 1, 1)
VNNI = NAMED["avx512-vnni"]


def conv(x, outputs, zero_point, padding=AROUND, **more) -> SampleProblem:
    attrs = {"padding": padding, "strides": (1, 1), "dilation": (1, 1), "groups": 1, **more}
    weight = (outputs, x[-1] // attrs["groups"], 3, 3)
    return SampleProblem(x, weight, zero_point, tuple(attrs.items()))


# Single pixels, primes, remainders of tiles, of registers and of panels in either direction; images; borders of every width.
AWKWARD = [
    conv((1, 1, 1, 4), 16, 9),
    conv((1, 7, 7, 16), 32, 0),
    conv((2, 5, 9, 20), 33, 3, (1, 0, 2, 1)),
    conv((1, 17, 17, 36), 40, 255, (0, 0, 0, 0)),
    conv((1, 33, 6, 8), 70, 131, (2, 2, 2, 2)),
    conv((3, 4, 4, 68), 17, 200, (0, 3, 0, 0)),
]


@pytest.fixture
def forced(monkeypatch):
    """`forced(**changes)`: Winograd wherever it applies, at the default point with changes."""

    def force(**changes):
        def choose(weight, problem, target):
            declined = lowering_winograd.declined(weight, problem, target)
            return declined or replace(int8_winograd.default_point(problem, target), **changes)

        monkeypatch.setattr(lowering_winograd, "choose", choose)

    return force


def loops_of(samples: list[SampleProblem], weights: list[np.ndarray], target=VNNI) -> set[str]:
    inputs = [np.zeros(s.x, "uint8") for s in samples]
    body = lambda bb, *xs: [layer(*of) for of in zip(samples, xs, weights)]  # noqa: E731
    return set(scheduled(graph(body, inputs), target)[1].values())


@pytest.mark.parametrize("pixel", [0, 255])
@pytest.mark.parametrize("weight", [-128, 127, None])
def test_transforms_fit_16_bits_and_wrap_to_the_sum(pixel, weight, rng):
    bt, g, at, factor = (np.array(m).astype(np.int64) for m in integer_matrices())
    d = np.full((64, 6, 6), pixel) if weight else rng.choice([pixel, 255 - pixel], (64, 6, 6))
    w = np.full((64, 3, 3), weight) if weight else rng.choice([-128, 127], (64, 3, 3))
    v, u = bt @ d @ bt.T, g @ w @ g.T
    assert max(abs(v).max(), abs(u).max()) < 2**15
    # Whatever the pixels and the weights: at most so many times the largest of either.
    most = [np.abs(m).sum(1).max() ** 2 for m in (bt, g)]
    assert most[0] * 255 < 2**15 and most[1] * 128 < 2**15
    products = (v * u).sum(0) % 2**32
    sums = (at @ products @ at.T * pow(9, -1, 2**32) % 2**32).astype(np.uint32).view(np.int32) >> 6
    wanted = sum(
        d[:, r : r + 4, s : s + 4] * w[:, r, s, None, None] for r in range(3) for s in range(3)
    )
    assert factor**2 == 9 * 2**6 and (sums == wanted.sum(0)).all()


@pytest.mark.parametrize("target", each_tier())
def test_sums_are_exact(target, rng, forced):
    if lowering_winograd.pair_product(target) is None:
        pytest.skip("no products of 16-bit pairs")
    forced()
    samples = AWKWARD if target is tiers()[0] else [AWKWARD[2]]
    weights = [np.zeros(s.w, "int8") for s in samples]
    assert loops_of(samples, weights, target) == {"int8_winograd"}
    check_samples(samples, target, rng)


def test_blocks_of_tiles(rng, forced):
    """Several blocks, the last one shorter than a register tile, whose rest is computed and not stored."""
    forced(block=7, rows=5, kept="weights")
    check_samples([AWKWARD[3]], tiers()[0], rng)
    forced(block=7, rows=5, kept="pixels")
    check_samples([AWKWARD[3]], tiers()[0], rng)


def test_two_threads(rng, forced):
    target = tiers()[0].with_threads(2)
    for kept in ("weights", "pixels"):
        forced(block=9, rows=3, kept=kept)
        check_samples(AWKWARD[4:5], target, rng)


def test_borders_count_nothing(rng, forced):
    """An image that is its zero point everywhere sums to 0; one that is not in its corners, to what taps inside see."""
    forced()
    blank = check_samples(AWKWARD[:3], tiers()[0], rng, lambda s: np.full(s.x, s.zero_point))
    assert not any(sums.any() for sums in blank)
    sample = conv((1, 8, 9, 20), 40, 131)

    def corners(s):
        x = np.full(s.x, s.zero_point)
        x[:, ::7, ::8] = rng.integers(0, 256, x[:, ::7, ::8].shape)
        return x

    (got,) = check_samples([sample], tiers()[0], rng, corners)
    assert got[0, :2, :2].any() and got[0, -2:, -2:].any() and not got[0, 2:6, 2:7].any()


def test_extremes(forced):
    """All pixels 255 and all weights 127 or -128, and the largest sum that 26 bits hold."""
    forced()
    x = np.full((1, 6, 6, 128), 255, "uint8")
    ones, signs = np.ones((16, 64, 3, 3), "int8"), np.full((16, 128, 3, 3), 127, "int8")
    signs[1::2] = -128
    signs[:, 64:] *= -1  # of -128 it is -128: such a channel's sums are too long
    signs[1::2, 64:] = 127
    largest = np.zeros((16, 1152), "int8")
    largest[:, : 131586 // 127] = 127
    largest[:, 131586 // 127] = 131586 % 127
    weights = [ones * 127, ones * -128, signs, largest.reshape(16, 128, 3, 3)]
    samples = [conv((1, 6, 6, w.shape[1]), len(w), 0) for w in weights]
    assert loops_of(samples, weights) == {"int8_winograd"}
    got = check(
        lambda bb, *xs: [layer(*of) for of in zip(samples, xs, weights)],
        [x[..., :64].copy(), x[..., :64].copy(), x, x],
        tiers()[0],
    )
    assert got[0].max() == 255 * 127 * 64 * 9 and got[1].min() == -255 * 128 * 64 * 9
    assert got[3].max() == 255 * 131586 == 2**25 - 2


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_too_long_stay_direct(sign, forced):
    forced()
    weight = np.full((16, 128, 3, 3), 127 * sign, "int8")
    sample = conv((1, 6, 6, 128), 16, 0)
    problem = Problem(1, 6, 6, 128, 16, 3, 3, padding=AROUND)
    assert "2^25" in str(lowering_winograd.declined(weight, problem, VNNI))
    assert loops_of([sample], [weight]) == {"int8_contraction"}
    (got,) = check(lambda bb, x: [layer(sample, x, weight)], [np.full(sample.x, 255, "uint8")], tiers()[0])  # fmt: skip
    assert abs(got).max() == 255 * 127 * 128 * 9


@pytest.mark.parametrize("outputs", [32, 40])
def test_bytes_and_residual(outputs, rng, forced):
    """Rounded to bytes with a bias per channel; a residual is added before. Whole vectors of channels, and not."""
    forced()
    x = rng.integers(0, 256, (2, 9, 13, 16)).astype("uint8")
    other = rng.integers(0, 256, (2, 9, 13, outputs)).astype("uint8")
    weight = relax.const(rng.integers(-128, 128, (outputs, 16, 3, 3)).astype("int8"))
    bias = relax.const(rng.integers(-9999, 9999, (1, 1, 1, outputs)).astype("int32"))
    scale = relax.const((rng.random((1, 1, 1, outputs)) * 1e-3).astype("float32"))

    def body(bb, x, other):
        y = int8.int8_conv2d(x, weight, name="l", zero_point=7, layout="NHWC", padding=AROUND)
        y = bb.emit(relax.op.astype(bb.emit(relax.op.add(bb.emit(y), bias)), "float32"))
        y = bb.emit(relax.op.multiply(y, scale))
        yield int8.quantize(y, scale=1.0, zero_point=100)
        y = bb.emit(int8.dequantize_add(y, other, scale=0.3, zero_point=5))
        yield int8.quantize(bb.emit(relax.op.nn.relu(y)), scale=1.0, zero_point=0)

    check(body, [x, other], tiers()[0])


def problem_of(*shape, **more) -> Problem:
    return Problem(*shape, 3, 3, **{"padding": AROUND, **more})


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (problem_of(1, 56, 56, 64, 64, stride=(2, 2)), "stride"),
        (problem_of(1, 56, 56, 64, 64, dilation=(2, 2)), "dilation"),
        (problem_of(1, 56, 56, 64, 64, groups=2), "groups"),
        (Problem(1, 56, 56, 64, 64, 5, 5), "5x5"),
        (Problem(1, 56, 56, 64, 64, 3, 1), "3x1"),
        (problem_of(1, 14, 14, 256, 256), "of direct"),
        (problem_of(1, 7, 7, 512, 512), "of direct"),
        (problem_of(1, 56, 56, 64, 15), "channels"),
        (problem_of(1, 56, 56, 63, 64), "channels"),
    ],
)
def test_near_misses_stay_direct(problem, reason):
    weight = np.ones((problem.o, problem.group_inputs, problem.r, problem.s), "int8")
    found = lowering_winograd.choose(weight, problem, VNNI)
    assert isinstance(found, Declined) and reason in str(found)


@pytest.mark.parametrize("name", ["generic", "aarch64", "aarch64-dotprod"])
def test_targets_without_products_of_pairs_stay_direct(name):
    weight, problem = np.ones((64, 64, 3, 3), "int8"), problem_of(1, 56, 56, 64, 64)
    assert "16-bit pairs" in str(lowering_winograd.choose(weight, problem, NAMED[name]))


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("avx512-vnni", "vpdpwssd"), ("avx512", "vpmaddwd"), ("avx2", "vpmaddwd")],
)
def test_layers_that_pay_choose_it(target, instruction, rng, forced):
    """ResNet's first 3x3 layers, by the cost rule."""
    for problem in (problem_of(1, 56, 56, 64, 64), problem_of(1, 28, 28, 128, 128)):
        weight = rng.integers(-128, 128, (problem.o, problem.c, 3, 3)).astype("int8")
        found = lowering_winograd.choose(weight, problem, NAMED[target])
        assert isinstance(found, int8_winograd.Point)
    forced()
    weight = rng.integers(-128, 128, AWKWARD[1].w).astype("int8")
    x = np.zeros(AWKWARD[1].x, "uint8")
    code, loops = assembly(lambda bb, x: [layer(AWKWARD[1], x, weight)], [x], NAMED[target])
    assert loops == {"int8_winograd"} and f"\t{instruction}\t" in code
