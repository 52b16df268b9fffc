# SPDX-License-Identifier: Apache-2.0
"""Gathered rows against float64: awkward shapes, tiers, densities on both sides of the limit, special values, epilogues."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import te

from schedules import contraction, gathered_gate, gathered_rows
from schedules.dispatch import schedule_function
from schedules.errors import ScheduleError
from schedules.fused import Fused
from schedules.target import NAMED, detect_host


def activations(rng, shape, density: float) -> np.ndarray:
    h = rng.standard_normal(shape) * (rng.random(shape) < density)
    return h.astype(np.float32)


def kernel(define, shapes, target, *, epilogue: bool = True, run: bool = True):
    """The kernel, with a bias and a ReLU behind it, compiled for running or as assembly, and what dispatch says of it.

    `shapes` are those of float32 arguments, or arrays like them.
    """
    given = [
        te.placeholder(getattr(s, "shape", s), str(getattr(s, "dtype", "float32")), name=f"a{i}")
        for i, s in enumerate(shapes)
    ]
    result = define(*given)
    if epilogue:
        b = te.placeholder(result.shape[-1:], "float32", name="b")
        given.append(b)
        result = te.compute(
            result.shape, lambda *i: te.max(te.const(0.0, "float32"), result(*i) + b(i[-1])), "out"
        )
    func = te.create_prim_func([*given, result])
    scheduled, found = schedule_function("k", func, target)
    mod = tvm.IRModule({"main": scheduled.with_attr("global_symbol", "main")})
    compiled = tvm.compile(mod, target.tvm())
    return compiled["main"] if run else compiled.mod.inspect_source("asm"), found


def point_at(problem, target, density=0.1, limit=1.0, dtype="float32", **fields):
    dense = contraction.default_point(problem, target)
    itemsize = np.dtype(dtype).itemsize
    point = gathered_rows.default_point(problem, target, density, limit, dense, itemsize)
    return replace(point, **fields) if point.form == "tiles" else point


def run(compiled, arrays, shape) -> np.ndarray:
    out = tvm.runtime.tensor(np.full(shape, 7, np.float32))
    compiled(*[tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays], out)
    return out.numpy()


def check(got, h, w, b) -> None:
    """Within the rounding of a sum in any order."""
    h64, w64 = h.astype(np.float64).reshape(-1, h.shape[-1]), w.astype(np.float64)
    wanted = np.maximum(h64 @ w64.T + b, 0).reshape(got.shape)
    scale = (np.abs(h64) @ np.abs(w64.T) + np.abs(b)).reshape(got.shape)
    assert (np.abs(got - wanted) <= 2e-7 * np.sqrt(w.shape[1] + 8) * scale + 1e-30).all()


SHAPES = [
    # lead, K, O, tiles: chunk
    ((1,), 17, 33, {}),
    ((1, 1), 1, 1, {}),
    ((1,), 96, 64, {}),
    ((5,), 33, 17, {"chunk": 16}),
    ((2, 3), 64, 40, {"chunk": 32, "fetch": 2}),
    ((7,), 31, 7, {"chunk": 32, "sums": 1, "fetch": 0}),
    ((3, 1), 50, 96, {"chunk": 48}),
]


def weights(rng, dtype: str, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * (1 if dtype == "float32" else 40)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("lead,inputs,outputs,fields", SHAPES)
def test_equals_the_dense_product_at_every_density(rng, lead, inputs, outputs, fields, dtype):
    """Above the limit the contraction runs: the answer is the same on both sides of it."""
    target = detect_host()
    problem = gathered_rows.dense_problem(int(np.prod(lead)), inputs, outputs)
    point = point_at(problem, target, limit=0.3, dtype=dtype, **fields)
    w = weights(rng, dtype, outputs, inputs)
    b = rng.standard_normal(outputs).astype(np.float32)
    packed = gathered_rows.pack_weights(w, problem, point, target.lanes)
    shape = (*lead, inputs)
    compiled, found = kernel(gathered_rows.define(shape, problem, point), [shape, packed], target)
    assert packed.dtype == dtype
    assert found.loops == "gathered_rows"
    for density in (0.0, 0.05, 0.25, 0.31, 0.6, 1.0):
        h = activations(rng, shape, density)
        check(run(compiled, [h, packed, b], (*lead, outputs)), h, w, b)


@pytest.mark.parametrize("rows,dtype", [(1, "float32"), (1, "int8"), (4, "float32"), (4, "int8")])
def test_every_tier_of_instructions(rng, host_tiers, rows, dtype):
    inputs, outputs = 40, 77
    problem = gathered_rows.dense_problem(rows, inputs, outputs)
    w = weights(rng, dtype, outputs, inputs)
    b = rng.standard_normal(outputs).astype(np.float32)
    h = activations(rng, (rows, inputs), 0.2)
    for target in host_tiers:
        point = point_at(problem, target, dtype=dtype)
        packed = gathered_rows.pack_weights(w, problem, point, target.lanes)
        compiled, _ = kernel(
            gathered_rows.define(h.shape, problem, point), [h.shape, packed], target
        )
        check(run(compiled, [h, packed, b], (rows, outputs)), h, w, b)


@pytest.mark.parametrize("rows,dtype", [(1, "float32"), (1, "int8"), (3, "float32")])
def test_special_values_propagate_and_zeros_do_not(rng, rows, dtype):
    """NaN, infinities and denormals are non-zeros; -0 is a zero. A weight of 0 makes NaN of an infinity, as densely."""
    target = detect_host()
    problem = gathered_rows.dense_problem(rows, 48, 16)
    point = point_at(problem, target, dtype=dtype)
    w = weights(rng, dtype, 16, 48)
    w[3, 5] = 0
    packed = gathered_rows.pack_weights(w, problem, point, target.lanes)
    compiled, _ = kernel(
        gathered_rows.define((rows, 48), problem, point),
        [(rows, 48), packed],
        target,
        epilogue=False,
    )
    for value in (np.nan, np.inf, -np.inf, 1e-41):
        h = np.zeros((rows, 48), np.float32)
        h[0, 5], h[0, 20], h[-1, 33] = value, 2.0, -0.0
        got = run(compiled, [h, packed], (rows, 16))
        with np.errstate(invalid="ignore"):
            wanted = h @ w.T.astype(np.float32)
        assert np.isnan(got).tolist() == np.isnan(wanted).tolist()
        assert np.isnan(got[0, 3]) or np.isfinite(value)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    zeros = np.full((rows, 48), -0.0, np.float32)
    assert (run(compiled, [zeros, packed], (rows, 16)) == 0).all()


def test_uneven_rows_share_one_list_and_threads_share_the_outputs(rng):
    """One row full, the others empty; two threads."""
    target = detect_host().with_threads(2)
    for rows in (1, 6):
        problem = gathered_rows.dense_problem(rows, 64, 80)
        point = point_at(problem, target, limit=0.5, chunk=32)
        w = rng.standard_normal((80, 64)).astype(np.float32)
        b = np.zeros(80, np.float32)
        packed = gathered_rows.pack_weights(w, problem, point, target.lanes)
        compiled, _ = kernel(
            gathered_rows.define((rows, 64), problem, point), [(rows, 64), packed.shape], target
        )
        h = np.zeros((rows, 64), np.float32)
        h[rows // 2] = rng.standard_normal(64)
        check(run(compiled, [h, packed, b], (rows, 80)), h, w, b)


def test_weights_packed_for_another_kernel_are_refused():
    target = detect_host()
    problem = gathered_rows.dense_problem(4, 32, 32)
    point = point_at(problem, target)
    x, w = te.placeholder((4, 32), name="x"), te.placeholder((9, 1, 1, 32, 16), name="w")
    func = te.create_prim_func([x, w, gathered_rows.define((4, 32), problem, point)(x, w)])
    with pytest.raises(ScheduleError, match="another shape"):
        gathered_rows.schedule(Fused.read(func), target)


def test_a_point_survives_its_annotation():
    for rows in (1, 9):
        point = point_at(gathered_rows.dense_problem(rows, 64, 64), detect_host())
        assert gathered_rows.Point.from_dict(point.to_dict()) == point


@pytest.mark.parametrize("name", ["aarch64", "avx2"])
def test_other_processors_get_a_kernel(name):
    """Code is generated; it runs only where the processor is the host's."""
    target = NAMED[name]
    for rows in (1, 5):
        problem = gathered_rows.dense_problem(rows, 48, 33)
        point = point_at(problem, target)
        shape = gathered_rows.packed_shape(problem, point, target.lanes)
        define = gathered_rows.define((rows, 48), problem, point)
        text, _ = kernel(define, [(rows, 48), shape], target, run=False)
        assert {"aarch64": "fmla\t", "avx2": "vfmadd"}[name] in text


