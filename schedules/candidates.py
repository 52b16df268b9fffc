# SPDX-License-Identifier: Apache-2.0
"""Candidates of a tuning problem: compiled, compared with the definition, timed with the default.

Inputs are small whole numbers, so that sums in float32 are exact in whatever order a kernel adds
them up: a candidate must give the definition's result bit for bit before its time counts. (Kernels
that round on the way, such as Winograd's, are not `exact` and are held to a thousandth of the
largest value.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import tirx

from schedules.dispatch import schedule_function
from schedules.errors import ScheduleError
from schedules.target import CpuTarget

_FLUSH = (
    "cache_flush_cpu_non_first_arg"  # weights come from memory; the activations were just written
)
_FEWEST, _MOST = 5, 60  # rounds of a comparison
_HELD_BYTES = 1 << 30  # arrays of candidates held at once


@dataclass(frozen=True)
class Candidate:
    """One kernel to try: its point, its definition (the unscheduled PrimFunc) and its inputs."""

    point: object
    func: tirx.PrimFunc
    inputs: tuple[np.ndarray, ...]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.func.params[-1].shape)


@dataclass(frozen=True)
class Outcome:
    """A candidate's time in microseconds and its ratio to the default's; or why it failed."""

    point: object
    ratio: float | None = None
    us: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Comparison:
    """A long comparison: median ratio to the default with a 95 % interval, both medians in us."""

    point: object
    ratio: float
    low: float
    high: float
    us: float
    default_us: float


class _Compiled:
    """A kernel with its arguments in place."""

    def __init__(self, func: tirx.PrimFunc, candidate: Candidate, target):
        module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        self._library = tvm.compile(module, target).jit()
        dtype = str(candidate.func.params[-1].dtype)
        self.output = tvm.runtime.tensor(np.zeros(candidate.output_shape, dtype))
        self.arguments = [*(tvm.runtime.tensor(a) for a in candidate.inputs), self.output]

    def run(self) -> np.ndarray:
        self._library["main"](*self.arguments)
        return self.output.numpy()

    def timer(self, repeat: int) -> Callable[[], list[float]]:
        """A function that times `repeat` calls, each from flushed caches, in seconds."""
        evaluate = self._library.time_evaluator(
            "main", tvm.cpu(), number=1, repeat=repeat, f_preproc=_FLUSH
        )
        return lambda: list(evaluate(*self.arguments).results)


class Bench:
    """The candidates of one problem, measured against its default point.

    `make(point)` gives a candidate; all of them compute the same function of the same numbers.
    """

    def __init__(
        self, make: Callable[[object], Candidate], default, target: CpuTarget, *, exact: bool = True
    ):
        self._make, self._target, self._exact = make, target, exact
        candidate = make(default)
        self._size = sum(a.nbytes for a in candidate.inputs)
        self._candidate = candidate
        self._default = self._compile(candidate)
        self._expected: np.ndarray | None = None

    def _compile(self, candidate: Candidate) -> _Compiled:
        func, _ = schedule_function("candidate", candidate.func, self._target)
        return _Compiled(func, candidate, self._target.tvm())

    @property
    def expected(self) -> np.ndarray:
        """The definition's result: the PrimFunc as it was before any schedule."""
        if self._expected is None:
            self._expected = _Compiled(
                self._candidate.func, self._candidate, self._target.tvm()
            ).run()
            self._check(self._default)
        return self._expected

    def _check(self, kernel: _Compiled) -> None:
        """Raises ScheduleError if a kernel's result is not the definition's."""
        found, wanted = kernel.run(), self._expected
        if self._exact:
            wrong = ~((found == wanted) | (np.isnan(found) & np.isnan(wanted)))
        else:
            wrong = ~(np.abs(found - wanted) <= 1e-3 * np.abs(wanted).max())
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ScheduleError(
                "kernel differs from its definition",
                found=f"{found[at]} at {at}",
                wanted=str(wanted[at]),
            )

    def default_us(self) -> float:
        """Median time of the default kernel."""
        self._default.run()
        return float(np.median(_rounds([self._default], 0.1))) * 1e6

    def try_points(self, points: Sequence, seconds: float = 0.25) -> list[Outcome]:
        """Each point compiled, checked and timed for about `seconds`, in turns with the default."""
        outcomes = []
        at_once = max(1, _HELD_BYTES // max(1, self._size))
        for first in range(0, len(points), at_once):
            outcomes += self._try(points[first : first + at_once], seconds)
        return outcomes

    def _try(self, points: Sequence, seconds: float) -> list[Outcome]:
        kernels: dict[int, _Compiled] = {}
        errors: dict[int, str] = {}
        _ = self.expected
        for i, point in enumerate(points):
            try:
                kernels[i] = self._compile(self._make(point))
                self._check(kernels[i])
            except Exception as error:  # a candidate may fail in LLVM too; the reason is kept
                kernels.pop(i, None)
                errors[i] = str(error)[:200]
        outcomes = {i: Outcome(points[i], error=text) for i, text in errors.items()}
        if kernels:
            taken = _rounds([self._default, *kernels.values()], seconds * (1 + len(kernels)))
            for row, i in enumerate(kernels, 1):
                ratio = float(np.median(taken[row] / taken[0]))
                outcomes[i] = Outcome(points[i], ratio, float(np.median(taken[row])) * 1e6)
        return [outcomes[i] for i in range(len(points))]

    def compare(self, points: Sequence, seconds: float = 1.0) -> list[Comparison]:
        """Already tried points once more, longer, in turns with each other and the default."""
        kernels = [self._compile(self._make(point)) for point in points]
        taken = _rounds([self._default, *kernels], seconds * (1 + len(kernels)), most=200)
        default_us = float(np.median(taken[0])) * 1e6
        found = []
        for row, point in enumerate(points, 1):
            ratios = taken[row] / taken[0]
            low, high = median_interval(ratios)
            found.append(
                Comparison(
                    point,
                    float(np.median(ratios)),
                    low,
                    high,
                    float(np.median(taken[row])) * 1e6,
                    default_us,
                )
            )
        return found


def _rounds(kernels: Sequence[_Compiled], seconds: float, most: int = _MOST) -> np.ndarray:
    """Times in seconds, [kernels, rounds]; a kernel's time in a round is the least of a few calls.

    The kernels take turns in every round, so that a machine that slows down slows all of them.
    """
    timers = [kernel.timer(3) for kernel in kernels]
    start = time.perf_counter()
    rounds = [[min(timer()) for timer in timers]]
    count = int(np.clip(seconds / (time.perf_counter() - start), _FEWEST, most))
    for number in range(1, count):
        # Every other round backwards, so that no kernel always follows the same one.
        order = range(len(timers)) if number % 2 == 0 else reversed(range(len(timers)))
        taken = {i: min(timers[i]()) for i in order}
        rounds.append([taken[i] for i in range(len(timers))])
    return np.array(rounds).T


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """A 95 % interval of the median from order statistics; the whole range below six values."""
    ordered = np.sort(values)
    n = len(ordered)
    reach = int(np.floor((n - 1.96 * np.sqrt(n)) / 2))
    reach = max(0, min(reach, (n - 1) // 2)) if n >= 6 else 0
    return float(ordered[reach]), float(ordered[n - 1 - reach])
