# SPDX-License-Identifier: Apache-2.0
"""Rewrite a Relax function binding by binding, keeping the names of its variables.

A pass is a table of rules. A rule sees one value (a call or a tuple element) whose operands are
already rewritten, and a `Graph` to look upstream, and returns what to put in its place, or None.
The result may nest new calls; they are flattened into bindings of their own. Bindings that nothing
uses any more disappear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import tvm
from tvm import relax

from passes.layers import const_array, is_call, is_const, shape_of
from schedules.errors import KerfError

_KNOWN_TYPES = (relax.TensorType, relax.ShapeType, tvm.ir.TupleType)

# (value with rewritten operands, graph) -> replacement, or None where the rule does not apply.
Rule = Callable[[relax.Expr, "Graph"], "relax.Expr | None"]


def bindings_of(func: relax.Function) -> list[relax.VarBinding]:
    """The bindings of a straight-line function, in order. Raises KerfError for control flow and
    match casts.
    """
    found = []
    for block in func.body.blocks:
        for binding in block.bindings:
            if not isinstance(binding, relax.VarBinding) or isinstance(
                binding.value, (relax.If, relax.Function)
            ):
                raise KerfError(
                    "control flow cannot be rewritten",
                    where=binding.var.name,
                    found=type(binding).__name__,
                    wanted="straight-line code",
                )
            found.append(binding)
    return found


def operands(value: relax.Expr) -> list[relax.Expr]:
    """The expressions a value reads directly."""
    if isinstance(value, relax.Call):
        return list(value.args)
    if isinstance(value, relax.Tuple):
        return list(value.fields)
    if isinstance(value, relax.TupleGetItem):
        return [value.tuple_value]
    return []


def variables(value: relax.Expr) -> list[relax.Var]:
    """Every variable a value reads, through nested tuples and calls."""
    if isinstance(value, relax.Var):
        return [value]
    return [v for operand in operands(value) for v in variables(operand)]


class Graph:
    """The function being rebuilt: what defines a variable, and how often it is read."""

    def __init__(self, func: relax.Function):
        self._bindings: list[tuple[relax.Var, relax.Expr]] = []
        self._definitions: dict[relax.Var, relax.Expr] = {}
        self._originals: dict[relax.Var, list[relax.Var]] = {}
        self._env: dict[relax.Var, relax.Expr] = {}
        self._readers: dict[relax.Var, list[relax.Expr]] = {}
        self._names: Counter[str] = Counter()
        self._builder = relax.BlockBuilder()
        source = bindings_of(func)
        for binding in source:
            self._names[binding.var.name] += 1
            for var in variables(binding.value):
                self._readers.setdefault(var, []).append(binding.value)
        for var in variables(func.body.body):
            self._readers.setdefault(var, []).append(func.body.body)
        for param in func.params:
            self._originals[param] = [param]
        self._added: Counter[relax.Var] = Counter()
        self.current: relax.Var | None = (
            None  # the original variable whose value is being rewritten
        )

    def definition(self, expr: relax.Expr) -> relax.Expr | None:
        """The value bound to a variable (None for parameters), or the expression itself if it is no
        variable.
        """
        return self._definitions.get(expr) if isinstance(expr, relax.Var) else expr

    def call(self, expr: relax.Expr, name: str) -> relax.Call | None:
        """The call of operator `name` that computes `expr`, if that is what computes it."""
        found = self.definition(expr)
        return found if found is not None and is_call(found, name) else None

    def readers(self, expr: relax.Expr) -> list[relax.Expr]:
        """Values of the original function that read what `expr` now stands for."""
        if not isinstance(expr, relax.Var):
            return []
        return [
            r for original in self._originals.get(expr, []) for r in self._readers.get(original, [])
        ]

    def is_read_once(self, expr: relax.Expr) -> bool:
        """Whether nothing but the value being rewritten, or its chain of operands, reads `expr`."""
        # A rewrite of this round may read what its original did not, so both counts must agree.
        return len(self.readers(expr)) <= 1 and self._added[expr] <= 1

    def next_readers(self) -> list[relax.Expr]:
        """Values of the original function that read the variable being rewritten."""
        return self._readers.get(self.current, [])

    def emit(self, value: relax.Expr, name: str = "") -> relax.Expr:
        """Bind a value (nested calls too, innermost first) and return the variable; variables and
        constants pass through.
        """
        if not isinstance(value, (relax.Call, relax.Tuple, relax.TupleGetItem)):
            return value
        value = self.flatten(value, name)
        var = relax.DataflowVar(self._fresh(name or _operator(value)), value.ty)
        self._bind(var, value)
        return var

    def flatten(self, value: relax.Expr, name: str = "") -> relax.Expr:
        """The value with nested calls bound to variables of their own, and its type inferred."""
        if isinstance(value, relax.Call):
            old = list(value.args)
            args = [self._leaf(a, name) for a in old]
            if _differ(args, old):
                value = relax.Call(value.op, args, value.attrs, value.ty_args)
            return value if isinstance(value.ty, _KNOWN_TYPES) else self._builder.normalize(value)
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self._leaf(f, name) for f in value.fields])
        return relax.TupleGetItem(self._leaf(value.tuple_value, name), value.index)

    def _leaf(self, expr: relax.Expr, name: str) -> relax.Expr:
        if isinstance(
            expr, relax.Tuple
        ):  # argument tuples (concat, strided_slice) stay where they are
            old = list(expr.fields)
            new = [self._leaf(f, name) for f in old]
            return relax.Tuple(new) if _differ(new, old) else expr
        if isinstance(expr, (relax.Call, relax.TupleGetItem)):
            return self.emit(expr, f"{name}_{_operator(expr)}" if name else "")
        return expr

    def _fresh(self, name: str) -> str:
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name] - 1}"

    def _bind(self, var: relax.Var, value: relax.Expr) -> None:
        self._bindings.append((var, value))
        self._definitions[var] = value
        for read in variables(value):
            self._added[read] += 1

    def substitute(self, value: relax.Expr) -> relax.Expr:
        """The value of the original function with its variables replaced by what they stand for
        now.
        """
        if isinstance(value, relax.Var):
            return self._env.get(value, value)
        old = operands(value)
        new = [self.substitute(o) for o in old]
        if not _differ(new, old):
            return value
        if isinstance(value, relax.Call):
            return _call_like(value, new)
        if isinstance(value, relax.Tuple):
            return relax.Tuple(new)
        return (
            new[0].fields[value.index]
            if isinstance(new[0], relax.Tuple)
            else relax.TupleGetItem(new[0], value.index)
        )

    def define(self, original: relax.Var, value: relax.Expr) -> None:
        """Let the original variable stand for `value` from here on, under its old name where a
        binding is needed.
        """
        value = self.bind(original.name, self._name_inner(value, original.name))
        if not _same_type(value.ty, original.ty):
            raise KerfError(
                "a rewrite changed a type",
                where=original.name,
                found=str(value.ty),
                wanted=str(original.ty),
            )
        self.alias(original, value)

    def _name_inner(self, value: relax.Expr, name: str) -> relax.Expr:
        """Give the old name to what is computed, rather than to the layout change around it."""
        if not (isinstance(value, relax.Call) and _operator(value) in ("reshape", "permute_dims")):
            return value
        inner, *rest = value.args
        if not isinstance(inner, relax.Call):
            return value
        return self.emit(
            relax.Call(value.op, [self.bind(name, inner), *rest], value.attrs),
            f"{name}_{_operator(value)}",
        )

    def bind(self, name: str, value: relax.Expr) -> relax.Expr:
        """Bind a value under exactly this name; variables and constants pass through."""
        if not isinstance(value, (relax.Call, relax.Tuple, relax.TupleGetItem)):
            return value
        value = self.flatten(value, name)
        var = relax.DataflowVar(name, value.ty)
        self._bind(var, value)
        return var

    def alias(self, original: relax.Var, value: relax.Expr) -> None:
        """Let readers of the original variable read `value`, a variable or constant."""
        self._env[original] = value
        if isinstance(value, relax.Var):
            self._originals.setdefault(value, []).append(original)

    def finish(self, func: relax.Function) -> relax.Function:
        """The rebuilt function: used bindings only, one dataflow block, the result bound to a
        variable.
        """
        result = self.substitute(func.body.body)
        fields = list(result.fields) if isinstance(result, relax.Tuple) else [result]
        used: set[relax.Var] = set()
        for field in fields:
            used.update(variables(field))
        kept = []
        for var, value in reversed(self._bindings):
            if var in used:
                used.update(variables(value))
                kept.append((var, value))
        kept.reverse()
        return _assemble(func, kept, result)


def with_result(func: relax.Function, result: relax.Expr) -> relax.Function:
    """`func` returning `result`, an expression over its variables, instead."""
    return _assemble(func, [(b.var, b.value) for b in bindings_of(func)], result, result.ty)


def _assemble(
    func: relax.Function, kept: list, result: relax.Expr, result_type=None
) -> relax.Function:
    """A function from its bindings; outputs become ordinary variables, which may leave the dataflow
    block.
    """
    outputs = set(variables(result))
    renamed: dict[relax.Var, relax.Var] = {}

    def swap(expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var):
            return renamed.get(expr, expr)
        old = operands(expr)
        new = [swap(o) for o in old]
        if not _differ(new, old):
            return expr
        if isinstance(expr, relax.Call):
            return _call_like(expr, new)
        return (
            relax.Tuple(new)
            if isinstance(expr, relax.Tuple)
            else relax.TupleGetItem(new[0], expr.index)
        )

    bindings = []
    for var, value in kept:
        value = swap(value)
        if var in outputs:
            renamed[var] = relax.Var(var.name, var.ty)
        bindings.append(relax.VarBinding(renamed.get(var, var), value))
    result = swap(result)
    if not isinstance(
        result, (relax.Var, relax.Tuple)
    ):  # a constant result needs a binding as well
        out = relax.Var("out", result.ty)
        bindings.append(relax.VarBinding(out, result))
        result = out
    blocks = [relax.DataflowBlock(bindings)] if bindings else []
    body = relax.SeqExpr(blocks, result)
    return relax.Function(
        list(func.params),
        body,
        func.ret_ty if result_type is None else result_type,
        is_pure=func.is_pure,
        attrs=func.attrs,
    )


def _same_type(a, b) -> bool:
    if isinstance(a, relax.TensorType) and isinstance(b, relax.TensorType):
        return str(a.dtype) == str(b.dtype) and [int(d) for d in a.shape] == [
            int(d) for d in b.shape
        ]
    return type(a) is type(b)


def _differ(new: Sequence[relax.Expr], old: Sequence[relax.Expr]) -> bool:
    return any(a is not b for a, b in zip(new, old))


def _call_like(call: relax.Call, args: Sequence[relax.Expr]) -> relax.Call:
    """The call on other operands of the same types, so that its own type need not be inferred
    again.
    """
    return relax.Call(call.op, args, call.attrs, call.ty_args, ret_ty=call.ty)


def _operator(value: relax.Expr) -> str:
    if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
        return value.op.name.split(".")[-1]
    return "item" if isinstance(value, relax.TupleGetItem) else "tuple"


def rewrite_function(
    func: relax.Function, rules: Sequence[Rule], limit: int = 20
) -> relax.Function:
    """Apply the rules to every value, again and again until none applies. Raises KerfError if they
    do not settle.
    """
    for _ in range(limit):
        graph, changed = Graph(func), False
        for binding in bindings_of(func):
            value, graph.current = graph.substitute(binding.value), binding.var
            for rule in rules:
                new = (
                    rule(value, graph)
                    if isinstance(value, (relax.Call, relax.TupleGetItem))
                    else None
                )
                if new is not None:
                    value, changed = new, True
                    break
            graph.define(binding.var, value)
        if not changed:
            return func
        func = graph.finish(func)
    raise KerfError(
        "rewrite rules do not settle", found=f"{limit} rounds", todo="This is a bug in Kerf"
    )


def rewrite_module(
    mod: tvm.IRModule, rewrite: Callable[[relax.Function], relax.Function]
) -> tvm.IRModule:
    """A new module with every Relax function rewritten and its types inferred."""
    functions, changed = {}, False
    for gv, func in mod.functions_items():
        functions[gv] = rewrite(func) if isinstance(func, relax.Function) else func
        changed = changed or functions[gv] is not func
    if not changed:
        return mod
    new = tvm.IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)
    return relax.transform.Normalize()(new)


def ints(values) -> list[int]:
    """A TVM array, tuple or single integer as a list of ints."""
    if values is None:
        return []
    if isinstance(values, relax.Tuple):
        return [int(v.value) for v in values.fields]
    if isinstance(values, relax.ShapeExpr):
        return [int(v) for v in values.values]
    return (
        [int(values)]
        if isinstance(values, int) or not hasattr(values, "__len__")
        else [int(v) for v in values]
    )


def scalar(expr: relax.Expr) -> float | None:
    """The value of a one-element float constant, else None."""
    if is_const(expr) and "float" in str(expr.ty.dtype) and int(np.prod(shape_of(expr))) == 1:
        return float(const_array(expr).reshape(()))
    return None


def constant(array: np.ndarray) -> relax.Expr:
    """A Relax constant of exactly this array's dtype (`relax.const` narrows 64-bit arrays)."""
    return relax.const(tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape)))


def permutation(call: relax.Call) -> list[int]:
    """The axes of a `relax.permute_dims` call, non-negative."""
    rank = len(shape_of(call.args[0]))
    return (
        list(range(rank))[::-1]
        if call.attrs.axes is None
        else [int(a) % rank for a in call.attrs.axes]
    )


def axes_of(values, rank: int) -> list[int]:
    """Non-negative axes from an attribute; None means all."""
    return list(range(rank)) if values is None else [a % rank for a in ints(values)]