GATED = [
    (33, 17, 10, "float32", "float32"),
    (16, 40, 48, "float32", "int8"),
    (1, 1, 1, "float32", "float32"),
    (70, 64, 33, "int8", "float32"),
    (70, 64, 80, "int8", "int8"),
]


@pytest.mark.parametrize("inputs,hidden,outputs,first,second", GATED)
def test_gated_pair_equals_both_layers_in_full(rng, inputs, hidden, outputs, first, second):
    problem = gathered_gate.Problem(inputs, hidden, outputs)
    up = weights(rng, first, hidden, inputs)
    scale = (rng.random(hidden) + 0.5).astype(np.float32) / (1 if first == "float32" else 40)
    bias = rng.standard_normal(hidden).astype(np.float32)
    down = weights(rng, second, outputs, hidden)
    b = rng.standard_normal(outputs).astype(np.float32)
    target = detect_host()
    compiled, arrays = gated_kernel(problem, up, bias, down, target, scale=scale)
    for density in (0.0, 0.1, 0.7, 1.0):
        x = rng.standard_normal((1, inputs)).astype(np.float32)
        g = activations(rng, (1, 1, hidden), density)
        got = run(compiled, [x, g, *arrays, b], (1, 1, outputs))
        check(got, gated_hidden(x, g, up * scale[:, None].astype(np.float64), bias), down, b)


