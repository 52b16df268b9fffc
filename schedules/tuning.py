# SPDX-License-Identifier: Apache-2.0
"""The search for kernel parameters: MetaSchedule's evolutionary search over the choices of a space.

Kernels are emitted, not scheduled by primitives, so the design space only decides: each choice is a
`sample_categorical` and an annotation of the anchor block, and a candidate is the point that those
annotations name. The cost model does not look at TIR, which is the same for every candidate, but at
problem and point.
"""

from __future__ import annotations

import math
import os
import sys
import types
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import tirx
from tvm.ir.utils import derived_object

from schedules.fused import Fused
from schedules.spaces import Space
from schedules.target import CpuTarget

SAMPLE = "kerf.sample."  # annotations of the anchor block: index chosen, by name of the choice
_FAILED = (
    -2.0
)  # logarithm of the speed, relative to the default, that a failed candidate is learned with
_NEAR = 0.25  # share of a batch spent one choice away from the best point so far
_MEMBERS = 4  # of the ensemble whose disagreement says what is worth a trial
_DOUBT = 0.3  # standard deviation of a space's estimate, as a logarithm of speed
_ENOUGH = 6  # measurements before trees are trusted


def _meta_schedule():
    """MetaSchedule, without the half minute its import of every GPU intrinsic takes."""
    package = "tvm.s_tir.tensor_intrin"
    if package not in sys.modules:
        stub = types.ModuleType(package)
        stub.__path__ = [os.path.join(os.path.dirname(tvm.s_tir.__file__), "tensor_intrin")]
        sys.modules[package] = tvm.s_tir.tensor_intrin = stub
    from tvm.s_tir import meta_schedule

    return meta_schedule


@dataclass
class SpeedModel:
    """Predicts log(default time / time) of a point, from measurements of all problems of one loop
    structure: boosted trees that have the space's estimate among their features.

    Each of a few members is trained on a resampling of the measurements; where they disagree a
    point is worth a trial. Without measurements the estimate is all there is, and trusted as far as
    it deserves.
    """

    seed: int = 0
    rows: list[list[float]] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    _members: list = field(default_factory=list)
    _trained_on: int = 0

    def add(self, features: list[float], speed: float) -> None:
        self.rows.append(features)
        self.speeds.append(speed)

    def predict(self, rows: Sequence[list[float]], priors: Sequence[float]) -> np.ndarray:
        """What each point may well reach: the expected speed and a share of the doubt about it."""
        random = np.random.default_rng(self.seed + len(self.rows))
        guess = np.asarray(priors, "float64") + random.normal(0, _DOUBT, len(rows))
        if len(self.rows) < _ENOUGH:
            return guess
        if self._trained_on != len(self.rows):
            self._train(random)
        found = np.array([member.predict(np.array(rows)) for member in self._members])
        trust = len(self.rows) / (len(self.rows) + _ENOUGH)
        return (1 - trust) * guess + trust * (found.mean(0) + found.std(0))

    def _train(self, random: np.random.Generator) -> None:
        import xgboost

        rows, speeds = np.array(self.rows), np.array(self.speeds)
        self._members = []
        for number in range(_MEMBERS):
            chosen = random.integers(0, len(rows), len(rows)) if number else np.arange(len(rows))
            trees = xgboost.XGBRegressor(
                n_estimators=60, max_depth=4, learning_rate=0.15, n_jobs=1, random_state=number
            )
            self._members.append(trees.fit(rows[chosen], speeds[chosen]))
        self._trained_on = len(rows)


def _numbers(fields: dict) -> list[float]:
    """Fields of a problem or a point as numbers; strings by checksum, as they need only differ."""
    out: list[float] = []
    for value in fields.values():
        if isinstance(value, str):
            out.append(float(zlib.crc32(value.encode()) % 1009))
        elif isinstance(value, (tuple, list)):
            out += [float(len(value)), float(sum(value)), float(math.prod(value))]
        else:
            out.append(float(value))
    return out


