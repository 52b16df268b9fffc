# SPDX-License-Identifier: Apache-2.0
"""Time per kernel and per layer: the program's own calls are timed, one variant's run after
another's.

The callback that takes the time costs about a microsecond per call, more with more arguments; that
cost is measured on kernels that do nothing and subtracted.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from compiler.artifact import Artifact, KernelCall
from compiler.environment import describe_environment
from compiler.layer_rows import layer_rows
from compiler.runtime import LoadedModel, load_variants
from schedules.errors import MeasurementError

_MAX_ARGUMENTS = 8


@dataclass(frozen=True)
class KernelRow:
    """One kernel call. `us` median; `gflops` of the dense operations of its layers,
    `useful_gflops` of those with a nonzero weight. `roofline`: the time that its useful
    operations at peak, or its bytes at the rate of the caches, would take at least, over `us`;
    beyond 1 where Winograd needs fewer operations, None where neither is known."""

    index: int
    function: str
    loops: str
    layers: tuple[str, ...]
    us: float
    flops: int
    useful_flops: float
    bytes: int
    gflops: float
    useful_gflops: float
    roofline: float | None


@dataclass(frozen=True)
class VariantProfile:
    """`kernels` in call order; `total_us` the median of whole, uninstrumented runs."""

    name: str
    kernels: tuple[KernelRow, ...]
    total_us: float

    def layer_us(self) -> dict[str, float]:
        """Time by layer; a kernel that reads several layers' weights is shared by their
        operations."""
        return _by_layer([(k.layers, k.us) for k in self.kernels])


@dataclass(frozen=True)
class Profile:
    """Kernel rows by variant and layer rows (see `compiler.layer_rows`). `peak_gflops`,
    `bandwidth_gbs` (of memory) and `cache_gbs` (second level, behind it) as measured now; `callback_us` what was subtracted, by the number of
    arguments."""

    variants: Mapping[str, VariantProfile]
    runs: int
    threads: int
    peak_gflops: float
    bandwidth_gbs: float
    cache_gbs: tuple[float, float]
    callback_us: tuple[float, ...]
    layers: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict:
        """See docs/report.md."""
        return {"format": "kerf-profile", "format_version": 1, **asdict(self)}


def _by_layer(rows: Sequence[tuple[Sequence[str], float]]) -> dict[str, float]:
    times: dict[str, float] = {}
    for layers, us in rows:
        for layer in layers:
            times[layer] = times.get(layer, 0.0) + us / len(layers)
    return times


def layer_times(
    model: LoadedModel, inputs: Sequence[Any], runs: int = 20, seconds: float = 2.0
) -> dict[int, float]:
    """Median microseconds of each kernel call of `model`, by its index in call order."""
    times, _ = kernel_times({"": model}, inputs, runs, seconds)
    return dict(enumerate(times[""]))


def layer_us(
    models: Mapping[str, LoadedModel],
    inputs: Sequence[Any],
    runs: int = 20,
    seconds: float = 4.0,
) -> dict[str, dict[str, float]]:
    """Median microseconds of each layer of each variant, measured in alternating runs."""
    times, _ = kernel_times(models, inputs, runs, seconds)
    return {name: layer_sums(model.kernels, times[name]) for name, model in models.items()}


def layer_sums(kernels: Sequence[KernelCall], us: Sequence[float]) -> dict[str, float]:
    """Time by layer, from that of each kernel call; a kernel of several layers is shared among them."""
    return _by_layer([(k.layers, t) for k, t in zip(kernels, us)])


def kernel_times(
    models: Mapping[str, LoadedModel],
    inputs: Sequence[Any] | Mapping[str, Sequence[Any]],
    runs: int,
    seconds: float,
) -> tuple[dict[str, list[float]], int]:
    """Median microseconds of every kernel call by variant, and the number of runs they are over. `inputs` of all models,
    or by model.

    One run of each model in turn, until `runs` are done or `seconds` have passed, but at least
    three.
    """
    overhead = callback_overhead()
    samples: dict[str, list[list[float]]] = {name: [] for name in models}
    given = inputs if isinstance(inputs, Mapping) else dict.fromkeys(models, inputs)
    bound = {name: model.bind(given[name]) for name, model in models.items()}
    for name, model in models.items():
        model.invoke(bound[name])
    stop = time.perf_counter() + seconds
    done = 0
    while done < 3 or (done < runs and time.perf_counter() < stop):
        for name, model in models.items():
            samples[name].append(_instrumented_run(model, bound[name], overhead))
        done += 1
    return {n: [float(v) for v in np.median(rows, axis=0)] for n, rows in samples.items()}, done


def _instrumented_run(
    model: LoadedModel, tensors: Sequence, overhead: Sequence[float]
) -> list[float]:
    """Microseconds of each kernel call in one run, the callback's cost taken off."""
    times: list[float] = []
    start = [0]
    clock = time.perf_counter_ns

    def watch(_function, name, before, _result, *arguments):
        now = clock()
        if before:
            start[0] = clock()
        elif name in model.kernel_names:
            own = overhead[min(len(arguments), len(overhead) - 1)]
            times.append(max((now - start[0]) / 1e3 - own, 0.0))
        return 0

    with model.instrumented(watch):
        model.invoke(tensors)
    if len(times) != len(model.kernels):
        raise MeasurementError(
            "the program does not call the kernels its manifest lists",
            found=f"{len(times)} calls",
            wanted=f"{len(model.kernels)}",
        )
    return times


