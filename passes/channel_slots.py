# SPDX-License-Identifier: Apache-2.0
"""Which channels of a graph's tensors must stay or go together, which are constant, and which nobody needs.

Every index along a tensor's channel axis has a slot. Operators that treat each channel alone unite the slots of what they
read and write; a layer (a sum over its input channels) starts new ones; what is not understood pins its slots. A class of
united slots may go if each of its members, in every tensor, is the same constant at every position, or is not needed: read
only where weights are zero. A residual sum thus keeps a channel that is alive in any branch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.channel_axes import by_group, concat_parts, extent, per_input, reads, reshaped_axis
from passes.channels_last import ELEMENTWISE
from passes.evaluate import evaluate_value
from passes.layers import (
    CONV2D,
    DENSE,
    attrs_of,
    const_array,
    is_call,
    is_const,
    shape_of,
)
from passes.numpy_operators import Numeric
from passes.rewriting import axes_of, bindings_of, ints, permutation, variables

_POOLS = (
    "relax.nn.max_pool2d",
    "relax.nn.avg_pool2d",
    "relax.nn.adaptive_avg_pool2d",
    "relax.image.resize2d",
)
_REDUCTIONS = ("relax.mean", "relax.max", "relax.min", "relax.sum")


@dataclass
class Channels:
    """Of one tensor: its channel axis, the slot of each index along it, and the value of those that are constant."""

    axis: int
    slots: np.ndarray  # int64
    known: np.ndarray  # bool
    value: np.ndarray  # float64, where known
    needed: np.ndarray  # bool

    @staticmethod
    def of(axis: int, slots: np.ndarray, known=None, value=None) -> Channels:
        size = len(slots)
        known = np.zeros(size, bool) if known is None else known & np.isfinite(value)
        value = np.where(known, 0.0 if value is None else value, 0.0)
        return Channels(axis, slots, known, value, np.zeros(size, bool))

    @property
    def size(self) -> int:
        return len(self.slots)

    @property
    def asked(self) -> np.ndarray:
        """What a reader of this tensor makes its operands provide: channels that are needed and not constant."""
        return self.needed & ~self.known


class ChannelSlots:
    """The analysis of one function in NCHW, done at construction: `channels` by variable, `removable()` slots.

    Slots that stay, with the reason: `pinned` by what the graph does with them, `held` by the constants they have now.
    """

    def __init__(self, func: relax.Function):
        self.channels: dict[relax.Var, Channels] = {}
        self.parents: list[int] = []
        self.pinned: dict[int, str] = {}
        self.held: dict[int, str] = {}
        self.grouped: list[tuple[np.ndarray, np.ndarray]] = []
        bindings = bindings_of(func)
        for binding in bindings:
            found = self._forward(binding.value)
            if found is not None:
                self.channels[binding.var] = found
        for var in variables(func.body.body):
            self._pin(var, "they are an output of the network")
        for binding in reversed(bindings):
            self._backward(binding.var, binding.value)

    # Classes of slots

    def fresh(self, count: int) -> np.ndarray:
        first = len(self.parents)
        self.parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, slot: int) -> int:
        while self.parents[slot] != slot:
            self.parents[slot] = self.parents[self.parents[slot]]
            slot = self.parents[slot]
        return slot

    def roots(self, slots: np.ndarray) -> np.ndarray:
        return np.array([self.root(int(s)) for s in slots], dtype=np.int64)

    def _unite(self, a: np.ndarray, b: np.ndarray) -> None:
        for x, y in zip(a, b):
            self.parents[self.root(int(x))] = self.root(int(y))

    def _pin(self, expr: relax.Expr, reason: str) -> None:
        found = self.channels.get(expr) if isinstance(expr, relax.Var) else None
        if found is not None:
            self._pin_slots(found.slots, reason)
            found.needed[:] = True

    def _pin_slots(self, slots: np.ndarray, reason: str) -> None:
        for slot in slots:
            self.pinned.setdefault(int(slot), reason)

    def removable(self, blocks: Collection[tuple[relax.Var, int]] = ()) -> np.ndarray:
        """bool by slot: its class may go. At least one channel of every tensor stays, and groups stay of one size.

        `blocks`: tensors that lose neighbouring channels only so many at once, aligned.
        """
        roots = self.roots(np.arange(len(self.parents)))
        free = np.ones(len(self.parents), bool)  # by root
        free[roots[[*self.pinned, *self.held]]] = False
        for found in self.channels.values():
            free[roots[found.slots[found.needed & ~found.known]]] = False
        while True:
            before = free.sum()
            for ins, outs in self.grouped:
                _keep_groups_even(free, roots[ins], roots[outs])
            for var, block in blocks:
                _keep_whole_blocks(free, roots[self.channels[var].slots], block)
            for found in self.channels.values():
                if free[roots[found.slots]].all():
                    free[roots[found.slots[0]]] = False
            if free.sum() == before:
                return free[roots]

    # From producers to consumers: slots and constants

    def _forward(self, value: relax.Expr) -> Channels | None:
        if isinstance(value, relax.Var):  # another name for the same tensor
            return self.channels.get(value)
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
            name, x = value.op.name, value.args[0] if len(value.args) else None
            if (
                is_call(value, CONV2D)
                and is_const(value.args[1])
                and attrs_of(value)["layout"] == "NCHW"
            ):
                return self._convolution(value)
            if is_call(value, DENSE) and is_const(value.args[1]):
                return self._dense(value)
            if name == "relax.concat":
                return self._concat(value)
            if name in ELEMENTWISE:
                return self._elementwise(value)
            found = self.channels.get(x) if isinstance(x, relax.Var) else None
            if found is not None and (moved := self._moved(value, found)) is not None:
                return moved
        for read in variables(value):
            self._pin(read, f"they reach {_name(value)}, which is not followed")
        return None

    def _tracked(self, expr: relax.Expr, axis: int) -> Channels | None:
        """The channels of a layer's input along the axis it sums over; others are pinned."""
        found = self.channels.get(expr) if isinstance(expr, relax.Var) else None
        if found is not None and found.axis != axis:
            self._pin(expr, "a layer reads them along another axis")
            return None
        return found

    def _convolution(self, call: relax.Call) -> Channels:
        attrs, weight = attrs_of(call), const_array(call.args[1])
        x, groups, padded = self._tracked(call.args[0], 1), attrs["groups"], any(attrs["padding"])
        outputs, per_group = weight.shape[:2]
        sums = weight.astype(np.float64).sum(axis=(2, 3))
        known, value = self._layer_constants(x, reads(weight), sums, groups, padded)
        if (
            groups > 1 and per_group == 1 and x is not None
        ):  # depthwise: a channel is its own output
            slots = x.slots[np.arange(outputs) // (outputs // groups)]
            return Channels.of(1, slots, known, value)
        slots = self.fresh(outputs)
        if groups > 1:
            ins = x.slots if x is not None else self.fresh(per_group * groups)
            if x is None:
                self._pin_slots(ins, "they are no layer's output")
            self.grouped.append((ins.reshape(groups, -1), slots.reshape(groups, -1)))
        return Channels.of(1, slots, known, value)

    def _dense(self, call: relax.Call) -> Channels:
        weight, rank = const_array(call.args[1]), len(shape_of(call.args[0]))
        x = self._tracked(call.args[0], rank - 1)
        sums = weight.astype(np.float64)
        known, value = self._layer_constants(x, weight != 0, sums, 1, False)
        return Channels.of(rank - 1, self.fresh(weight.shape[0]), known, value)

    def _layer_constants(self, x, reads, sums, groups, padded) -> tuple[np.ndarray, np.ndarray]:
        """Output channels that are constant, and their values: they read only constant input channels, or none. Under
        zero padding a constant that is not zero is none, and cannot leave the layer that reads it."""
        if x is None:
            return ~reads.any(axis=1), np.zeros(len(reads))
        steady = x.known & ((x.value == 0) | (not padded))
        if padded:
            stuck = x.known & (x.value != 0) & per_input(reads, groups).any(axis=0)
            reason = "a constant that is not zero meets zero padding"
            self.held |= dict.fromkeys(map(int, x.slots[stuck]), reason)
        inputs = by_group(steady, groups, len(reads))
        values = by_group(x.value, groups, len(reads))
        return ~(reads & ~inputs).any(axis=1), np.where(reads & inputs, sums * values, 0.0).sum(
            axis=1
        )

    def _elementwise(self, call: relax.Call) -> Channels | None:
        shape = shape_of(call) if isinstance(call.ty, relax.TensorType) else ()
        tracked: dict[relax.Var, int] = {}
        for arg in call.args:
            if isinstance(arg, relax.Var) and arg in self.channels:
                tracked[arg] = self.channels[arg].axis + len(shape) - len(shape_of(arg))
        if not tracked:
            return None
        sliced = {v: a for v, a in tracked.items() if shape_of(v)[a - len(shape)] == shape[a]}
        axes = set(sliced.values())
        alone = [
            a for a in call.args
            if isinstance(a, relax.Var) and a not in sliced and axes and extent(a, max(axes), len(shape)) > 1
        ]  # fmt: skip
        for var in set(tracked) - set(sliced):
            self._pin(var, "they are spread over other channels")
        if len(axes) != 1 or alone:
            for var in sliced:
                self._pin(var, f"{_name(call)} joins them with values that are no layer's output")
            return None
        axis, (first, *others) = axes.pop(), [self.channels[v] for v in sliced]
        for other in others:
            self._unite(other.slots, first.slots)
        known, value = self._elementwise_constants(call, sliced, axis, shape)
        return Channels.of(axis, first.slots, known, value)

    def _elementwise_constants(
        self, call, sliced, axis: int, shape
    ) -> tuple[np.ndarray, np.ndarray]:
        """Channels of an elementwise result that are constant: of constant operands, or a product with zero."""
        found = [self.channels[v] for v in sliced]
        known = np.logical_and.reduce([c.known for c in found])
        if any(isinstance(a, relax.Var) and a not in sliced for a in call.args):
            known[:] = False
        value = np.zeros(shape[axis])
        if known.any():
            values = {}
            for var, channels in zip(sliced, found):
                wide = [1] * len(shape_of(var))
                wide[channels.axis] = -1
                values[var] = np.broadcast_to(channels.value.reshape(wide), shape_of(var))
            result = evaluate_value(call, values, Numeric("float64"), {})
            rows = np.moveaxis(np.asarray(result, np.float64), axis, 0).reshape(shape[axis], -1)
            known &= (rows == rows[:, :1]).all(axis=1)
            value = rows[:, 0]
        if is_call(call, "relax.multiply"):
            zero = np.logical_or.reduce([c.known & (c.value == 0) for c in found])
            known, value = known | zero, np.where(zero, 0.0, value)
        return known, value

    def _concat(self, call: relax.Call) -> Channels | None:
        parts = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
        axis = int(call.attrs.axis or 0) % len(shape_of(call))
        found = [self.channels.get(p) if isinstance(p, relax.Var) else None for p in parts]
        tracked = [f for f in found if f is not None]
        if not tracked or any(f.axis != axis for f in tracked):
            for read in variables(call):
                self._pin(read, "they are concatenated along another axis")
            return None
        pieces = []
        for part, channels in zip(parts, found):
            if channels is None:
                channels = Channels.of(axis, self.fresh(shape_of(part)[axis]))
                self._pin_slots(channels.slots, "they are no layer's output")
            pieces.append(channels)
        slots, known, value = (
            np.concatenate([getattr(p, field) for p in pieces])
            for field in ("slots", "known", "value")
        )
        return Channels.of(axis, slots, known, value)

    def _moved(self, call: relax.Call, x: Channels) -> Channels | None:
        """Operators of one tensor that leave each channel to itself."""
        name = call.op.name
        if name in _POOLS and str(call.attrs.layout) == "NCHW" and x.axis == 1:
            exact = name == "relax.nn.max_pool2d" or (
                name == "relax.nn.avg_pool2d"
                and not (call.attrs.count_include_pad and any(ints(call.attrs.padding)))
            )
            return Channels.of(1, x.slots, x.known & ((x.value == 0) | exact), x.value)
        if name in _REDUCTIONS:
            axes = axes_of(call.attrs.axis, len(shape_of(call.args[0])))
            if x.axis in axes:
                return None
            axis = x.axis if call.attrs.keepdims else x.axis - sum(a < x.axis for a in axes)
            same = (x.value == 0) | (name != "relax.sum")
            return Channels.of(axis, x.slots, x.known & same, x.value)
        if name == "relax.permute_dims":
            return Channels.of(permutation(call).index(x.axis), x.slots, x.known, x.value)
        if name == "relax.nn.pad":
            widths = ints(call.attrs.pad_width)
            if any(widths[2 * x.axis : 2 * x.axis + 2]) or str(call.attrs.pad_mode) != "constant":
                return None
            return Channels.of(
                x.axis, x.slots, x.known & (x.value == float(call.attrs.pad_value)), x.value
            )
        if name in ("relax.reshape", "relax.broadcast_to"):
            where = reshaped_axis(
                shape_of(call.args[0]), shape_of(call), x.axis, name == "relax.reshape"
            )
            if where is not None:
                axis, inner = where
                return Channels.of(
                    axis, *(np.repeat(a, inner) for a in (x.slots, x.known, x.value))
                )
        return None

    # From consumers to producers: what is needed

    def _backward(self, var: relax.Var, value: relax.Expr) -> None:
        result = self.channels.get(var)
        for read in variables(value):
            x = self.channels.get(read)
            if x is None or x.needed.all():  # pinned ones may have another axis than the reader's
                continue
            if result is None:
                x.needed[:] = True
            elif is_call(value, CONV2D) or is_call(value, DENSE):
                weight = const_array(value.args[1])
                groups = attrs_of(value).get("groups", 1)
                used = reads(weight) & result.asked[:, None]
                x.needed |= per_input(used, groups).any(axis=0)
            elif is_call(value, "relax.concat"):
                for part, first in concat_parts(value):
                    if part.same_as(read):
                        x.needed |= result.asked[first : first + x.size]
            elif result.size != x.size and result.size % x.size == 0:  # flattened
                x.needed |= result.asked.reshape(x.size, -1).any(axis=1)
            else:
                x.needed |= result.asked


def _keep_groups_even(free: np.ndarray, ins: np.ndarray, outs: np.ndarray) -> None:
    """Let every group of a convolution lose as many channels as the others, or go as a whole. In place, by root."""
    left = [g for g in range(len(ins)) if not (free[ins[g]].all() and free[outs[g]].all())]
    for slots in (ins, outs):
        fewest = min((int(free[slots[g]].sum()) for g in left), default=0)
        for g in left:
            free[slots[g][free[slots[g]]][fewest:]] = False


def _keep_whole_blocks(free: np.ndarray, slots: np.ndarray, block: int) -> None:
    """Let channels go only if all of their aligned block go. In place, by root."""
    for first in range(0, len(slots), block):
        here = slots[first : first + block]
        free[here] &= free[here].all()


def _name(value: relax.Expr) -> str:
    if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
        return value.op.name.removeprefix("relax.")
    return "an expression"
