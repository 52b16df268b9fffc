# SPDX-License-Identifier: Apache-2.0
"""Attention lowered to one kernel for all heads.

    rewrite: y = relax.nn.attention(q, k, v)             ->  y = call_tir(attention, (q, k, v))
             y = relax.nn.attention_bias(q, k, v, bias)  ->  y = call_tir(attention, (q, k, v, bias))

float32. A sliding window, or a bias that does not broadcast to [B, H, Sq, Sk], is left to TVM. A constant bias of zeros
is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import relax

from passes.family import Lowering
from passes.layers import const_array, is_const, shape_of
from passes.lower import call_te
from schedules import attention, attention_queries
from schedules.attention_problem import Problem, define_attention
from schedules.target import CpuTarget

CAUSAL = {"": "", "TopLeft": "top_left", "BottomRight": "bottom_right"}


def problem_of(call: relax.Call) -> Problem | None:
    """The problem of an attention call; None if the kernel does not cover it."""
    q, k, v, *bias = call.args
    if any(str(e.ty.dtype) != "float32" for e in call.args) or call.attrs.window_size is not None:
        return None
    (batch, q_len, heads, depth), (k_batch, k_len, k_heads, _) = shape_of(q), shape_of(k)
    if (k_batch, k_heads) != (batch, heads):
        return None
    bias = [b for b in bias if not (is_const(b) and not const_array(b).any())]
    bias_shape = shape_of(bias[0]) if bias else ()
    if bias and len(bias_shape) != 4:
        return None
    full = (batch, heads, q_len, k_len)
    if bias and (bias_shape[3] != k_len or any(b not in (1, f) for b, f in zip(bias_shape, full))):
        return None
    causal = CAUSAL[str(call.attrs.causal_mask or "")]
    return Problem(
        batch, q_len, k_len, heads, depth, shape_of(v)[3], _scale(call, depth), causal, bias_shape
    )


def _scale(call: relax.Call, depth: int) -> float:
    scale = call.attrs.scale
    if scale is None:
        return depth**-0.5
    return float(scale.value if hasattr(scale, "value") else scale)


def lower_attention(
    bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget
) -> relax.Expr | None:
    """relax.nn.attention and relax.nn.attention_bias."""
    problem = problem_of(call)
    if problem is None:
        return None
    structure = attention_queries if attention_queries.suits(problem, target) else attention
    point = structure.default_point(problem, target)

    def define(q, k, v, bias=None):
        return define_attention(q, k, v, bias, problem, structure.LOOPS, point)

    args = call.args[:4] if problem.bias else call.args[:3]
    hint = f"attention_{problem.q_len}_{problem.k_len}_{problem.heads}x{problem.depth}"
    return call_te(bb, define, *args, hint=hint)


LOWERINGS: Mapping[str, Lowering] = {
    "relax.nn.attention": lower_attention,
    "relax.nn.attention_bias": lower_attention,
}
