# SPDX-License-Identifier: Apache-2.0
"""The density of activations above which a dense kernel is faster, measured on this machine or estimated for another."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import tvm
from tvm import te

from schedules import contraction, gathered_rows
from schedules.dispatch import schedule_function
from schedules.spaces import point_for
from schedules.target import CpuTarget
from schedules.windows import Problem

_DENSITIES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
# Rounds in which every kernel runs once: at least so many, more while they take less than so many seconds.
_ROUNDS, _MOST_ROUNDS, _SECONDS = 11, 60, 0.8
# Weights come from memory in a network: so many bytes of copies take turns.
_COLD_BYTES = 64 << 20
# The kernel goes over to dense where gathering takes this share of its time: measurements differ, and a wrong guess
# then costs less.
_LEVEL = 0.95
# (rows, density) of the crossover for machines that cannot be measured here: AVX-512, 3072 -> 768.
_ESTIMATES = ((8, 0.3), (64, 0.15), (1 << 30, 0.25))


def crossover(
    rows: int, inputs: int, outputs: int, target: CpuTarget, density: float, dtype: str = "float32"
) -> float:
    """The density in [0, 1] up to which gathering rows is the faster way, by the kernel made for `density`; the weights
    are of `dtype`."""
    if rows == 1:
        return 1.0  # one row of activations reads what it needs: never slower, see gathered_rows
    if target.missing_on_host():
        return next(limit for most, limit in _ESTIMATES if rows <= most)
    target = target.with_threads(1)
    problem = gathered_rows.dense_problem(rows, inputs, outputs)
    dense = point_for(contraction, problem, target)
    itemsize = np.dtype(dtype).itemsize
    point = gathered_rows.default_point(problem, target, density, 1.0, dense, itemsize)
    return _measure(problem, replace(point, limit=rows * inputs), target, dtype)


@functools.lru_cache(maxsize=64)
def _measure(problem: Problem, point: gathered_rows.Point, target: CpuTarget, dtype: str) -> float:
    """The first density whose time, interpolated, is no longer well below that of the loop that `point` goes over to."""
    shape = (problem.row, problem.c)
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (problem.o, problem.c)).astype(dtype)
    packed = gathered_rows.pack_weights(weight, problem, point, target.lanes)
    dense, gathered = (
        _compile(
            gathered_rows.define(shape, problem, replace(point, limit=limit)), shape, packed, target
        )
        for limit in (0, point.limit)
    )
    rows = [
        rng.standard_normal(shape, dtype=np.float32) * (rng.random(shape) < d) for d in _DENSITIES
    ]
    given = [tvm.runtime.tensor(x) for x in rows]
    out = tvm.runtime.tensor(np.zeros((problem.row, problem.o), np.float32))
    turn = itertools.cycle(
        [tvm.runtime.tensor(packed) for _ in range(max(2, _COLD_BYTES // packed.nbytes))]
    )
    ratios = relative_times(
        lambda: dense(given[-1], next(turn), out),
        [functools.partial(lambda x: gathered(x, next(turn), out), x) for x in given],
    )
    return first_above(_DENSITIES, rising(ratios), _LEVEL)


def _compile(define, shape, packed: np.ndarray, target: CpuTarget):
    arguments = [
        te.placeholder(s, dtype, name=n)
        for n, s, dtype in (("x", shape, "float32"), ("w", packed.shape, str(packed.dtype)))
    ]
    func = te.create_prim_func([*arguments, define(*arguments)])
    func, _ = schedule_function("crossover", func, target)
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(mod, target.tvm())["main"]


def relative_times(
    base: Callable[[], object], others: Sequence[Callable[[], object]]
) -> list[float]:
    """The time of each of `others` as a share of that of `base`.

    All run in turn, round after round. The clock counts what this thread computed, not how long others had the
    processor, and a share is the median over rounds of neighbours in time: a busy machine slows both.
    """
    shares: list[list[float]] = [[] for _ in others]
    stop = time.perf_counter() + _SECONDS
    for done in range(_MOST_ROUNDS + 1):
        if done > _ROUNDS and time.perf_counter() > stop:
            break
        first = _seconds(base)
        times = [_seconds(other) for other in others]
        level = (first + _seconds(base)) / 2
        if done:  # the first round finds nothing in any cache
            for kept, took in zip(shares, times):
                kept.append(took / level)
    return [float(np.median(kept)) for kept in shares]


def _seconds(run: Callable[[], object]) -> float:
    start = time.thread_time_ns()
    run()
    return max(1, time.thread_time_ns() - start)


def rising(values: Sequence[float]) -> list[float]:
    """The nearest sequence, by squares, that never falls: neighbours out of order become their mean."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [float(np.mean(block)) for block in blocks for _ in block]


def first_above(densities: Sequence[float], ratios: Sequence[float], level: float) -> float:
    """Where `ratios` over `densities`, joined by straight lines, first pass `level`; the ends where they never or always
    do."""
    previous = (0.0, 0.0)
    for density, ratio in zip(densities, ratios):
        if ratio >= level:
            if previous[0] == 0.0:
                return 0.0
            share = (level - previous[1]) / (ratio - previous[1])
            return previous[0] + share * (density - previous[0])
        previous = (density, ratio)
    return densities[-1]