@functools.cache
def callback_overhead() -> tuple[float, ...]:
    """Microseconds that the timing callback adds to a kernel of 0, 1, 2, ... arguments, measured
    here."""
    model = _idle_model()
    tensors = model.bind([np.zeros(1, "float32")])
    zero = [0.0] * (_MAX_ARGUMENTS + 1)
    rows = np.median([_instrumented_run(model, tensors, zero) for _ in range(200)], axis=0)
    known = {k.flops: float(us) for k, us in zip(model.kernels, rows)}
    return tuple(known.get(n, known[min(known)]) for n in range(_MAX_ARGUMENTS + 1))


def _idle_model() -> LoadedModel:
    """A program of kernels with 2 to 8 arguments that compute one number each; `flops` counts
    arguments."""
    import tvm
    from tvm import relax, te

    from compiler.artifact import KernelCall
    from compiler.frontend import TensorSpec

    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1,), "float32"))
    counts = range(2, _MAX_ARGUMENTS + 1)
    with bb.function("main", [x]):
        values = [x]
        for count in counts:
            read = [values[min(i, len(values) - 1)] for i in range(count - 1)]
            values.append(bb.emit_te(_first_of(te), *read, primfunc_name_hint=f"idle{count}"))
        bb.emit_func_output(values[-1])
    executable = tvm.compile(bb.get(), tvm.target.Target({"kind": "llvm"}))
    spec = TensorSpec("x", (1,), "float32")
    kernels = [KernelCall(f"idle{n}", [], "generic", {}, n, 0) for n in counts]
    return LoadedModel(
        executable.jit(), [], variant="idle", inputs=[spec], outputs=[spec], kernels=kernels
    )


def _first_of(te):
    def first(*tensors):
        # Every argument is named, or it would not be one.
        return te.compute((1,), lambda i: sum((t[i] for t in tensors[1:]), tensors[0][i]))

    return first


def profile_artifact(
    artifact: Artifact,
    inputs: Sequence[Any],
    *,
    threads: int = 1,
    runs: int = 50,
    seconds: float = 5.0,
) -> Profile:
    """Profile every variant of an artifact on `inputs`, in alternating runs."""
    from compiler.hardware import measure_bandwidth, measure_peak, roofline_bandwidths

    environment = describe_environment(threads)
    models = load_variants(artifact, list(artifact.variants), threads)
    machine = artifact.target.with_threads(threads)
    peak, bandwidth = measure_peak(machine).best, measure_bandwidth(machine).best
    near, far = roofline_bandwidths(machine)

    def least_us(flops: float, size: int) -> float:
        rate = near if size <= machine.l2_bytes else far
        return max(flops / peak, size / rate) / 1e3  # 1e9 per second are 1e3 per us

    times, done = kernel_times(models, inputs, runs, seconds)
    totals = total_us(models, inputs, seconds / 2)
    useful = useful_shares(artifact.layers)
    variants = {
        name: VariantProfile(
            name,
            _rows(model, times[name], useful if name != "dense" else {}, least_us),
            totals[name],
        )
        for name, model in models.items()
    }
    layers = layer_rows(artifact, {name: v.layer_us() for name, v in variants.items()})
    return Profile(
        variants,
        done,
        threads,
        peak,
        bandwidth,
        (near, far),
        callback_overhead(),
        layers,
        environment,
    )


def total_us(
    models: Mapping[str, LoadedModel], inputs: Sequence[Any], seconds: float
) -> dict[str, float]:
    """Median microseconds of a whole run of each model, in alternating runs without any
    callback."""
    bound = {name: model.bind(inputs) for name, model in models.items()}
    samples: dict[str, list[float]] = {name: [] for name in models}
    stop = time.perf_counter() + seconds
    while len(next(iter(samples.values()))) < 5 or time.perf_counter() < stop:
        for name, model in models.items():
            start = time.perf_counter_ns()
            model.invoke(bound[name])
            samples[name].append((time.perf_counter_ns() - start) / 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def useful_shares(layers: Sequence[Mapping]) -> dict[str, float]:
    """Layer -> share of its operations that the compressed variant has to do, from the manifest."""
    shares = {}
    for row in layers:
        found = row.get("found") or {}
        density = found.get("density")
        compressed = row.get("treatment", "dense") != "dense" and density is not None
        # The kernel's operations are counted on the layer as it is now, the density on what it was.
        lost = math.prod(
            a / b for b, a in (found.get("inputs", (1, 1)), found.get("outputs", (1, 1)))
        )
        shares[row["name"]] = min(1.0, float(density) / lost) if compressed else 1.0
    return shares


def _rows(
    model: LoadedModel,
    times: Sequence[float],
    useful: Mapping[str, float],
    least_us: Callable[[float, int], float],
) -> tuple[KernelRow, ...]:
    rows = []
    for index, (call, us) in enumerate(zip(model.kernels, times)):
        shares = [useful.get(layer, 1.0) for layer in call.layers]
        flops = call.flops * (sum(shares) / len(shares) if shares else 1.0)
        best = least_us(flops, call.bytes)
        measured = (us, call.flops, flops, call.bytes)
        rates = (call.flops / us / 1e3, flops / us / 1e3) if us else (0.0, 0.0)
        roofline = best / us if us and best else None
        names = (index, call.function, call.loops, tuple(call.layers))
        rows.append(KernelRow(*names, *measured, *rates, roofline))
    return tuple(rows)
