# SPDX-License-Identifier: Apache-2.0
"""Tune a model: which of its layers to search on, how to share the trials, what to keep.

Each distinct problem of the model (loop structure, shape) is one task, weighed by the number of its calls. A task's
kernels are made exactly as a build makes them, by lowering the layer alone (with a bias and a ReLU behind it) with the
candidate's parameters in place of the default ones. Everything measured is in the records at once, so that an interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from compiler import __version__, pipeline
from compiler.measure import pinned
from compiler.thread_pool import check_threads, prepare_thread_pool, use_threads
from passes import families
from passes.layers import attrs_of, const_array, is_const, shape_of
from schedules.candidates import Bench, Candidate, Comparison
from schedules.errors import ScheduleError, TargetError
from schedules.fused import Fused
from schedules.records import Records, target_key
from schedules.spaces import Space, space_of, structure_of
from schedules.target import CpuTarget
from schedules.tuning import Search, SpeedModel

Progress = Callable[[str], None]

BATCH = 8  # candidates compiled and measured between two looks at what to search next
MARGIN = (
    0.02  # the interval of a candidate's ratio must lie this far below 1 to replace the default
)
_FINALISTS = 3
_UNTRIED = 0.15  # gain to expect of a task never searched


@dataclass
class Task:
    """One distinct problem: `calls` layers of the model have it; `make(point)` is the candidate for it."""

    loops: str
    problem: object
    calls: int
    name: str
    space: Space
    default: object
    make: Callable[[object], Candidate]
    exact: bool
    rounds: int = 0
    last_gain: float = _UNTRIED
    default_us: float = 0.0
    search: Search | None = None

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
        return (
            self.calls
            * self.default_us
            * self.best[1]
            * max(self.last_gain, _UNTRIED / (1 + self.rounds) ** 2)
        )


@dataclass(frozen=True)
class TunedTask:
    """One row of the result. `tuned_us` is None where the default stays; `confirmed` False if the run ended before."""

    name: str
    loops: str
    calls: int
    trials: int
    default_us: float
    tuned_us: float | None
    confirmed: bool
    point: Mapping

    @property
    def gain(self) -> float:
        """Share of the default's time that is saved."""
        return 1 - self.tuned_us / self.default_us if self.tuned_us else 0.0


@dataclass(frozen=True)
class TuningResult:
    """`tasks` by weight, heaviest first. `interrupted` says what ended the search early, if anything did."""

    records: Path
    tasks: list[TunedTask]
    trials: int
    seconds: float
    interrupted: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def saved(self) -> float:
        """Share of all tunable layers' time that is saved."""
        before = sum(t.calls * t.default_us for t in self.tasks)
        after = sum(t.calls * (t.tuned_us or t.default_us) for t in self.tasks)
        return 1 - after / before if before else 0.0


def tune(
    source,
    records: str | Path,
    *,
    trials: int,
    target: CpuTarget,
    inputs: Mapping[str, tuple[int, ...]] | None = None,
    batch: int | None = None,
    example=None,
    time_budget: float | None = None,
    progress: Progress | None = None,
) -> TuningResult:
    """Search kernel parameters for a model and add what is found to the directory `records`.

    `trials` counts every candidate ever tried for this model's problems on this target, so a second run with the same
    number only finishes what the first left. Stops early after `time_budget` seconds or at Ctrl-C, keeping everything.
    Raises TargetError for a target that this machine cannot run.
    """
    say = progress or (lambda _text: None)
    if missing := target.missing_on_host():
        raise TargetError(
            "tuning needs a machine that can run the kernels",
            where="--target",
            found="no " + ", ".join(missing),
        )
    check_threads(target.threads)
    store = Records.open(records, create=True)
    notes = [note] if (note := store.ignored_for(target)) else []
    for note in notes:
        say(note)
    from compiler.frontend import import_model

    say("importing")
    imported = import_model(source, example=example, inputs=inputs, batch=batch)
    tasks = find_tasks(
        pipeline.lay_out(pipeline.canonicalize(imported.mod)), target.with_records(None)
    )
    prepare_thread_pool()
    with pinned(target.threads):
        use_threads(target.threads)
        return _Run(tasks, store, target, say, trials, time_budget).run(Path(records), notes)


