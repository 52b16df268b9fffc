# SPDX-License-Identifier: Apache-2.0
"""Programs that torch's PT2E flow has quantized: `quantized_decomposed` operators to Relax. See `quantization`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx
from tvm import relax

from compiler.frontend import quantization
from compiler.frontend.support import Refused, constant
from passes.layers import is_const, shape_of
from passes.name_layers import Grid

if TYPE_CHECKING:
    from compiler.frontend.torch_convert import Converter

_DTYPES = {torch.int8: "int8", torch.uint8: "uint8", torch.int16: "int16", torch.uint16: "uint16", torch.int32: "int32"}  # fmt: skip
_DEQUANTIZE = re.compile(r"dequantize_per_(tensor|channel)\.\w+")
# What convert_pt2e calls weights that it has quantized.
_FROZEN = re.compile(r"_frozen_param\d+")


def register_operators() -> None:
    """Make torch know `quantized_decomposed` operators; needed before a program that calls them is loaded."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401


def is_dequantize(node: fx.Node) -> bool:
    return _DEQUANTIZE.fullmatch(getattr(node.target, "__name__", "")) is not None


def grid_of(node: fx.Node, constants: dict[fx.Node, Any]) -> Grid | None:
    """The scales of a weight that `node`, a dequantization of constants, computes; None where they are no float32 numbers."""
    scale = node.args[1]
    scale = constants.get(scale) if isinstance(scale, fx.Node) else torch.tensor(scale)
    if not isinstance(scale, torch.Tensor) or not bool((scale > 0).all()):
        return None
    array = scale.detach().reshape(-1).to(torch.float32).numpy()
    return Grid(array, int(node.args[3]) if "per_channel" in node.target.__name__ else None)


def weight_name(node: fx.Node, name: str, names: dict[fx.Node, str]) -> str:
    """A frozen weight's layer, known from its bias, else by the module that calls it."""
    if not _FROZEN.fullmatch(name):
        return name
    for user in node.users:
        bias = user.args[2] if len(user.args) > 2 else None
        if isinstance(bias, fx.Node) and names.get(bias, "").endswith(".bias"):
            return names[bias].removesuffix(".bias")
        stack = user.meta.get("nn_module_stack") or {}
        path = next((str(p) for p, _ in reversed(stack.values()) if p), "")
        if path:
            return path.removeprefix("L['self'].")
    return name


def _numbers(value: Any, dtype: str) -> np.ndarray:
    """A number, or a constant tensor of one or several. Raises Refused for what is computed."""
    if isinstance(value, (int, float)):
        return np.array(value, dtype)
    if not (isinstance(value, relax.Expr) and is_const(value)):
        raise Refused("a scale or zero point that is computed at run time")
    array = value.value.numpy().astype(dtype)
    return array.reshape(()) if array.size == 1 else array


def _name(dtype: torch.dtype) -> str:
    if dtype not in _DTYPES:
        raise Refused(f"quantization to {dtype}")
    return _DTYPES[dtype]


def _per_tensor(
    c: Converter, function: Callable, x, scale, zero_point, dtype, limits
) -> relax.Expr:
    scale, zero_point = _numbers(scale, "float32"), _numbers(zero_point, "int64")
    quantization.check_scale(scale)
    extra = (limits,) if function is quantization.quantize else ()
    return function(c, x, scale, zero_point, _name(dtype), *extra)


def _per_channel(
    c: Converter, function: Callable, x, scales, zero_points, axis: int, dtype, limits
) -> relax.Expr:
    scale, zero_point = _numbers(scales, "float32"), _numbers(zero_points, "int64")
    quantization.check_scale(scale)
    along = [1] * len(shape_of(x))
    along[axis] = -1
    extra = (limits,) if function is quantization.quantize else ()
    return function(c, x, scale.reshape(along), zero_point.reshape(along), _name(dtype), *extra)


def _quantize_tensor(c, x, scale, zero_point, low, high, dtype):
    return _per_tensor(c, quantization.quantize, x, scale, zero_point, dtype, (low, high))


def _dequantize_tensor(c, x, scale, zero_point, _low, _high, dtype, *_out):
    return _per_tensor(c, quantization.dequantize, x, scale, zero_point, dtype, None)


def _quantize_channel(c, x, scales, zero_points, axis, low, high, dtype):
    return _per_channel(c, quantization.quantize, x, scales, zero_points, axis, dtype, (low, high))


def _dequantize_channel(c, x, scales, zero_points, axis, _low, _high, dtype, *_out):
    if zero_points is None:
        zero_points = constant(np.zeros(shape_of(scales), "int64"))
    return _per_channel(c, quantization.dequantize, x, scales, zero_points, axis, dtype, None)


CONVERTERS: dict[str, Callable] = {
    "quantize_per_tensor.default": _quantize_tensor,
    "quantize_per_tensor.tensor": _quantize_tensor,
    "dequantize_per_tensor.default": _dequantize_tensor,
    "dequantize_per_tensor.tensor": _dequantize_tensor,
    "quantize_per_channel.default": _quantize_channel,
    "dequantize_per_channel.default": _dequantize_channel,
}
