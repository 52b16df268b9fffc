# SPDX-License-Identifier: Apache-2.0
"""The quadratic kernels against float64, with a bound from rounding: awkward shapes, tiers, tiles, threads, NaN and inf."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from tvm import relax

from passes import layers
from passes.family import LoweredCall
from passes.quadratic import lowering, reference, winograd
from passes.quadratic.operators import quadratic_call
from schedules.dispatch import loop_structure
from schedules.errors import Declined
from schedules.fused import Fused
from schedules.quadratic_winograd import Point, Problem, default_point
from schedules.target import NAMED


@dataclass(frozen=True)
class Sample:
    """One quadratic layer: x channels last, the weights' common shape in the framework's order."""

    form: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def call(self, weights: dict, shifts) -> tuple[relax.Var, relax.Call]:
        x = relax.Var("x", relax.TensorType(self.x, "float32"))
        w = relax.const(weights[self.form[0]])
        if len(self.w) == 2:
            like = layers.dense(x, w, name="q")
        else:
            like = layers.conv2d(
                x, w, name="q", strides=self.strides, padding=self.padding,
                dilation=self.dilation, groups=self.groups, layout="NHWC",
            )  # fmt: skip
        like = relax.BlockBuilder().normalize(like)
        return x, quadratic_call(like, x, weights, shifts, [f"q.{b}" for b in self.form])


SAMPLES = {
    "pixel": Sample("rgb", (1, 1, 1, 1), (1, 1, 1, 1)),
    "odd": Sample("rgb", (1, 7, 17, 5), (33, 5, 3, 3), padding=(1, 1, 1, 1)),
    "strided": Sample("rgl", (2, 9, 8, 6), (20, 6, 3, 2), (2, 1), (1, 0, 2, 1)),
    "dilated": Sample("rg", (1, 8, 8, 7), (17, 7, 3, 3), dilation=(2, 1), padding=(2, 2, 2, 2)),
    "grouped": Sample("rgb", (1, 6, 6, 12), (40, 6, 3, 3), padding=(1, 1, 1, 1), groups=2),
    "square": Sample("b", (1, 9, 9, 16), (31, 16, 3, 3), padding=(1, 1, 1, 1)),
    "sum": Sample("bl", (2, 5, 5, 9), (18, 9, 1, 1)),
    "rows": Sample("rgb", (33, 40), (50, 40)),
    "row": Sample("rgb", (1, 257), (100, 257)),
    "leading": Sample("rgl", (2, 3, 5, 24), (36, 24)),
    "long": Sample("rgb", (19, 700), (70, 700)),
}


def operands(sample: Sample, rng) -> tuple[dict, np.ndarray | None, np.ndarray]:
    """Weights by branch, shifts, constant."""
    weights = {b: rng.standard_normal(sample.w).astype(np.float32) for b in sample.form}
    outputs = sample.w[0]
    shifts = rng.standard_normal((2, outputs)).astype(np.float32) if "r" in sample.form else None
    return weights, shifts, rng.standard_normal(outputs).astype(np.float32)


def lowered(sample: Sample, operand, target, point=None, lower=lowering.lower_fused):
    """(definition, kernel, arrays between x and y, call) of the layer, a constant and ReLU."""
    weights, shifts, constant = operand
    x, call = sample.call(weights, shifts)
    bb = relax.BlockBuilder()
    with bb.function("main", [x]):
        with bb.dataflow():
            call = bb.normalize(call)
            if point is None:
                lowered = lower(bb, call, target)
            else:
                lowered = lowering.lower_at(bb, call, lowering.problem_of(call), point)
            y = bb.emit(lowered.call if isinstance(lowered, LoweredCall) else lowered)
            y = bb.emit(relax.op.nn.relu(bb.emit(relax.op.add(y, relax.const(constant)))))
            out = bb.emit_output(y)
        bb.emit_func_output(out)
    passes = ["LegalizeOps", "AnnotateTIROpPattern", "FuseOps", "FuseTIR"]
    mod = tvm.transform.Sequential([getattr(relax.transform, p)() for p in passes])(bb.get())
    found = [f for _, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    (func,) = found  # constant and ReLU joined it
    fused = Fused.read(func)
    (block,) = [b for b in mod["main"].body.blocks if len(b.bindings)]
    (fused_call,) = [b.value for b in block.bindings if isinstance(b.value, relax.Call)]
    arrays = [layers.const_array(a) for a in fused_call.args[1].fields[1:]]
    return func, loop_structure(fused.loops)(fused, target), arrays, call


def build(functions: dict, target):
    mod = {
        n: f.with_attr("global_symbol", n).with_attr("tirx.noalias", True)
        for n, f in functions.items()
    }
    return tvm.compile(tvm.IRModule(mod), target=target.tvm())


def run(lib, name: str, x, arrays, shape) -> np.ndarray:
    """y, which starts as a number that no element keeps."""
    y = tvm.runtime.tensor(np.full(shape, -1e30, np.float32))
    lib[name](*[tvm.runtime.tensor(a) for a in (x, *arrays)], y)
    return y.numpy()


def expected(call, sample: Sample, operand, x) -> tuple[np.ndarray, np.ndarray]:
    """(float64 result, bound of the rounding error of float32 sums and products)."""
    weights, shifts, constant = operand
    define = reference.quadratic_conv2d if len(sample.w) == 4 else reference.quadratic_dense
    attrs = layers.attrs_of(call)

    def evaluate(change):
        parts = [change(weights[b].astype("float64")) for b in sample.form]
        if shifts is not None:
            parts.append(change(shifts.astype("float64")))
        return define(attrs, change(x.astype("float64")), *parts)

    size = evaluate(np.abs) + np.abs(constant)
    terms = int(np.prod(sample.w[1:])) + 4
    return np.maximum(evaluate(np.asarray) + constant, 0), 2 * size * terms * 2.0**-24


def check(cases: dict, target, rng, lower=lowering.lower_fused, slack=1) -> None:
    """{name: (sample, point)}: compile all as one module, compare each with its reference."""
    made = {}
    for name, (sample, point) in cases.items():
        operand = operands(sample, rng)
        made[name] = (sample, operand, *lowered(sample, operand, target, point, lower))
    lib = build({name: m[3] for name, m in made.items()}, target)
    for name, (sample, operand, _, _, arrays, call) in made.items():
        x = rng.standard_normal(sample.x).astype(np.float32)
        wanted, bound = expected(call, sample, operand, x)
        error = np.abs(run(lib, name, x, arrays, layers.shape_of(call)) - wanted)
        assert (error <= slack * bound).all(), f"{name}: error {error.max()} beyond rounding"


def test_every_sample_on_every_tier(host_tiers, rng):
    check({name: (sample, None) for name, sample in SAMPLES.items()}, host_tiers[0], rng)
    for target in host_tiers[1:]:
        check({n: (SAMPLES[n], None) for n in ("odd", "strided", "row")}, target, rng)


def test_every_point_computes_the_same(host_tiers, rng):
    """Orders, chunks of the sum, several sums, squares in registers and in memory, two threads."""
    target = host_tiers[0]
    cases, defaults = {}, {}
    for name, chosen in (
        ("odd", ("registers", "panels", "chunks")),
        ("rows", ("wide", "chunks", "sums")),
    ):
        sample = SAMPLES[name]
        _, call = sample.call(*operands(sample, rng)[:2])
        problem = lowering.problem_of(relax.BlockBuilder().normalize(call))
        defaults[name] = point = lowering.point_for(lowering.quadratic_contraction, problem, target)
        variants = {
            "registers": {"squares": "registers"},
            "wide": {"mr": 2, "nv": 2, "unroll": 2},
            "panels": {"order": "panels", "block": 1, "chunk": 0, "prefetch": 7},
            "chunks": {"order": "chunks", "block": 1, "chunk": 2, "unroll": 1, "sums": 1, "prefetch": 7},
            "sums": {"mr": 1, "nv": 1, "sums": 4, "unroll": 4},
        }  # fmt: skip
        cases |= {
            f"{name}_{k}": (sample, replace(point, **v)) for k, v in variants.items() if k in chosen
        }
    check(cases, target, rng)
    threaded = {n: (SAMPLES[n], p) for n, p in defaults.items()}
    check(threaded, target.with_threads(2), rng)


def test_special_values_pass_as_in_the_definition(host_tiers, rng):
    sample, target = SAMPLES["odd"], host_tiers[0]
    operand = operands(sample, rng)
    definition, kernel, arrays, call = lowered(sample, operand, target)
    lib = build({"definition": definition, "kernel": kernel}, target)
    x = rng.standard_normal(sample.x).astype(np.float32)
    x[0, 1, 2, 3], x[0, 3, 9, 0], x[0, 5, 15, 1] = np.nan, np.inf, 1e30
    x[0, 6, :4] = 0.0
    x[0, 6, 4:8] = -0.0
    shape = layers.shape_of(call)
    wanted, got = run(lib, "definition", x, arrays, shape), run(lib, "kernel", x, arrays, shape)
    special = ~np.isfinite(wanted)
    assert special.any() and not special.all()
    assert np.array_equal(special, ~np.isfinite(got))
    np.testing.assert_allclose(got[~special], wanted[~special], rtol=2e-4, atol=1e-3)


def test_unknown_forms_are_refused(rng):
    sample = Sample("rg", (2, 4), (3, 4))
    weights, shifts, _ = operands(sample, rng)
    with pytest.raises(ValueError, match="no quadratic operator of the form r"):
        sample.call({"r": weights["r"]}, shifts)


WINOGRAD = {
    "one tile": Sample("rgb", (1, 2, 2, 3), (5, 3, 3, 3), padding=(1, 1, 1, 1)),
    "edges": Sample("rgb", (2, 7, 9, 17), (33, 17, 3, 3), padding=(1, 1, 1, 1)),
    "no padding": Sample("rgl", (1, 8, 7, 16), (48, 16, 3, 3)),
    "square": Sample("b", (1, 10, 6, 8), (20, 8, 3, 3), padding=(1, 0, 2, 1)),
    "t4": Sample("rg", (1, 9, 9, 5), (16, 5, 3, 3), padding=(1, 1, 1, 1)),
}


@pytest.mark.parametrize("m", [2, 4])
def test_winograd(m, host_tiers, rng):
    """As the direct kernel; its rounding is that of the transforms, a few times the direct sum's."""

    def lower(bb, call, target):
        problem = winograd.problem_of(call)
        point = winograd.default_point(problem, m, target)
        return winograd.lower_at(bb, call, problem, point)

    names = ("edges", "square") if m == 4 else WINOGRAD
    check({n: (WINOGRAD[n], None) for n in names}, host_tiers[0], rng, lower, slack=4)
    if m == 2:
        target = host_tiers[0].with_threads(2)
        check({"edges": (WINOGRAD["edges"], None)}, target, rng, lower, slack=4)


