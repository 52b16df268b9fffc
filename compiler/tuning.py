# SPDX-License-Identifier: Apache-2.0
"""Tune a model: share the trials between its kernels, keep what clearly wins, go on later.

Each distinct problem of the model (loop structure and shape) is a task, weighed by the number of
its calls. Everything measured is in the records at once, so that an interrupted run goes on where
it stopped. Trials go where they may save most; the best of a task replaces the default only after a
second, longer comparison.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import tvm

from compiler import __version__, pipeline
from compiler.driver import BuildOptions, prepare, with_calibration
from compiler.failures import Interrupts
from compiler.measure import pinned
from compiler.recipe import load_recipe
from compiler.thread_pool import check_threads, prepare_thread_pool, use_threads
from compiler.tuning_tasks import Task, find_tasks
from passes.treat_layers import treat_layers
from schedules.candidates import Bench, Comparison, Outcome
from schedules.errors import TargetError
from schedules.records import Records, target_key
from schedules.spaces import structure_of
from schedules.target import CpuTarget
from schedules.tuning import Search, SpeedModel

Progress = Callable[[str], None]

BATCH = 8  # candidates compiled and measured between two looks at what to search next
MARGIN = 0.02  # a candidate replaces the default if all of its ratio's interval is below 1 - MARGIN
_FINALISTS = 3


@dataclass(frozen=True)
class TunedTask:
    """One row of the result. `tuned_us` is None where the default stays; `confirmed` is False if
    the run ended before the task's best candidate was compared a second time."""

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
    """`tasks` heaviest first. `interrupted` says what ended the search early, if anything did."""

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
    recipe="dense",
    calibration=None,
    preprocess: str | None = None,
    time_budget: float | None = None,
    progress: Progress | None = None,
) -> TuningResult:
    """Search kernel parameters for a model and add what is found to the directory `records`.

    `trials` counts every candidate ever tried for this model's problems on this target, so a second
    run with the same number only finishes what the first left. The problems are those of the model
    under `recipe`, with `calibration` and `preprocess` as in `build`. Stops early after `time_budget`
    seconds or at Ctrl-C, keeping everything. Raises TargetError for a target that this machine
    cannot run.
    """
    say = progress or (lambda _text: None)
    if missing := target.missing_on_host():
        raise TargetError(
            "tuning needs a machine that can run the kernels",
            where="--target",
            found="no " + ", ".join(missing),
        )
    check_threads(target.threads)
    from compiler.frontend import import_model

    say("importing")
    imported = import_model(source, example=example, inputs=inputs, batch=batch)
    options = BuildOptions(load_recipe(recipe), target, target.threads)
    options = with_calibration(options, imported, calibration, preprocess, say)
    original, treatments = prepare(imported.mod, options)
    treated = treat_layers(original, treatments, options.context).treated
    # Only now, so that a model that cannot be imported or treated leaves no empty directory.
    store = Records.open(records, create=True)
    notes = [note] if (note := store.ignored_for(target)) else []
    for note in notes:
        say(note)
    say("finding the distinct kernels")
    tasks = find_tasks(pipeline.lay_out(treated), target.with_records(None))
    prepare_thread_pool()
    with pinned(target.threads):
        use_threads(target.threads)
        run = Run(tasks, store, target, trials=trials, budget=time_budget, say=say)
        rows, ended = run.run()
        return TuningResult(Path(records), rows, run.done, run.seconds, ended, notes)


