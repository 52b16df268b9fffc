# SPDX-License-Identifier: Apache-2.0
"""Move the whole graph from NCHW to NHWC.

    rewrite: kerf.conv2d(x, w, layout="NCHW")
             ->  kerf.conv2d(permute_dims(x, [0, 2, 3, 1]), w, layout="NHWC")
    requires: kerf.* convolutions (any operator with a `layout` attribute) in NCHW; squeeze and
      flatten spelled reshape
    ensures: convolution, pooling and resizing are NHWC; whatever lies between them is as well,
      where it can be

Every 4-D tensor may exist in NCHW ("plain"), in NHWC ("last"), or in both; the form that is missing
is made from the other on demand, once. Convolution-like operators ask for NHWC; operators that can
work in either layout follow their operands; every other operator gets NCHW back, which costs a
permute that `layout_changes` reports.
"""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax

from passes.layers import (
    attrs_of,
    const_array,
    is_call,
    is_const,
    is_elementwise,
    operator_call,
    shape_of,
)
from passes.numpy_operators import BINARY, UNARY
from passes.rewriting import (
    Graph,
    axes_of,
    bindings_of,
    constant,
    ints,
    permutation,
    rewrite_module,
    variables,
)

TO_LAST = (0, 2, 3, 1)
TO_FIRST = (0, 3, 1, 2)
# Where each NCHW axis lies in NHWC.
_AXIS = {0: 0, 1: 3, 2: 1, 3: 2}

ELEMENTWISE = frozenset(
    [f"relax.{name}" for name in (*UNARY, *BINARY)]
    + [
        f"relax.{name}"
        for name in (
            "divide",
            "rsqrt",
            "round",
            "clip",
            "where",
            "astype",
            "ewise_fma",
            "zeros_like",
            "ones_like",
            "full_like",
            "logical_and",
            "logical_or",
            "logical_xor",
            "logical_not",
        )
    ]
    + [
        f"relax.nn.{name}"
        for name in ("relu", "leakyrelu", "selu", "gelu", "gelu_tanh", "silu", "softplus")
    ]
)
_REDUCTIONS = frozenset(
    f"relax.{name}" for name in ("sum", "mean", "prod", "max", "min", "variance", "std")
)


def layout_changes(mod: tvm.IRModule) -> list[str]:
    """The names of the 4-D permutes of `main`, in program order."""
    return [
        b.var.name
        for b in bindings_of(mod["main"])
        if is_call(b.value, "relax.permute_dims") and len(shape_of(b.value)) == 4
    ]


def _is_reshape(shape: tuple[int, ...]) -> bool:
    """Whether NCHW and NHWC tensors of this NCHW shape hold their values in the same order."""
    return shape[1] == 1 or shape[2] * shape[3] == 1