class Search:
    """The search on one problem: `propose` points, `learn` what they took.

    `func` is the problem's fused PrimFunc (any point's), `default` its default point, `model` is
    shared between the problems of one loop structure. Ratios are times over the default's, None for
    a candidate that failed.
    """

    def __init__(
        self,
        func: tirx.PrimFunc,
        problem,
        space: Space,
        default,
        target: CpuTarget,
        model: SpeedModel,
        *,
        seed: int,
        batch: int,
    ):
        self.space, self.model, self.batch = space, model, batch
        self.known: dict = {}
        self._asked: list = []
        self._problem, self._default = problem, default
        self._ms = ms = _meta_schedule()
        self._target = target.tvm()
        self._block = Fused.read(func).anchor.name_hint
        self._mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        self._context = ms.TuneContext(
            self._mod,
            target=self._target,
            space_generator=ms.space_generator.ScheduleFn(
                self._sample, sch_rules=[], postprocs=[], mutator_probs={_mutator(ms, seed): 1.0}
            ),
            search_strategy=ms.search_strategy.EvolutionarySearch(
                population_size=64,
                init_measured_ratio=0.25,
                init_min_unmeasured=1,
                genetic_num_iters=3,
                eps_greedy=0.1,
            ),
            task_name=self._block,
            rand_state=seed + 1,
            num_threads=1,
        )
        self._database = ms.database.MemoryDatabase()
        self._workload = self._database.commit_workload(self._mod)
        designs = self._context.generate_design_space()
        self._trace = designs[0].trace
        self._context.pre_tuning(1 << 30, batch, designs, self._database, _cost_model(ms, self))
        self.learn([default], [1.0])

    def _sample(self, sch) -> None:
        block = sch.get_sblock(self._block)
        for name, values in self.space.choices.items():
            index = sch.sample_categorical(
                list(range(len(values))), [1.0 / len(values)] * len(values)
            )
            sch.annotate(block, SAMPLE + name, index)

    def _decode(self, sch):
        """The point that a schedule's decisions name."""
        notes = sch.get(sch.get_sblock(self._block)).annotations
        return self.space.point({name: int(notes[SAMPLE + name]) for name in self.space.choices})

    def scores(self, points: Sequence) -> np.ndarray:
        """Predicted speed relative to the default point, higher is faster."""
        return np.exp(
            self.model.predict(
                [self._features(p) for p in points], [self._prior(p) for p in points]
            )
        )

    def _prior(self, point) -> float:
        return math.log(self.space.estimate(self._default) / self.space.estimate(point))

    def _features(self, point) -> list[float]:
        return [*_numbers(self._problem.to_dict()), *_numbers(point.to_dict()), self._prior(point)]

    @property
    def exhausted(self) -> bool:
        return len(self.known) >= len(self.space.points)

    def propose(self) -> list:
        """Up to `batch` points not measured yet, none when the space is exhausted; `learn` next."""
        self._asked = self._context.generate_measure_candidates() or []
        near = self._ranked(self._neighbours())[: int(_NEAR * self.batch)]
        points = dict.fromkeys([*near, *(self._decode(c.sch) for c in self._asked)])
        fresh = [p for p in points if p not in self.known][: self.batch]
        if len(fresh) < self.batch:
            # The evolution does not know what earlier runs measured, and gives up on small spaces.
            rest = [p for p in self.space.points if p not in points]
            fresh += self._ranked(rest)[: self.batch - len(fresh)]
        return fresh

    def _neighbours(self) -> list:
        """The points one choice away from the fastest known one."""
        worked = {p: r for p, r in self.known.items() if r is not None}
        indices = self.space.indices_of(min(worked, key=worked.get))
        if indices is None:
            return []
        return [
            self.space.point({**indices, name: other})
            for name, values in self.space.choices.items()
            for other in range(len(values))
        ]

    def _ranked(self, points: Sequence) -> list:
        """Those not measured yet, the most promising first."""
        fresh = [p for p in dict.fromkeys(points) if p not in self.known]
        if not fresh:
            return []
        return [fresh[i] for i in np.argsort(-self.scores(fresh), kind="stable")]

    def learn(self, points: Sequence, ratios: Sequence[float | None]) -> None:
        """Take measurements of proposed points, or of an earlier run."""
        for point, ratio in zip(points, ratios):
            if point in self.known:
                continue
            self.known[point] = ratio
            speed = _FAILED if ratio is None else -math.log(ratio)
            self.model.add(self._features(point), speed)
            indices = self.space.indices_of(point)
            if ratio is not None and indices is not None:
                self._commit(indices, ratio)
        if asked := self._asked:
            result = self._ms.runner.RunnerResult
            ratios = [self.known.get(self._decode(c.sch)) for c in asked]
            failed = result(None, "failed or not measured")
            self._context.notify_runner_results(
                asked, [failed if r is None else result([r], None) for r in ratios]
            )
            self._asked = []

    def _commit(self, indices: dict[str, int], ratio: float) -> None:
        trace = self._trace
        samples = [i for i in trace.insts if i.kind.name == "SampleCategorical"]
        for inst, name in zip(samples, self.space.choices):
            trace = trace.with_decision(inst, indices[name], True)
        ms = self._ms
        arguments = ms.arg_info.ArgInfo.from_entry_func(self._mod, False)
        self._database.commit_tuning_record(
            ms.database.TuningRecord(trace, self._workload, [ratio], self._target, arguments)
        )


def _cost_model(ms, search: Search):
    """`SpeedModel` as MetaSchedule wants it."""

    @derived_object
    class Model(ms.cost_model.PyCostModel):
        def load(self, path) -> None:
            raise NotImplementedError

        def save(self, path) -> None:
            raise NotImplementedError

        def update(self, context, candidates, results) -> None:
            """Nothing: `Search.learn` has told the model, in the units it wants."""

        def predict(self, context, candidates) -> np.ndarray:
            return search.scores([search._decode(c.sch) for c in candidates])

    return Model()


def _mutator(ms, seed: int):
    """Changes one sampled choice of a trace to another value."""

    @derived_object
    class ChangeOneChoice(ms.mutator.PyMutator):
        def __init__(self):
            super().__init__()
            self.random = np.random.default_rng(seed)

        def _initialize_with_tune_context(self, context) -> None:
            pass

        def apply(self, trace, _):
            choices = [
                i for i in trace.insts if i.kind.name == "SampleCategorical" and len(i.attrs[0]) > 1
            ]
            if not choices:
                return None
            inst = choices[self.random.integers(len(choices))]
            count = len(inst.attrs[0])
            old = int(trace.decisions[inst])
            return trace.with_decision(
                inst, int((old + 1 + self.random.integers(count - 1)) % count), True
            )

        def clone(self):
            return _mutator(ms, seed)

    return ChangeOneChoice()