class Run:
    """One tuning run over `tasks`: shares the trials between them, keeps the records.

    `trials` counts all candidates, earlier runs' included; `budget` is in seconds.
    """

    def __init__(
        self,
        tasks: list[Task],
        records: Records,
        target: CpuTarget,
        *,
        trials: int,
        budget: float | None = None,
        say: Progress = lambda _text: None,
    ):
        self.tasks, self.records, self.target, self.say = tasks, records, target, say
        self.wanted, self.budget = trials, budget
        self.models: dict[str, SpeedModel] = {}
        self.start = time.perf_counter()
        self.bench: tuple[Task, Bench] | None = None
        self.interrupts = Interrupts()
        self.searched_seconds = 0.0
        self.searched_trials = 0

    @property
    def done(self) -> int:
        return sum(task.trials for task in self.tasks)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def run(self) -> tuple[list[TunedTask], str]:
        """The rows of the result, heaviest first, and what ended the search early, if anything."""
        ended = ""
        with self.interrupts:
            try:
                self._open_tasks()
                ended = self._search()
                self._confirm_all()
            except (KeyboardInterrupt, Exception) as error:
                if not (self.interrupts.seen or isinstance(error, KeyboardInterrupt)):
                    raise
                ended = "interrupted"
        rows = [self._row(task) for task in self.tasks if task.default_us]
        return sorted(rows, key=lambda row: -row.calls * row.default_us), ended

    # ---- tasks

    def _bench(self, task: Task) -> Bench:
        """The bench of a task; only one is kept, as it holds the weights of several kernels."""
        if self.bench is None or self.bench[0] is not task:
            self.bench = None
            self.bench = (task, Bench(task.make, task.default, self.target, exact=task.exact))
        return self.bench[1]

    def _open_tasks(self) -> None:
        """Time every default, or take its time from the records, and learn from earlier trials."""
        for i, task in enumerate(self.tasks):
            earlier = self._earlier_trials(task)
            times = [e["default_us"] for _, e in earlier if e.get("default_us")]
            if not times:
                self.say(f"timing the default kernels: {i + 1} of {len(self.tasks)}, {task.name}")
            task.default_us = times[-1] if times else self._bench(task).default_us()
            self._open_search(task, i)
            task.search.learn([p for p, _ in earlier], [e.get("ratio") for _, e in earlier])
            task.rounds = len(earlier) // BATCH
        self.say(
            f"{len(self.tasks)} kernels, {self._total_us() / 1e3:.2f} ms per run by default;"
            f" {self.done} of {self.wanted} trials done before"
        )

    def _earlier_trials(self, task: Task) -> list[tuple[object, dict]]:
        """Recorded trials of a task that this version's parameters can express."""
        found = []
        for entry in self.records.trials_of(self.target, task.loops, task.problem.to_dict()):
            try:
                found.append((structure_of(task.loops).Point(**entry["point"]), entry))
            except TypeError:
                self.say(f"{task.name}: a trial with parameters of another version is left out")
        return found

    def _open_search(self, task: Task, number: int) -> None:
        model = self.models.setdefault(task.loops, SpeedModel())
        func = task.make(task.default).func
        task.search = Search(
            func, task.problem, task.space, task.default, self.target, model,
            seed=number, batch=BATCH,
        )  # fmt: skip

    def _total_us(self) -> float:
        return sum(t.calls * t.default_us * t.best[1] for t in self.tasks)

    # ---- search

    def _search(self) -> str:
        while self.done < self.wanted:
            if self.budget is not None and self.seconds > self.budget:
                return "out of time"
            open_tasks = [t for t in self.tasks if not t.search.exhausted]
            if not open_tasks:
                return ""
            self._step(max(open_tasks, key=Task.worth))
        return ""

    def _step(self, task: Task) -> None:
        """One batch of one task."""
        start, before = time.perf_counter(), task.best[1]
        points = task.search.propose()[: self.wanted - self.done]
        outcomes = self._bench(task).try_points(points)
        if self.interrupts.seen:  # one of them may have failed because of that
            raise KeyboardInterrupt
        for outcome in outcomes:
            self._note_trial(task, outcome)
        task.search.learn(points, [outcome.ratio for outcome in outcomes])
        task.rounds += 1
        task.last_gain = 1 - task.best[1] / before
        self.searched_trials += len(points)
        self.searched_seconds += time.perf_counter() - start
        left = (self.wanted - self.done) * self.searched_seconds / self.searched_trials
        self.say(
            f"{task.name} x{task.calls}: {task.default_us:.0f} us by default,"
            f" best {task.best[1] - 1:+.1%} after {task.trials} trials |"
            f" {self.done} of {self.wanted} trials, about {left:.0f} s left |"
            f" all kernels {self._total_us() / 1e3:.2f} ms"
        )

    def _note_trial(self, task: Task, outcome: Outcome) -> None:
        fields = {"ratio": outcome.ratio, "us": outcome.us, "error": outcome.error}
        default_us = outcome.us / outcome.ratio if outcome.ratio else task.default_us
        self._note("trial", task, outcome.point, default_us=default_us, **fields)

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
            }
        )

    # ---- results

    def _result(self, task: Task) -> dict | None:
        """The task's recorded result, if it was closed after its last trial."""
        result = self.records.result_of(self.target, task.loops, task.problem.to_dict())
        return result if result is not None and result["trials"] >= task.trials else None

    def _confirm_all(self) -> None:
        open_tasks = [t for t in self.tasks if t.trials and self._result(t) is None]
        for i, task in enumerate(open_tasks, 1):
            self.say(f"confirming {i} of {len(open_tasks)}: {task.name}")
            self._confirm(task)

    def _confirm(self, task: Task) -> None:
        """Compare the best candidates with the default at length; keep one if it clearly wins."""
        points = [p for p in task.measured if p != task.default and task.measured[p] < 1]
        finalists = sorted(points, key=task.measured.get)[:_FINALISTS]
        kept = self.records.lookup(self.target, task.loops, task.problem.to_dict())
        points_by_fields = {json.dumps(p.to_dict(), sort_keys=True): p for p in task.measured}
        if kept is not None:
            finalists.append(points_by_fields.get(json.dumps(kept, sort_keys=True), task.default))
        finalists = [p for p in dict.fromkeys(finalists) if p != task.default]
        if finalists:
            compared = self._bench(task).compare(finalists)
            best = min(compared, key=lambda comparison: comparison.ratio)
        else:
            us = task.default_us
            best = Comparison(task.default, 1.0, 1.0, 1.0, us, us)
        self._note(
            "result",
            task,
            best.point,
            kept=best.high < 1 - MARGIN,
            trials=task.trials,
            ratio=best.ratio,
            interval=[best.low, best.high],
            us=best.us,
            default_us=best.default_us,
            versions={"kerf": __version__, "tvm": tvm.__version__},
        )

    def _row(self, task: Task) -> TunedTask:
        result = self._result(task)
        row = TunedTask(
            name=task.name,
            loops=task.loops,
            calls=task.calls,
            trials=task.trials,
            default_us=task.default_us,
            tuned_us=None,
            confirmed=result is not None or not task.trials,
            point=task.default.to_dict(),
        )
        if result is None or not result["kept"]:
            return row
        times = {"default_us": result["default_us"], "tuned_us": result["us"]}
        return replace(row, point=dict(result["point"]), **times)
