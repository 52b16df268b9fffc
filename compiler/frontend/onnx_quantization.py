# SPDX-License-Identifier: Apache-2.0
"""Quantized ONNX models: QuantizeLinear and DequantizeLinear to `kerf.quantize` and `kerf.dequantize`.

They say which values are rounded, and float32 is computed between them; that is what is imported. What is stored as
integers was made float32 before, see `onnx_grids`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from tvm import relax

from compiler.frontend import quantization
from compiler.frontend.onnx_grids import DEQUANTIZE, QUANTIZE, integer_type
from compiler.frontend.support import Refused
from passes.layers import shape_of

if TYPE_CHECKING:
    from compiler.frontend.onnx_convert import Converter


def _parameters(c: Converter, x: relax.Expr) -> tuple[np.ndarray, np.ndarray, str]:
    """(scale, zero point) shaped to broadcast against x, and the integer type. Raises Refused."""
    scale = c.array(1)
    zero_point = c.array(2) if len(c.node.input) > 2 else None
    dtype = integer_type(c.graph, c.node)
    quantization.check_scale(scale)
    if c.attr("block_size", 0) or scale.ndim > 1:
        raise Refused("quantization in blocks of an activation")
    zero_point = np.zeros(scale.shape, dtype) if zero_point is None else zero_point
    if scale.size == 1:
        return scale.reshape(()), zero_point.reshape(()), dtype
    rank = len(shape_of(x))
    axis = c.attr("axis", 1)
    if not -rank <= axis < rank or shape_of(x)[axis] != scale.size:
        raise Refused(f"{scale.size} scales along axis {axis} of a tensor of {rank} axes")
    along = [1] * rank
    along[axis] = -1
    return scale.reshape(along), zero_point.reshape(along), dtype


def _quantize(c: Converter, x: relax.Expr, *_parameters_of) -> relax.Expr:
    scale, zero_point, dtype = _parameters(c, x)
    if dtype == "int32":
        raise Refused("int32")
    return quantization.quantize(c, x, scale, zero_point, dtype)


def _dequantize(c: Converter, x: relax.Expr, *parameters: relax.Expr) -> relax.Expr:
    computed = len(c.node.input) > 2 and c.node.input[2] not in c.graph.constants
    if computed and np.array_equal(c.array(1), np.float32(1)):
        return quantization.steps(c, x, parameters[1])
    return quantization.dequantize(c, x, *_parameters(c, x))


CONVERTERS: dict[str, Callable] = {
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
    "DynamicQuantizeLinear": quantization.quantize_dynamic,
}
