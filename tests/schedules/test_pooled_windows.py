# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse convolution and max pooling in one kernel, against a float64 sum over the non-zeros and numpy's maximum."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax

from passes import layers
from passes.max_pooling import largest_reference
from passes.sparse import lowering_pooled
from passes.sparse.lowering import pack_at
from passes.sparse.operators import POOLED_CONV2D, in_planes, register
from passes.sparse.reference import sparse_conv2d
from schedules import pooled_windows
from schedules.dispatch import loop_structure
from schedules.fused import Fused
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


STEM = Sample((1, 20, 37, 3), (20, 3, 7, 7), strides=(2, 2), padding=(3, 3, 3, 3))
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


def fused_kernel(sample: Sample, weight, target, planes, point=None, epilogue: bool = True):
    """(scheduled PrimFunc, arguments but x and y, y's shape)."""
    register()
    bb = relax.BlockBuilder()
    shape = planes_of(np.empty(sample.x)).shape if planes[0] else sample.x
    given = relax.Var("x", relax.TensorType(shape, "float32"))
    like = relax.Var("x", relax.TensorType(sample.x, "float32"))
    with bb.function("main", [given]):
        with bb.dataflow():
            attrs = {"name": "l", "layout": "NHWC", "flops": 0, **sample.attrs()}
            call = layers.operator_call(POOLED_CONV2D, [like, relax.const(weight)], **attrs)
            call = bb.normalize(in_planes(bb.normalize(call), given, *planes))
            problem, pool = lowering_pooled.problems_of(call)
            point = point or pooled_windows.default_point(problem, pool, target)
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
    arrays = [packed.pointer, packed.index, packed.values, packed.order, packed.slot, *arrays]
    fused = Fused.read(func)
    return loop_structure(fused.loops)(fused, target), arrays, layers.shape_of(call)


def expected(sample: Sample, x, weight, epilogue: bool = True):
    """(float64 result, bound of a float32 sum's rounding error), channels last."""
    attrs = {"layout": "NHWC", **sample.attrs()}
    y = sparse_conv2d(attrs, x.astype(np.float64), weight)
    size = sparse_conv2d(attrs, np.abs(x).astype(np.float64), np.abs(weight))
    terms = np.count_nonzero(weight.reshape(len(weight), -1), axis=1).max() + 2
    bound = largest_reference(attrs, size + 1) * terms * 2.0**-24
    y = largest_reference(attrs, y)
    return np.maximum(y + np.linspace(-1, 1, len(weight)), 0) if epilogue else y, bound


def check(cases: dict, target, rng) -> None:
    made = {}
    for name, (sample, planes, *point) in cases.items():
        weight = sparse_weight(rng, sample.w, sample.grain, sample.density)
        made[name] = (weight, *fused_kernel(sample, weight, target, planes, *point))
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


def test_shapes(host_tiers, rng):
    check(SAMPLES, host_tiers[0], rng)