class _Planner:
    def __init__(self, func: relax.Function):
        self.func, self.graph = func, Graph(func)
        self.plain: dict[relax.Var, relax.Expr] = {p: p for p in func.params}
        self.last: dict[relax.Var, relax.Expr] = {}
        self.widened: dict[relax.Var, relax.Expr] = {}  # tensors of lower rank, as NHWC

    def run(self) -> relax.Function:
        for binding in bindings_of(self.func):
            self._visit(binding.var, binding.value)
        for var in variables(self.func.body.body):
            if var in self.plain or var in self.last:
                self.graph.alias(var, self.to_plain(var))
        return self.graph.finish(self.func)

    def _visit(self, var: relax.Var, value: relax.Expr) -> None:
        handler = None
        if isinstance(value, relax.TupleGetItem) and value.tuple_value in self.last:
            tupled = self.last[value.tuple_value]
            self.last[var] = self.graph.bind(var.name, relax.TupleGetItem(tupled, value.index))
            return
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
            handler = self._handler(value)
        if handler is None or not handler(var, value):
            self.plain[var] = self.graph.bind(var.name, self._with_plain(value))

    def _handler(self, call: relax.Call):
        name = call.op.name
        if name.startswith("kerf."):
            if is_elementwise(call):
                return self._elementwise
            return self._convolution if attrs_of(call).get("layout") == "NCHW" else None
        if name in ELEMENTWISE:
            return self._elementwise
        if name in _REDUCTIONS:
            return self._reduction
        return {
            "relax.nn.max_pool2d": self._pool,
            "relax.nn.avg_pool2d": self._pool,
            "relax.nn.adaptive_avg_pool2d": self._adaptive_pool,
            "relax.image.resize2d": self._resize,
            "relax.concat": self._concat,
            "relax.split": self._split,
            "relax.nn.softmax": self._softmax,
            "relax.nn.log_softmax": self._softmax,
            "relax.nn.pad": self._pad,
            "relax.strided_slice": self._slice,
            "relax.nn.prelu": self._prelu,
            "relax.nn.group_norm": self._normalisation,
            "relax.nn.instance_norm": self._normalisation,
            "relax.permute_dims": self._permute,
            "relax.reshape": self._reshape,
            "relax.broadcast_to": self._broadcast,
        }.get(name)

    # The two forms of a tensor.

    def has_last(self, expr: relax.Expr) -> bool:
        return isinstance(expr, relax.Var) and expr in self.last

    def to_plain(self, expr: relax.Expr) -> relax.Expr:
        if not isinstance(expr, relax.Var):
            return expr
        if expr not in self.plain:
            last = self.last[expr]
            if isinstance(expr.ty, tvm.ir.TupleType):
                items = [
                    self._first(relax.TupleGetItem(last, i), expr.name)
                    for i in range(len(expr.ty.fields))
                ]
                self.plain[expr] = self.graph.emit(relax.Tuple(items), f"{expr.name}_nchw")
            else:
                self.plain[expr] = self._first(last, expr.name)
        return self.plain[expr]

    def _first(self, last: relax.Expr, name: str) -> relax.Expr:
        n, h, w, c = shape_of(last)
        same = _is_reshape((n, c, h, w))
        moved = (
            relax.op.reshape(last, (n, c, h, w)) if same else relax.op.permute_dims(last, TO_FIRST)
        )
        return self.graph.emit(moved, f"{name}_nchw")

    def to_last(self, expr: relax.Expr) -> relax.Expr:
        """The NHWC form; tensors of lower rank count as 4-D with leading ones, scalars stay."""
        if isinstance(expr, relax.Var) and expr in self.last:
            return self.last[expr]
        if not isinstance(expr.ty, relax.TensorType) or len(shape_of(expr)) == 0:
            return self.to_plain(expr)
        shape = shape_of(expr)
        if is_const(expr):
            array = const_array(expr)
            if math.prod(shape) == 1:
                return constant(array.reshape(()))
            return constant(array.reshape((1,) * (4 - len(shape)) + shape).transpose(TO_LAST))
        n, c, h, w = full = (1,) * (4 - len(shape)) + shape
        if expr in self.widened:
            return self.widened[expr]
        plain = self.to_plain(expr)
        if _is_reshape(full):
            moved = relax.op.reshape(plain, (n, h, w, c))
        else:
            wide = plain if len(shape) == 4 else relax.op.reshape(plain, full)
            moved = relax.op.permute_dims(wide, TO_LAST)
        found = self.graph.emit(moved, f"{expr.name}_nhwc")
        (self.last if len(shape) == 4 else self.widened)[expr] = found
        return found

    def _with_plain(self, value: relax.Expr) -> relax.Expr:
        for var in variables(value):
            if var in self.plain or var in self.last:
                self.graph.alias(var, self.to_plain(var))
        return self.graph.substitute(value)

    def _set_last(self, var: relax.Var, value: relax.Expr) -> bool:
        self.last[var] = self.graph.bind(var.name, value)
        return True

    # Operators that ask for NHWC.

    def _convolution(self, var, call) -> bool:
        args = [self.to_last(call.args[0]), *(self.to_plain(a) for a in list(call.args)[1:])]
        return self._set_last(
            var, operator_call(call.op.name, args, **{**attrs_of(call), "layout": "NHWC"})
        )

    def _pool(self, var, call) -> bool:
        if str(call.attrs.layout) != "NCHW":
            return False
        a = call.attrs
        make = (
            relax.op.nn.max_pool2d
            if call.op.name.endswith("max_pool2d")
            else relax.op.nn.avg_pool2d
        )
        return self._set_last(
            var,
            make(
                self.to_last(call.args[0]),
                ints(a.pool_size),
                ints(a.strides),
                ints(a.padding),
                ints(a.dilation),
                bool(a.ceil_mode),
                bool(a.count_include_pad),
                layout="NHWC",
            ),
        )

    def _adaptive_pool(self, var, call) -> bool:
        if str(call.attrs.layout) != "NCHW":
            return False
        size = None if call.attrs.output_size is None else ints(call.attrs.output_size)
        return self._set_last(
            var, relax.op.nn.adaptive_avg_pool2d(self.to_last(call.args[0]), size, layout="NHWC")
        )

    def _resize(self, var, call) -> bool:
        a = call.attrs
        if str(a.layout) != "NCHW":
            return False
        return self._set_last(
            var,
            relax.op.image.resize2d(
                self.to_last(call.args[0]),
                call.args[1],
                roi=tuple(float(r) for r in a.roi),
                layout="NHWC",
                method=str(a.method),
                coordinate_transformation_mode=str(a.coordinate_transformation_mode),
                rounding_method=str(a.rounding_method),
                cubic_alpha=float(a.cubic_alpha),
                cubic_exclude=int(a.cubic_exclude),
                extrapolation_value=float(a.extrapolation_value),
                out_dtype=a.out_dtype,
            ),
        )

    # Operators that follow their operands.

    def _elementwise(self, var, call) -> bool:
        args = list(call.args)
        if len(shape_of(var)) != 4 or not any(self.has_last(a) for a in args):
            return False
        args = [self.to_last(a) for a in args]
        return self._set_last(var, relax.Call(call.op, args, call.attrs, call.ty_args))

    def _reduction(self, var, call) -> bool:
        x = call.args[0]
        if not self.has_last(x) or len(shape_of(x)) != 4:
            return False
        axes = [_AXIS[a] for a in axes_of(call.attrs.axis, 4)]
        value = getattr(relax.op, call.op.name.removeprefix("relax."))(
            self.to_last(x), sorted(axes), bool(call.attrs.keepdims)
        )
        if call.attrs.keepdims:
            return self._set_last(var, value)
        left = [_AXIS[a] for a in range(4) if _AXIS[a] not in axes]
        if left != sorted(left):  # the axes that remain would come out in another order
            return False
        self.plain[var] = self.graph.bind(var.name, value)
        return True

    def _concat(self, var, call) -> bool:
        parts = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
        if len(shape_of(var)) != 4 or not any(self.has_last(p) for p in parts):
            return False
        axis = _AXIS[(0 if call.attrs.axis is None else int(call.attrs.axis)) % 4]
        return self._set_last(var, relax.op.concat([_exact_last(self, p) for p in parts], axis))

    def _split(self, var, call) -> bool:
        if not self.has_last(call.args[0]):
            return False
        sections = call.attrs.indices_or_sections
        sections = ints(sections) if hasattr(sections, "__len__") else int(sections)
        return self._set_last(
            var,
            relax.op.split(self.to_last(call.args[0]), sections, _AXIS[int(call.attrs.axis) % 4]),
        )

    def _softmax(self, var, call) -> bool:
        if not self.has_last(call.args[0]):
            return False
        make = (
            relax.op.nn.softmax if call.op.name == "relax.nn.softmax" else relax.op.nn.log_softmax
        )
        return self._set_last(
            var, make(self.to_last(call.args[0]), _AXIS[int(call.attrs.axis) % 4])
        )

    def _pad(self, var, call) -> bool:
        if not self.has_last(call.args[0]):
            return False
        widths = ints(call.attrs.pad_width)
        moved = [w for axis in TO_LAST for w in widths[2 * axis : 2 * axis + 2]]
        value = relax.op.nn.pad(
            self.to_last(call.args[0]), moved, str(call.attrs.pad_mode), float(call.attrs.pad_value)
        )
        return self._set_last(var, value)

    def _slice(self, var, call) -> bool:
        if not self.has_last(call.args[0]):
            return False
        axes = [_AXIS[a % 4] for a in ints(call.args[1])]
        rest = [ints(a) for a in list(call.args)[2:]]
        value = relax.op.strided_slice(
            self.to_last(call.args[0]), axes, *rest, assume_inbound=bool(call.attrs.assume_inbound)
        )
        return self._set_last(var, value)

    def _prelu(self, var, call) -> bool:
        if not self.has_last(call.args[0]) or int(call.attrs.axis) % 4 != 1:
            return False
        return self._set_last(
            var, relax.op.nn.prelu(self.to_last(call.args[0]), self.to_plain(call.args[1]), 3)
        )

    def _normalisation(self, var, call) -> bool:
        a, args = call.attrs, list(call.args)
        if not self.has_last(args[0]) or int(a.channel_axis) % 4 != 1:
            return False
        rest = [self.to_plain(arg) for arg in args[1:]]
        axes = sorted(_AXIS[axis] for axis in axes_of(a.axes, 4))
        common = {
            "axes": axes,
            "epsilon": float(a.epsilon),
            "center": bool(a.center),
            "scale": bool(a.scale),
        }
        if call.op.name.endswith("group_norm"):
            value = relax.op.nn.group_norm(
                self.to_last(args[0]), *rest, num_groups=int(a.num_groups), channel_axis=3, **common
            )
        else:
            value = relax.op.nn.instance_norm(
                self.to_last(args[0]), *rest, channel_axis=3, **common
            )
        return self._set_last(var, value)

    def _broadcast(self, var, call) -> bool:
        x = call.args[0]
        if not self.has_last(x) or len(shape_of(var)) != 4 or len(shape_of(x)) != 4:
            return False
        n, c, h, w = shape_of(var)
        return self._set_last(var, relax.op.broadcast_to(self.to_last(x), (n, h, w, c)))

    # Operators that change what the axes mean.

    def _permute(self, var, call) -> bool:
        x, axes = call.args[0], permutation(call)
        if len(axes) != 4:
            return False
        if self.has_last(x):
            composed = [TO_FIRST[a] for a in axes]
            last = self.last[x]
            value = last if composed == [0, 1, 2, 3] else relax.op.permute_dims(last, composed)
            self.plain[var] = self.graph.bind(var.name, value)
            return True
        if tuple(axes) == TO_FIRST:
            self.last[var] = self.to_plain(x)
            return True
        return False

    def _reshape(self, var, call) -> bool:
        x, shape = call.args[0], shape_of(var)
        source = self.to_plain(x) if not self.has_last(x) else self.last[x]
        if self.has_last(x) and (len(shape_of(x)) != 4 or not _is_reshape(shape_of(x))):
            return False
        if len(shape) == 4 and shape[2] * shape[3] == 1:
            return self._set_last(var, relax.op.reshape(source, (shape[0], 1, 1, shape[1])))
        self.plain[var] = self.graph.bind(var.name, relax.op.reshape(source, shape))
        return True


def _exact_last(planner: _Planner, part: relax.Expr) -> relax.Expr:
    """The NHWC form of an operand that must keep its rank (a one-element constant must not become a
    scalar).
    """
    if is_const(part):
        return constant(np.transpose(const_array(part), TO_LAST))
    return planner.to_last(part)


@tvm.transform.module_pass(opt_level=0, name="kerf.ChannelsLast")
class ChannelsLast:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(mod, lambda func: _Planner(func).run())