def gated_kernel(problem, up, bias, down, target, *, scale=None, **options):
    scale = np.ones(problem.hidden, np.float32) if scale is None else scale
    arrays = gathered_gate.pack_weights(up, scale, bias, down, target.lanes)
    shapes = [(1, problem.inputs), (1, 1, problem.hidden)]
    define = gathered_gate.define(shapes, problem)
    compiled, _ = kernel(define, [*shapes, *arrays], target, **options)
    return compiled, arrays


def gated_hidden(x, g, up, bias) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return g * (x.astype(np.float64) @ up.T.astype(np.float64) + bias)


def test_gated_pair_on_every_tier_and_with_threads(rng, host_tiers):
    problem = gathered_gate.Problem(24, 30, 20)
    up = rng.standard_normal((30, 24)).astype(np.float32)
    bias, down = rng.standard_normal(30), rng.standard_normal((20, 30)).astype(np.float32)
    x, g = rng.standard_normal((1, 24)).astype(np.float32), activations(rng, (1, 1, 30), 0.3)
    b = np.zeros(20, np.float32)
    for target in (*host_tiers, detect_host().with_threads(2)):
        compiled, arrays = gated_kernel(problem, up, bias, down, target)
        got = run(compiled, [x, g, *arrays, b], (1, 1, 20))
        check(got, gated_hidden(x, g, up, bias), down, b)


@pytest.mark.parametrize("where", ["x", "g"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gated_pair_hands_on_what_is_not_finite(rng, where, value):
    """0 * inf is NaN behind closed gates too."""
    problem = gathered_gate.Problem(20, 24, 16)
    up = rng.standard_normal((24, 20)).astype(np.float32)
    bias, down = np.zeros(24, np.float32), rng.standard_normal((16, 24)).astype(np.float32)
    x, g = rng.standard_normal((1, 20)).astype(np.float32), activations(rng, (1, 1, 24), 0.3)
    (x if where == "x" else g)[..., 3] = value
    compiled, arrays = gated_kernel(problem, up, bias, down, detect_host(), epilogue=False)
    got = run(compiled, [x, g, *arrays], (1, 1, 16))
    with np.errstate(invalid="ignore"):
        wanted = gated_hidden(x, g, up, bias) @ down.T
    assert np.isnan(got).tolist() == np.isnan(wanted).tolist()
    assert not np.isfinite(got).any()
