# SPDX-License-Identifier: Apache-2.0
"""A dense convolution and the maximum over windows of its result: in one kernel by Winograd's algorithm, or in two.

rewrite: y = kerf.pooled_conv2d(x, w)  ->  y = call_tir(winograd_max_pool, (x, packed G w G^T))
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tvm import relax

from passes.dense import conv2d, pooling, winograd
from passes.family import LoweredCall, Lowering, Pooling
from passes.layers import CONV2D, POOLED_CONV2D, attrs_of, operator_call, shape_of
from passes.lower import call_te
from passes.max_pooling import largest_reference, pool_of
from passes.numpy_images import conv2d as conv2d_reference
from schedules import windows, winograd_points, winograd_pooled
from schedules.errors import Declined
from schedules.pooling import default_point
from schedules.target import CpuTarget


def suits(call: relax.Call, _windows: Mapping) -> bool:
    """Whether one kernel may compute a `kerf.conv2d` in NCHW and pool it: strided first layers by Winograd's algorithm."""
    first = shape_of(call.args[0])[1] <= conv2d.MOST_PLANES and max(attrs_of(call)["strides"]) > 1
    return (
        first and str(call.args[0].ty.dtype) == "float32" and winograd.unsuited(call, True) is None
    )


def reference(attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The maxima over windows of the convolution."""
    return largest_reference(attrs, conv2d_reference(attrs, x, w))


def lower(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> LoweredCall:
    """Of a call in NHWC."""
    own = {k: v for k, v in attrs_of(call).items() if k != "flops" and not k.startswith("pool_")}
    conv = operator_call(CONV2D, list(call.args), **own)
    pool = pool_of(call, shape_of(call.args[0])[:-1])
    if (fused := _lower_in_one(bb, conv, pool, target)) is not None:
        return fused
    lowered = conv2d.lower_conv2d(bb, conv, target)
    sources = lowered.sources if isinstance(lowered, LoweredCall) else {}
    y = bb.emit(lowered.call if isinstance(lowered, LoweredCall) else lowered)
    define = pooling.define_max_pool(pool, default_point(pool, target))
    return LoweredCall(call_te(bb, define, y, hint=pooling.hint("max", pool)), sources)


def _lower_in_one(
    bb: relax.BlockBuilder, conv: relax.Call, pool: windows.Problem, target: CpuTarget
) -> LoweredCall | None:
    """Winograd's kernel with the windows in it; None where it does not apply or does not pay."""
    planes = conv2d.planes_of(bb, conv.args[0], conv2d.problem_of(conv))
    problem = winograd.problem_of(conv, planes is not None)
    if planes is None or isinstance(problem, Declined):
        return None
    m = winograd.choose(problem, target)
    if isinstance(m, Declined) or winograd_pooled.windows_of_row(problem, m, pool) is None:
        return None
    alone = winograd_points.default_point(problem, m, target)
    point = winograd_pooled.default_point(problem, alone)
    return winograd.lower_at(bb, conv, problem, point, planes, pool)


LOWERINGS: dict[str, Lowering] = {POOLED_CONV2D: lower}
POOLING = {CONV2D: Pooling(POOLED_CONV2D, suits)}