def find_tasks(mod: tvm.IRModule, target: CpuTarget) -> list[Task]:
    """The distinct tunable problems of a canonical, channels-last module."""
    lowerings = {name for family in families() for name in family.lowerings}
    calls: dict[tuple, list[relax.Call]] = {}
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if (
                isinstance(call, relax.Call)
                and isinstance(call.op, tvm.ir.Op)
                and call.op.name in lowerings
            ):
                calls.setdefault(_signature(call), []).append(call)
    tasks: dict[tuple, Task] = {}
    for same in calls.values():
        found = _task_of(same[0], len(same), target)
        if found is None:
            continue
        known = tasks.setdefault((found.loops, found.problem), found)
        if known is not found:
            known.calls += found.calls
    return list(tasks.values())


def _signature(call: relax.Call) -> tuple:
    """Calls with the same signature lower to the same kernel."""
    attrs = (
        {k: v for k, v in attrs_of(call).items() if k != "name"} if call.attrs is not None else {}
    )
    return (
        call.op.name,
        str(attrs),
        tuple((shape_of(a), is_const(a)) if hasattr(a.ty, "shape") else str(a) for a in call.args),
    )


class _Asking:
    """A `PointSource` that has nothing, and notes what it was asked for."""

    def __init__(self):
        self.asked: list[tuple[str, Mapping]] = []

    def lookup(self, target, loops, problem) -> None:
        self.asked.append((loops, problem))


@dataclass(frozen=True)
class _Fixed:
    """A `PointSource` that gives one point for everything."""

    point: object

    def lookup(self, target, loops, problem) -> dict:
        return self.point.to_dict()


def _task_of(call: relax.Call, calls: int, target: CpuTarget) -> Task | None:
    """None if the lowering of this call chooses no parameters, or there is nothing to choose from."""
    alone = isolate(call)
    asking = _Asking()
    graph = pipeline.fuse_graph(alone, target.with_records(asking))
    if len(asking.asked) != 1:
        return None
    loops, fields = asking.asked[0]
    structure = structure_of(loops)
    problem = structure.Problem.from_dict(dict(fields))
    space = space_of(loops, problem, target)
    if space is None or len(space.points) < 2:
        return None

    def make(point) -> Candidate:
        return candidate(
            pipeline.fuse_graph(alone, target.with_records(_Fixed(point))).mod, loops, point
        )

    default = structure.default_point(problem, target)
    name = candidate_name(graph.mod, loops)
    return Task(loops, problem, calls, name, space, default, make, exact=True)


def isolate(call: relax.Call) -> tvm.IRModule:
    """The layer alone: its variable arguments are parameters, its weights whole numbers with the zeros where they were."""
    random = np.random.default_rng(0)
    parameters, arguments = [], []
    for i, arg in enumerate(call.args):
        if is_const(arg):
            arguments.append(_whole_numbers(const_array(arg), random))
        elif isinstance(arg, relax.Var):
            parameters.append(relax.Var(f"x{i}", arg.ty))
            arguments.append(parameters[-1])
        else:
            arguments.append(arg)
    bb = relax.BlockBuilder()
    with bb.function("main", parameters):
        with bb.dataflow():
            out = bb.emit(relax.Call(call.op, arguments, attrs=call.attrs))
            if call.op.name.startswith("kerf."):
                bias = random.integers(-3, 4, shape_of(call)[-1]).astype("float32")
                out = bb.emit(relax.op.nn.relu(bb.emit(relax.op.add(out, relax.const(bias)))))
            out = bb.emit_output(out)
        bb.emit_func_output(out)
    return bb.get()


def _whole_numbers(array: np.ndarray, random: np.random.Generator) -> relax.Expr:
    if array.dtype != np.float32:
        return relax.const(array)
    values = random.integers(1, 3, array.shape) * (1 - 2 * random.integers(0, 2, array.shape))
    return relax.const(np.where(array == 0, 0, values).astype("float32"))


