# SPDX-License-Identifier: Apache-2.0
"""Named layer operators: Relax operators whose attributes carry the layer's name, so that no pass can lose it.

`kerf.conv2d(x, w)`   x [N, C, H, W] (`layout="NCHW"`) or [N, H, W, C] ("NHWC"), w constant [O, C/groups, R, S]
`kerf.dense(x, w)`    x [..., K], w constant [O, K] -> [..., O]

All float32. A bias, a residual or an activation is an ordinary Relax call after them.

`kerf.depth_to_space(x)`, no layer, puts the phases of a transposed convolution together: channel `(a * sw + b) * C + c` of
x [N, groups * sh * sw * C, H, W], in each group, becomes the pixels (sh * i + a, sw * j + b) of channel c, of which those
from `crop` on, as many as `size` says, are left.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import tvm
import tvm_ffi
from tvm import relax
from tvm.ir.expr import GenericConst

from schedules import errors

CONV2D = "kerf.conv2d"
POOLED_CONV2D = "kerf.pooled_conv2d"
DENSE = "kerf.dense"
DEPTH_TO_SPACE = "kerf.depth_to_space"

ELEMENTWISE = "kerf.elementwise"  # attribute of operators, see `register_operator`


def shape_of(expr) -> tuple[int, ...]:
    """The static shape of a Relax tensor expression."""
    return tuple(int(d) for d in expr.ty.shape)


def is_const(expr) -> bool:
    return isinstance(expr, GenericConst)


def const_array(expr):
    """The numpy value of a Relax constant (a view where the runtime allows)."""
    return expr.value.numpy()


def register_operator(
    name: str, infer: Callable[[relax.Call], relax.TensorType], *, elementwise: bool = False
) -> None:
    """Make `name` a pure Relax operator whose type is `infer(call)`. Call once per process and name.

    An `elementwise` operator computes each element from those at the same place: it takes its operands in any layout.
    """
    tvm.ir.register_op_attr(name, "FInferType", lambda call, _ctx: infer(call))
    tvm.ir.register_op_attr(name, "FPurity", True)
    tvm.ir.register_op_attr(name, ELEMENTWISE, elementwise)


def is_elementwise(call: relax.Call) -> bool:
    """Whether a call is of an operator registered as elementwise."""
    return bool(call.op.has_attr(ELEMENTWISE) and call.op.get_attr(ELEMENTWISE))


def operator_call(name: str, args: Sequence[relax.Expr], /, **attrs) -> relax.Call:
    """A call of a registered operator with its attributes (ints, strings, lists of ints) in a DictAttrs."""
    register()
    return relax.Call(
        tvm.ir.Op.get(name), list(args), attrs=tvm.ir.make_node("ir.DictAttrs", **attrs)
    )


def attrs_of(call: relax.Call) -> dict:
    """A named operator's attributes as plain Python values."""

    def plain(value):
        if isinstance(value, (str, int, float)):
            return value
        if hasattr(value, "__len__"):
            return [plain(v) for v in value]
        return value.value if hasattr(value, "value") else value

    return {str(k): plain(v) for k, v in call.attrs.items()}


def layers_computed_by(call: relax.Call) -> tuple[str, ...]:
    """The layers whose work a `kerf.*` call does: its attribute `layers`, else its `name`; none for any other call."""
    if not (isinstance(call.op, tvm.ir.Op) and call.op.name.startswith("kerf.")):
        return ()
    attrs = attrs_of(call)
    return (
        tuple(attrs["layers"]) if "layers" in attrs else (attrs["name"],) if "name" in attrs else ()
    )


def is_call(expr, name: str) -> bool:
    return isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == name


def is_layer(value) -> bool:
    """Whether a value is a dense named layer with a constant weight: what a treatment may replace."""
    return (is_call(value, CONV2D) or is_call(value, DENSE)) and is_const(value.args[1])


def conv2d(
    x,
    w,
    *,
    name: str,
    strides=(1, 1),
    padding=(0, 0, 0, 0),
    dilation=(1, 1),
    groups=1,
    layout="NCHW",
) -> relax.Call:
    """`kerf.conv2d`; padding is (top, left, bottom, right) zeros."""
    return operator_call(
        CONV2D, [x, w], name=name, strides=[int(v) for v in strides], padding=[int(v) for v in padding],
        dilation=[int(v) for v in dilation], groups=int(groups), layout=layout,
    )  # fmt: skip


def dense(x, w, *, name: str) -> relax.Call:
    """`kerf.dense`: the last axis of x against the rows of w."""
    return operator_call(DENSE, [x, w], name=name)


