# SPDX-License-Identifier: Apache-2.0
"""Compute layers on bytes: activations uint8, weights int8, sums int32, and back to bytes in the same kernel.

    rewrite: relu(add(conv2d(x, w), b))
             ->  quantize(relu(astype(int8_conv2d(x8, w8) + b32, "float32") * m), scale=1)
    requires: canonical graph, NCHW, a `BytesPlan` with the bytes of every group it holds
    ensures: outputs of the network are float32; no float32 tensor lies between two int8 layers without a float reader

A scale is folded into constants as far up as the arithmetic allows, so that rounding to bytes needs no multiplication of
its own. ReLU and the ceiling of ReLU6 vanish where saturation does the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.layers import CONV2D, attrs_of, const_array, is_call, is_const, shape_of
from passes.quantized import operators
from passes.quantized.plan_bytes import (
    BytesPlan,
    is_carrier,
    is_operator,
    tensors,
    window_mean,
)
from passes.quantized.ranges import STEPS, Affine
from passes.rewriting import Graph, bindings_of, constant, rewrite_module, variables


@dataclass(frozen=True)
class QuantizedWeight:
    """int8 [O, ...] and float32 [O]; `grain` names the zeros that a kernel may skip."""

    values: np.ndarray
    scale: np.ndarray
    grain: str | None = None


class QuantizeLayers:
    """See the module's docstring; `bytes_of` by group of the plan, `weights` by layer."""

    def __init__(
        self,
        plan: BytesPlan,
        bytes_of: Mapping[relax.Var, Affine],
        weights: Mapping[str, QuantizedWeight],
    ):
        self.plan, self.weights = plan, weights
        self.affine = {var: bytes_of[plan.group(var)] for var in plan.held}

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        return rewrite_module(mod, lambda func: _Rewriter(self, func).run())