@pytest.mark.parametrize("m, block, rows, threads", [(4, 5, 2, 1), (2, 7, 3, 2), (4, 1000, 14, 2)])
def test_winograd_with_rows_of_matrices_outside(m, block, rows, threads, host_tiers, rng):
    """Blocks and register tiles with a rest, a panel with a rest, threads that share out tiles or panels."""

    def lower(bb, call, target):
        problem = winograd.problem_of(call)
        size = min(block, int(np.prod(problem.tiles(m))))
        point = Point(m, size, min(rows, size), 2, target.lanes, order="rows")
        return winograd.lower_at(bb, call, problem, point)

    target = host_tiers[0].with_threads(threads)
    names = ("edges", "no padding") if m == 2 else ("edges", "square", "one tile")
    check({n: (WINOGRAD[n], None) for n in names}, target, rng, lower, slack=4)


def test_rows_are_outside_where_weights_exceed_the_cache():
    target, padding = NAMED["avx512"], (1, 1, 1, 1)
    point = default_point(Problem(1, 28, 28, 128, 128, padding, form="rgb"), 4, target)
    assert (point.order, point.block, point.rows) == ("rows", 49, 14)
    for fits in (
        Problem(1, 28, 28, 32, 32, padding, form="rgb"),
        Problem(1, 7, 7, 512, 512, padding, form="rgb"),
    ):
        assert default_point(fits, 4, target).order != "rows"


def test_winograd_is_chosen_where_it_pays(host_tiers):
    target = NAMED["avx512"]
    padding = (1, 1, 1, 1)
    assert winograd.choose(Problem(1, 28, 28, 128, 128, padding, form="rgb"), target) == 4
    assert isinstance(
        winograd.choose(Problem(1, 3, 3, 8, 8, padding, form="rgb"), target), Declined
    )
    _, call = Sample("rgb", (1, 28, 28, 8), (8, 8, 3, 3), (2, 2)).call(
        {b: np.zeros((8, 8, 3, 3), np.float32) for b in "rgb"}, np.zeros((2, 8), np.float32)
    )
    assert "strides" in winograd.problem_of(relax.BlockBuilder().normalize(call)).reason
