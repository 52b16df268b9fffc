# SPDX-License-Identifier: Apache-2.0
"""Take the maximum over windows where a convolution is made, so that its whole result never exists.

    rewrite: y = kerf.conv2d(x, w); z = relu(y + b); max_pool2d(z)
             ->  y = kerf.pooled_conv2d(x, w); relu(y + b)
    and so of every convolution for which its family has such an operator (`Family.pooling`)
    requires: NCHW, as canonicalized
    ensures: the same values, bit for bit but for the sign of zeros

What never falls commutes with a maximum: rounding does not fall, so adding a finite number to a channel, multiplying it by a
positive one, bounding it and ReLU may come after the maximum as well as before it; of integer sums, which no addition
takes beyond 32 bits, also their conversion to floats and rounding to bytes. All of them leave NaN what it is, and so does
the maximum. A window that holds nothing of the image would become what follows of minus infinity, and stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import tvm
from tvm import DataType, relax

from passes import families
from passes.family import Pooling
from passes.layers import (
    attrs_of,
    const_array,
    is_call,
    is_const,
    multiply_accumulates,
    operator_call,
    shape_of,
)
from passes.rewriting import Graph, ints, rewrite_function, rewrite_module
from schedules.errors import Declined

# Bytes of what is pooled up to which it stays near until it is read again: at 392 KiB nothing is gained, at 784
# the two kernels take .77 of the time (3x3, out:4 at 10 %, measured on Cascade Lake).
_NEAR = 512 * 1024


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())


def _positive(array: np.ndarray) -> bool:
    return _finite(array) and bool((array > 0).all())


def _number(array: np.ndarray) -> bool:
    return not np.isnan(array).any()


# Operators of one tensor and one constant, by what makes them rise with the tensor: a condition on the constant.
_RISING: dict[str, Callable[[np.ndarray], bool]] = {
    "relax.add": _finite,
    "relax.subtract": _finite,
    "relax.multiply": _positive,
    "relax.divide": _positive,
    "relax.maximum": _number,
    "relax.minimum": _number,
}
_RISING_ALONE = ("relax.nn.relu", "relax.nn.relu6")  # with their first operand, whatever it is
_FIRST_ONLY = ("relax.subtract", "relax.divide")  # a constant less the tensor falls with it


def rising_operand(call: relax.Expr) -> int | None:
    """Which operand of an operator its result rises with, element by element, and is as large as; None if unknown."""
    if not isinstance(call, relax.Call) or not isinstance(call.op, tvm.ir.Op):
        return None
    name = call.op.name
    if name in _RISING_ALONE:
        return 0
    if name == "relax.astype":
        types = [str(e.ty.dtype) for e in (call.args[0], call)]
        return 0 if types == ["int32", "float32"] else None
    if name == "relax.nn.leakyrelu":
        return 0 if 0 < float(call.attrs.alpha) < math.inf else None
    if name not in _RISING:
        return None
    for position, other in ((0, call.args[1]), (1, call.args[0])):
        if not is_const(other) or (position == 1 and name in _FIRST_ONLY):
            continue
        own = (1,) * (4 - len(shape_of(other))) + shape_of(other)
        same = shape_of(call.args[position]) == shape_of(call)
        if same and own[2:] == (1, 1) and _RISING[name](const_array(other)):
            return position
    return None


def _attributes(pool: relax.Call) -> dict | Declined:
    """The attributes `pool_...` of a max_pool2d."""
    a = pool.attrs
    size, strides, dilation = (ints(v) for v in (a.pool_size, a.strides, a.dilation))
    before = ints(a.padding)[:2]
    behind = []
    for i, (taken, given) in enumerate(zip(shape_of(pool)[2:], shape_of(pool.args[0])[2:])):
        reach = (size[i] - 1) * dilation[i]
        for o in range(taken):
            first = o * strides[i] - before[i]
            if not any(0 <= first + t * dilation[i] < given for t in range(size[i])):
                return Declined("a window holds nothing of the image")
        behind.append(max(0, (taken - 1) * strides[i] - before[i] + reach + 1 - given))
    return {
        "pool_size": size, "pool_strides": strides, "pool_dilation": dilation, "pool_padding": before + behind,
    }  # fmt: skip


def _poolings() -> dict[str, Pooling]:
    return {name: pooling for family in families() for name, pooling in family.pooling.items()}


def pooled(pool: relax.Expr, graph: Graph) -> relax.Call | Declined | None:
    """What computes a max_pool2d with the convolution behind it in one operator, or why not; None if there is none."""
    if not is_call(pool, "relax.nn.max_pool2d"):
        return None
    poolings = _poolings()
    rounding = {name for pooling in poolings.values() for name in pooling.rounding}
    chain: list[tuple[relax.Call, int]] = []
    x, once = pool.args[0], True
    while True:
        value, once = graph.definition(x), once and graph.is_read_once(x)
        if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
            return None
        if value.op.name in poolings:
            break
        position = 0 if value.op.name in rounding else rising_operand(value)
        if position is None:
            return None
        chain.append((value, position))
        x = value.args[position]
    pooling, layer = poolings[value.op.name], attrs_of(value)["name"]
    attributes = _attributes(pool)
    suits = attributes
    if not isinstance(attributes, Declined):
        suits = pooling.suits(value, attributes)
    if str(pool.attrs.layout) != "NCHW" or suits is False:
        return None
    if any(c.op.name not in pooling.rounding for c, _ in chain if c.op.name in rounding):
        return Declined(f"{layer}: its sums, which may be NaN, are rounded to bytes before")
    if not once:
        return Declined(f"{layer}: others read its result before it is pooled")
    if DataType(pool.ty.dtype).itemsize * math.prod(shape_of(value)) <= _NEAR:
        return Declined(f"{layer}: its result stays near until it is pooled")
    if isinstance(suits, Declined):
        return Declined(f"{layer}: {suits.reason}")
    attributes["flops"] = 2 * multiply_accumulates(value)
    new = operator_call(pooling.operator, list(value.args), **attrs_of(value), **attributes)
    for call, position in reversed(chain):
        args = list(call.args)
        args[position] = new
        new = relax.Call(call.op, args, call.attrs, call.ty_args)
    return new


def left_apart(mod: tvm.IRModule) -> list[str]:
    """Lines for the report: the convolutions whose maxima are taken by a kernel of their own, and why."""
    found: list[str] = []

    def note(value: relax.Expr, graph: Graph) -> None:
        outcome = pooled(value, graph)
        if isinstance(outcome, Declined):
            found.append(f"max pooling apart from its convolution: {outcome.reason}")

    rewrite_function(mod["main"], (note,))
    return found


def _rule(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    found = pooled(value, graph)
    return None if isinstance(found, Declined) else found


@tvm.transform.module_pass(opt_level=0, name="kerf.PoolConvolutions")
class PoolConvolutions:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        for family in families():
            family.register()
        return rewrite_module(mod, lambda func: rewrite_function(func, (_rule,)))
