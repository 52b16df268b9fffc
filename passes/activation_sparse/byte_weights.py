# SPDX-License-Identifier: Apache-2.0
"""Weights of layers that skip zeros, kept as signed bytes with one scale per output channel; activations stay float32.

w [O, K]  ->  q [O, K] int8, s [O]        w ~ s q        dense(h, w)  ~  dense(h, q) * s
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.layers import DENSE, attrs_of, const_array, is_call, is_const
from passes.quantized.weights import quantize_weight
from passes.rewriting import Graph, bindings_of, constant, rewrite_function, rewrite_module


@dataclass(frozen=True)
class ByteWeight:
    """`values` int8 [O, K] times `scale` float32 [O]; `error` is |w - s q| / |w| in the Euclidean norm."""

    values: np.ndarray
    scale: np.ndarray
    error: float

    @staticmethod
    def of(weight: np.ndarray) -> ByteWeight:
        """The nearest bytes. Raises ValueError, to be shown as a reason, for a weight without a scale."""
        values, scale = quantize_weight(weight)
        made = ByteWeight(values, scale, 0.0)
        error = np.linalg.norm(made.as_float() - weight) / np.linalg.norm(weight)
        return ByteWeight(values, scale, float(error))

    def as_float(self) -> np.ndarray:
        """s q in float32 [O, K]."""
        return (self.values.astype(np.float64) * self.scale[:, None]).astype(np.float32)


def byte_weights(mod: tvm.IRModule, layers: Collection[str]) -> dict[str, ByteWeight]:
    """The weights of these dense layers as bytes, by layer."""
    calls = [b.value for b in bindings_of(mod["main"]) if is_call(b.value, DENSE)]
    return {
        attrs_of(call)["name"]: ByteWeight.of(const_array(call.args[1]))
        for call in calls
        if is_const(call.args[1]) and attrs_of(call)["name"] in layers
    }


def with_byte_weights(mod: tvm.IRModule, weights: Mapping[str, ByteWeight]) -> tvm.IRModule:
    """`mod` with the weights of these layers as the floats that their bytes stand for."""
    if not weights:
        return mod

    def put(value: relax.Expr, _graph: Graph) -> relax.Expr | None:
        if not (is_call(value, DENSE) and attrs_of(value)["name"] in weights):
            return None
        found = weights[attrs_of(value)["name"]].as_float()
        if np.array_equal(found, const_array(value.args[1])):
            return None
        return relax.Call(
            value.op, [value.args[0], constant(found)], value.attrs, value.ty_args, ret_ty=value.ty
        )

    return rewrite_module(mod, lambda func: rewrite_function(func, (put,)))
