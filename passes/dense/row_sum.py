# SPDX-License-Identifier: Apache-2.0
"""Sums and means along the last axis.

rewrite: mean(x [..., K], axis=[-1])  ->  call_tir(row_sum, (x))
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import relax

from passes.family import Lowering
from passes.layers import shape_of
from passes.lower import call_te
from schedules.row_sum import Point, define_row_sum
from schedules.target import CpuTarget


def lower_row_sum(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr | None:
    """A sum or mean of float32 along the last of several axes; None for any other."""
    shape = shape_of(call.args[0])
    axes = call.attrs.axis
    if axes is None or len(axes) != 1 or len(shape) < 2 or 0 in shape:
        return None
    if int(axes[0]) not in (-1, len(shape) - 1) or str(call.ty.dtype) != "float32":
        return None
    point = Point(call.op.name == "relax.mean", bool(call.attrs.keepdims))
    hint = f"{'mean' if point.mean else 'sum'}_{'x'.join(map(str, shape))}"
    return call_te(bb, lambda x: define_row_sum(x, point), call.args[0], hint=hint)


LOWERINGS: Mapping[str, Lowering] = {"relax.mean": lower_row_sum, "relax.sum": lower_row_sum}
