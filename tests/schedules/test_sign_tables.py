# SPDX-License-Identifier: Apache-2.0
"""Sums of floats with the signs of weights, looked up in tables, against float64 on every tier that has them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from passes.binary import FAMILY, operators
from passes.lower import lower_operators
from schedules.dispatch import schedule_module
from schedules.sign_tables import Point, Problem, default_point, supports
from schedules.spaces import space_of
from schedules.target import NAMED

_PLAIN = {
    "strides": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1, "layout": "NHWC",
    "name": "layer", "flops": 0,
}  # fmt: skip

# name -> (x [N, H, W, C], w, attributes that differ)
CONVOLUTIONS = {
    "one pixel, one channel": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "border, odd channels": ((2, 7, 9, 33), (17, 33, 3, 3), {"padding": [1, 1, 1, 1]}),
    "lopsided border": ((1, 5, 7, 8), (70, 8, 3, 3), {"padding": [2, 0, 1, 2]}),
    "every window on the border": ((1, 3, 2, 5), (20, 5, 5, 5), {"padding": [2, 3, 2, 3]}),
    "strided, dilated, two groups": (
        (1, 9, 8, 66), (34, 33, 3, 2),
        {"padding": [2, 1, 0, 1], "groups": 2, "strides": [2, 1], "dilation": [1, 2]},
    ),
    "pointwise, two images": ((2, 5, 5, 255), (130, 255, 1, 1), {}),
    "strips": ((1, 20, 40, 96), (16, 96, 3, 3), {"padding": [1, 1, 1, 1]}),
}  # fmt: skip


@pytest.fixture(params=["avx512", "avx2"])
def target(request):
    found = NAMED[request.param]
    if found.missing_on_host():
        pytest.skip(f"this machine has no {request.param}")
    return found


def _signs(rng, *shape):
    return np.where(rng.random(shape) < 0.5, -1, 1).astype(np.int8)


def _compile(operator: str, x: np.ndarray, w: np.ndarray, attrs: dict, target):
    builder = relax.BlockBuilder()
    var = relax.Var("x", relax.TensorType(x.shape, "float32"))
    with builder.function("main", [var]):
        with builder.dataflow():
            call = operators.binary_call(operator, [var, relax.const(w)], **attrs)
            out = builder.emit_output(builder.emit(call))
        builder.emit_func_output(out)
    lowered = lower_operators(builder.finalize(), FAMILY.lowerings, target)
    return tvm.compile(schedule_module(lowered.mod, target)[0], target.tvm())


def _run(operator: str, x: np.ndarray, w: np.ndarray, attrs: dict, target) -> np.ndarray:
    vm = relax.VirtualMachine(_compile(operator, x, w, attrs, target), tvm.cpu())
    return vm["main"](tvm.runtime.tensor(x)).numpy()


def _check(operator: str, x: np.ndarray, w: np.ndarray, attrs: dict, target) -> None:
    found = _run(operator, x, w, attrs, target)
    wanted = FAMILY.references[operator](attrs, x.astype(np.float64), w)
    # What a sum of this length may round, by the size of its terms.
    terms = FAMILY.references[operator](attrs, np.abs(x).astype(np.float64), np.ones_like(w))
    assert (np.abs(found - wanted) <= 2.0**-24 * np.prod(w.shape[1:]) * terms + 1e-30).all()


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case, rng, target):
    x_shape, w_shape, different = CONVOLUTIONS[case]
    x = rng.standard_normal(x_shape).astype("float32")
    _check(operators.SIGN_CONV2D, x, _signs(rng, *w_shape), {**_PLAIN, **different}, target)


@pytest.mark.parametrize("rows, inputs, outputs", [(1, 100, 70), (3, 7, 33), (17, 64, 1)])
def test_dense_layers(rows, inputs, outputs, rng, target):
    x = rng.standard_normal((rows, inputs)).astype("float32")
    attrs = {"name": "layer", "flops": 0}
    _check(operators.SIGN_DENSE, x, _signs(rng, outputs, inputs), attrs, target)


def test_whole_numbers_are_exact_and_what_is_no_number_stays_so(rng, target):
    x = rng.integers(-99, 99, (4, 50)).astype("float32")
    w, attrs = _signs(rng, 20, 50), {"name": "layer", "flops": 0}
    np.testing.assert_array_equal(_run(operators.SIGN_DENSE, x, w, attrs, target), x @ w.T)
    x[0, 3], x[1, 3], x[2, 3], x[2, 40] = np.nan, np.inf, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        wanted = x @ w.T.astype("float32")
    np.testing.assert_array_equal(_run(operators.SIGN_DENSE, x, w, attrs, target), wanted)


def test_two_threads(rng, target):
    x = rng.standard_normal((1, 8, 8, 40)).astype("float32")
    attrs = {**_PLAIN, "padding": [1, 1, 1, 1]}
    _check(operators.SIGN_CONV2D, x, _signs(rng, 150, 40, 3, 3), attrs, target.with_threads(2))


def test_a_term_is_a_fraction_of_an_instruction(rng):
    """A permutation and an addition for 64 products, and no multiplication but those of the tables."""
    target = NAMED["avx512"]
    x = rng.standard_normal((1, 12, 12, 64)).astype("float32")
    builder = relax.BlockBuilder()
    var = relax.Var("x", relax.TensorType(x.shape, "float32"))
    with builder.function("main", [var]):
        with builder.dataflow():
            weight = relax.const(_signs(rng, 64, 64, 1, 1))
            call = operators.binary_call(operators.SIGN_CONV2D, [var, weight], **_PLAIN)
            out = builder.emit_output(builder.emit(call))
        builder.emit_func_output(out)
    lowered = lower_operators(builder.finalize(), FAMILY.lowerings, target)
    scheduled = schedule_module(lowered.mod, target)[0]
    (kernel,) = (f for f in scheduled.functions.values() if not isinstance(f, relax.Function))
    module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    text = tvm.compile(module, target.tvm()).mod.inspect_source("asm")
    permutations = text.count("vpermps\t") + text.count("vpermd\t")  # LLVM takes either
    additions = text.count("vaddps\t")
    assert permutations and permutations % 16 == 0  # of a tile of 4 x 4 vectors
    assert permutations <= additions <= permutations + 16
    assert text.count("vmulps") + text.count("vfmadd") == 4 * 16  # of the tables of 16 fields


def test_targets_without_such_a_permutation_decline():
    assert supports(NAMED["avx512"]) is None and supports(NAMED["avx2"]) is None
    assert "no permutation" in supports(NAMED["aarch64"]).reason
    assert "no permutation" in supports(NAMED["generic"]).reason


def test_points_are_in_their_space_and_survive_json():
    for problem in (Problem(1, 14, 14, 64, 96, 3, 3, padding=(1, 1, 1, 1)), Problem(1, 1, 1, 9, 5)):
        for name in ("avx512", "avx2"):
            point = default_point(problem, NAMED[name])
            space = space_of("sign_tables", problem, point, NAMED[name])
            assert space.indices_of(point) is not None
            assert Point.from_dict(point.to_dict()) == point
