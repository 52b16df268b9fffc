# SPDX-License-Identifier: Apache-2.0
"""Where the output channels of a layer go: the ground that the float-domain tricks stand on.

A channel may be scaled in one layer and scaled back in the next if everything between them treats
each channel alone and commutes with a positive factor (ReLU, pooling), or has a constant that can be
scaled as well (a bias, the ceiling of ReLU6). `flows` finds all such places of a graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from passes.layers import (
    CONV2D,
    DENSE,
    attrs_of,
    const_array,
    is_call,
    is_const,
    is_layer,
    operator_call,
    shape_of,
)
from passes.rewriting import Graph, bindings_of, constant, ints, rewrite_module, variables

# f(s * x) == s * f(x) for s > 0, channel by channel.
_HOMOGENEOUS = ("relax.nn.relu", "relax.nn.leakyrelu", "relax.nn.max_pool2d", "relax.nn.avg_pool2d")
# f(s * x, s * c) == s * f(x, c) for a constant c.
_WITH_CONSTANT = ("relax.add", "relax.subtract", "relax.minimum", "relax.maximum")


@dataclass(frozen=True)
class Axis:
    """Channels along `axis` of a tensor, each as `inner` consecutive entries (after flattening [N, C, H, W] to [N, C*H*W])."""

    axis: int
    inner: int = 1

    def spread(self, values: np.ndarray, rank: int) -> np.ndarray:
        """One value per channel as an array that broadcasts against a tensor of `rank` axes."""
        shape = [1] * rank
        shape[self.axis] = -1
        return np.repeat(values, self.inner).reshape(shape)


@dataclass(frozen=True)
class Step:
    """One binding between a producer and its consumers, with the channel axis of its result."""

    var: relax.Var
    value: relax.Call
    axis: Axis

    @property
    def has_constant(self) -> bool:
        """Whether its constant has to be scaled with the channels."""
        return self.value.op.name in _WITH_CONSTANT


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the channels; `inner` input columns for each."""

    var: relax.Var
    call: relax.Call
    inner: int


@dataclass(frozen=True)
class Flow:
    """All the ways of one layer's output channels, every one of which ends in a layer.

    `steps` lie between `producer` and `consumers`, in program order.
    """

    producer: relax.Var
    call: relax.Call
    steps: tuple[Step, ...]
    consumers: tuple[Consumer, ...]

    @property
    def channels(self) -> int:
        return shape_of(self.call.args[1])[0]


@dataclass
class Uses:
    """Who defines and who reads each variable of `main`."""

    mod: tvm.IRModule
    bindings: list = field(default_factory=list)
    readers: dict = field(default_factory=dict)
    definitions: dict = field(default_factory=dict)
    outputs: set = field(default_factory=set)

    def __post_init__(self):
        func = self.mod["main"]
        self.bindings = bindings_of(func)
        self.outputs = set(variables(func.body.body))
        for binding in self.bindings:
            self.definitions[binding.var] = binding.value
            for var in variables(binding.value):
                self.readers.setdefault(var, []).append(binding)


def layer_counts(uses: Uses) -> Counter[str]:
    """How often each layer is called: one that is called twice has one weight for two places."""
    return Counter(attrs_of(b.value)["name"] for b in uses.bindings if is_layer(b.value))


def flows(mod: tvm.IRModule) -> tuple[list[Flow], dict[str, str]]:
    """Every flow of `main` in program order, and for each other layer the reason why its channels are tied."""
    uses = Uses(mod)
    counts = layer_counts(uses)
    found, reasons = [], {}
    for binding in uses.bindings:
        if not is_layer(binding.value):
            continue
        name = attrs_of(binding.value)["name"]
        outcome = _follow(binding.var, binding.value, uses)
        if isinstance(outcome, Flow):
            names = [name, *(attrs_of(c.call)["name"] for c in outcome.consumers)]
            shared = [n for n in names if counts[n] > 1]
            outcome = f"{shared[0]} is used more than once" if shared else outcome
        if isinstance(outcome, Flow):
            found.append(outcome)
        else:
            reasons[name] = outcome
    return found, reasons


def _follow(var: relax.Var, call: relax.Call, uses: Uses) -> Flow | str:
    start = Axis(1 if is_call(call, CONV2D) else len(shape_of(call)) - 1)
    steps: list[Step] = []
    consumers: list[Consumer] = []
    pending = [(var, start)]
    while pending:
        at, axis = pending.pop()
        readers = uses.readers.get(at, [])
        if at in uses.outputs or any(isinstance(r.value, relax.Tuple) for r in readers):
            return "its result is an output of the model"
        for reader in readers:
            value = reader.value
            if is_layer(value) and _is_input_axis(value, axis):
                consumers.append(Consumer(reader.var, value, axis.inner))
            elif (after := _passes(value, at, axis)) is not None:
                steps.append(Step(reader.var, value, after))
                pending.append((reader.var, after))
            else:
                return f"its channels reach {operator_name(value)}"
    return Flow(var, call, tuple(steps), tuple(consumers)) if consumers else "nothing reads it"


