# SPDX-License-Identifier: Apache-2.0
"""The tuning tasks of a model: its distinct problems, each with the means to make its kernels.

A candidate is made exactly as a build makes it, by lowering the layer alone (with a bias and a ReLU
behind it) with the candidate's parameters in place of the default ones, so every family's lowering
serves tuning as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from compiler import pipeline
from passes import families
from passes.layers import attrs_of, const_array, is_const, shape_of
from passes.quantized.operators import quantize
from schedules.candidates import Candidate
from schedules.errors import ScheduleError
from schedules.fused import Fused
from schedules.spaces import Space, space_of, structure_of
from schedules.target import CpuTarget
from schedules.tuning import Search

UNTRIED = 0.15  # gain to expect of a task never searched
_ROUNDING = ("winograd",)  # loop structures whose results are not exact on whole numbers
# What activations are drawn from, by type: whole numbers, bytes, words of signs.
_DRAWN = {"float32": (-3, 4), "uint8": (0, 8), "uint32": (0, 2**32)}


@dataclass
class Task:
    """One distinct problem: `calls` layers of the model have it; `make(point)` is the candidate for
    it. Times in microseconds, `best` and `measured` as ratios to the default's."""

    loops: str
    problem: object
    calls: int
    name: str
    space: Space
    default: object
    make: Callable[[object], Candidate]
    rounds: int = 0
    last_gain: float = UNTRIED
    default_us: float = 0.0
    search: Search | None = None

    @property
    def exact(self) -> bool:
        """Whether results on whole numbers must be those of the definition bit for bit."""
        return self.loops not in _ROUNDING

    @property
    def measured(self) -> dict:
        """Ratio to the default by point, of candidates that worked."""
        known = self.search.known if self.search else {}
        return {p: r for p, r in known.items() if r is not None}

    @property
    def best(self) -> tuple[object, float]:
        return min(self.measured.items(), key=lambda item: item[1], default=(self.default, 1.0))

    @property
    def trials(self) -> int:
        """Candidates tried, without the default."""
        return len(self.search.known) - 1 if self.search else 0

    def worth(self) -> float:
        """Microseconds per run of the model that the next trials may save."""
        likely = max(self.last_gain, UNTRIED / (1 + self.rounds) ** 2)
        return self.calls * self.default_us * self.best[1] * likely


def find_tasks(mod: tvm.IRModule, target: CpuTarget) -> list[Task]:
    """The distinct tunable problems of a canonical, channels-last module."""
    lowerings = {name for family in families() for name in family.lowerings}
    calls: dict[tuple, list[relax.Call]] = {}
    for call in _calls(mod):
        if isinstance(call.op, tvm.ir.Op) and call.op.name in lowerings:
            calls.setdefault(_signature(call), []).append(call)
    tasks: dict[tuple, Task] = {}
    for same in calls.values():
        for found in _tasks_of(same[0], len(same), target):
            known = tasks.setdefault((found.loops, found.problem), found)
            if known is not found:
                known.calls += found.calls
    return list(tasks.values())


def _calls(mod: tvm.IRModule) -> Iterator[relax.Call]:
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.Call):
                yield binding.value


def _signature(call: relax.Call) -> tuple:
    """Calls with the same signature lower to the same kernel."""
    attrs = {}
    if call.attrs is not None and call.op.name.startswith("kerf."):
        attrs = {k: v for k, v in attrs_of(call).items() if k != "name"}
    args = tuple((str(a.ty), is_const(a)) if hasattr(a, "ty") else str(a) for a in call.args)
    return call.op.name, str(attrs or call.attrs), args


class _Asking:
    """A `PointSource` that has nothing, and notes what it was asked for."""

    def __init__(self):
        self.asked: list[tuple[str, Mapping]] = []

    def lookup(self, target, loops, problem) -> None:
        self.asked.append((loops, problem))


@dataclass(frozen=True)
class _Fixed:
    """A `PointSource` that gives one point, for one problem."""

    loops: str
    problem: Mapping
    point: object

    def lookup(self, target, loops, problem) -> dict | None:
        return self.point.to_dict() if (loops, problem) == (self.loops, self.problem) else None


def _tasks_of(call: relax.Call, calls: int, target: CpuTarget) -> Iterator[Task]:
    """One for each kernel of this call whose lowering chooses parameters, and has a choice."""
    alone = isolate(call)
    if alone is None:
        return
    asking = _Asking()
    graph = pipeline.fuse_graph(alone, target.with_records(asking))
    for loops, fields in asking.asked:
        structure = structure_of(loops)
        problem = structure.Problem.from_dict(dict(fields))
        anchor = _anchor_call(graph.mod, loops, problem)
        if anchor is None:
            continue  # it asked for the parameters of a kernel that it then did not take
        name, lowered = anchor
        default = structure.Point(**Fused.read(graph.mod[lowered.args[0]]).point["point"])
        space = space_of(loops, problem, default, target)
        if space is None or len(space.points) < 2:
            continue
        make = functools.partial(_made, alone, target, loops, fields, problem)
        for ending in ("_add_relu", "_cast_multiply"):
            name = name.removeprefix("fused_").removesuffix(ending)
        yield Task(loops, problem, calls, name, space, default, make)


