# SPDX-License-Identifier: Apache-2.0
"""Which activations of a graph lie in memory as bytes, and how each of their readers reads them.

An activation is *held* as bytes where a layer that becomes int8 reads it, also through operators that only move or pick
values (max pooling, reshape, transpose, concatenation: these then work on bytes, and all they join shares one scale);
where it is one of two computed operands of an addition whose result is held (a kernel computes one of them together with
the sum, the other has to lie somewhere); and where the rest of its readers cost less from bytes (means over windows, the
scaling of a squeeze-and-excitation, maxima over windows of what an int8 layer makes). Everything else is float32 in registers, or float32 in memory.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import tvm
from tvm import relax

from passes.channel_flow import Uses
from passes.layers import attrs_of, is_const, is_layer, shape_of
from passes.numpy_operators import BINARY, UNARY
from passes.rewriting import axes_of, ints

_ELEMENTWISE = frozenset(
    [f"relax.{name}" for name in (*UNARY, *BINARY, "divide", "clip")]
    + [f"relax.nn.{name}" for name in ("relu", "leakyrelu", "gelu", "gelu_tanh", "silu", "softplus")]
)  # fmt: skip
_CARRIERS = frozenset(
    ["relax.nn.max_pool2d", "relax.reshape", "relax.permute_dims", "relax.concat", "relax.squeeze",
     "relax.expand_dims"]
)  # fmt: skip

# What only moves or picks values does so in its reader's kernel, and leaves nothing in memory.
_MOVES = (_CARRIERS - {"relax.nn.max_pool2d"}) | {"relax.strided_slice", "relax.take"}


def is_operator(value, names: Collection[str]) -> bool:
    return (
        isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name in names
    )


def is_elementwise(value) -> bool:
    """Whether a value is computed element by element, so that it costs a kernel nothing to do it on the way."""
    return is_operator(value, _ELEMENTWISE) and _is_float(value)


def _is_float(expr) -> bool:
    return isinstance(expr.ty, relax.TensorType) and str(expr.ty.dtype) == "float32"


def tensors(value) -> list[relax.Var]:
    """The variables that a value reads tensors from, one entry per operand."""
    if not isinstance(value, relax.Call):
        return []
    found = []
    for arg in value.args:
        parts = arg.fields if isinstance(arg, relax.Tuple) else [arg]
        found += [p for p in parts if isinstance(p, relax.Var)]
    return found


def is_carrier(value) -> bool:
    """Whether a value consists of values of its operands, all of which are computed."""
    if not is_operator(value, _CARRIERS) or not _is_float(value):
        return False
    if is_operator(value, ["relax.nn.max_pool2d"]):
        return str(value.attrs.layout) == "NCHW"
    parts = value.args[0].fields if isinstance(value.args[0], relax.Tuple) else [value.args[0]]
    return all(isinstance(p, relax.Var) for p in parts)


def window_mean(value) -> dict | None:
    """A mean over windows or over the whole image of an [N, C, H, W] tensor, as `int8_average_pool` takes it; else None."""
    if is_operator(value, ["relax.mean"]):
        shape = shape_of(value.args[0])
        if len(shape) == 4 and sorted(axes_of(value.attrs.axis, 4)) == [2, 3]:
            return {"pool_size": shape[2:]}
    if is_operator(value, ["relax.nn.avg_pool2d"]):
        a = value.attrs
        plain = str(a.layout) == "NCHW" and not a.ceil_mode and set(ints(a.dilation)) == {1}
        if plain:
            return {
                "pool_size": ints(a.pool_size),
                "strides": ints(a.strides),
                "padding": ints(a.padding),
                "count_include_pad": bool(a.count_include_pad),
            }
    return None


@dataclass
class BytesPlan:
    """`held` maps every variable that lies in bytes to the group that shares its scale; `sources` are those of a group
    that are made from floats, whose values decide its range. `layers` are the calls that become int8, by variable."""

    uses: Uses
    layers: dict[relax.Var, relax.Call]
    held: dict[relax.Var, relax.Var] = field(default_factory=dict)

    def group(self, var: relax.Var) -> relax.Var:
        """The variable that stands for all those that share a scale with `var`."""
        while self.held[var] is not var:
            var = self.held[var]
        return var

    def sources(self) -> dict[relax.Var, list[relax.Var]]:
        """By group, in program order."""
        found: dict[relax.Var, list[relax.Var]] = {}
        for var in self.held:
            if not is_carrier(self.uses.definitions.get(var)):
                found.setdefault(self.group(var), []).append(var)
        return found

    def reads_bytes(self, reader: relax.Var, operand: relax.Var) -> bool:
        """Whether the value bound to `reader` reads a held operand as bytes rather than as floats."""
        if operand not in self.held:
            return False
        value = self.uses.definitions[reader]
        if reader in self.layers:
            return True
        if is_carrier(value):
            return reader in self.held
        return window_mean(value) is not None or (
            is_elementwise(value) and self.becomes_bytes(reader)
        )

    def becomes_bytes(self, var: relax.Var) -> bool:
        """Whether a float value only ever turns into bytes, so that it needs no place in memory."""
        if var in self.uses.outputs:
            return False
        if var in self.held:
            return True
        readers = self.uses.readers.get(var, [])
        return (
            len(readers) == 1
            and is_elementwise(readers[0].value)
            and self.becomes_bytes(readers[0].var)
        )

    def floats_read(self, var: relax.Var) -> bool:
        """Whether anything reads the float value of a held variable."""
        readers = self.uses.readers.get(var, [])
        return var in self.uses.outputs or any(not self.reads_bytes(b.var, var) for b in readers)


def plan_bytes(mod: tvm.IRModule, chosen: Collection[str]) -> BytesPlan:
    """The plan for a canonical graph whose layers named in `chosen` become int8."""
    uses = Uses(mod)
    layers = {
        b.var: b.value
        for b in uses.bindings
        if is_layer(b.value) and attrs_of(b.value)["name"] in chosen
    }
    plan = BytesPlan(uses, layers)
    order = [*mod["main"].params, *(b.var for b in uses.bindings)]
    position = {var: i for i, var in enumerate(order)}
    # What layers need decides where residuals go, so it comes first.
    for wanted in (_needed, _worthwhile):
        for var in reversed(order):
            if var not in plan.held and _is_float(var) and wanted(plan, var, position):
                plan.held[var] = var
        _share(plan)
    plan.held = {var: plan.held[var] for var in order if var in plan.held}
    return plan


def _share(plan: BytesPlan) -> None:
    """One group for a held variable and whatever it carries."""
    for binding in plan.uses.bindings:
        if binding.var in plan.held and is_carrier(binding.value):
            for operand in tensors(binding.value):
                first, second = plan.group(operand), plan.group(binding.var)
                if first is not second:
                    plan.held[second] = first


def _needed(plan: BytesPlan, var: relax.Var, _position) -> bool:
    """Whether an int8 layer reads `var`, directly or through carriers."""
    return any(
        (b.var in plan.layers and b.value.args[0].same_as(var))
        or (b.var in plan.held and is_carrier(b.value))
        for b in plan.uses.readers.get(var, [])
    )


def _worthwhile(plan: BytesPlan, var: relax.Var, position) -> bool:
    """Whether `var` costs less as bytes though no int8 layer needs it so."""
    readers = plan.uses.readers.get(var, [])
    if not readers or var in plan.uses.outputs:
        return False
    if _needed(plan, var, position):  # of a carrier that this pass has decided to hold
        return True
    if any(_joins_later(plan, var, b, position) for b in readers):
        return len(readers) == 1
    if _is_max_pool(plan.uses.definitions.get(var)):
        return _pools_layer(plan, var, position)
    if _root(plan, var, position) not in plan.layers:
        return False
    means = [window_mean(b.value) is not None for b in readers]
    others = [is_elementwise(b.value) and plan.becomes_bytes(b.var) for b in readers]
    return any(means) and all(m or o for m, o in zip(means, others))


def _is_max_pool(value) -> bool:
    return is_carrier(value) and is_operator(value, ["relax.nn.max_pool2d"])


def _pools_layer(plan: BytesPlan, var: relax.Var, position) -> bool:
    """Whether `var` is the maxima over windows of what an int8 layer makes and nothing else reads, and its readers take
    numbers one by one or mean over them: from bytes as well as from floats of four times the size."""
    pooled = plan.uses.definitions[var].args[0]
    if pooled in plan.uses.outputs or len(plan.uses.readers[pooled]) != 1:
        return False
    readers = [b.value for b in plan.uses.readers.get(var, [])]
    if not all(is_operator(v, _ELEMENTWISE) or window_mean(v) is not None for v in readers):
        return False
    return _root(plan, pooled, position) in plan.layers


def _joins_later(plan: BytesPlan, var: relax.Var, reader, position) -> bool:
    """Whether `reader` adds `var` to a tensor whose kernel can take the sum along, as it comes first."""
    if not is_operator(reader.value, ["relax.add"]) or not plan.becomes_bytes(reader.var):
        return False
    a, b = reader.value.args
    if is_const(a) or is_const(b) or a.same_as(b) or shape_of(a) != shape_of(b):
        return False
    other = b if a.same_as(var) else a
    # A tensor that something else reads as floats is finished before the sum: its kernel cannot take that along.
    if other in plan.held or other in plan.uses.outputs or len(plan.uses.readers[other]) != 1:
        return False
    roots = [_root(plan, v, position) for v in (var, other)]
    made = [plan.uses.definitions.get(r) for r in roots]
    if any(v is None or is_elementwise(v) or is_operator(v, _MOVES) for v in made):
        return False
    return position[roots[0]] > position[roots[1]]


def _root(plan: BytesPlan, var: relax.Var, position) -> relax.Var:
    """The variable whose kernel computes `var` on the way: up through elementwise values that nothing else reads."""
    value = plan.uses.definitions.get(var)
    if not is_elementwise(value):
        return var
    ups = [
        v
        for v in tensors(value)
        if v not in plan.held
        and v in plan.uses.definitions
        and len(plan.uses.readers[v]) == 1
        and shape_of(v) == shape_of(var)
    ]
    return min((_root(plan, v, position) for v in ups), key=position.get, default=var)
