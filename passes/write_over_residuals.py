# SPDX-License-Identifier: Apache-2.0
"""Let a kernel write its result over a residual that nothing reads afterwards.

    rewrite: out = alloc_tensor(); f(x, w, r, out)  ->  f(x, w, r, r), and r for out behind it

The last kernel of a residual block reads as many numbers as it writes; storage of its own for the result would have to be
fetched from memory to be overwritten. Only a kernel knows whether it reads each number of r before it stores there and
never again, only the graph knows whether r is needed later. So `MarkDying` notes on every fused function which arguments
nothing reads after any of its calls; a kernel that takes one of them up says so (`Emission.write_over_residual`); and
`WriteOverResiduals` makes the calls of such kernels what their code expects.

MarkDying requires fused PrimFuncs called by call_tir. WriteOverResiduals requires explicit allocation and calls
(CallTIRRewrite), and storage not planned yet.
"""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm import relax, tirx

from passes.layers import is_call
from passes.rewriting import bindings_of, variables
from schedules.fused import DYING, IN_PLACE


@tvm.transform.module_pass(opt_level=0, name="kerf.MarkDying")
class MarkDying:
    """Ensures the attribute `kerf.dying` on PrimFuncs of which arguments die in all their calls."""

    def transform_module(self, mod: tvm.IRModule, _context) -> tvm.IRModule:
        for function, positions in _dying_arguments(mod["main"]).items():
            if positions:
                marked = mod[function].with_attr(DYING, sorted(positions))
                mod.update_func(mod.get_global_var(function), marked)
        return mod


@tvm.transform.module_pass(opt_level=0, name="kerf.WriteOverResiduals")
class WriteOverResiduals:
    """Ensures that the last two of a tensor's owners are one where a kernel has the attribute `kerf.in_place`."""

    def transform_module(self, mod: tvm.IRModule, _context) -> tvm.IRModule:
        over = {
            gv.name_hint: int(func.attrs[IN_PLACE])
            for gv, func in mod.functions_items()
            if isinstance(func, tirx.PrimFunc) and func.attrs and IN_PLACE in func.attrs.keys()
        }
        if over:
            main = mod["main"]
            mod.update_func(mod.get_global_var("main"), _with_shared_storage(main, over))
        return mod


def _dying_arguments(main: relax.Function) -> dict[str, set[int]]:
    """For each function that call_tir calls: positions of arguments that are tensors of `main`'s own, given once, and not
    read after the call, in every call of it."""
    bindings = bindings_of(main)
    kept = len(bindings)
    owner: dict[relax.Var, relax.Var] = {}  # the tensor whose storage a variable may share
    last_read: dict[relax.Var, int] = {}
    for index, binding in enumerate(bindings):
        read = [owner.get(v, v) for v in variables(binding.value)]
        called = is_call(binding.value, "relax.call_tir")
        for tensor in read:
            # What else there is may keep a tensor by another name.
            last_read[tensor] = max(last_read.get(tensor, 0), index if called else kept)
        if called and len(binding.value.args[1].fields) == 1 and read:
            owner[binding.var] = read[0]  # it may become a reshape
        elif called:
            owner[binding.var] = binding.var
    for var in variables(main.body.body):
        last_read[owner.get(var, var)] = kept
    own = {tensor for tensor in owner.values() if owner.get(tensor) is tensor}
    dying: dict[str, set[int]] = {}
    for index, binding in enumerate(bindings):
        if not is_call(binding.value, "relax.call_tir"):
            continue
        function, arguments = binding.value.args[0].name_hint, list(binding.value.args[1].fields)
        owners = [owner.get(a) if isinstance(a, relax.Var) else None for a in arguments]
        found = {
            i
            for i, tensor in enumerate(owners)
            if tensor in own and last_read[tensor] == index and owners.count(tensor) == 1
        }
        dying[function] = dying[function] & found if function in dying else found
    return dying


def _with_shared_storage(main: relax.Function, over: Mapping[str, int]) -> relax.Function:
    """`main` with the argument `over[f]` of every call of f as the tensor that it writes."""
    written: dict[relax.Var, relax.Expr] = {}  # allocated for a result -> what is written instead
    for binding in bindings_of(main):
        if (position := _written_over(binding.value, over)) is not None:
            *_, out = binding.value.args
            written[out] = binding.value.args[position]
    kept = []
    for binding in bindings_of(main):
        value = binding.value
        if _written_over(value, over) is not None:
            arguments = [*value.args[:-1], written[value.args[-1]]]
            value = relax.Call(value.op, arguments, value.attrs, value.ty_args, ret_ty=value.ty)
        elif isinstance(value, relax.Var):
            value = written.get(value, value)
        if binding.var not in written:
            kept.append(relax.VarBinding(binding.var, value))
    body = relax.SeqExpr([relax.BindingBlock(kept)], main.body.body)
    return relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)


def _written_over(value: relax.Expr, over: Mapping[str, int]) -> int | None:
    """The position of the argument that a call writes over, if it is one of a function in `over`."""
    called = isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar)
    return over.get(value.op.name_hint) if called else None