class _Rewriter:
    def __init__(self, own: QuantizeLayers, func: relax.Function):
        self.plan, self.weights, self.affine = own.plan, own.weights, own.affine
        self.func, self.graph = func, Graph(func)
        self.values = self.plan.uses.definitions
        self.bytes: dict[relax.Var, relax.Expr] = {}
        self.sums: dict[relax.Var, relax.Expr] = {}

    def run(self) -> relax.Function:
        for param in self.func.params:
            if param in self.affine:
                self._hold(param, param)
        for binding in bindings_of(self.func):
            self._visit(binding.var, binding.value)
        return sink_residuals(self.graph.finish(self.func))

    def _visit(self, var: relax.Var, value: relax.Expr) -> None:
        if var in self.plan.layers:
            self.sums[var] = self.graph.emit(self._sum(var, value), f"{var.name}_sum")
        if var in self.affine and is_carrier(value):
            self.bytes[var] = self.graph.emit(self._carried(value), f"{var.name}_bytes")
            self._alias(var, self._dequantized(var, 1.0))
            return
        exact = self._in_units(var, 1.0)
        self._alias(var, self._from_operands(var, value) if exact is None else exact)
        if var in self.affine:
            self._hold(var, self.graph.substitute(var))

    def _alias(self, var: relax.Var, value: relax.Expr) -> None:
        self.graph.alias(var, self.graph.bind(var.name, value))

    def _hold(self, var: relax.Var, floats: relax.Expr) -> None:
        """Bind the bytes of `var`, from its floats or from what they are made of."""
        to = self.affine[var]
        steps = None if self.plan.floats_read(var) else self._in_units(var, to.scale, to)
        scale = to.scale if steps is None else 1.0
        made = operators.quantize(
            floats if steps is None else steps,
            scale=scale,
            zero_point=to.zero_point,
            step=to.scale,
            of=var.name,
            bounded=steps is not None and largest_steps(steps) < 1 << 30,
        )
        self.bytes[var] = self.graph.emit(made, f"{var.name}_bytes")

    def _sum(self, var: relax.Var, call: relax.Call) -> relax.Call:
        attrs, x = attrs_of(call), call.args[0]
        weight = self.weights[attrs["name"]]
        w = constant(weight.values)
        of = {"name": attrs["name"], "zero_point": self.affine[x].zero_point}
        if weight.grain is not None:
            of["grain"] = weight.grain
        if is_call(call, CONV2D):
            shared = ("strides", "padding", "dilation", "groups", "layout")
            of |= {key: attrs[key] for key in shared}
            return operators.int8_conv2d(self.bytes[x], w, **of)
        return operators.int8_dense(self.bytes[x], w, **of)

    def _carried(self, value: relax.Call) -> relax.Call:
        """A carrier's call on bytes."""
        args = [
            relax.Tuple([self.bytes[f] for f in a.fields])
            if isinstance(a, relax.Tuple)
            else self.bytes.get(a, a)
            for a in value.args
        ]
        return relax.Call(value.op, args, value.attrs, value.ty_args)

    def _dequantized(self, var: relax.Var, unit: float) -> relax.Call:
        """The floats of a held variable, in multiples of `unit`; a call of its own for every reader, to fuse with it."""
        of = self.affine[var]
        return operators.dequantize(
            self.bytes[var], scale=of.scale / unit, zero_point=of.zero_point
        )

    def _from_operands(self, var: relax.Var, value: relax.Expr) -> relax.Expr:
        """The value as it is, on operands read as the plan says."""
        held = [v for v in tensors(value) if self.plan.reads_bytes(var, v)]
        if not held:
            return self.graph.substitute(value)
        args = [
            self._dequantized(a, 1.0)
            if any(a.same_as(v) for v in held)
            else self.graph.substitute(a)
            for a in value.args
        ]
        return relax.Call(value.op, args, value.attrs, value.ty_args)

    # Values in multiples of a unit: a scale goes into the constants that there are anyway.

    def _in_units(self, var: relax.Var, unit: float, to: Affine | None = None):
        """The value of `var` over `unit`, on int8 operands; None where there is nothing better than the floats.

        With `to`, the value is about to be stored so, and what saturation does need not be done before.
        """
        value = self.values.get(var)
        if var in self.plan.layers:
            return self._scaled_sum(var, None, unit)
        if is_operator(value, ["relax.add"]):
            return self._sum_in_units(var, value, unit)
        if is_operator(value, ["relax.multiply"]):
            return self._product_in_units(var, value, unit)
        if is_operator(value, ["relax.nn.relu", "relax.minimum"]):
            return self._bounded_in_units(var, value, unit, to)
        if window_mean(value) is not None and self.plan.reads_bytes(var, value.args[0]):
            return self._mean_in_units(value, unit)
        return None

    def _operand(self, reader: relax.Var, operand: relax.Expr, unit: float):
        """An operand of `reader` over `unit`, or None."""
        if not isinstance(operand, relax.Var):
            return None
        if self.plan.reads_bytes(reader, operand):
            return self._dequantized(operand, unit)
        only = len(self.plan.uses.readers[operand]) == 1 and operand not in self.plan.uses.outputs
        return self._in_units(operand, unit) if only and operand not in self.affine else None

    def _scaled_sum(self, var: relax.Var, bias: np.ndarray | None, unit: float) -> relax.Expr:
        """astype(sum + bias) * multiplier, the bias in units of the sum."""
        call = self.plan.layers[var]
        name, x = attrs_of(call)["name"], call.args[0]
        weight = self.weights[name]
        step = self.affine[x].scale * weight.scale.astype("float64")
        along = (-1, 1, 1) if is_call(call, CONV2D) else (-1,)
        total = self.sums[var]
        after = None
        if bias is not None:
            inside = np.rint(bias / step)
            room = 2**31 - 1 - operators.largest_sum(weight.values, self.affine[x].zero_point)
            if np.abs(inside).max() <= room:
                shaped = inside.astype("int32").reshape(along)
                total = relax.op.add(total, constant(shaped[None] if len(along) == 3 else shaped))
            else:  # a bias beyond anything the layer computes
                after = (bias / unit).astype("float32").reshape(along)
        shaped = (step / unit).astype("float32").reshape(along)
        multiplier = constant(shaped[None] if len(along) == 3 else shaped)
        made = relax.op.multiply(relax.op.astype(total, "float32"), multiplier)
        return made if after is None else relax.op.add(made, constant(after))

    def _sum_in_units(self, var: relax.Var, value: relax.Call, unit: float):
        a, b = value.args
        if is_const(a) or is_const(b):
            other, array = (b, const_array(a)) if is_const(a) else (a, const_array(b))
            if other in self.plan.layers and len(self.plan.uses.readers[other]) == 1:
                outputs = shape_of(self.plan.layers[other].args[1])[0]
                if array.size in (1, outputs):
                    bias = np.broadcast_to(array.reshape(-1).astype("float64"), (outputs,))
                    return self._scaled_sum(other, bias, unit)
            inner = self._operand(var, other, unit)
            return None if inner is None else relax.op.add(inner, _over(array, unit))
        for x, y in ((a, b), (b, a)):
            if self.plan.reads_bytes(var, y) and shape_of(x) == shape_of(y):
                inner = self._operand(var, x, unit)
                if inner is None and unit == 1.0:
                    inner = self.graph.substitute(x)
                if inner is not None:
                    of = self.affine[y]
                    return operators.dequantize_add(
                        inner, self.bytes[y], scale=of.scale / unit, zero_point=of.zero_point
                    )
        first, second = self._operand(var, a, unit), self._operand(var, b, unit)
        return None if first is None or second is None else relax.op.add(first, second)

    def _product_in_units(self, var: relax.Var, value: relax.Call, unit: float):
        for x, y in ((0, 1), (1, 0)):
            inner = self._operand(var, value.args[x], unit)
            if inner is None:
                continue
            other = value.args[y]
            factor = other if is_const(other) else self._operand(var, other, 1.0)
            factor = self.graph.substitute(other) if factor is None else factor
            parts = (inner, factor) if x == 0 else (factor, inner)
            return relax.op.multiply(*parts)
        return None

    def _bounded_in_units(self, var: relax.Var, value: relax.Call, unit: float, to: Affine | None):
        """ReLU, and the minimum with a positive constant: a number, or one per channel."""
        x = value.args[0]
        is_lower = is_operator(value, ["relax.nn.relu"])
        if not is_lower and not (is_const(value.args[1]) and const_array(value.args[1]).min() >= 0):
            return None
        bound = np.zeros(()) if is_lower else const_array(value.args[1])
        saturates = to is not None and bool(
            to.zero_point == 0
            if is_lower
            else (np.rint(bound / to.scale) + to.zero_point >= STEPS).all()
        )
        # Neither bound changes which values the other one's saturation takes care of.
        only = len(self.plan.uses.readers[x]) == 1 and x not in self.affine
        inner = self._in_units(x, unit, to) if only else self._operand(var, x, unit)
        if inner is None or saturates:
            return inner
        return relax.op.nn.relu(inner) if is_lower else relax.op.minimum(inner, _over(bound, unit))

    def _mean_in_units(self, value: relax.Call, unit: float) -> relax.Expr:
        x = value.args[0]
        of = self.affine[x]
        pooled = operators.int8_average_pool(
            self.bytes[x], zero_point=of.zero_point, **window_mean(value)
        )
        made = relax.op.multiply(pooled, _over(np.asarray(of.scale), unit))
        shape = shape_of(value)
        return made if len(shape) == 4 else relax.op.reshape(made, shape)


