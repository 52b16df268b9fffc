# SPDX-License-Identifier: Apache-2.0
"""Lower what turns sums into bytes and back: elementwise te definitions that fuse into the layer before them.

rewrite: kerf.quantize(x)  ->  call_tir(quantize, (x,))
"""

from __future__ import annotations

import numpy as np
from tvm import relax, te, tirx

from passes.layers import attrs_of, shape_of
from schedules.target import CpuTarget

_OPAQUE = 8  # an operator pattern that nothing fuses with


def _float(value: float):
    return tirx.const(float(np.float32(value)), "float32")


def quantized(x, scale: float, zero_point: int, bounded: bool = False):
    """uint8 of a float32 expression, `bounded` as in `operators.quantize`.

    The upper bound, a whole step, comes before rounding, so that the conversion to integers cannot overflow upwards; what
    is too low for it becomes the least integer. Where neither can happen, both bounds come last. `byte_stores` packs
    either form, and computes no bound that comes last.
    """
    reciprocal = float(np.float32(1 / scale))
    steps = x if reciprocal == 1 else x * _float(reciprocal)
    lowest = tirx.const(0, "int32")
    if bounded:
        whole = tirx.call_llvm_pure_intrin("int32", "llvm.lrint", steps) + zero_point
        return tirx.max(tirx.min(whole, tirx.const(255, "int32")), lowest).astype("uint8")
    if zero_point:  # with zero point 0, NaN ends up as 0 by itself
        steps = tirx.Select(tirx.isnan(steps), _float(0), steps)
    highest = _float(255 - zero_point)
    steps = tirx.Select(steps > highest, highest, steps)
    nearest = tirx.call_llvm_pure_intrin("int32", "llvm.lrint", steps)
    return tirx.max(nearest + zero_point, lowest).astype("uint8")


def steps_of(x, zero_point: int):
    """float32 x - zero_point of a uint8 expression, exact."""
    return (x.astype("int32") - zero_point).astype("float32")


def lower_quantize(bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget) -> relax.Expr:
    attrs, shape = attrs_of(call), shape_of(call)
    of = (attrs["scale"], attrs["zero_point"], bool(attrs.get("bounded")))

    def quantize(x):
        return te.compute(shape, lambda *i: quantized(x(*i), *of), name="quantize")

    return bb.call_te(quantize, call.args[0], primfunc_name_hint="quantize")


def lower_dequantize(bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget) -> relax.Expr:
    attrs, shape = attrs_of(call), shape_of(call)

    def dequantize(x):
        return te.compute(
            shape,
            lambda *i: steps_of(x(*i), attrs["zero_point"]) * _float(attrs["scale"]),
            name="dequantize",
        )

    # Bytes that have to lie in memory are read by a kernel of their own.
    attrs_of_function = {"op_pattern": _OPAQUE} if attrs.get("stored") else None
    return bb.call_te(
        dequantize,
        call.args[0],
        primfunc_name_hint="dequantize",
        primfunc_attrs=attrs_of_function,
    )


def lower_quantize_dynamic(
    bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget
) -> relax.Expr:
    shape = shape_of(call)

    def quantize(x, scale, zero_point):
        def value(*i):
            steps = x(*i) / scale()
            steps = tirx.Select(tirx.isnan(steps), _float(0), steps)
            highest = _float(255) - zero_point()
            steps = tirx.Select(steps > highest, highest, steps)
            whole = tirx.call_llvm_pure_intrin("int32", "llvm.lrint", steps)
            return tirx.max(whole + zero_point().astype("int32"), 0).astype("uint8")

        return te.compute(shape, value, name="quantize_dynamic")

    return bb.call_te(quantize, *call.args, primfunc_name_hint="quantize_dynamic")


def lower_steps(bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget) -> relax.Expr:
    """In a kernel of its own: the bytes are part of the model, and verification looks at them."""

    def steps(x, zero_point):
        value = lambda *i: x(*i).astype("float32") - zero_point()  # noqa: E731
        return te.compute(shape_of(call), value, name="steps")

    opaque = {"op_pattern": _OPAQUE}
    return bb.call_te(steps, *call.args, primfunc_name_hint="steps", primfunc_attrs=opaque)


def lower_dequantize_add(
    bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget
) -> relax.Expr:
    """The product and the sum are one fused multiply-add, asked for by name: LLVM would otherwise choose where to fuse."""
    attrs, shape = attrs_of(call), shape_of(call)

    def dequantize_add(y, x):
        def value(*i):
            steps = steps_of(x(*i), attrs["zero_point"])
            scale = _float(attrs["scale"])
            return tirx.call_llvm_pure_intrin("float32", "llvm.fma", steps, scale, y(*i))

        return te.compute(shape, value, name="dequantize_add")

    return bb.call_te(dequantize_add, *call.args, primfunc_name_hint="dequantize_add")