def operator_name(value: relax.Expr) -> str:
    """A value's operator, without the namespace."""
    if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
        return value.op.name.split(".")[-1]
    return type(value).__name__


def _is_input_axis(call: relax.Call, axis: Axis) -> bool:
    rank = len(shape_of(call.args[0]))
    return axis.axis == (1 if is_call(call, CONV2D) else rank - 1) and (
        axis.inner == 1 or is_call(call, DENSE)
    )


def _passes(value: relax.Expr, operand: relax.Var, axis: Axis) -> Axis | None:
    """The channel axis after `value`, or None if it mixes channels or does not scale."""
    if not (isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op)):
        return None
    name = value.op.name
    if name in _WITH_CONSTANT:
        same_shape = shape_of(value) == shape_of(operand)
        return axis if same_shape and any(is_const(a) for a in value.args) else None
    if name == "relax.multiply":
        return axis if any(is_const(a) for a in value.args) else None
    if name == "relax.mean":
        kept = bool(value.attrs.keepdims) and axis.inner == 1
        over = [a % len(shape_of(operand)) for a in ints(value.attrs.axis)]
        return axis if kept and over and axis.axis not in over else None
    if name in _HOMOGENEOUS:
        return axis if axis.inner == 1 else None
    if name == "relax.reshape":
        return _through_reshape(shape_of(operand), shape_of(value), axis)
    return None


def _through_reshape(before: tuple, after: tuple, axis: Axis) -> Axis | None:
    """[N, C, H, W] -> [N, C*H*W] and back to [N, C, ...], and anything that keeps a last channel axis."""
    at = axis.axis
    if at == len(before) - 1 and axis.inner == 1:
        return Axis(len(after) - 1) if before[-1] == after[-1] else None
    if before[:at] != after[:at] or len(after) <= at:
        return None
    channels = before[at] // axis.inner
    if after[at] % channels or len(after) not in (at + 1, len(before)):
        return None
    inner = after[at] // channels
    is_flat = len(after) == at + 1
    return Axis(at, inner) if is_flat or inner == axis.inner else None


def input_columns(call: relax.Call, values: np.ndarray, inner: int = 1) -> np.ndarray:
    """One value per input channel, shaped to broadcast against the layer's weight."""
    weight = shape_of(call.args[1])
    if is_call(call, DENSE):
        return np.repeat(values, inner).reshape(1, -1)
    groups = attrs_of(call)["groups"]
    by_group = values.reshape(groups, weight[1])
    return np.repeat(by_group, weight[0] // groups, axis=0)[:, :, None, None]


def output_rows(call: relax.Call, values: np.ndarray) -> np.ndarray:
    """One value per output channel, shaped to broadcast against the layer's weight."""
    return values.reshape(-1, *[1] * (len(shape_of(call.args[1])) - 1))


def input_ranges(call: relax.Call, weight: np.ndarray, inner: int = 1) -> np.ndarray:
    """The largest magnitude that multiplies each input channel."""
    size = np.abs(weight)
    if is_call(call, DENSE):
        return size.max(axis=0).reshape(-1, inner).max(axis=1)
    groups = attrs_of(call)["groups"]
    per_group = size.max(axis=(2, 3)).reshape(groups, -1, weight.shape[1])
    return per_group.max(axis=1).reshape(-1)


def with_weight(call: relax.Call, weight: np.ndarray) -> relax.Call:
    """The layer with another weight of the same shape."""
    return operator_call(call.op.name, [call.args[0], constant(weight)], **attrs_of(call))


def replace_values(
    mod: tvm.IRModule, changes: Mapping[relax.Var, Callable[[relax.Expr, Graph], relax.Expr]]
) -> tvm.IRModule:
    """`mod` with the values bound to these variables of `main` replaced by `change(value, graph)`.

    The value passed has its operands already rewritten. The type must stay.
    """
    if not changes:
        return mod

    def rewrite(func: relax.Function) -> relax.Function:
        graph = Graph(func)
        for binding in bindings_of(func):
            value, graph.current = graph.substitute(binding.value), binding.var
            if binding.var in changes:
                value = changes[binding.var](value, graph)
            graph.define(binding.var, value)
        return graph.finish(func)

    return rewrite_module(mod, rewrite)


def map_constant(value: relax.Call, change: Callable[[np.ndarray], np.ndarray]) -> relax.Call:
    """An elementwise call with its constant operand changed, in float64 and rounded once."""
    args = [
        constant(change(const_array(a).astype("float64")).astype(const_array(a).dtype))
        if is_const(a)
        else a
        for a in value.args
    ]
    return relax.Call(value.op, args, value.attrs)
