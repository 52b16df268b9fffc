# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import tvm
from tvm import te

from compiler.divergence import _Definitions


def test_a_definition_may_round_floats_anywhere_in_memory(rng):
    """Rows of 18 floats begin on 8 bytes; SSE's rounding instruction faults there."""
    shape = (16, 18)
    x = te.placeholder(shape, "float32")
    doubled = te.compute(shape, lambda i, j: x[i, j] * 2.0)

    def rounded(i, j):
        whole = tvm.tirx.call_llvm_pure_intrin("int32", "llvm.lrint", doubled[i, j])
        return tvm.tirx.max(tvm.tirx.min(whole, 255), 0).astype("uint8")

    func = te.create_prim_func([x, te.compute(shape, rounded)])
    values = rng.uniform(-9, 140, shape).astype("float32")
    out = tvm.runtime.empty(shape, "uint8")
    definitions = _Definitions(tvm.IRModule({"rounded": func}), 0.0)
    definitions._run("rounded")(tvm.runtime.tensor(values), out)
    np.testing.assert_array_equal(out.numpy(), np.clip(np.rint(values * 2), 0, 255))
