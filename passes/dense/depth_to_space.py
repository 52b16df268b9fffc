# SPDX-License-Identifier: Apache-2.0
"""Lower `kerf.depth_to_space`: a copy, which fuses with what reads it element by element."""

from __future__ import annotations

from tvm import relax, te

from passes.layers import DEPTH_TO_SPACE, attrs_of, shape_of
from schedules.target import CpuTarget

_INJECTIVE = 2  # TVM's operator pattern


def lower_depth_to_space(
    bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget
) -> relax.Expr:
    """x and the result in NHWC."""
    attrs, shape = attrs_of(call), shape_of(call)
    (sh, sw), (top, left), groups = attrs["block"], attrs["crop"], attrs["groups"]
    channels = shape[3] // groups

    def define(x):
        def value(n, i, j, o):
            i, j = i + top, j + left
            group, c = (0, o) if groups == 1 else (o // channels, o % channels)
            phase = (group * sh + i % sh) * sw + j % sw
            return x[n, i // sh, j // sw, phase * channels + c]

        return te.compute(shape, value, name="depth_to_space")

    return bb.call_te(
        define, call.args[0], primfunc_name_hint="depth_to_space",
        primfunc_attrs={"op_pattern": _INJECTIVE},
    )  # fmt: skip


LOWERINGS = {DEPTH_TO_SPACE: lower_depth_to_space}
