# SPDX-License-Identifier: Apache-2.0
"""The sparse layer operators.

`kerf.sparse_conv2d(x, w)`   as `kerf.conv2d`, attribute `grain` more
`kerf.sparse_dense(x, w)`    as `kerf.dense`, attribute `grain` more

The weight stays dense, zeros included, until it is lowered: it is the definition, and packing depends on the kernel.
"""

from __future__ import annotations

import functools

from tvm import relax

from passes.layers import attrs_of, infer_conv2d, infer_dense, operator_call, register_operator
from passes.sparse.format import block_of

SPARSE_CONV2D = "kerf.sparse_conv2d"
SPARSE_DENSE = "kerf.sparse_dense"


@functools.cache
def register() -> None:
    """Register the sparse operators; idempotent."""
    register_operator(SPARSE_CONV2D, infer_conv2d)
    register_operator(SPARSE_DENSE, infer_dense)


def sparse_call(call: relax.Call, grain: str) -> relax.Call:
    """The sparse operator of a dense named layer. Raises ValueError for an unknown grain."""
    register()
    block_of(grain)
    name = SPARSE_CONV2D if call.op.name.endswith("conv2d") else SPARSE_DENSE
    return operator_call(name, list(call.args), **attrs_of(call), grain=grain)