def _anchor_calls(mod: tvm.IRModule, loops: str) -> Iterator[tuple[str, relax.Call]]:
    """Name and call of every fused PrimFunc with this loop structure."""
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call) and call.op == tvm.ir.Op.get("relax.call_tir"):
                fused = Fused.read(mod[call.args[0]])
                if fused is not None and fused.loops == loops:
                    yield call.args[0].name_hint, call


def candidate_name(mod: tvm.IRModule, loops: str) -> str:
    """The kernel's name in a build, without what is fused behind it."""
    return (
        next(name for name, _ in _anchor_calls(mod, loops))
        .removeprefix("fused_")
        .removesuffix("_add_relu")
    )


def candidate(mod: tvm.IRModule, loops: str, point) -> Candidate:
    """The one kernel of a lowered `isolate` module, with inputs. Raises ScheduleError if there are more."""
    calls = list(_anchor_calls(mod, loops))
    if len(calls) != 1:
        raise ScheduleError(f"{len(calls)} {loops} kernels from one layer", wanted="1")
    call = calls[0][1]
    random = np.random.default_rng(1)  # the same activations for every candidate
    arrays = []
    for arg in call.args[1].fields:
        if is_const(arg):
            arrays.append(const_array(arg))
        else:
            arrays.append(random.integers(-3, 4, shape_of(arg)).astype("float32"))
    return Candidate(point, mod[call.args[0]], tuple(arrays))


