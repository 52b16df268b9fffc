# SPDX-License-Identifier: Apache-2.0
"""Matrix products: `kerf.dense` over packed constant weights, and the product of two activations."""

from __future__ import annotations

import math

from tvm import relax, te

from passes.dense.conv2d import pack_weights
from passes.family import Lowering
from passes.layers import DENSE, const_array, shape_of
from passes.lower import call_te
from schedules import batch_matmul, contraction
from schedules.fused import annotations
from schedules.spaces import point_for
from schedules.target import CpuTarget


def define_dense(shape: tuple[int, ...], problem: contraction.Problem, point: contraction.Point):
    """te function (x [..., K] of `shape`, packed w) -> [..., O]."""
    notes = annotations("contraction", problem=problem.to_dict(), point=point.to_dict())

    def dense(x, w):
        k = te.reduce_axis((0, problem.c), "k")
        return te.compute(
            (*shape[:-1], problem.o),
            lambda *i: te.sum(x[(*i[:-1], k)] * w[i[-1] // point.panel, 0, 0, k, i[-1] % point.panel], axis=[k]),
            name="dense", attrs=notes,
        )  # fmt: skip

    return dense


def lower_dense(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """A contraction whose pixels are the rows of x."""
    x, weight = call.args[0], const_array(call.args[1])
    shape = shape_of(x)
    problem = contraction.Problem(1, 1, math.prod(shape[:-1]), shape[-1], weight.shape[0])
    point = point_for(contraction, problem, target)
    packed = relax.const(pack_weights(weight[:, :, None, None], problem, point))
    return call_te(
        bb,
        define_dense(shape, problem, point),
        x,
        packed,
        hint=f"dense_{problem.w}_{problem.c}_{problem.o}",
    )


def define_matmul(problem: batch_matmul.Problem, point: batch_matmul.Point):
    """te function (a [..., M, K], b [..., K, N]) -> [..., M, N], leading dimensions broadcast."""
    notes = annotations(
        "batch_matmul", problem=problem.to_dict(), point=point.to_dict(), flops=problem.flops
    )

    def matmul(a, b):
        k = te.reduce_axis((0, problem.k), "k")

        def value(*i):
            left = batch_matmul.operand_index(i[:-2], problem.a_batch)
            right = batch_matmul.operand_index(i[:-2], problem.b_batch)
            return te.sum(a[(*left, i[-2], k)] * b[(*right, k, i[-1])], axis=[k])

        return te.compute((*problem.batch, problem.m, problem.n), value, name="matmul", attrs=notes)

    return matmul


def lower_matmul(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr | None:
    """float32 operands of at least two dimensions; TVM's legalisation takes the others (vectors)."""
    a, b = shape_of(call.args[0]), shape_of(call.args[1])
    if (
        min(len(a), len(b)) < 2
        or any(str(arg.ty.dtype) != "float32" for arg in call.args)
        or str(call.ty.dtype) != "float32"
    ):
        return None
    problem = batch_matmul.Problem(a[:-2], b[:-2], a[-2], a[-1], b[-1])
    point = point_for(batch_matmul, problem, target)
    hint = f"matmul_{math.prod(problem.batch)}_{problem.m}_{problem.k}_{problem.n}"
    return call_te(bb, define_matmul(problem, point), *call.args, hint=hint)


LOWERINGS: dict[str, Lowering] = {DENSE: lower_dense, "relax.matmul": lower_matmul}
