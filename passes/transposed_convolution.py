# SPDX-License-Identifier: Apache-2.0
"""Transposed convolutions as convolutions of their phases, and what follows them moved before the phases are put together.

    rewrite: nn.conv2d_transpose(x, w)                    ->  depth_to_space(conv2d(x, w by phase))
             f(depth_to_space(x), ...), f elementwise     ->  depth_to_space(f(x, ...))

With stride s, output pixel s * i + a meets every s-th tap of the kernel, those congruent to a: each of the s * s phases is
a convolution of stride 1 with a kernel of ceil(R / s), and all are one convolution with s * s as many outputs. Taps that
a phase lacks are zero. f may have constants per channel among its operands; all others come from such phases too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.layers import (
    DEPTH_TO_SPACE,
    attrs_of,
    const_array,
    is_const,
    is_elementwise,
    operator_call,
    shape_of,
)
from passes.numpy_operators import BINARY, UNARY
from passes.rewriting import Graph, constant

_ELEMENTWISE = frozenset(
    [f"relax.{n}" for n in (*UNARY, *BINARY, "divide", "rsqrt", "clip")]
    + [f"relax.nn.{n}" for n in ("relu", "leakyrelu", "gelu", "gelu_tanh", "silu", "softplus")]
)


@dataclass(frozen=True)
class Phases:
    """The convolution of all phases: its weight [groups * sh * sw * O, C, T, U], padding (top, left, bottom, right), and
    `crop` of what depth to space makes of its result."""

    weight: np.ndarray
    padding: tuple[int, int, int, int]
    crop: tuple[int, int]


def phases_of(
    weight: np.ndarray,
    image: tuple[int, int],
    result: tuple[int, int],
    strides,
    padding,
    groups: int,
) -> Phases | None:
    """The phases of the transposed convolution of an image (H, W) with `weight` [C, O/groups, R, S].

    `padding` is what the transposed convolution leaves out at the (top, left), `result` its height and width. None where it
    leaves out more than a kernel reaches, so that some of the image is never read.
    """
    channels, outputs = weight.shape[:2]
    taps = [-(-k // s) for k, s in zip(weight.shape[2:], strides)]
    first = [p // s for p, s in zip(padding, strides)]
    last = [(p + size - 1) // s for p, size, s in zip(padding, result, strides)]
    before = [t - 1 - f for t, f in zip(taps, first)]
    after = [end - size + 1 for end, size in zip(last, image)]
    if min(*before, *after) < 0:
        return None
    (sh, sw), (t, u) = strides, taps
    full = np.zeros((channels, outputs, t * sh, u * sw), weight.dtype)
    full[:, :, : weight.shape[2], : weight.shape[3]] = weight
    # group, c, o, t, phase, u, phase -> group, phase, phase, o, c, and taps from the last to the first
    split = full.reshape(groups, channels // groups, outputs, t, sh, u, sw)[:, :, :, ::-1, :, ::-1]
    phases = split.transpose(0, 4, 6, 2, 1, 3, 5).reshape(-1, channels // groups, t, u)
    crop = tuple(p % s for p, s in zip(padding, strides))
    return Phases(np.ascontiguousarray(phases), (*before, *after), crop)


def sink_depth_to_space(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """f(depth_to_space(x), ...) -> depth_to_space(f(x, ...))"""
    if not (isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op)) or not value.args:
        return None
    if value.op.name not in _ELEMENTWISE and not is_elementwise(value):
        return None
    spaces = [graph.call(a, DEPTH_TO_SPACE) for a in value.args]
    like = next((s for s in spaces if s is not None), None)
    if like is None:
        return None
    attrs, args = attrs_of(like), []
    for arg, space in zip(value.args, spaces):
        if space is not None and attrs_of(space) == attrs and shape_of(arg) == shape_of(like):
            args.append(space.args[0])
        elif (inner := _by_phase(arg, like)) is not None:
            args.append(inner)
        else:
            return None
    moved = relax.Call(value.op, args, value.attrs)
    return operator_call(DEPTH_TO_SPACE, [moved], **attrs)


def _by_phase(expr: relax.Expr, like: relax.Call) -> relax.Expr | None:
    """A number, or a constant per channel, against the result of `like`: the same against its operand."""
    if not isinstance(expr.ty, relax.TensorType):
        return expr
    if not is_const(expr):
        return None
    array, shape = const_array(expr), shape_of(like)
    if array.size == 1 and array.ndim <= len(shape):
        return expr
    if array.shape not in ((shape[1], 1, 1), (1, shape[1], 1, 1)):
        return None
    attrs = attrs_of(like)
    split = array.reshape(attrs["groups"], 1, -1)
    spread = np.repeat(split, attrs["block"][0] * attrs["block"][1], axis=1)
    return constant(spread.reshape(1, -1, 1, 1))
