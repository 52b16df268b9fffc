# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse convolution and max pooling in one kernel, against a float64 sum over the non-zeros and numpy's maximum."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from tvm import relax

from passes import layers
from passes.max_pooling import largest_reference
from passes.sparse import lowering_pooled
from passes.sparse.lowering import pack_at
from passes.sparse.operators import SPARSE_POOLED_CONV2D, in_planes, register
from passes.sparse.reference import sparse_conv2d
from schedules import pooled_windows, sparse_windows
from schedules.dispatch import loop_structure
from schedules.fused import Fused
from schedules.pooled_windows import Point, band_lines, pooled_lines
from schedules.sparse_problem import Problem
from schedules.target import NAMED
from schedules.windows import Problem as Windows
from tests.schedules.test_sparse_planes import build, run, sparse_weight

ROWS, IN, OUT, PLANES = (False, False), (True, False), (False, True), (True, True)


@dataclass(frozen=True)
class Sample:
    """x [N, H, W, C], w [O, C/groups, R, S], a convolution's attributes and a pool's, by default 3x3 with stride 2."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    grain: str = "out:4"
    density: float = 0.3
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pool_size: tuple[int, int] = (3, 3)
    pool_strides: tuple[int, int] = (2, 2)
    pool_dilation: tuple[int, int] = (1, 1)
    pool_padding: tuple[int, ...] = (1, 1, 1, 1)

    def attrs(self) -> dict:
        fields = {k: v for k, v in vars(self).items() if k not in ("x", "w", "density")}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def planes_of(x: np.ndarray) -> np.ndarray:
    """[N, H, W, C] as planes that repeat their last pixel to the end of a line."""
    planes = x.reshape(x.shape[0], -1, x.shape[-1]).transpose(0, 2, 1)
    return np.pad(planes, ((0, 0), (0, 0), (0, -planes.shape[-1] % 16)), mode="edge")


STEM = Sample((1, 20, 37, 3), (20, 3, 5, 5), strides=(2, 2), padding=(2, 2, 2, 2))
SAMPLES = {
    "stem": (STEM, PLANES),
    "stem_rows": (replace(STEM, x=(2, 23, 30, 3)), IN),
    "from_rows": (Sample((1, 9, 13, 6), (33, 6, 3, 3), "element"), OUT),
    "rows": (Sample((2, 7, 17, 8), (17, 8, 3, 3), "out:8"), ROWS),
    "few_outputs": (Sample((1, 7, 7, 3), (5, 3, 3, 3), "element"), IN),
    "halves": (Sample((1, 14, 33, 5), (16, 5, 3, 3), pool_size=(2, 2), pool_padding=(0,) * 4), PLANES),
    "overlapping": (Sample((1, 9, 34, 4), (10, 4, 3, 3), pool_strides=(1, 1)), PLANES),
    "uneven": (Sample((1, 11, 21, 4), (8, 4, 5, 3), padding=(2, 1, 0, 1), pool_size=(2, 3), pool_strides=(3, 2), pool_padding=(0, 1, 1, 2)), ROWS),
    "dilated": (Sample((1, 12, 19, 3), (8, 3, 3, 3), dilation=(2, 1), pool_dilation=(2, 3), pool_padding=(2, 3, 2, 3), pool_strides=(1, 2)), PLANES),
    "groups": (Sample((1, 9, 18, 12), (24, 4, 3, 3), groups=3), PLANES),
    "pointwise": (Sample((1, 8, 8, 24), (16, 24, 1, 1), padding=(0,) * 4), ROWS),
    "one_pixel": (Sample((1, 5, 3, 4), (4, 4, 3, 3), "element", pool_size=(5, 3), pool_strides=(5, 3), pool_padding=(0,) * 4), PLANES),
    "column": (Sample((1, 9, 1, 4), (4, 4, 3, 3), "element"), OUT),
    "far_apart": (Sample((1, 10, 50, 4), (4, 4, 3, 3), pool_size=(1, 2), pool_strides=(4, 5), pool_padding=(0,) * 4), PLANES),
}  # fmt: skip


def fused_kernel(
    sample: Sample, weight, target, planes, point=None, epilogue: bool = True, definition: bool = False
):  # fmt: skip
    """(scheduled PrimFunc, arguments but x and y, y's shape[, the PrimFunc before])."""
    register()
    bb = relax.BlockBuilder()
    shape = planes_of(np.empty(sample.x)).shape if planes[0] else sample.x
    given = relax.Var("x", relax.TensorType(shape, "float32"))
    like = relax.Var("x", relax.TensorType(sample.x, "float32"))
    with bb.function("main", [given]):
        with bb.dataflow():
            attrs = {"name": "l", "layout": "NHWC", "flops": 0, **sample.attrs()}
            call = layers.operator_call(SPARSE_POOLED_CONV2D, [like, relax.const(weight)], **attrs)
            call = bb.normalize(in_planes(bb.normalize(call), given, *planes))
            problem, pool = lowering_pooled.problems_of(call)
            default = pooled_windows.default_point(problem, pool, target)
            point = default if point is None else point(default)
            y = bb.emit(lowering_pooled.lower_at(bb, call, point))
            arrays = []
            if epilogue:
                bias = np.linspace(-1, 1, len(weight), dtype=np.float32)
                arrays = [bias.reshape(1, -1, 1) if planes[1] else bias]
                y = bb.emit(relax.op.nn.relu(bb.emit(relax.op.add(y, relax.const(arrays[0])))))
            out = bb.emit_output(y)
        bb.emit_func_output(out)
    passes = [
        relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern(), relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]  # fmt: skip
    mod = tvm.transform.Sequential(passes)(bb.get())
    (func,) = [f for _, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    packed = pack_at(weight, sample.grain, problem, pooled_windows, point)
    arrays = [*packed.arrays(), *arrays]
    fused = Fused.read(func)
    kernel = loop_structure(fused.loops)(fused, target)
    made = kernel, arrays, layers.shape_of(call)
    return (*made, func) if definition else made


def expected(sample: Sample, x, weight, epilogue: bool = True):
    """(float64 result, bound of a float32 sum's rounding error), channels last."""
    attrs = {"layout": "NHWC", **sample.attrs()}
    y = sparse_conv2d(attrs, x.astype(np.float64), weight)
    size = sparse_conv2d(attrs, np.abs(x).astype(np.float64), np.abs(weight))
    terms = np.count_nonzero(weight.reshape(len(weight), -1), axis=1).max() + 2
    bound = largest_reference(attrs, size + 1) * terms * 2.0**-24
    y = largest_reference(attrs, y)
    return np.maximum(y + np.linspace(-1, 1, len(weight)), 0) if epilogue else y, bound


def small(default: Point) -> Point:
    """The default with small tiles, which compile fast."""
    return replace(default, vectors=2, rows=min(default.rows, 4))


def check(cases: dict, target, rng) -> None:
    """Each (sample, planes[, what to make of the default point, by default `small`]) against its reference."""
    made = {}
    for name, (sample, planes, *point) in cases.items():
        weight = sparse_weight(rng, sample.w, sample.grain, sample.density)
        made[name] = (weight, *fused_kernel(sample, weight, target, planes, *(point or [small])))
    lib = build({name: m[1] for name, m in made.items()}, target)
    for name, (weight, _, arrays, shape) in made.items():
        sample, planes, *_ = cases[name]
        x = rng.standard_normal(sample.x).astype(np.float32)
        want, bound = expected(sample, x, weight)
        got = run(lib, name, planes_of(x) if planes[0] else x, arrays, shape)
        if planes[1]:
            want, bound = planes_of(want), planes_of(bound)
        error = np.abs(got - want)
        assert got.shape == want.shape and (error <= bound).all(), (
            name,
            np.nanmax(error),
            got,
            want,
        )


def at(vectors: int, rows: int, part: int, splits: int, lines: int):
    return lambda _default: Point(vectors, rows, part, splits, lines)


def test_shapes(host_tiers, rng):
    cases = dict(SAMPLES)
    cases["default"] = (STEM, PLANES, lambda default: default)
    cases["one line"] = (STEM, PLANES, at(2, 4, 64, 1, 3))
    cases["remainder"] = (STEM, IN, at(3, 2, 64, 1, 5))
    cases["parts"] = (replace(SAMPLES["rows"][0], w=(40, 8, 3, 3)), ROWS, at(1, 8, 16, 1, 5))
    check(cases, host_tiers[0], rng)


def test_other_tiers_and_threads(host_tiers, rng):
    check({name: SAMPLES[name] for name in ("stem", "uneven")}, host_tiers[-1], rng)
    parts = replace(SAMPLES["rows"][0], w=(40, 8, 3, 3))
    shared = {"stem": SAMPLES["stem"], "shared": (parts, ROWS, at(1, 8, 16, 2, 5))}
    check(shared, host_tiers[0].with_threads(2), rng)


@pytest.mark.parametrize("planes", [PLANES, ROWS], ids=["planes", "rows"])
def test_special_values(host_tiers, rng, planes):
    """A window with NaN, or with infinities that cancel, is NaN; others, beside the border too, hear nothing of it."""
    sample = Sample((1, 11, 37, 4), (4, 4, 1, 1), "element", padding=(0,) * 4)
    weight = np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1)
    weight[1, 0] = 1.0
    x = -1 - rng.random(sample.x).astype(np.float32)
    x[0, 0, 0, 0], x[0, 5, 17, 0], x[0, 7, 36, 1] = np.nan, np.inf, -np.inf
    x[0, 5, 17, 1] = -np.inf
    x[0, :, :, 2], x[0, 10, 36, 3] = -np.inf, -0.0
    kernel, arrays, shape = fused_kernel(
        sample, weight, host_tiers[0], planes, small, epilogue=False
    )
    lib = build({"main": kernel}, host_tiers[0])
    got = run(lib, "main", planes_of(x) if planes[0] else x, arrays, shape)
    attrs = {"layout": "NHWC", **sample.attrs()}
    with np.errstate(invalid="ignore"):
        y = np.stack([x[..., 0], x[..., 0] + x[..., 1], x[..., 2], x[..., 3]], axis=-1)
    want = largest_reference(attrs, y)
    assert np.isnan(want[0, :, :, :2]).any() and np.isneginf(want[..., 2]).all()
    np.testing.assert_array_equal(got, planes_of(want) if planes[1] else want)


def test_the_kernel_equals_its_definition(host_tiers, rng):
    target = host_tiers[0]
    sample = Sample((1, 9, 12, 3), (8, 3, 3, 3), pool_dilation=(2, 1), pool_padding=(2, 1, 2, 1))
    weight = sparse_weight(rng, sample.w, sample.grain, sample.density)
    x = rng.standard_normal(sample.x).astype(np.float32)
    made, functions = {}, {}
    for i, planes in enumerate((PLANES, ROWS)):
        kernel, arrays, shape, definition = fused_kernel(
            sample, weight, target, planes, small, definition=True
        )
        made[i] = (planes_of(x) if planes[0] else x, arrays, shape)
        functions |= {f"kernel{i}": kernel, f"definition{i}": definition}
    lib = build(functions, target)
    for i, given in made.items():
        got, want = (run(lib, f"{name}{i}", *given) for name in ("kernel", "definition"))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bands_and_pooled_lines_are_inverse():
    for size, stride, dilation in ((3, 2, 1), (2, 2, 1), (5, 3, 2), (1, 4, 1)):
        pool = Windows(1, 40, 40, 8, 8, size, size, (stride, stride), (0,) * 4, (dilation,) * 2, 8)
        assert [pooled_lines(pool, band_lines(pool, n)) for n in range(1, 9)] == list(range(1, 9))


@pytest.mark.parametrize("target", ["avx512", "avx2", "generic", "aarch64"])
def test_default_bands_stay_near(target):
    cpu = NAMED[target]
    problem = Problem(
        1, 224, 224, 3, 64, 112, 112, (7, 7), (2, 2), padding=(3,) * 4, block=4, stored=200,
        planes_in=True, planes_out=True,
    )  # fmt: skip
    pool = Windows(1, 112, 112, 64, 64, 3, 3, (2, 2), (1,) * 4, groups=64)
    point = pooled_windows.default_point(problem, pool, cpu)
    panel = 4 * 3 * sparse_windows.window_of(problem, point.lines).channel
    assert panel <= cpu.l2_bytes // 2 and problem.block % point.rows == 0
    assert pool.oh > pooled_lines(pool, point.lines) >= 1
    many = replace(problem, channels=4096)
    assert pooled_lines(pool, pooled_windows.default_point(many, pool, cpu).lines) == 1
