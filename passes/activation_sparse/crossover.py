# SPDX-License-Identifier: Apache-2.0
"""The density of activations above which a dense kernel is faster, measured on this machine or estimated for another."""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import replace

import numpy as np
import tvm
from tvm import te

from passes.dense.conv2d import pack_weights
from passes.dense.matmul import define_dense
from schedules import contraction, gathered_rows
from schedules.dispatch import schedule_function
from schedules.spaces import point_for
from schedules.target import CpuTarget
from schedules.windows import Problem

_DENSITIES = (0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
_RUNS = 7
# Weights come from memory in a network: so many bytes of copies take turns.
_COLD_BYTES = 64 << 20
# The kernel goes over to dense before they are level: measurements differ, and a wrong guess then costs less.
_MARGIN = 0.85
# (rows, density) of the crossover for machines that cannot be measured here: AVX-512, 3072 -> 768.
_ESTIMATES = ((8, 0.3), (64, 0.15), (1 << 30, 0.25))


def crossover(rows: int, inputs: int, outputs: int, target: CpuTarget, density: float) -> float:
    """The density in [0, 1] up to which gathering rows is the faster way, by the kernel made for `density`."""
    if rows == 1:
        return 1.0  # one row of activations reads what it needs: never slower, see gathered_rows
    if target.missing_on_host():
        return next(limit for most, limit in _ESTIMATES if rows <= most)
    target = target.with_threads(1)
    problem = gathered_rows.dense_problem(rows, inputs, outputs)
    dense = point_for(contraction, problem, target)
    point = gathered_rows.default_point(problem, target, density, 1.0, dense)
    return _measure(problem, replace(point, limit=rows * inputs), target)


@functools.lru_cache(maxsize=64)
def _measure(problem: Problem, point: gathered_rows.Point, target: CpuTarget) -> float:
    """The first density whose interpolated time passes that of the dense kernel; runs alternate."""
    shape = (problem.row, problem.c)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((problem.o, problem.c), dtype=np.float32)
    packed = pack_weights(weight[:, :, None, None], problem, point.dense)
    dense, gathered = (
        _compile(define, shape, packed, target)
        for define in (
            define_dense(shape, problem, point.dense),
            gathered_rows.define(shape, problem, point),
        )
    )
    rows = [
        rng.standard_normal(shape, dtype=np.float32) * (rng.random(shape) < d) for d in _DENSITIES
    ]
    given = [tvm.runtime.tensor(x) for x in rows]
    times = _times([dense, *[gathered] * len(given)], packed, given, (problem.row, problem.o))
    return _MARGIN * first_above(_DENSITIES, [t / times[0] for t in times[1:]])


def _compile(define, shape, packed: np.ndarray, target: CpuTarget):
    arguments = [
        te.placeholder(s, "float32", name=n) for n, s in (("x", shape), ("w", packed.shape))
    ]
    func = te.create_prim_func([*arguments, define(*arguments)])
    func, _ = schedule_function("crossover", func, target)
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(mod, target.tvm())["main"]


def _times(
    kernels: list, packed: np.ndarray, inputs_at: list, shape: tuple[int, int]
) -> list[float]:
    """Least seconds of each kernel on its own input; the first, which is dense, on the last of them."""
    out = tvm.runtime.tensor(np.zeros(shape, np.float32))
    copies = max(2, min(16, _COLD_BYTES // packed.nbytes))
    weights = [tvm.runtime.tensor(packed) for _ in range(copies)]
    turn = itertools.cycle(weights)
    given = [inputs_at[-1], *inputs_at]
    samples: list[list[float]] = [[] for _ in kernels]
    for run in range(_RUNS + 1):
        for kernel, x, kept in zip(kernels, given, samples):
            w = next(turn)
            start = time.perf_counter()
            kernel(x, w, out)
            if run:
                kept.append(time.perf_counter() - start)
    return [min(kept) for kept in samples]


def first_above(densities, ratios) -> float:
    """Where `ratios` over `densities`, joined by straight lines, first pass 1; the ends where they never or always do."""
    previous = (0.0, 0.0)
    for density, ratio in zip(densities, ratios):
        if ratio >= 1:
            if previous[0] == 0.0:
                return 0.0
            share = (1 - previous[1]) / (ratio - previous[1])
            return previous[0] + share * (density - previous[0])
        previous = (density, ratio)
    return densities[-1]
