# SPDX-License-Identifier: Apache-2.0
"""Binary kernels against numpy, bit for bit, on every tier; and the instructions of tiers that this machine lacks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax

from passes.binary import FAMILY, operators
from passes.binary.bits import pack_bits, unpack_bits
from passes.layers import shape_of
from passes.lower import lower_operators
from schedules.binary_problem import Point, Problem, default_point, packed_shape
from schedules.bit_words import BitCounter
from schedules.dispatch import schedule_module
from schedules.target import NAMED

_PLAIN = {
    "strides": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1, "layout": "NHWC",
    "pad_value": 0, "name": "layer", "flops": 0,
}  # fmt: skip

# name -> (x [N, H, W, C] in channels, w, attributes that differ)
CONVOLUTIONS = {
    "one pixel, one channel": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "border of zeros, odd channels": ((2, 7, 9, 33), (17, 33, 3, 3), {"padding": [1, 1, 1, 1]}),
    "border of +1, odd channels": (
        (1, 7, 5, 40), (33, 40, 3, 3), {"padding": [1, 1, 1, 1], "pad_value": 1},
    ),
    "border of -1, lopsided": (
        (1, 5, 7, 40), (7, 40, 3, 3), {"padding": [2, 0, 1, 2], "pad_value": -1},
    ),
    "every window on the border": ((1, 3, 2, 64), (20, 64, 5, 5), {"padding": [2, 3, 2, 3]}),
    "no row between the borders": ((1, 2, 2, 32), (16, 32, 3, 3), {"padding": [1, 1, 1, 1]}),
    "strided, dilated, two groups": (
        (1, 9, 8, 66), (34, 33, 3, 2),
        {"padding": [2, 1, 0, 1], "groups": 2, "strides": [2, 1], "dilation": [1, 2]},
    ),
    "long rows": ((1, 3, 3, 512), (32, 512, 3, 3), {"padding": [1, 1, 1, 1]}),
    "lines of a row in parities": ((2, 5, 6, 96), (64, 96, 3, 3), {"padding": [1, 0, 1, 1], "strides": [1, 2]}),
    "a line in several runs": ((1, 3, 4, 1056), (64, 1056, 3, 3), {"padding": [1, 1, 1, 1]}),
    "taps apart in parities": (
        (1, 6, 8, 224), (128, 112, 3, 3), {"padding": [2, 2, 2, 2], "dilation": [2, 2], "groups": 2},
    ),
    "one long sum in straight-line code": ((1, 4, 3, 512), (64, 512, 3, 3), {"padding": [1, 1, 1, 1]}),
    "pointwise, long": ((1, 3, 3, 1090), (80, 1090, 1, 1), {}),
    "pointwise": ((1, 5, 5, 255), (48, 255, 1, 1), {}),
}  # fmt: skip


def _signs(rng, *shape):
    return np.where(rng.random(shape) < 0.5, -1, 1).astype(np.int8)


def _module(operator: str, x: np.ndarray, constants, attrs: dict) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    var = relax.Var("x", relax.TensorType(x.shape, str(x.dtype)))
    with builder.function("main", [var]):
        with builder.dataflow():
            args = [var, *(relax.const(c) for c in constants)]
            out = builder.emit_output(operators.binary_call(operator, args, **attrs))
        builder.emit_func_output(out)
    return builder.finalize()


def _compile(operator: str, x: np.ndarray, constants, attrs: dict, target):
    lowered = lower_operators(_module(operator, x, constants, attrs), FAMILY.lowerings, target)
    return tvm.compile(schedule_module(lowered.mod, target)[0], target.tvm())


def _check(operator: str, x: np.ndarray, constants, attrs: dict, target) -> np.ndarray:
    vm = relax.VirtualMachine(_compile(operator, x, constants, attrs, target), tvm.cpu())
    found = vm["main"](tvm.runtime.tensor(x)).numpy()
    wanted = FAMILY.references[operator](attrs, x, *constants)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)
    return found


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_equal_their_definition(case, rng, host_tiers):
    x_shape, w_shape, different = CONVOLUTIONS[case]
    attrs = {**_PLAIN, **different}
    x = pack_bits(rng.random(x_shape) < 0.5, 3, attrs["groups"])
    _check(operators.BINARY_CONV2D, x, [_signs(rng, *w_shape)], attrs, host_tiers[0])


def test_the_definition_is_a_convolution_of_signs(rng):
    torch = pytest.importorskip("torch")
    x, w = _signs(rng, 1, 6, 5, 40), _signs(rng, 8, 20, 3, 3)
    attrs = {**_PLAIN, "padding": [1, 1, 1, 1], "groups": 2, "strides": [2, 2]}
    bits = pack_bits(x > 0, 3, 2)
    found = FAMILY.references[operators.BINARY_CONV2D](attrs, bits, w)
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).astype("float32"))
    wanted = torch.nn.functional.conv2d(
        images, torch.from_numpy(w.astype("float32")), None, 2, 1, 1, 2
    )
    np.testing.assert_array_equal(found.transpose(0, 3, 1, 2), wanted.numpy())


def test_rows_in_blocks(rng, host_tiers):
    """Output that no cache holds."""
    target = replace(host_tiers[0], l2_bytes=16384)
    for x_shape, w_shape, padding in (
        ((2, 9, 5, 40), (33, 40, 3, 3), 1),
        ((1, 6, 10, 40), (33, 40, 1, 1), 0),
    ):
        x = pack_bits(rng.random(x_shape) < 0.5, 3)
        attrs = {**_PLAIN, "padding": [padding] * 4}
        for t in (target, target.with_threads(2)):
            problem = Problem(
                *x_shape[:3],
                x.shape[3],
                *w_shape[:1],
                *w_shape[2:],
                padding=(padding,) * 4,
                bits=40,
            )
            assert default_point(problem, t).rows
            _check(operators.BINARY_CONV2D, x, [_signs(rng, *w_shape)], attrs, t)


def test_every_tier_and_counter_agrees(rng, host_tiers):
    x = pack_bits(rng.random((1, 5, 6, 70)) < 0.5, 3)
    w, attrs = _signs(rng, 35, 70, 3, 3), {**_PLAIN, "padding": [1, 1, 1, 1]}
    methods = set()
    for target in [NAMED["avx512"], *host_tiers]:
        if target.missing_on_host():
            continue
        methods.add(BitCounter.of(target).method)
        _check(operators.BINARY_CONV2D, x, [w], attrs, target)
    assert methods


def test_thresholds_and_directions_give_bits(rng, host_tiers):
    x = pack_bits(rng.random((1, 7, 7, 64)) < 0.5, 3)
    w = _signs(rng, 70, 64, 3, 3)
    thresholds = rng.integers(-30, 30, 70).astype(np.int32)
    # Beyond the accumulator: bits that are always set, and never.
    thresholds[:2] = -9 * 64, 9 * 64 + 1
    flips = pack_bits(np.arange(70) % 3 == 1, 0)
    attrs = {**_PLAIN, "padding": [1, 1, 1, 1]}
    found = _check(operators.BINARY_CONV2D_BITS, x, [w, thresholds, flips], attrs, host_tiers[0])
    bits = unpack_bits(found, 3, 70)
    assert bits[..., 0].all() and bits[..., 1].all()  # reached; not reached, and flipped
    assert not (found[..., 2] >> 6).any()  # nothing behind the last channel


def test_dense_layers(rng, host_tiers):
    x = pack_bits(rng.random((3, 100)) < 0.5, 1)
    attrs = {"name": "layer", "flops": 0}
    _check(operators.BINARY_DENSE, x, [_signs(rng, 17, 100)], attrs, host_tiers[0])
    constants = [_signs(rng, 40, 100), np.zeros(40, np.int32), np.zeros(2, np.uint32)]
    _check(operators.BINARY_DENSE_BITS, x, constants, attrs, host_tiers[-1])


@pytest.mark.parametrize("groups", [1, 2])
def test_packing_compares_special_values_as_ieee_does(groups, rng, host_tiers):
    x = rng.standard_normal((1, 3, 5, 70)).astype(np.float32)
    special = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45]
    x[0, 0, 0, : len(special)] = special
    thresholds = np.zeros(70, np.float32)
    thresholds[40:45] = np.nan, np.inf, -np.inf, 1e-45, -1e-45
    flips = pack_bits(rng.random(70) < 0.5, 0, groups)
    attrs = {"groups": groups, "layout": "NHWC"}
    for target in (host_tiers[0], host_tiers[-1]):
        _check(operators.BINARY_PACK, x, [thresholds, flips], attrs, target)


@pytest.mark.parametrize("channels, groups", [(70, 1), (70, 2), (64, 1), (17, 1)])
def test_packing_compares_bytes(channels, groups, rng, host_tiers):
    x = rng.integers(0, 256, (1, 3, 5, channels)).astype(np.uint8)
    x[0, 0, :2] = [[0], [255]]
    thresholds = rng.integers(0, 256, channels).astype(np.uint8)
    thresholds[:3] = 0, 255, 128
    flips = pack_bits(rng.random(channels) < 0.5, 0, groups)
    attrs = {"groups": groups, "layout": "NHWC"}
    for target in host_tiers:
        _check(operators.BINARY_PACK, x, [thresholds, flips], attrs, target)


def test_max_pooling_of_bits(rng, host_tiers):
    x = pack_bits(rng.random((1, 7, 6, 40)) < 0.3, 3)
    attrs = {
        "window": [3, 2], "strides": [2, 1], "padding": [1, 0, 1, 1], "dilation": [1, 2], "layout": "NHWC",
    }  # fmt: skip
    _check(operators.BINARY_MAX_POOL2D, x, [], attrs, host_tiers[0])
    flips = pack_bits(rng.random(40) < 0.5, 0)  # the smallest sign of these channels
    _check(operators.BINARY_MAX_POOL2D, x, [flips], attrs, host_tiers[0])


def test_two_threads_divide_the_panels(rng, host_tiers):
    x = pack_bits(rng.random((1, 6, 6, 32)) < 0.5, 3)
    attrs = {**_PLAIN, "padding": [1, 1, 1, 1]}
    target = host_tiers[0].with_threads(2)
    _check(operators.BINARY_CONV2D, x, [_signs(rng, 48, 32, 3, 3)], attrs, target)


@pytest.mark.parametrize(
    "name, instructions, absent",
    [
        ("avx512-vnni-vpopcntdq", ["vpopcntd"], ["vpshufb"]),
        ("avx512-vnni", ["vpternlog", "vpshufb", "vpdpbusd"], ["vpopcntd"]),
        ("avx512", ["vpternlog", "vpshufb", "vpmaddubsw"], ["vpdpbusd"]),
        ("avx2", ["vpshufb", "vpmaddubsw"], ["zmm"]),
        ("aarch64", ["cnt\t"], []),
    ],
)
def test_instructions_of_each_tier(name, instructions, absent, rng):
    target = NAMED[name]
    x = pack_bits(rng.random((1, 4, 4, 256)) < 0.5, 3)
    lowered = lower_operators(
        _module(operators.BINARY_CONV2D, x, [_signs(rng, 32, 256, 3, 3)], _PLAIN),
        FAMILY.lowerings,
        target,
    )
    scheduled = schedule_module(lowered.mod, target)[0]
    (kernel,) = (f for f in scheduled.functions.values() if not isinstance(f, relax.Function))
    mod = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    text = tvm.compile(mod, target.tvm()).mod.inspect_source("asm")
    assert all(each in text for each in instructions)
    assert not any(each in text for each in absent)


@pytest.mark.parametrize("target", NAMED.values(), ids=NAMED)
def test_points_fit_and_survive_json(target):
    for problem in (
        Problem(1, 14, 14, 8, 256, 3, 3, padding=(1, 1, 1, 1), bits=256),
        Problem(1, 1, 1, 4, 10, bits=100),
    ):
        point = default_point(problem, target)
        assert not point.paired or BitCounter.of(target).three_inputs
        assert 1 <= point.mr <= problem.row and point.block >= 1
        assert point.mr * (point.levels + 1) < target.registers
        assert Point.from_dict(point.to_dict()) == point
        assert Problem.from_dict(problem.to_dict()) == problem
        assert packed_shape(problem, point, True)[-1] == 32


def test_an_operator_infers_both_layouts():
    x = relax.Var("x", relax.TensorType((1, 2, 8, 6), "uint32"))
    attrs = {**_PLAIN, "layout": "NCHW", "padding": [1, 1, 1, 1], "strides": [2, 2]}
    call = operators.binary_call(
        operators.BINARY_CONV2D, [x, relax.const(np.ones((40, 64, 3, 3), np.int8))], **attrs
    )
    assert shape_of(relax.BlockBuilder().normalize(call)) == (1, 40, 4, 3)
