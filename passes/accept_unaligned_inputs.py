# SPDX-License-Identifier: Apache-2.0
"""Let kernels read the model's inputs wherever the caller's arrays lie.

    rewrite: f(x: Buffer(align=64), w, out)  ->  f(x: Buffer(align=4), w, out)
    for every f that some call gives an input of `main`, or a view of one, as x of 4-byte elements

TVM assumes a kernel's arguments to begin at multiples of 64 bytes. That holds of what a program allocates and of its
constants, not of a caller's arrays (numpy's begin at multiples of 16), which would have to be copied. What depends on it is
the alignment that code generation states of loads; kernels that read no input keep it.

Requires explicit allocation and calls (CallTIRRewrite). Only for targets that read vectors from any address
(`CpuTarget.reads_unaligned`).
"""

from __future__ import annotations

from collections import defaultdict

import tvm
import tvm_ffi
from tvm import relax, tirx

from passes.rewriting import bindings_of, variables


@tvm.transform.module_pass(opt_level=0, name="kerf.AcceptUnalignedInputs")
class AcceptUnalignedInputs:
    """Ensures that kernels assume of the model's inputs only that elements are aligned."""

    def transform_module(self, mod: tvm.IRModule, _context) -> tvm.IRModule:
        for function, positions in _given_inputs(mod["main"]).items():
            if isinstance(mod[function], tirx.PrimFunc):
                relaxed = _with_elements_aligned(mod[function], positions)
                mod.update_func(mod.get_global_var(function), relaxed)
        return mod


def _given_inputs(main: relax.Function) -> dict[str, set[int]]:
    """For each function that `main` calls: positions of arguments that may be the model's inputs or views of them."""
    given = {p for p in main.params if isinstance(p.ty, relax.TensorType)}
    found: dict[str, set[int]] = defaultdict(set)
    for binding in bindings_of(main):
        value = binding.value
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            found[value.op.name_hint] |= {i for i, a in enumerate(value.args) if a in given}
        elif given.intersection(variables(value)):
            given.add(binding.var)
    return {function: positions for function, positions in found.items() if positions}


def _with_elements_aligned(func: tirx.PrimFunc, positions: set[int]) -> tirx.PrimFunc:
    """`func` with the parameters at `positions` aligned to their elements only."""
    for position in sorted(positions):
        given = func.params[position]
        bytes_each = tvm.DataType(given.dtype).itemsize
        new = tirx.decl_buffer(given.shape, given.dtype, name=given.name, data_alignment=bytes_each)

        def replaced(var, given=given, new=new):
            return new if var.same_as(given) else var

        func = tvm_ffi.structural_map(func, (tvm.ir.Var, replaced))
    return func
