# SPDX-License-Identifier: Apache-2.0
"""Rounding to integers and back, as every front end needs it.

Eight bits per tensor become `kerf.quantize` and `kerf.dequantize`, whose bytes are unsigned: int8 is uint8 with a zero
point 128 higher. Anything else (a scale per channel, 16 bits) no kernel reads; it is spelled in float32 operators.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from tvm import relax
from tvm.relax import op

from compiler.frontend.support import Refused, constant, dtype_of
from passes.layers import attrs_of, operator_call, shape_of
from passes.quantized import operators

BYTES = ("int8", "uint8")
WIDE = ("int16", "uint16")


class Converting(Protocol):
    """What is needed of a converter; `unsigned` maps int8 tensors to what they are as uint8."""

    unsigned: dict[relax.Expr, relax.Expr]

    def emit(self, expr: relax.Expr) -> relax.Expr: ...


def check_scale(scale: np.ndarray) -> None:
    """Raises Refused for what is no float32 scale."""
    if scale.dtype != np.float32:
        raise Refused(f"a scale of type {scale.dtype}")
    if not (np.isfinite(scale).all() and np.all(scale >= np.finfo(np.float32).tiny)):
        raise Refused(f"a scale that is not a positive, normal number ({scale.reshape(-1).min()})")


def quantize(
    c: Converting, x: relax.Expr, scale: np.ndarray, zero_point: np.ndarray, dtype: str,
    limits: tuple[int, int] | None = None,
) -> relax.Expr:  # fmt: skip
    """clip(round(x / scale) + zero_point, *limits) as `dtype`; scale and zero point have no axes, or broadcast against x.

    `limits` are those of the type by default.
    """
    full = (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    low, high = limits or full
    if dtype_of(x) != "float32":
        x = c.emit(op.astype(x, "float32"))
    if scale.ndim or dtype not in BYTES:
        steps = c.emit(op.round(c.emit(op.divide(x, constant(scale)))))
        steps = c.emit(op.add(steps, constant(zero_point.astype("float32"))))
        return op.astype(c.emit(op.clip(steps, float(low), float(high))), dtype)
    if (low, high) != full:  # the ends of a narrower range are steps themselves
        ends = [constant(((q - zero_point) * scale).astype("float32")) for q in (low, high)]
        x = c.emit(op.minimum(c.emit(op.maximum(x, ends[0])), ends[1]))
    shift = 128 if dtype == "int8" else 0
    found = c.emit(operators.quantize(x, scale=float(scale), zero_point=int(zero_point) + shift))
    return _signed(c, found) if shift else found


def dequantize(
    c: Converting, x: relax.Expr, scale: np.ndarray, zero_point: np.ndarray, dtype: str
) -> relax.Expr:
    """(x - zero_point) * scale in float32."""
    if scale.ndim or dtype not in BYTES:
        centred = op.astype(x, "float32")
        if np.any(zero_point):
            centred = op.subtract(c.emit(centred), constant(zero_point.astype("float32")))
        return op.multiply(c.emit(centred), constant(scale))
    shift = 128 if dtype == "int8" else 0
    x = _as_unsigned(c, x) if shift else x
    made = operators.dequantize(x, scale=float(scale), zero_point=int(zero_point) + shift)
    # The bytes are part of the model: they are stored, so that what was rounded can be looked at.
    return operator_call(operators.DEQUANTIZE, list(made.args), **attrs_of(made), stored=1)


def quantize_dynamic(c: Converting, x: relax.Expr) -> tuple[relax.Expr, relax.Expr, relax.Expr]:
    """uint8 of x, with the scale (float32) and zero point (uint8) that hold exactly the values of x, and zero.

    As ONNX's DynamicQuantizeLinear defines it; a tensor of zeros has the scale 1, as in ONNX Runtime.
    """

    def over_all(reduce) -> relax.Expr:
        rank = len(shape_of(x))
        rows = c.emit(reduce(x, list(range(rank - 1)))) if rank > 1 else x
        return c.emit(reduce(rows))

    zero, steps = constant(np.float32(0)), constant(np.float32(255))
    low = c.emit(op.minimum(over_all(op.min), zero))
    high = c.emit(op.maximum(over_all(op.max), zero))
    scale = c.emit(op.divide(c.emit(op.subtract(high, low)), steps))
    empty = c.emit(op.equal(scale, zero))
    scale = c.emit(op.where(empty, constant(np.float32(1)), scale))
    zero_point = c.emit(op.subtract(zero, c.emit(op.divide(low, scale))))
    zero_point = c.emit(op.round(c.emit(op.clip(zero_point, 0.0, 255.0))))
    made = c.emit(operators.quantize_dynamic(x, scale, zero_point))
    return made, scale, op.astype(zero_point, "uint8")


def steps(c: Converting, x: relax.Expr, zero_point: relax.Expr) -> relax.Expr:
    """x - zero_point in float32, of uint8 operands that are computed at run time; the zero point has no axes. Raises
    Refused for others."""
    if dtype_of(x) != "uint8" or shape_of(zero_point) != ():
        raise Refused(
            "a zero point that is computed at run time, but not one for a tensor of uint8"
        )
    return operators.steps(x, c.emit(op.astype(zero_point, "float32")))


def _signed(c: Converting, unsigned: relax.Expr) -> relax.Expr:
    """Bytes less 128, as int8; remembered, so that reading them as floats needs no detour."""
    wide = c.emit(op.subtract(c.emit(op.astype(unsigned, "int16")), constant(np.int16(128))))
    found = c.emit(op.astype(wide, "int8"))
    c.unsigned[found] = unsigned
    return found


def _as_unsigned(c: Converting, x: relax.Expr) -> relax.Expr:
    """An int8 tensor plus 128, as uint8."""
    if x in c.unsigned:
        return c.unsigned[x]
    wide = c.emit(op.add(c.emit(op.astype(x, "int16")), constant(np.int16(128))))
    return c.emit(op.astype(wide, "uint8"))
