# SPDX-License-Identifier: Apache-2.0
"""The activation-sparse operators.

`kerf.activation_sparse_dense(h, w)`
    as `kerf.dense`: h [..., K], w constant [O, K] -> [..., O]
`kerf.activation_sparse_gated(x, g, up, scale, bias, down)`
    x [..., D] and g [..., K] of one row, up [K, D], scale [K], bias [K], down [O, K] constant -> [..., O]:
    (g * (x up^T * scale + bias)) down^T
`kerf.activation_cut(h)`
    h where its magnitude is above the attribute `threshold`, else 0; NaN stays NaN

float32, but w, up and down may also be int8. The first two compute the dense function; `density` (the share of non-zeros expected in h or g) and `crossover` (the
density above which the dense loop is faster) choose the kernel. Constants stay as they are until lowered.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from tvm import relax

from passes.layers import attrs_of, infer_dense, operator_call, register_operator, shape_of

DENSE = "kerf.activation_sparse_dense"
GATED = "kerf.activation_sparse_gated"
CUT = "kerf.activation_cut"


def _infer_gated(call: relax.Call) -> relax.TensorType:
    gate, down = shape_of(call.args[1]), shape_of(call.args[-1])
    return relax.TensorType((*gate[:-1], down[0]), call.args[1].ty.dtype)


@functools.cache
def register() -> None:
    """Register the operators; idempotent."""
    register_operator(DENSE, infer_dense)
    register_operator(GATED, _infer_gated)
    register_operator(CUT, lambda call: call.args[0].ty)


def cut(x, threshold: float) -> relax.Call:
    """`x` without its values of magnitude at most `threshold`, which is rounded to float32."""
    register()
    return operator_call(CUT, [x], threshold=float(np.float32(threshold)))


def sparse_dense(call: relax.Call, weight, density: float, crossover: float) -> relax.Call:
    """The activation-sparse operator of a `kerf.dense`, on `weight`."""
    register()
    attrs = {**attrs_of(call), "density": float(density), "crossover": float(crossover)}
    return operator_call(DENSE, [call.args[0], weight], **attrs)


def sparse_gated(
    x, gate, up, scale, bias, down, *, layers: list[str], density: float
) -> relax.Call:
    """The gated operator; `layers` are the names of up and down."""
    register()
    flops = 2 * (math.prod(shape_of(up)) + math.prod(shape_of(down)))
    return operator_call(
        GATED, [x, gate, up, scale, bias, down], name=layers[0], layers=layers, flops=flops, density=float(density)
    )  # fmt: skip
