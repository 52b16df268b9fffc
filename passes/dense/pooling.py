# SPDX-License-Identifier: Apache-2.0
"""Max and average pooling of NHWC images: te definitions and lowerings."""

from __future__ import annotations

from tvm import relax, te, tirx

from passes.family import Lowering
from passes.layers import shape_of
from passes.lower import call_te
from passes.max_pooling import largest_of, windowed
from schedules import pooling
from schedules.fused import annotations
from schedules.target import CpuTarget
from schedules.windows import Problem


def problem_of(call: relax.Call) -> Problem | None:
    """The windows of a pooling call; None if its layout is not NHWC.

    Bottom and right padding are what the result's size needs, which `ceil_mode` may make more than the call says.
    """
    attrs = call.attrs
    if str(attrs.layout) != "NHWC" or str(attrs.out_layout) not in ("", "NHWC"):
        return None
    (n, h, w, c), (_, oh, ow, _) = shape_of(call.args[0]), shape_of(call)
    (r, s), (sh, sw), (dh, dw) = (
        [int(v) for v in a] for a in (attrs.pool_size, attrs.strides, attrs.dilation)
    )
    top, left = int(attrs.padding[0]), int(attrs.padding[1])
    bottom = max(0, (oh - 1) * sh + (r - 1) * dh + 1 - h - top)
    right = max(0, (ow - 1) * sw + (s - 1) * dw + 1 - w - left)
    problem = Problem(n, h, w, c, c, r, s, (sh, sw), (top, left, bottom, right), (dh, dw), c)
    return problem if (problem.oh, problem.ow) == (oh, ow) else None


def define_max_pool(problem: Problem, point: pooling.Point):
    """te function x [N, H, W, C] -> [N, OH, OW, C]."""
    notes = annotations("pooling", problem=problem.to_dict(), point=point.to_dict(), kind="max")
    return lambda x: largest_of(problem, x, notes)


def define_average_pool(problem: Problem, point: pooling.Point, counting: str):
    """te function x [N, H, W, C] -> [N, OH, OW, C]; `counting` as in `schedules.pooling`."""
    notes = annotations(
        "pooling",
        problem=problem.to_dict(),
        point=point.to_dict(),
        kind="average",
        counting=counting,
    )
    shape = (problem.n, problem.oh, problem.ow, problem.c)
    (sh, sw), (dh, dw) = problem.stride, problem.dilation

    def average_pool(x):
        value = windowed(problem, x, tirx.const(0.0, "float32"))
        r, s = te.reduce_axis((0, problem.r), "r"), te.reduce_axis((0, problem.s), "s")
        total = te.compute(
            shape, lambda n, i, j, c: te.sum(value(n, i, j, c, r, s), axis=[r, s]), name="total"
        )
        if counting == "window":
            scale = tirx.const(1.0 / (problem.r * problem.s), "float32")
            return te.compute(
                shape, lambda *at: total(*at) * scale, name="average_pool", attrs=notes
            )

        def counted(n, i, j, c):
            rows = [
                _one(
                    0 <= i * sh + k * dh - problem.padding[0],
                    i * sh + k * dh < problem.h + problem.padding[0],
                )
                for k in range(problem.r)
            ]
            columns = [
                _one(
                    0 <= j * sw + k * dw - problem.padding[1],
                    j * sw + k * dw < problem.w + problem.padding[1],
                )
                for k in range(problem.s)
            ]
            return total[n, i, j, c] / (sum(rows[1:], rows[0]) * sum(columns[1:], columns[0]))

        return te.compute(shape, counted, name="average_pool", attrs=notes)

    return average_pool


def _one(low, high):
    return tirx.Select(tirx.all(low, high), tirx.const(1.0, "float32"), tirx.const(0.0, "float32"))


def hint(kind: str, problem: Problem) -> str:
    """What a pooling kernel is called."""
    return f"{kind}_pool{problem.r}x{problem.s}_{problem.oh}x{problem.ow}_{problem.c}"


def lower_max_pool(
    bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget
) -> relax.Expr | None:
    """Pooling of NHWC float32 and uint8 images; TVM's legalisation takes others."""
    problem, dtype = problem_of(call), str(call.ty.dtype)
    if problem is None or dtype not in ("float32", "uint8"):
        return None
    lanes = target.lanes if dtype == "float32" else 4 * target.lanes
    define = define_max_pool(problem, pooling.default_point(problem, target, lanes))
    return call_te(bb, define, call.args[0], hint=hint("max", problem))


def lower_average_pool(
    bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget
) -> relax.Expr | None:
    """As `lower_max_pool`; left to TVM where `ceil_mode` makes windows reach past the padding that is to be counted."""
    problem = problem_of(call)
    if problem is None or str(call.ty.dtype) != "float32":
        return None
    given = tuple(int(v) for v in call.attrs.padding)
    counting = (
        "window" if bool(call.attrs.count_include_pad) or not any(problem.padding) else "image"
    )
    if counting == "window" and any(p > g for p, g in zip(problem.padding, given)):
        return None
    define = define_average_pool(problem, pooling.default_point(problem, target), counting)
    return call_te(bb, define, call.args[0], hint=hint("average", problem))


LOWERINGS: dict[str, Lowering] = {
    "relax.nn.max_pool2d": lower_max_pool,
    "relax.nn.avg_pool2d": lower_average_pool,
}
