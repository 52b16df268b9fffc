# SPDX-License-Identifier: Apache-2.0
"""Remove filters that contribute nothing, and the input channels that they feed: a smaller, dense network.

rewrite: kerf.conv2d(relu(kerf.conv2d(x, w1 [64, ...])), w2 [128, 64, ...]), 20 filters of w1 zero
         -> kerf.conv2d(relu(kerf.conv2d(x, w1' [44, ...])), w2' [128, 44, ...])
         kerf.conv2d(sigmoid(kerf.conv2d(x, w1)), w2), filter o zero, no padding
         -> kerf.conv2d(sigmoid(kerf.conv2d(x, w1')), w2') + sigmoid(0) * sum of w2[:, o]
requires: NCHW, constants folded, batch norm folded
ensures: outputs keep their shapes and values; a channel goes only where it goes in everything that
  shares it (the branches of a residual sum, a depthwise filter), and where the constant that it
  holds after bias and activation is zero or can be added to its readers; an unread filter goes as
  well; every tensor keeps one channel at least, and the groups of a convolution stay of one size
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.channel_axes import by_group, extent
from passes.channel_slots import Channels, ChannelSlots
from passes.layers import (
    CONV2D,
    DENSE,
    attrs_of,
    const_array,
    is_call,
    is_const,
    operator_call,
    shape_of,
)
from passes.rewriting import Graph, bindings_of, constant


@dataclass(frozen=True)
class LayerChannels:
    """Channels of one layer: `inputs` and `outputs` of its weight's two first axes before and after; `dead` filters (all
    zero) before, and why those that are left could not go."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    dead: int
    reason: str = ""

    @property
    def changed(self) -> bool:
        return self.inputs[0] != self.inputs[1] or self.outputs[0] != self.outputs[1]