class _Run:
    """One tuning run: shares the trials between the tasks, keeps the records."""

    def __init__(
        self,
        tasks,
        records: Records,
        target: CpuTarget,
        say: Progress,
        trials: int,
        budget: float | None,
    ):
        self.tasks, self.records, self.target, self.say = tasks, records, target, say
        self.wanted, self.budget = trials, budget
        self.models: dict[str, SpeedModel] = {}
        self.start = time.perf_counter()
        self.bench: tuple[Task, Bench] | None = None
        self.spent_on_trials = 0.0
        self.new_trials = 0

    @property
    def done(self) -> int:
        return sum(task.trials for task in self.tasks)

    def run(self, path: Path, notes: list[str]) -> TuningResult:
        ended = ""
        try:
            self._open_tasks()
            ended = self._search()
            self._confirm_all()
        except KeyboardInterrupt:
            ended = "interrupted"
        rows = sorted((self._row(t) for t in self.tasks), key=lambda r: -r.calls * r.default_us)
        return TuningResult(path, rows, self.done, time.perf_counter() - self.start, ended, notes)

    # ---- tasks

    def _bench(self, task: Task) -> Bench:
        """The bench of a task; only the last one is kept, as it holds the weights of several kernels."""
        if self.bench is None or self.bench[0] is not task:
            self.bench = None
            self.bench = (task, Bench(task.make, task.default, self.target, exact=task.exact))
        return self.bench[1]

    def _open_tasks(self) -> None:
        """Time every default, or take its time from the records, and learn from earlier trials."""
        for i, task in enumerate(self.tasks):
            earlier = self.records.trials_of(self.target, task.loops, task.problem.to_dict())
            times = [e["default_us"] for e in earlier if e.get("default_us")]
            if not times:
                self.say(f"timing the default kernels: {i + 1} of {len(self.tasks)}, {task.name}")
            task.default_us = times[-1] if times else self._bench(task).default_us()
            self._open_search(task, i, earlier)
        self.say(
            f"{len(self.tasks)} kernels, {self._total_us() / 1e3:.2f} ms per run by default; {self.done} trials in the records"
        )

    def _open_search(self, task: Task, number: int, earlier: list[dict]) -> None:
        model = self.models.setdefault(task.loops, SpeedModel())
        func = task.make(task.default).func
        task.search = Search(
            func,
            task.problem,
            task.space,
            task.default,
            self.target,
            model,
            seed=number,
            batch=BATCH,
        )
        structure = structure_of(task.loops)
        points = [structure.Point.from_dict(e["point"]) for e in earlier]
        task.search.learn(points, [e.get("ratio") for e in earlier])
        task.rounds = len(points) // BATCH

    def _total_us(self) -> float:
        return sum(t.calls * t.default_us * t.best[1] for t in self.tasks)

    # ---- search

    def _search(self) -> str:
        while self.done < self.wanted:
            if self.budget is not None and time.perf_counter() - self.start > self.budget:
                return "out of time"
            open_tasks = [t for t in self.tasks if not t.search.exhausted]
            if not open_tasks:
                return ""
            self._step(max(open_tasks, key=Task.worth))
        return ""

    def _step(self, task: Task) -> None:
        """One batch of one task."""
        start = time.perf_counter()
        before = task.best[1]
        points = task.search.propose()[: self.wanted - self.done]
        bench = self._bench(task)
        ratios = []
        try:
            for outcome in bench.try_points(points):
                self._note_trial(task, outcome)
                ratios.append(outcome.ratio)
        finally:
            task.search.learn(points[: len(ratios)], ratios)
        task.rounds += 1
        task.last_gain = 1 - task.best[1] / before
        self.new_trials += len(points)
        self.spent_on_trials += time.perf_counter() - start
        left = (self.wanted - self.done) * self.spent_on_trials / max(1, self.new_trials)
        self.say(
            f"{task.name} x{task.calls}: {task.default_us:.0f} us by default, best {task.best[1] - 1:+.1%} after {task.trials} trials"
            f" | {self.done} of {self.wanted} trials, {left:.0f} s left, all kernels {self._total_us() / 1e3:.2f} ms"
        )

    def _note_trial(self, task: Task, outcome) -> None:
        default_us = outcome.us / outcome.ratio if outcome.ratio else task.default_us
        self._note(
            "trial",
            task,
            outcome.point,
            ratio=outcome.ratio,
            us=outcome.us,
            default_us=default_us,
            error=outcome.error,
        )

    def _note(self, kind: str, task: Task, point, **fields) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.records.add(
            {
                "kind": kind,
                "target": target_key(self.target),
                "loops": task.loops,
                "problem": task.problem.to_dict(),
                "point": point.to_dict(),
                "date": now,
                **fields,
            }  # fmt: skip
        )

    # ---- results

    def _result(self, task: Task) -> dict | None:
        """The task's result, if it was closed after its last trial."""
        result = self.records.result_of(self.target, task.loops, task.problem.to_dict())
        return result if result is not None and result["trials"] >= task.trials else None

    def _confirm_all(self) -> None:
        open_tasks = [t for t in self.tasks if t.trials and self._result(t) is None]
        for i, task in enumerate(open_tasks, 1):
            self.say(f"confirming {i} of {len(open_tasks)}: {task.name}")
            self._confirm(task)

    def _confirm(self, task: Task) -> None:
        """Compare the best candidates with the default at length; keep the best if it clearly wins."""
        ranked = sorted(task.measured, key=task.measured.get)
        finalists = [p for p in ranked if p != task.default and task.measured[p] < 1][:_FINALISTS]
        earlier = self.records.lookup(self.target, task.loops, task.problem.to_dict())
        if earlier is not None:
            finalists.append(structure_of(task.loops).Point.from_dict(earlier))
        if not finalists:
            self._note(
                "result",
                task,
                task.default,
                kept=False,
                trials=task.trials,
                ratio=1.0,
                us=task.default_us,
                default_us=task.default_us,
            )
            return
        best = min(self._bench(task).compare(list(dict.fromkeys(finalists))), key=lambda c: c.ratio)
        self._note_result(task, best)

    def _note_result(self, task: Task, best: Comparison) -> None:
        self._note(
            "result", task, best.point, kept=best.high < 1 - MARGIN, trials=task.trials, ratio=best.ratio,
            interval=[best.low, best.high], us=best.us, default_us=best.default_us,
            versions={"kerf": __version__, "tvm": tvm.__version__},
        )  # fmt: skip

    def _row(self, task: Task) -> TunedTask:
        result = self._result(task)
        if result is None or not result.get("kept"):
            return TunedTask(
                task.name, task.loops, task.calls, task.trials, task.default_us, None,
                result is not None or not task.trials, task.default.to_dict(),
            )  # fmt: skip
        return TunedTask(
            task.name,
            task.loops,
            task.calls,
            task.trials,
            result["default_us"],
            result["us"],
            True,
            dict(result["point"]),
        )
