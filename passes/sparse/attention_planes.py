# SPDX-License-Identifier: Apache-2.0
"""Attention between planes, where sparse layers write q, k and v and read the result.

    rewrite: y = kerf.attention_planes(q, k, v[, bias])  ->  y = call_tir(attention_planes, (q, k, v[, bias]))

q [1, H * D, B * Sq], k [1, H * D, B * Sk], v [1, H * Dv, B * Sk], bias [B or 1, H or 1, 1, Sk] -> [1, H * Dv, B * Sq], planes up
to a whole cache line; attributes `batch`, `q_len`, `k_len`, `heads`, `scale`, `causal` (of `schedules.attention_problem.Problem`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from tvm import relax

from passes.dense.attention import CAUSAL, problem_of
from passes.layers import attrs_of, operator_call, register_operator, shape_of
from passes.lower import call_te
from passes.numpy_nn import attention
from schedules import attention_planes, attention_queries
from schedules.attention_problem import Problem
from schedules.target import CpuTarget

ATTENTION_PLANES = "kerf.attention_planes"
_NAMES = ("relax.nn.attention", "relax.nn.attention_bias")
_WIDEST = 16  # lanes of any target


@functools.cache
def register() -> None:
    """Register the operator; idempotent."""
    register_operator(ATTENTION_PLANES, infer_attention_planes)


def infer_attention_planes(call: relax.Call) -> relax.TensorType:
    (_, _, pixels), (_, channels, _) = shape_of(call.args[0]), shape_of(call.args[2])
    return relax.TensorType((1, channels, pixels), call.args[0].ty.dtype)


def is_attention(value) -> bool:
    """Whether a call is of an attention that the kernel between planes computes."""
    if not isinstance(value, relax.Call) or getattr(value.op, "name", None) not in _NAMES:
        return False
    problem = problem_of(value)
    return problem is not None and attention_queries.serves(problem, _WIDEST)


def attention_in_planes(call: relax.Call, operands: Sequence[relax.Expr]) -> relax.Call:
    """An attention [B, S, H, D] on planes of q, k, v, and its bias if it has one."""
    register()
    p = problem_of(call)
    operands = operands if p.bias else operands[:3]
    names = ("batch", "q_len", "k_len", "heads", "scale", "causal")
    return operator_call(ATTENTION_PLANES, operands, **{n: getattr(p, n) for n in names})


def _problem(call: relax.Call) -> Problem:
    attrs, (q, _, v, *bias) = attrs_of(call), (shape_of(a) for a in call.args)
    heads = attrs["heads"]
    return Problem(
        attrs["batch"], attrs["q_len"], attrs["k_len"], heads, q[1] // heads, v[1] // heads,
        attrs["scale"], attrs["causal"], *bias,
    )  # fmt: skip


def lower_attention_planes(
    bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget
) -> relax.Expr:
    problem = _problem(call)
    point = attention_queries.default_point(problem, target)

    def define(q, k, v, bias=None):
        return attention_planes.define_attention_planes(q, k, v, bias, problem, point)

    hint = f"attention_planes_{problem.q_len}_{problem.k_len}_{problem.heads}x{problem.depth}"
    return call_te(bb, define, *call.args, hint=hint)


def attention_of_planes(attrs: Mapping, q, k, v, bias=None) -> np.ndarray:
    """The operator in numpy."""
    batch, heads, q_len, k_len = (int(attrs[n]) for n in ("batch", "heads", "q_len", "k_len"))

    def by_head(x, length: int):
        pixels = x[..., : batch * length]
        return pixels.reshape(heads, -1, batch, length).transpose(2, 3, 0, 1)

    causal = {name: key for key, name in CAUSAL.items()}[str(attrs["causal"])] or None
    operands = by_head(q, q_len), by_head(k, k_len), by_head(v, k_len)
    y = attention(*operands, bias, float(attrs["scale"]), causal).transpose(2, 3, 0, 1)
    y = np.ascontiguousarray(y).reshape(1, -1, batch * q_len)
    return np.pad(y, ((0, 0), (0, 0), (0, q.shape[2] - batch * q_len)), "edge")