def sink_residuals(func: relax.Function) -> relax.Function:
    """`func` with the bytes that are only added to something computed right before they are.

    Of two kernels that end in one addition, operator fusion gives it to the one that comes first: that must be the one
    whose float values are added, or these would have to be stored.
    """
    bindings = bindings_of(func)
    readers: dict[relax.Var, list[int]] = {}
    for i, binding in enumerate(bindings):
        for var in variables(binding.value):
            readers.setdefault(var, []).append(i)
    outputs = set(variables(func.body.body))
    before: dict[int, list[relax.VarBinding]] = {}
    moved = set()
    for i, binding in enumerate(bindings):
        at = readers.get(binding.var, [])
        residual = [
            is_call(bindings[j].value, operators.DEQUANTIZE_ADD)
            and bindings[j].value.args[1].same_as(binding.var)
            for j in at
        ]
        if is_call(binding.value, operators.QUANTIZE) and at and all(residual):
            if binding.var not in outputs:
                before.setdefault(at[0], []).append(binding)
                moved.add(i)
    if not moved:
        return func
    order = []
    for i, binding in enumerate(bindings):
        order += before.get(i, [])
        if i not in moved:
            order.append(binding)
    body = relax.SeqExpr([relax.DataflowBlock(order)], func.body.body)
    return relax.Function(
        list(func.params), body, func.ret_ty, is_pure=func.is_pure, attrs=func.attrs
    )


def largest_steps(value: relax.Expr) -> float:
    """What |value| cannot exceed, whatever the network reads: known for what is made of int32 sums and of bytes; else inf.

    Twice what exact arithmetic gives, which covers its roundings.
    """
    if is_const(value):
        return 2 * float(np.abs(const_array(value)).max(initial=0))
    if not isinstance(value, relax.Call):
        return np.inf
    if is_operator(value, ["relax.astype"]):
        sums = value.args[0].args[0] if is_operator(value.args[0], ["relax.add"]) else value.args[0]
        known = isinstance(sums, relax.Var) and str(sums.ty.dtype) == "int32"
        return 2.0**32 if known else np.inf
    if is_operator(value, ["relax.nn.relu"]):
        return largest_steps(value.args[0])
    if is_operator(value, ["relax.add", "relax.multiply"]):
        a, b = (largest_steps(v) for v in value.args)
        return a + b if value.op.name == "relax.add" else a * b
    if is_call(value, operators.DEQUANTIZE):
        return 2 * 255 * attrs_of(value)["scale"]
    if is_call(value, operators.DEQUANTIZE_ADD):
        return largest_steps(value.args[0]) + 2 * 255 * attrs_of(value)["scale"]
    return np.inf


def _over(array: np.ndarray, unit: float) -> relax.Expr:
    """A float32 constant in multiples of `unit`."""
    return constant((array.astype("float64") / unit).astype("float32"))
