# SPDX-License-Identifier: Apache-2.0
"""Keep a small tensor's broadcast out of the kernel that computes it.

    rewrite: multiply(x [N, H, W, C], s [N, 1, 1, C])  ->  call_tir(multiply, (x, s)), not fusable into what computes s

Squeeze-and-excitation scales an image by the result of a tiny layer. FuseOps would make the image an epilogue of that
layer, whose kernel has a tile per channel and none per pixel. A constant operand is an ordinary bias or scale and stays
fusable.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import relax, topi

from passes.family import Lowering
from passes.layers import is_const, shape_of
from schedules.target import CpuTarget

_INJECTIVE = 2  # TVM's pattern kind: fuses with what follows it, never into an anchor before it
_OPERATORS = {
    "relax.add": topi.add, "relax.subtract": topi.subtract, "relax.multiply": topi.multiply, "relax.divide": topi.divide,
    "relax.maximum": topi.maximum, "relax.minimum": topi.minimum,
}  # fmt: skip


def lower_broadcast(
    bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget
) -> relax.Expr | None:
    """A binary operator one of whose computed operands is smaller than its result; None for any other."""
    shape = shape_of(call)
    grows = [not is_const(a) and shape_of(a)[-len(shape) :] != shape for a in call.args]
    if not any(grows):
        return None
    name = call.op.name.removeprefix("relax.")
    return bb.call_te(
        _OPERATORS[call.op.name],
        *call.args,
        primfunc_name_hint=f"{name}_broadcast",
        primfunc_attrs={"op_pattern": _INJECTIVE},
    )


LOWERINGS: Mapping[str, Lowering] = dict.fromkeys(_OPERATORS, lower_broadcast)