def _made(
    alone: tvm.IRModule, target: CpuTarget, loops: str, fields: Mapping, problem, point
) -> Candidate:
    """The kernel of a problem in an `isolate` module, made with `point`."""
    given = target.with_records(_Fixed(loops, fields, point))
    return candidate(pipeline.fuse_graph(alone, given).mod, loops, problem, point)


def isolate(call: relax.Call) -> tvm.IRModule | None:
    """The layer alone: its variable arguments are parameters, its weights whole numbers with the
    zeros where they were. None if an argument is no tensor of a type in `_DRAWN`."""
    random = np.random.default_rng(0)
    parameters, arguments = [], []
    for i, arg in enumerate(call.args):
        if is_const(arg):
            arguments.append(_whole_numbers(const_array(arg), random))
        elif isinstance(arg, relax.Var):
            if str(getattr(arg.ty, "dtype", "")) not in _DRAWN:
                return None
            parameters.append(relax.Var(f"x{i}", arg.ty))
            arguments.append(parameters[-1])
        else:
            arguments.append(arg)
    bb = relax.BlockBuilder()
    with bb.function("main", parameters):
        with bb.dataflow():
            out = bb.emit(relax.Call(call.op, arguments, attrs=call.attrs))
            if call.op.name.startswith("kerf."):
                out = _followed(bb, out, random, on_bytes=str(parameters[0].ty.dtype) == "uint8")
            out = bb.emit_output(out)
        bb.emit_func_output(out)
    return bb.get()


def _followed(
    bb: relax.BlockBuilder, out: relax.Var, random: np.random.Generator, *, on_bytes: bool
) -> relax.Var:
    """What follows a layer in its kernel: a bias and a ReLU, which for sums of bytes is rounding to
    bytes; a scale before them for other sums of integers; nothing for words of signs."""
    dtype, channels = str(out.ty.dtype), shape_of(out)[-1]
    if dtype == "uint32":
        return out
    scale = relax.const(np.full(channels, 2**-6, "float32"))
    if dtype == "int32" and not on_bytes:
        out = bb.emit(relax.op.multiply(bb.emit(relax.op.astype(out, "float32")), scale))
        dtype = "float32"
    biased = bb.emit(relax.op.add(out, relax.const(random.integers(-3, 4, channels).astype(dtype))))
    if dtype != "int32":
        return bb.emit(relax.op.nn.relu(biased))
    scaled = bb.emit(relax.op.multiply(bb.emit(relax.op.astype(biased, "float32")), scale))
    return bb.emit(quantize(scaled, scale=1.0, zero_point=0, bounded=True))


def _whole_numbers(array: np.ndarray, random: np.random.Generator) -> relax.Expr:
    if array.dtype not in (np.float32, np.int8):
        return relax.const(array)
    values = random.integers(1, 3, array.shape) * (1 - 2 * random.integers(0, 2, array.shape))
    return relax.const(np.where(array == 0, 0, values).astype(array.dtype))


def _anchor_call(mod: tvm.IRModule, loops: str, problem) -> tuple[str, relax.Call] | None:
    """Name and call of the one kernel that computes a problem with this loop structure, None if none does.

    Raises ScheduleError if several do.
    """
    found = []
    for call in _calls(mod):
        if call.op != tvm.ir.Op.get("relax.call_tir"):
            continue
        fused = Fused.read(mod[call.args[0]])
        if fused is None or fused.loops != loops:
            continue
        if type(problem).from_dict(fused.point["problem"]) == problem:
            found.append((call.args[0].name_hint, call))
    if len(found) > 1:
        raise ScheduleError(f"{len(found)} {loops} kernels from one layer", wanted="1")
    return found[0] if found else None


def candidate(mod: tvm.IRModule, loops: str, problem, point) -> Candidate:
    """A problem's kernel in a lowered `isolate` module, with inputs. Raises ScheduleError if there is none."""
    anchor = _anchor_call(mod, loops, problem)
    if anchor is None:
        raise ScheduleError(f"no {loops} kernel for the problem", found=str(problem))
    call = anchor[1]
    random = np.random.default_rng(1)  # the same activations for every candidate
    arrays = []
    for arg in call.args[1].fields:
        if is_const(arg):
            arrays.append(const_array(arg))
        else:
            dtype = str(arg.ty.dtype)
            arrays.append(random.integers(*_DRAWN[dtype], shape_of(arg)).astype(dtype))
    return Candidate(point, mod[call.args[0]], tuple(arrays))
