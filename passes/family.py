# SPDX-License-Identifier: Apache-2.0
"""What a family of operators is: the one interface between the pipeline and everything that is family-specific."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from passes.layers import attrs_of, const_array, shape_of
from passes.treatment import Decision, Treatment
from schedules.errors import Declined
from schedules.preparation import Source
from schedules.target import CpuTarget


@dataclass(frozen=True)
class LoweredCall:
    """The call_tir that computes a layer, and, by `handle_of`, what those of its constants are made of that a file should
    not hold as they are."""

    call: relax.Expr
    sources: Mapping[int, Source]


# (builder, call in channels-last layout, target) -> the call_tir that computes it.
Lowering = Callable[[relax.BlockBuilder, relax.Call, CpuTarget], "relax.Expr | LoweredCall"]
# (attributes, *arguments as numpy arrays) -> result: slow, obviously right, any float dtype.
Reference = Callable[..., np.ndarray]
# (graph, names of its variables or inputs[, values of further inputs that the graph has behind the model's]) -> per
# calibration sample the values of these names.
Observe = Callable[..., Iterator[Mapping[str, np.ndarray]]]


@dataclass(frozen=True)
class Context:
    """What a family may know beyond the graph.

    `observe` runs a graph on the user's calibration data; it is None where the user gave none.
    `left` are layers that the family did not take with their weights pruned, and is not to take now that they are whole:
    what it chooses by weights would else fall on others.
    """

    target: CpuTarget
    observe: Observe | None = None
    left: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rewritten:
    """What a family made of a whole graph.

    `decisions` has exactly one entry for each layer asked of the family, taken or declined.
    `reference` is what `treated` must compute, as a graph that can be evaluated in numpy: None where
    the family changed no values, so that what the graph computed before still holds.
    `floats` is the graph before rounding whose variables `treated` holds in steps, for those who measure the noise: None
    where that is the graph given. `notes` are lines for the report about what belongs to no layer.
    """

    treated: tvm.IRModule
    decisions: Sequence[Decision]
    reference: tvm.IRModule | None = None
    floats: tvm.IRModule | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Pooling:
    """How a convolution takes the maximum over windows of its result: as `operator`, with the attributes of
    `passes/max_pooling.py`, where `suits(call, windows)`, of the convolution in NCHW and these attributes; Declined says
    why not, False that there is nothing to say. `rounding` names operators that round its result to steps, rising with their
    first argument, which may come after the maximum as well."""

    operator: str
    suits: Callable[[relax.Call, Mapping], bool | Declined]
    rounding: Sequence[str] = ()


Rewrite = Callable[[tvm.IRModule, Mapping[str, Treatment], Context], Rewritten]


@dataclass(frozen=True)
class Layer:
    """A named layer operator as a family sees it when asked to treat it: `weight` is [O, I/groups, R, S] or [O, K]."""

    call: relax.Call

    @property
    def name(self) -> str:
        return attrs_of(self.call)["name"]

    @property
    def attrs(self) -> dict:
        return attrs_of(self.call)

    @property
    def operator(self) -> str:
        return self.call.op.name

    @property
    def weight(self) -> np.ndarray:
        return const_array(self.call.args[1])

    @property
    def input_shape(self) -> tuple[int, ...]:
        return shape_of(self.call.args[0])

    @property
    def output_shape(self) -> tuple[int, ...]:
        return shape_of(self.call)


@dataclass(frozen=True)
class Family:
    """One family of operators.

    `prune(weight, **parameters)` returns the weight the treatment would have (only called when the user asked for it);
    `check(parameters, prune)` raises ValueError for parameters that contradict one another, before any work is done.
    `rewrite(graph, treatments, context)` gives layers the family's operators: it sees the canonical graph, NCHW, after the
    families before it, and the treatments asked of this family only. `passes.treat_layers.each_layer` makes one of a
    function on a single layer.
    `found(weight)` describes what the weight already is, `found_in(graph)` what the canonical graph
    shows of layers, by name: both for `inspect` and the report. `observed_in(graph, context)` is what
    calibration data shows of layers, for `inspect`.
    `jumps` names the operators that round to steps, element by element and rising with their first argument: a kernel may
    be a step off where the value lies at a tie, which verification has to know (`compiler/jumps.py`).
    `pooling` is how the family's convolutions, by operator, take the maxima of the pooling behind them.
    """

    name: str
    register: Callable[[], None]
    lowerings: Mapping[str, Lowering]
    references: Mapping[str, Reference]
    parameters: Mapping[str, Callable] = field(
        default_factory=dict
    )  # name -> parse(value), raising ValueError
    prune: Callable[..., np.ndarray] | None = None
    check: Callable[[Mapping[str, object], bool], None] | None = None
    rewrite: Rewrite | None = None
    found: Callable[[np.ndarray], Mapping] | None = None
    found_in: Callable[[tvm.IRModule], Mapping[str, Mapping]] | None = None
    observed_in: Callable[[tvm.IRModule, Context], Mapping[str, Mapping]] | None = None
    samples: Callable[[], Sequence] = tuple
    jumps: Sequence[str] = ()
    pooling: Mapping[str, Pooling] = field(default_factory=dict)
