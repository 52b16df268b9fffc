# SPDX-License-Identifier: Apache-2.0
"""Evaluate a Relax function in numpy, one small function per operator: the reference that
verification stands on.

It shares no code with the kernels. Floats are computed in `dtype` (float64 by default), whatever
the graph says; integers and booleans keep the graph's types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tvm
from tvm import relax

from passes.layers import CONV2D, DENSE, DEPTH_TO_SPACE, attrs_of, const_array, is_const
from passes.numpy_images import conv2d, depth_to_space
from passes.numpy_nn import NN_OPERATORS, dense
from passes.numpy_operators import OPERATORS, Numeric
from passes.rewriting import bindings_of, variables
from schedules.errors import KerfError, UserError

# The layer operators themselves; families bring their own.
LAYER_REFERENCES: Mapping[str, Callable[..., np.ndarray]] = {
    CONV2D: conv2d,
    DENSE: dense,
    DEPTH_TO_SPACE: depth_to_space,
}


def evaluate(
    func_or_mod: relax.Function | tvm.IRModule,
    inputs: Sequence[np.ndarray],
    *,
    dtype: str = "float64",
    references: Mapping[str, Callable[..., np.ndarray]] | None = None,
    observe: Callable[[str, np.ndarray], None] | None = None,
) -> list[np.ndarray]:
    """The outputs for `inputs`, in order.

    `references` maps other operators to `(attributes, *arrays) -> array`; `observe(name, array)` is
    called with every tensor as it is computed. Raises KerfError naming an operator there is no
    reference for, UserError for wrong inputs.
    """
    func = func_or_mod["main"] if isinstance(func_or_mod, tvm.IRModule) else func_or_mod
    numeric = Numeric(dtype)
    values = _bind_inputs(func, inputs, numeric)
    references = {**LAYER_REFERENCES, **(references or {})}
    bindings = bindings_of(func)
    last_use = {var: i for i, b in enumerate(bindings) for var in variables(b.value)}
    kept = set(variables(func.body.body))
    for i, binding in enumerate(bindings):
        value = evaluate_value(binding.value, values, numeric, references, where=binding.var.name)
        values[binding.var] = value
        if observe is not None and isinstance(value, np.ndarray):
            observe(binding.var.name, value)
        for var in variables(
            binding.value
        ):  # activations are large: let go of each after its last reader
            if last_use[var] == i and var not in kept:
                values.pop(var, None)
    result = _operand(func.body.body, values, numeric)
    return list(_flatten(result))


def _bind_inputs(func: relax.Function, inputs: Sequence[np.ndarray], numeric: Numeric) -> dict:
    if len(inputs) != len(func.params):
        raise UserError(
            "wrong number of inputs", found=str(len(inputs)), wanted=str(len(func.params))
        )
    values = {}
    for param, array in zip(func.params, inputs):
        shape = tuple(int(d) for d in param.ty.shape)
        if tuple(array.shape) != shape:
            raise UserError(
                "wrong input shape",
                where=param.name,
                found=str(tuple(array.shape)),
                wanted=str(shape),
            )
        values[param] = np.asarray(array).astype(numeric.dtype(param.ty.dtype), copy=False)
    return values


def _flatten(value):
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flatten(item)
    else:
        yield value


def _operand(expr, values: Mapping, numeric: Numeric):
    if isinstance(expr, relax.Var):
        return values[expr]
    if is_const(expr):
        array = const_array(expr)
        return array.astype(numeric.dtype(str(array.dtype)), copy=False)
    if isinstance(expr, relax.Tuple):
        return tuple(_operand(f, values, numeric) for f in expr.fields)
    if isinstance(expr, relax.ShapeExpr):
        return tuple(int(v) for v in expr.values)
    if hasattr(expr, "value"):  # an IntImm, FloatImm or StringImm
        return expr.value
    raise KerfError("no numpy value for an operand", found=type(expr).__name__)


def evaluate_value(
    expr: relax.Expr, values: Mapping, numeric: Numeric, references: Mapping, where: str = ""
):
    """One binding's value: an array, or a tuple of arrays."""
    if isinstance(expr, relax.TupleGetItem):
        return _operand(expr.tuple_value, values, numeric)[expr.index]
    if not isinstance(expr, relax.Call):
        return _operand(expr, values, numeric)
    name = expr.op.name if isinstance(expr.op, tvm.ir.Op) else type(expr.op).__name__
    args = [_operand(a, values, numeric) for a in expr.args]
    with np.errstate(all="ignore"):  # infinities and NaN are legitimate values here
        if name in references:
            result = references[name](attrs_of(expr), *args)
        elif operator := OPERATORS.get(name) or NN_OPERATORS.get(name):
            result = operator(numeric, expr.attrs, *args)
        else:
            raise KerfError("no numpy reference for an operator", where=where, found=name)
    return _typed(result, expr.ty, numeric, where or name)


def _typed(result, ty, numeric: Numeric, where: str):
    if isinstance(result, tuple) and hasattr(ty, "fields"):
        return tuple(_typed(r, t, numeric, where) for r, t in zip(result, ty.fields))
    if not isinstance(ty, relax.TensorType):
        return result
    array = np.asarray(result).astype(numeric.dtype(ty.dtype), copy=False)
    shape = tuple(int(d) for d in ty.shape)
    if array.shape != shape:
        raise KerfError(
            "a reference disagrees with the graph",
            where=where,
            found=str(array.shape),
            wanted=str(shape),
        )
    return array
