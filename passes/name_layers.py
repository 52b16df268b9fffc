# SPDX-License-Identifier: Apache-2.0
"""Make convolutions and matrix products with constant weights named layers.

    rewrite: nn.conv2d(x, const w)                   ->  kerf.conv2d(x, w, name=...)
             nn.conv1d(x, const w)                   ->  reshape(kerf.conv2d(reshape(x), w[:, :, None, :]))
             nn.conv2d_transpose(x, const w)         ->  depth_to_space(kerf.conv2d(x, w by phase)), as well of one dimension
             matmul(x, const w) with w [K, O]        ->  kerf.dense(x, w.T)
             matmul(x, permute_dims(const w [O, K])) ->  kerf.dense(x, w)

A weight that the model stores as integers also gets what they are multiplied by: `weight_scale`, one number or one per
output.

Requires float32, NCHW / OIHW (NCW / OIW). Ensures that every such operator with a constant weight is a named one; a
weight that is computed, batched or the left operand of a product stays with its Relax operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.relax import PyExprMutator, expr_functor

from passes import layers
from passes.layers import const_array, is_call, is_const, shape_of
from passes.transposed_convolution import phases_of


@dataclass(frozen=True)
class Grid:
    """A weight is a multiple of `scale`: one number, or one for each index along `axis`."""

    scale: np.ndarray
    axis: int | None = None


class _Names:
    """The name of each weight: the given one, made unique where two weights share it, or `conv2d_3`."""

    def __init__(self, given: Mapping[relax.Expr, str]):
        self.given, self.owners, self.claimed, self.anonymous = given, {}, {}, 0

    def of(self, weight: relax.Expr, kind: str) -> str:
        if weight not in self.claimed:
            name = self.given.get(weight)
            if name is None:
                self.anonymous += 1
                name = f"{kind}_{self.anonymous}"
            count = self.owners[name] = self.owners.get(name, 0) + 1
            self.claimed[weight] = name if count == 1 else f"{name}#{count}"
        return self.claimed[weight]


@expr_functor.mutator
class _Namer(PyExprMutator):
    def __init__(
        self,
        mod: tvm.IRModule,
        names: Mapping[relax.Expr, str],
        grids: Mapping[relax.Expr, Grid],
    ):
        super().__init__(mod)
        self.names, self.grids = _Names(names), grids
        self.derived: dict[tuple, relax.Expr] = {}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if is_call(call, "relax.nn.conv2d"):
            return self._conv2d(call)
        if is_call(call, "relax.nn.conv1d"):
            return self._conv1d(call)
        if is_call(call, "relax.nn.conv2d_transpose") or is_call(call, "relax.nn.conv1d_transpose"):
            return self._transposed(call)
        if is_call(call, "relax.matmul"):
            return self._matmul(call)
        return call

    def _resolve(self, expr: relax.Expr) -> relax.Expr:
        while isinstance(expr, relax.Var):
            bound = self.lookup_binding(expr)
            if bound is None:
                return expr
            expr = bound
        return expr

    def _derive(self, weight: relax.Expr, change: str) -> relax.Expr:
        """The weight transposed or with a height of 1: one constant per weight, however often it is used."""
        if (weight, change) not in self.derived:
            array = const_array(weight)
            array = array.T if change == "transpose" else array[:, :, None, :]
            self.derived[weight, change] = relax.const(
                tvm.runtime.tensor(np.ascontiguousarray(array))
            )
        return self.derived[weight, change]

    def _with_grid(self, layer: relax.Call, weight: relax.Expr, output_axis: int) -> relax.Call:
        """The layer with its weight's scales, where these are one for all or one per output."""
        grid = self.grids.get(weight)
        if grid is None or grid.axis not in (None, output_axis):
            return layer
        scales = [float(s) for s in grid.scale]
        attrs = {**layers.attrs_of(layer), "weight_scale": scales}
        return layers.operator_call(layer.op.name, list(layer.args), **attrs)

    def _conv2d(self, call: relax.Call) -> relax.Expr:
        x, weight, attrs = call.args[0], self._resolve(call.args[1]), call.attrs
        if not (
            _is_weight(weight, 4)
            and (attrs.data_layout, attrs.kernel_layout) == ("NCHW", "OIHW")
            and _is_float32(call)
        ):
            return call
        layer = layers.conv2d(
            x, weight, name=self.names.of(weight, "conv2d"), strides=_ints(attrs.strides), padding=_sides(attrs.padding),
            dilation=_ints(attrs.dilation), groups=attrs.groups,
        )  # fmt: skip
        return self._with_grid(layer, weight, output_axis=0)

    def _conv1d(self, call: relax.Call) -> relax.Expr:
        x, weight, attrs = call.args[0], self._resolve(call.args[1]), call.attrs
        if not (
            _is_weight(weight, 3)
            and (attrs.data_layout, attrs.kernel_layout) == ("NCW", "OIW")
            and _is_float32(call)
        ):
            return call
        n, c, width = shape_of(x)
        padding = _ints(attrs.padding)
        left, right = padding if len(padding) == 2 else padding * 2
        high = self.builder_.emit(relax.op.reshape(x, (n, c, 1, width)))
        result = layers.conv2d(
            high, self._derive(weight, "height"), name=self.names.of(weight, "conv1d"), strides=(1, *_ints(attrs.strides)),
            padding=(0, left, 0, right), dilation=(1, *_ints(attrs.dilation)), groups=attrs.groups,
        )  # fmt: skip
        result = self._with_grid(result, weight, output_axis=0)
        return relax.op.reshape(self.builder_.emit(result), shape_of(call))

    def _transposed(self, call: relax.Call) -> relax.Expr:
        x, weight, attrs = call.args[0], self._resolve(call.args[1]), call.attrs
        rank = len(shape_of(x)) - 2
        layouts = {1: ("NCW", "IOW"), 2: ("NCHW", "IOHW")}[rank]
        if not (
            _is_weight(weight, rank + 2)
            and (attrs.data_layout, attrs.kernel_layout) == layouts
            and all(d == 1 for d in _ints(attrs.dilation))
            and _is_float32(call)
        ):
            return call
        # One dimension is an image of height 1.
        n, c, *size = shape_of(x)
        high = [1] * (2 - rank)
        strides, groups = [*high, *_ints(attrs.strides)], int(attrs.groups)
        padding = [*(0 for _ in high), *_ints(attrs.padding)[:rank]]
        result = [*high, *shape_of(call)[2:]]
        array = const_array(weight).reshape((*shape_of(weight)[:2], *high, *shape_of(weight)[2:]))
        phases = phases_of(array, (*high, *size), result, strides, padding, groups)
        if phases is None:
            return call
        name = self.names.of(weight, f"conv{rank}d_transpose")
        x = self.builder_.emit(relax.op.reshape(x, (n, c, *high, *size))) if high else x
        by_phase = self.derived.setdefault(
            (weight, tuple(strides), groups), relax.const(tvm.runtime.tensor(phases.weight))
        )
        layer = layers.conv2d(x, by_phase, name=name, padding=phases.padding, groups=groups)
        if strides != [1, 1]:
            layer = layers.depth_to_space(
                self.builder_.emit(layer), block=strides, crop=phases.crop, size=result, groups=groups
            )  # fmt: skip
        return relax.op.reshape(self.builder_.emit(layer), shape_of(call)) if high else layer

    def _matmul(self, call: relax.Call) -> relax.Expr:
        x, weight = call.args[0], self._resolve(call.args[1])
        if not _is_float32(call) or is_const(self._resolve(x)):
            return call
        if is_call(weight, "relax.permute_dims"):
            stored = self._resolve(weight.args[0])
            if _is_weight(stored, 2) and _is_transposition(weight):
                layer = layers.dense(x, stored, name=self.names.of(stored, "dense"))
                return self._with_grid(layer, stored, output_axis=0)
        if _is_weight(weight, 2):
            layer = layers.dense(
                x, self._derive(weight, "transpose"), name=self.names.of(weight, "dense")
            )
            return self._with_grid(layer, weight, output_axis=1)
        return call


