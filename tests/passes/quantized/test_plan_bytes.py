# SPDX-License-Identifier: Apache-2.0
"""Which tensors lie in bytes."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.layers import dense
from passes.quantized.plan_bytes import plan_bytes


def residual(rng, shared):
    """Two dense layers whose sum an int8 layer reads; the first one's result is read by the second if `shared`."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 16), "float32"))

    def layer(data, name):
        weight = relax.const(rng.standard_normal((16, 16)).astype(np.float32))
        return builder.emit(dense(data, weight, name=name))

    with builder.function("main", [x]):
        with builder.dataflow():
            first = layer(x, "first")
            second = layer(first if shared else x, "second")
            total = builder.emit(relax.op.add(second, first))
            out = builder.emit_output(layer(total, "int8"))
        builder.emit_func_output(out)
    return builder.get(), second, total


@pytest.mark.parametrize("shared", [True, False])
def test_a_float_operand_joins_a_sum_only_where_a_kernel_can_end_with_it(rng, shared):
    mod, second, total = residual(rng, shared)
    held = plan_bytes(mod, ["int8"]).held
    names = {var.name for var in held}
    assert total.name in names
    assert (second.name in names) is not shared