class _Compactor:
    def __init__(self, func: relax.Function, blocks: Mapping[str, int]):
        self.func, self.graph = func, Graph(func)
        self.slots = ChannelSlots(func)
        self.removable = self.slots.removable(block_vars(func, blocks))
        self.layers: dict[str, LayerChannels] = {}

    def run(self) -> relax.Function:
        for binding in bindings_of(self.func):
            value = binding.value
            if isinstance(value, relax.Call) and self._touches(binding.var, value):
                value = self._rebuilt(binding.var, value)
            else:
                value = self.graph.substitute(value)
            self.graph.alias(binding.var, self.graph.bind(binding.var.name, value))
            self._note(binding.var, binding.value, value)
        return self.graph.finish(self.func)

    def channels(self, expr: relax.Expr) -> Channels | None:
        return self.slots.channels.get(expr) if isinstance(expr, relax.Var) else None

    def kept(self, expr: relax.Expr) -> np.ndarray | None:
        """Indices that stay along a tensor's channel axis; None where all do."""
        found = self.channels(expr)
        if found is None:
            return None
        going = self.removable[found.slots]
        return np.flatnonzero(~going) if going.any() else None

    def _touches(self, var: relax.Var, call: relax.Call) -> bool:
        parts = [
            a for arg in call.args for a in (arg.fields if isinstance(arg, relax.Tuple) else [arg])
        ]
        return any(self.kept(e) is not None for e in (var, *parts))

    def _rebuilt(self, var: relax.Var, call: relax.Call) -> relax.Expr:
        if (is_call(call, CONV2D) or is_call(call, DENSE)) and is_const(call.args[1]):
            return self._layer(var, call)
        found, shape = self.slots.channels[var], list(shape_of(var))
        kept = self.kept(var)
        args = [self.graph.substitute(a) for a in call.args]
        if call.op.name in ("relax.reshape", "relax.broadcast_to"):
            shape[found.axis] = len(kept)
            args[1] = relax.ShapeExpr(shape)
        else:
            args = [_sliced(a, found.axis, len(shape), found.size, kept) for a in args]
        return relax.Call(call.op, args, call.attrs, call.ty_args)

    def _layer(self, var: relax.Var, call: relax.Call) -> relax.Expr:
        attrs, weight = attrs_of(call), const_array(call.args[1])
        groups = attrs.get("groups", 1)
        x, outputs = call.args[0], self.kept(var)
        outputs = np.arange(len(weight)) if outputs is None else outputs
        inputs = self.kept(x)
        added = self._constants(call, weight, groups)[outputs]
        if inputs is None:
            weight = weight[outputs]
        elif groups == 1:
            weight = weight[np.ix_(outputs, inputs)]
        else:
            per_group, of_group = weight.shape[1], len(weight) // groups
            left = [inputs[inputs // per_group == g] % per_group for g in range(groups)]
            weight = np.stack([weight[o][left[o // of_group]] for o in outputs])
            groups = sum(len(g) > 0 for g in left)
        if "groups" in attrs:
            attrs["groups"] = groups
        new = operator_call(call.op.name, [self.graph.substitute(x), constant(weight)], **attrs)
        if not added.any():
            return new
        tail = (1, -1, 1, 1) if is_call(call, CONV2D) else (-1,)
        return relax.op.add(new, constant(added.astype(weight.dtype).reshape(tail)))

    def _constants(self, call: relax.Call, weight: np.ndarray, groups: int) -> np.ndarray:
        """float64 [O]: what the input channels that go contribute to every output channel."""
        x = self.channels(call.args[0])
        if x is None:
            return np.zeros(len(weight))
        going = np.where(self.removable[x.slots] & x.known, x.value, 0.0)
        sums = weight.astype(np.float64).reshape(*weight.shape[:2], -1).sum(axis=2)
        values = by_group(going, groups, len(weight))
        return np.where(values != 0, sums * values, 0.0).sum(axis=1)

    def _note(self, var: relax.Var, before: relax.Expr, after: relax.Expr) -> None:
        if not ((is_call(before, CONV2D) or is_call(before, DENSE)) and is_const(before.args[1])):
            return
        old, name = const_array(before.args[1]), attrs_of(before)["name"]
        new = after if is_call(after, before.op.name) else after.args[0]  # a constant was added
        kept = const_array(new.args[1])
        dead = ~(old != 0).reshape(len(old), -1).any(axis=1)
        staying = dead & ~self.removable[self.slots.channels[var].slots]
        groups = [attrs_of(c).get("groups", 1) for c in (before, new)]
        self.layers[name] = LayerChannels(
            (old.shape[1] * groups[0], kept.shape[1] * groups[1]),
            (len(old), len(kept)),
            int(dead.sum()),
            self._why(var, staying, dead) if staying.any() else "",
        )

    def _why(self, var: relax.Var, staying: np.ndarray, dead: np.ndarray) -> str:
        """Why dead filters stay, of the first of them."""
        if dead.all() and staying.sum() == 1:
            return "every filter is dead; one stays"
        slot = int(self.slots.channels[var].slots[np.flatnonzero(staying)[0]])
        root = self.slots.root(slot)
        for pinned, reason in {**self.slots.held, **self.slots.pinned}.items():
            if self.slots.root(pinned) == root:
                return reason
        return "other branches or groups need these channels"


def _sliced(arg: relax.Expr, axis: int, rank: int, size: int, kept: np.ndarray) -> relax.Expr:
    """An operand of an elementwise operator: constants lose the channels that variables have lost."""
    if not is_const(arg) or size == 1 or extent(arg, axis, rank) != size:
        return arg
    array = const_array(arg)
    return constant(np.take(array, kept, axis=axis - (rank - array.ndim)))


def block_vars(func: relax.Function, blocks: Mapping[str, int]) -> list[tuple[relax.Var, int]]:
    """The results of layers by name, for `ChannelSlots.removable`."""
    found = [b for b in bindings_of(func) if is_call(b.value, CONV2D) or is_call(b.value, DENSE)]
    return [(b.var, blocks[n]) for b in found if (n := attrs_of(b.value)["name"]) in blocks]


def compact(
    mod: tvm.IRModule, blocks: Mapping[str, int] | None = None
) -> tuple[tvm.IRModule, Mapping[str, LayerChannels]]:
    """`mod` without what can go, and the channels of each layer of `main` before and after. The module given, if nothing
    can. `blocks`: layers by name that lose neighbouring filters only so many at once, aligned: their zeros lie in such
    blocks, and a filter less would shift all behind it."""
    compactor = _Compactor(mod["main"], blocks or {})
    main = compactor.run()
    if not any(c.changed for c in compactor.layers.values()):
        return mod, compactor.layers
    functions = {gv: main if gv.name_hint == "main" else func for gv, func in mod.functions_items()}
    new = tvm.IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)
    return relax.transform.Normalize()(new), compactor.layers


@tvm.transform.module_pass(opt_level=0, name="kerf.RemoveDeadFilters")
class RemoveDeadFilters:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return compact(mod)[0]
