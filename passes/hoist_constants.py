# SPDX-License-Identifier: Apache-2.0
"""Make every tensor constant of `main` a parameter, so that the library holds code and the weights live beside it.

    rewrite: main(x) { call_tir(f, (x, CONST)) }  ->  main(x, params) { call_tir(f, (x, params[0])) }

Requires FuseTIR. Ensures that `main` takes the inputs and one tuple, in which each distinct constant stands once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir.expr import GenericConst
from tvm.relax import PyExprMutator, expr_functor


@dataclass(frozen=True)
class Hoisted:
    """The rewritten module, its constants in the tuple's order and their handles, which name the layers they belong to."""

    mod: tvm.IRModule
    constants: list[np.ndarray]
    handles: list[int]


def handle_of(const: GenericConst) -> int:
    """The identity of a constant's storage: equal for every use of one `relax.const`."""
    return const.value.__chandle__()


@expr_functor.mutator
class _Hoister(PyExprMutator):
    def __init__(self, mod: tvm.IRModule):
        super().__init__(mod)
        self.params: dict[int, relax.Var] = {}
        self.values: dict[int, GenericConst] = {}

    def visit_generic_const_(self, const: GenericConst) -> relax.Expr:
        if not isinstance(const.ty, relax.TensorType):
            return const
        key = handle_of(const)
        if key not in self.params:
            self.params[key] = relax.Var(f"w{len(self.params)}", const.ty)
            self.values[key] = const
        return self.params[key]


def hoist_constants(mod: tvm.IRModule) -> Hoisted:
    """Hoist the constants of `main`; see the module's docstring."""
    main = mod["main"]
    hoister = _Hoister(mod)
    body = hoister.visit_expr(main.body)
    params = list(hoister.params.values())
    attrs = {
        **({k: main.attrs[k] for k in main.attrs.keys()} if main.attrs else {}),
        "num_input": len(main.params),
    }
    func = relax.Function(
        [*main.params, *params], body, main.ret_ty, attrs=tvm.ir.make_node("ir.DictAttrs", **attrs)
    )
    out = (
        mod.clone()
        if hasattr(mod, "clone")
        else tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    )
    out.update_func(out.get_global_var("main"), func)
    if params:
        out = relax.transform.BundleModelParams("params")(out)
    return Hoisted(out, [c.value.numpy() for c in hoister.values.values()], list(hoister.values))
