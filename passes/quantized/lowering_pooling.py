# SPDX-License-Identifier: Apache-2.0
"""Lower `kerf.int8_average_pool`: an integer sum over the window, one multiplication.

rewrite: kerf.int8_average_pool(x)  ->  call_tir(byte_average_pool, (x,))
"""

from __future__ import annotations

from tvm import relax, te, tirx

from passes.layers import attrs_of, shape_of
from passes.lower import call_te
from passes.max_pooling import windowed
from schedules import pooling
from schedules.errors import ScheduleError
from schedules.fused import annotations
from schedules.target import CpuTarget
from schedules.windows import Problem


def _inside(first, taps: int, size: int):
    """How many of `taps` positions from `first` lie in [0, size), as an int32 expression."""
    return tirx.min(first + taps, size) - tirx.max(first, 0)


def define(problem: Problem, point: pooling.Point, counting: str, zero_point: int):
    """te function uint8 [N, H, W, C] -> float32 [N, OH, OW, C]; `counting` as in `schedules.pooling`."""
    notes = annotations(
        "pooling", problem=problem.to_dict(), point=point.to_dict(), kind="byte_average",
        counting=counting, zero_point=zero_point,
    )  # fmt: skip
    shape = (problem.n, problem.oh, problem.ow, problem.c)

    def average_pool(x):
        value = windowed(problem, x, tirx.const(0, "uint8"))
        r, s = te.reduce_axis((0, problem.r), "r"), te.reduce_axis((0, problem.s), "s")
        total = te.compute(
            shape,
            lambda n, i, j, c: te.sum(value(n, i, j, c, r, s).astype("int32"), axis=[r, s]),
            name="total",
        )

        def mean(n, i, j, c):
            rows = _inside(i * problem.stride[0] - problem.padding[0], problem.r, problem.h)
            columns = _inside(j * problem.stride[1] - problem.padding[1], problem.s, problem.w)
            steps = (total[n, i, j, c] - rows * columns * zero_point).astype("float32")
            if counting == "window":
                return steps * tirx.const(1.0 / (problem.r * problem.s), "float32")
            return steps * (tirx.const(1.0, "float32") / (rows * columns).astype("float32"))

        return te.compute(shape, mean, name="average_pool", attrs=notes)

    return average_pool


def define_mean_of_planes(pixels: int, zero_point: int):
    """te function uint8 [N, C / 4, pixels, 4] -> float32 [N, 1, 1, C]: the mean of whole planes of quads."""

    def mean_of_planes(x):
        images, planes, _, together = (int(d) for d in x.shape)
        k = te.reduce_axis((0, pixels), "k")
        shape = (images, 1, 1, planes * together)
        total = te.compute(
            shape,
            lambda n, i, j, c: te.sum(x[n, c // together, k, c % together].astype("int32"), axis=k),
            name="total",
        )
        share = tirx.const(1.0 / pixels, "float32")
        return te.compute(
            shape,
            lambda n, i, j, c: (total[n, i, j, c] - pixels * zero_point).astype("float32") * share,
            name="mean_of_planes",
        )

    return mean_of_planes


def lower_average_pool(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """Channels last, or the mean of planes. Raises ScheduleError in any other layout."""
    attrs = attrs_of(call)
    if "image" in attrs:
        pixels = attrs["image"][1] * attrs["image"][2]
        kernel = define_mean_of_planes(pixels, attrs["zero_point"])
        return bb.call_te(kernel, call.args[0], primfunc_name_hint="mean_of_planes")
    if attrs["layout"] != "NHWC":
        raise ScheduleError("pooling not channels last", found=attrs["layout"], wanted="NHWC")
    n, h, w, c = shape_of(call.args[0])
    (r, s), stride, padding = attrs["pool_size"], tuple(attrs["strides"]), tuple(attrs["padding"])
    problem = Problem(n, h, w, c, c, r, s, stride, padding, groups=c)
    counting = "window" if attrs["count_include_pad"] or not any(padding) else "image"
    point = pooling.default_point(problem, target)
    kernel = define(problem, point, counting, attrs["zero_point"])
    hint = f"byte_average_pool{r}x{s}_{problem.oh}x{problem.ow}_{c}"
    return call_te(bb, kernel, call.args[0], hint=hint)
