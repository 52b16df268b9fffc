# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention: the problem, and its definition.

    o[b, i, h, :] = sum over j of softmax_j(scale q[b, i, h, :] . k[b, j, h, :] + bias[b, h, i, j]) v[b, j, h, :]

q [B, Sq, H, D], k [B, Sk, H, D], v [B, Sk, H, Dv], float32. A query whose scores are all -inf (fully masked) gives zeros, as
`torch.nn.functional.scaled_dot_product_attention` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm import te, tirx

from schedules import vector_math
from schedules.annotated import Annotated
from schedules.emission import emitting
from schedules.fused import Fused, annotations
from schedules.target import CpuTarget

_STAGES = 7  # blocks of the definition


@dataclass(frozen=True)
class Problem(Annotated):
    """Shapes and options. `causal` is "", "top_left" (j <= i) or "bottom_right" (j <= i + |k_len - q_len|);
    `bias` the shape of the bias, [B or 1, H or 1, Sq or 1, Sk], or () for none."""

    batch: int
    q_len: int
    k_len: int
    heads: int
    depth: int
    value_depth: int
    scale: float
    causal: str = ""
    bias: tuple[int, ...] = ()

    @property
    def reach(self) -> int | None:
        """Query row i sees the keys up to i + reach; None where it sees all."""
        return {"": None, "top_left": 0, "bottom_right": abs(self.k_len - self.q_len)}[self.causal]

    @property
    def flops(self) -> int:
        """Of both products, 2 per multiply-accumulate, without the keys that causality hides."""
        reach = self.k_len if self.reach is None else self.reach
        seen = sum(min(self.k_len, i + reach + 1) for i in range(self.q_len))
        return 2 * self.batch * self.heads * seen * (self.depth + self.value_depth)


def define_attention(q, k, v, bias, problem: Problem, loops: str, point: Annotated):
    """te: the output [B, Sq, H, Dv] of the kernel `loops`; `bias` is a tensor of shape `problem.bias`, or None."""
    p = problem
    notes = annotations(loops, problem=p.to_dict(), point=point.to_dict(), flops=p.flops)
    shape = (p.batch, p.q_len, p.heads, p.value_depth)
    return te.compute(shape, attend(q, k, v, bias, p), name="attention", attrs=notes)


def attend(q: Callable, k: Callable, v: Callable, bias, problem: Problem) -> Callable:
    """te: the output's element at (b, i, h, e), of what reads q, k and v at (b, i, h, d): tensors, or functions."""
    p = problem
    scores_shape = (p.batch, p.heads, p.q_len, p.k_len)
    d, j, s, t = (
        te.reduce_axis((0, n), name=x)
        for n, x in ((p.depth, "d"), (p.k_len, "j"), (p.k_len, "s"), (p.k_len, "t"))
    )
    minus_infinity, zero, one = (tirx.const(c, "float32") for c in (-math.inf, 0.0, 1.0))

    def logit(b, h, i, c):
        value = scores(b, h, i, c) * tirx.const(p.scale, "float32")
        if bias is not None:
            value = value + bias(*(0 if n == 1 else x for n, x in zip(p.bias, (b, h, i, c))))
        return value if p.reach is None else tirx.Select(c <= i + p.reach, value, minus_infinity)

    def weight(b, h, i, c):
        top = greatest(b, h, i)
        return vector_math.softmax_weight(
            logits(b, h, i, c) - tirx.Select(top == minus_infinity, zero, top)
        )

    scores = te.compute(
        scores_shape,
        lambda b, h, i, c: te.sum(q(b, i, h, d) * k(b, c, h, d), axis=d),
        name="scores",
    )
    logits = te.compute(scores_shape, logit, name="logits")
    greatest = te.compute(
        scores_shape[:3], lambda b, h, i: te.max(logits(b, h, i, j), axis=j), name="greatest"
    )
    weights = te.compute(scores_shape, weight, name="weights")
    total = te.compute(
        scores_shape[:3], lambda b, h, i: te.sum(weights(b, h, i, s), axis=s), name="total"
    )
    weighted = te.compute(
        (p.batch, p.q_len, p.heads, p.value_depth),
        lambda b, i, h, e: te.sum(weights(b, h, i, t) * v(b, t, h, e), axis=t),
        name="weighted",
    )

    def normalized(b, i, h, e):
        divisor = total(b, h, i)
        return weighted(b, i, h, e) * tirx.Select(divisor == zero, zero, one / divisor)

    return normalized


def emitted(fused: Fused, target: CpuTarget, points: type, kernels: type) -> tirx.PrimFunc:
    """The kernel for a fused attention, whose anchor holds one of `points`, by an emitter of the class `kernels`."""
    problem = Problem.from_dict(fused.point["problem"])
    point = points.from_dict(fused.point["point"])
    with emitting(fused, _STAGES) as (kernel, (q, k, *bias, v)):
        kernels(kernel, problem, point, target, q, k, v, bias[0] if bias else None).emit()
    return kernel.func
