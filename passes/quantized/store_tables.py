# SPDX-License-Identifier: Apache-2.0
"""Store tables that rows are picked from, such as word embeddings, as bytes with a scale per row.

    rewrite: take(W float32 [V, D], i)  ->  astype(take(W8 int8 [V, D], i)) * take(scale float32 [V, 1], i)
    requires: W constant, rows picked along the first axis
    ensures: bytes that differ from W by at most half a step of their row: W = 0 stays 0

Nothing is computed with integers here. A table is often the largest part of a language model, and of what it holds only
the rows that occur are ever read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from passes.layers import const_array, is_call, is_const, shape_of
from passes.quantized.weights import quantize_weight
from passes.rewriting import Graph, constant, rewrite_function, rewrite_module

# Smaller tables are not worth an operator; the scale of a short row costs as much as its bytes save.
_SMALLEST_TABLE = 1 << 14
_SHORTEST_ROW = 16


@dataclass
class StoreTables:
    """See the module's docstring; `notes` says what was stored so."""

    notes: list[str] = field(default_factory=list)
    _stored: dict[relax.Expr, tuple[relax.Expr, relax.Expr]] = field(default_factory=dict)

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        return rewrite_module(mod, lambda func: rewrite_function(func, (self._pick,)))

    def _pick(self, value: relax.Expr, graph: Graph) -> relax.Call | None:
        if not is_call(value, "relax.take") or not _is_table(value):
            return None
        table, scale = self._bytes_of(value.args[0])
        picked, scales = (
            graph.emit(relax.Call(value.op, [of, value.args[1]], value.attrs))
            for of in (table, scale)
        )
        return relax.op.multiply(relax.op.astype(picked, "float32"), scales)

    def _bytes_of(self, weight: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
        """The table and its scales, once for all that pick from it."""
        if weight not in self._stored:
            values, scale = quantize_weight(const_array(weight))
            self._stored[weight] = (constant(values), constant(scale.reshape(-1, 1)))
            rows, width = values.shape
            self.notes.append(
                f"a table of {rows} rows of {width} is stored as int8, a scale per row"
            )
        return self._stored[weight]


def _is_table(call: relax.Call) -> bool:
    weight = call.args[0]
    if not is_const(weight) or str(weight.ty.dtype) != "float32" or len(shape_of(weight)) != 2:
        return False
    rows, width = shape_of(weight)
    picks_rows = call.attrs.axis is not None and int(call.attrs.axis) in (0, -2)
    # Out of range, this mode gives NaN, which bytes do not have.
    if not picks_rows or str(call.attrs.mode) == "nan":
        return False
    array = const_array(weight)
    large = width >= _SHORTEST_ROW and rows * width >= _SMALLEST_TABLE
    return large and bool(np.isfinite(array).all()) and bool(array.any())
