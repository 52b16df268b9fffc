# SPDX-License-Identifier: Apache-2.0
"""Expressions on vectors: how many lanes one has, and scalar expressions rebuilt on vectors."""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.errors import ScheduleError


def lanes_of(expr) -> int:
    """Vector lanes of an expression; 1 for a scalar."""
    return tvm.DataType(expr.ty.dtype).lanes


def broadcast(expr, lanes: int):
    """`expr` on every lane; unchanged if it is a vector already or `lanes` is 1."""
    return expr if lanes == 1 or lanes_of(expr) == lanes else T.broadcast(expr, lanes)


_BINARY = tvm.ir.prim.expr.BinaryOpExpr


def rebuild(expr, values: dict, load):
    """`expr` with its variables replaced, vectors where a replaced index is a ramp."""

    def go(e):
        if isinstance(e, tvm.ir.expr.Var):
            return next((v for k, v in values.items() if k.same_as(e)), e)
        if isinstance(e, tvm.ir.expr.TensorLoad):
            return load(e.source, [go(i) for i in e.indices])
        if isinstance(e, (tvm.ir.prim.expr.IntImm, tvm.ir.prim.expr.FloatImm)):
            return e
        if (truth := _tested_truth(e)) is not None:
            return go(truth)
        if isinstance(e, tvm.ir.prim.expr.Cast):
            inner = go(e.value)
            return inner.astype(_with_lanes(e, lanes_of(inner)))
        if isinstance(e, tvm.ir.prim.expr.Not):
            return type(e)(go(e.a))
        if isinstance(e, tvm.ir.prim.expr.Select):
            parts = [go(p) for p in (e.condition, e.true_value, e.false_value)]
            return tirx.Select(*_same_lanes(parts))
        if isinstance(e, tvm.ir.expr.Call):
            args = [go(a) for a in e.args]
            if e.op.name == "prim.if_then_else":
                return tirx.Select(*_same_lanes(args))
            lanes = max(lanes_of(a) for a in args)
            if lanes > 1:  # an LLVM intrinsic's first argument is its number, a scalar
                args = [
                    a
                    if isinstance(a, tvm.ir.prim.expr.IntImm) and "llvm" in e.op.name
                    else broadcast(a, lanes)
                    for a in args
                ]
            return tirx.call_intrin(_with_lanes(e, lanes), e.op, *args)
        if isinstance(e, _BINARY) or (hasattr(e, "a") and hasattr(e, "b")):
            a, b = _same_lanes([go(e.a), go(e.b)])
            return type(e)(*_same_integers(a, b))
        raise ScheduleError(
            f"the epilogue holds {type(e).__name__}, which no vector form is known for"
        )

    return go(expr)


def _tested_truth(e):
    """The truth value c of 0 < integer(c), which is how a select tests it; TVM's simplifier fails on vectors of those."""
    is_test = isinstance(e, tvm.ir.prim.expr.LT) and isinstance(e.b, tvm.ir.prim.expr.Cast)
    if is_test and isinstance(e.a, tvm.ir.prim.expr.IntImm) and int(e.a.value) == 0:
        return e.b.value if str(e.b.value.ty.dtype) == "bool" else None
    return None


def _same_lanes(parts: list) -> list:
    lanes = max(lanes_of(p) for p in parts)
    return [broadcast(p, lanes) for p in parts]


def _same_integers(a, b) -> tuple:
    """Both as int64 if one is: TVM's own operators compute indices with it, kernels with int32."""
    kinds = [str(e.ty.dtype).split("x")[0] for e in (a, b)]
    if set(kinds) != {"int32", "int64"}:
        return a, b
    wide = "int64" if lanes_of(a) == 1 else f"int64x{lanes_of(a)}"
    return a.astype(wide), b.astype(wide)


def _with_lanes(expr, lanes: int) -> str:
    base = str(expr.ty.dtype).split("x")[0]
    return base if lanes == 1 else f"{base}x{lanes}"
