# SPDX-License-Identifier: Apache-2.0
"""Programs that torch's PT2E flow has quantized: `quantized_decomposed` operators to Relax. See `quantization`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tvm import relax

from compiler.frontend import quantization
from compiler.frontend.support import Refused, constant
from passes.layers import is_const, shape_of

if TYPE_CHECKING:
    from compiler.frontend.torch_convert import Converter

_DTYPES = {torch.int8: "int8", torch.uint8: "uint8", torch.int16: "int16", torch.uint16: "uint16", torch.int32: "int32"}  # fmt: skip


def register_operators() -> None:
    """Make torch know `quantized_decomposed` operators; needed before a program that calls them is loaded."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401


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
