# SPDX-License-Identifier: Apache-2.0
"""Rows turned into planes and back: exact, cut, extended, fused into."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.layers import operator_call
from passes.sparse.lowering import lower_transpose
from passes.sparse.operators import TRANSPOSE, register
from passes.sparse.reference import transpose


@pytest.mark.parametrize(
    "shape, rows, columns",
    [
        ((1, 197, 64), 64, 208),
        ((2, 17, 33), 33, 48),
        ((7, 5), 5, 16),
        ((1, 33, 48), 17, 33),
        ((1, 1, 1), 1, 1),
        ((3, 1, 20), 18, 3),
    ],
)
def test_a_transposition_moves_every_element(run, rng, host_tiers, shape, rows, columns):
    register()
    x = rng.standard_normal(shape).astype("float32")
    x.flat[0] = np.nan
    attrs = {"rows": rows, "columns": columns}
    for target in host_tiers:
        ran = run(
            lambda bb, x: bb.emit(
                relax.op.negative(bb.emit(operator_call(TRANSPOSE, [x], **attrs)))
            ),
            [x],
            {TRANSPOSE: lower_transpose},
            target,
        )
        assert list(ran.loops.values()) == ["transposition"]
        np.testing.assert_array_equal(ran.output, -transpose(attrs, x))