def _is_weight(expr: relax.Expr, rank: int) -> bool:
    return is_const(expr) and len(shape_of(expr)) == rank and str(expr.ty.dtype.dtype) == "float32"


def _is_float32(call: relax.Call) -> bool:
    return all(str(e.ty.dtype.dtype) == "float32" for e in (call, *call.args))


def _is_transposition(call: relax.Call) -> bool:
    return call.attrs.axes is None or _ints(call.attrs.axes) in ([1, 0], [-1, 0], [1, -2], [-1, -2])


def _ints(values) -> list[int]:
    return [int(v) for v in values]


def _sides(padding) -> list[int]:
    """(top, left, bottom, right) from one, two or four values."""
    values = _ints(padding)
    return values * (4 // len(values))


@tvm.transform.module_pass(opt_level=0, name="kerf.NameLayers")
class NameLayers:
    """`names` maps weight constants (by identity) to layer names; a weight that is not there is `dense_1`, `conv2d_2`, ...;
    `grids` those to their scales that the model stores as integers."""

    def __init__(
        self,
        names: Mapping[relax.Expr, str] | None = None,
        grids: Mapping[relax.Expr, Grid] | None = None,
    ):
        self.names, self.grids = names or {}, grids or {}

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        namer = _Namer(mod, self.names, self.grids)
        for gv, func in mod.functions_items():
            if isinstance(func, relax.Function):
                namer.builder_.update_func(
                    gv, relax.analysis.remove_all_unused(namer.visit_expr(func))
                )
        return namer.builder_.get()