def depth_to_space(x, *, block, crop, size, groups=1, layout="NCHW") -> relax.Call:
    """`kerf.depth_to_space`; block (sh, sw), crop (top, left), size (H, W) of the result."""
    return operator_call(
        DEPTH_TO_SPACE, [x], block=[int(v) for v in block], crop=[int(v) for v in crop],
        size=[int(v) for v in size], groups=int(groups), layout=layout,
    )  # fmt: skip


def _channels_last_attrs(call: relax.Call) -> dict:
    """The attributes of a convolution, whose layout must be NHWC by now. Raises ScheduleError."""
    attrs = attrs_of(call)
    if attrs["layout"] != "NHWC":
        raise errors.ScheduleError(
            "convolution not channels last",
            where=attrs["name"],
            found=attrs["layout"],
            wanted="NHWC",
        )
    return attrs


def windows_of(call: relax.Call, x: tuple[int, ...] | None = None) -> tuple:
    """The first fields of a `schedules.windows.Problem`: of a convolution all of that class, of a dense layer (1, 1, rows,
    inputs, outputs). `x` is the input's shape channels last, where it lies otherwise. Raises ScheduleError in another layout."""
    x, w = x or shape_of(call.args[0]), shape_of(call.args[1])
    if len(w) == 2:
        return (1, 1, math.prod(x[:-1]), x[-1], w[0])
    attrs = _channels_last_attrs(call)
    padding, stride, dilation = (tuple(attrs[key]) for key in ("padding", "strides", "dilation"))
    return (*x, w[0], w[2], w[3], stride, padding, dilation, attrs["groups"])


def conv2d_output_hw(
    attrs: dict, height: int, width: int, kernel: tuple[int, int]
) -> tuple[int, int]:
    """Output height and width of a convolution with these attributes."""
    top, left, bottom, right = attrs["padding"]
    sizes = (height + top + bottom, width + left + right)
    return tuple(
        (size - dilation * (k - 1) - 1) // stride + 1
        for size, k, stride, dilation in zip(sizes, kernel, attrs["strides"], attrs["dilation"])
    )


def result_hw(attrs: dict, height: int, width: int, kernel: tuple[int, int]) -> tuple[int, int]:
    """As `conv2d_output_hw`, of an operator that may take the maximum over windows (`passes/max_pooling.py`) as well."""
    sizes = conv2d_output_hw(attrs, height, width, kernel)
    if "pool_size" not in attrs:
        return sizes
    pool = {key: attrs[f"pool_{key}"] for key in ("strides", "padding", "dilation")}
    return conv2d_output_hw(pool, *sizes, attrs["pool_size"])


def infer_conv2d(call: relax.Call) -> relax.TensorType:
    """Result type of any convolution operator whose first two arguments are x and w [O, C/groups, R, S]."""
    attrs = attrs_of(call)
    x, w = shape_of(call.args[0]), shape_of(call.args[1])
    n, h, width = (x[0], x[1], x[2]) if attrs["layout"] == "NHWC" else (x[0], x[2], x[3])
    oh, ow = result_hw(attrs, h, width, w[2:])
    shape = (n, oh, ow, w[0]) if attrs["layout"] == "NHWC" else (n, w[0], oh, ow)
    return relax.TensorType(shape, call.args[0].ty.dtype)


def infer_dense(call: relax.Call) -> relax.TensorType:
    x, w = shape_of(call.args[0]), shape_of(call.args[1])
    return relax.TensorType((*x[:-1], w[0]), call.args[0].ty.dtype)


def infer_depth_to_space(call: relax.Call) -> relax.TensorType:
    attrs, x = attrs_of(call), shape_of(call.args[0])
    (sh, sw), last = attrs["block"], attrs["layout"] == "NHWC"
    channels = x[3 if last else 1] // (sh * sw)
    shape = (x[0], *attrs["size"], channels) if last else (x[0], channels, *attrs["size"])
    return relax.TensorType(shape, call.args[0].ty.dtype)


@functools.cache
def register() -> None:
    """Register the layer operators and our errors; idempotent, called on first use, never at import."""
    register_operator(CONV2D, infer_conv2d)
    register_operator(POOLED_CONV2D, infer_conv2d)
    register_operator(DENSE, infer_dense)
    register_operator(DEPTH_TO_SPACE, infer_depth_to_space)
    # Raised inside a pass, an error goes through TVM, which would make a RuntimeError of what it does not know.
    for error in errors.classes():
        tvm_ffi.error.register_error(error.__name__, error)


def multiply_accumulates(call: relax.Call) -> int:
    """Multiplications of the dense operator, one per weight used per output."""
    w = shape_of(call.args[1])
    return math.prod(shape_of(call)) * math.prod(w[1:])
