# SPDX-License-Identifier: Apache-2.0
"""What this machine is and can do: features, caches, cores, measured peaks, and what each family
can expect here."""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from schedules.target import CpuTarget, detect_host, usable_cores

_CPU_DIR = Path("/sys/devices/system/cpu/cpu0")


@dataclass(frozen=True)
class Rate:
    """A measured rate (GFLOP/s or GB/s) over `samples` calls: the median, and the best that was
    seen."""

    median: float
    best: float
    samples: int
    threads: int


@dataclass(frozen=True)
class Expectation:
    """What one family of operators gains from this processor."""

    family: str
    text: str


@dataclass(frozen=True)
class Hardware:
    """`caches` in bytes by level as one core sees them; `governor` and `cpu` empty where the system
    does not tell."""

    cpu: str
    arch: str
    tier: str
    features: tuple[str, ...]
    missing: tuple[str, ...]
    cores: int
    usable_cores: int
    caches: dict[str, int]
    memory_bytes: int
    governor: str
    peak_gflops: Rate | None
    bandwidth_gbs: Rate | None
    expectations: tuple[Expectation, ...]

    def to_json(self) -> dict:
        return asdict(self)


def describe_hardware(*, measure: bool = True) -> Hardware:
    """This machine; `measure=False` leaves the two measured rates out and loads no TVM."""
    host = detect_host()
    worth_naming = {
        "x86_64": ("avx2", "fma", "avx512f", "avx512vnni", "avx512vpopcntdq", "avx512bf16"),
        "aarch64": ("neon", "dotprod", "i8mm", "sve"),
    }.get(host.arch, ())
    return Hardware(
        cpu=_cpu_name(),
        arch=host.arch,
        tier=host.tier,
        features=host.features,
        missing=tuple(f for f in worth_naming if not host.has(f)),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        caches=_caches(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        governor=_read(_CPU_DIR / "cpufreq/scaling_governor"),
        peak_gflops=measure_peak(host) if measure else None,
        bandwidth_gbs=measure_bandwidth(host) if measure else None,
        expectations=expectations(host),
    )


def expectations(target: CpuTarget) -> tuple[Expectation, ...]:
    """What each family can expect of a processor with these features."""
    dense = {
        "avx512": "512-bit tiles, 32 registers: the full tier",
        "avx2": "256-bit tiles, 16 registers: about half the AVX-512 rate per clock",
        "neon": "128-bit tiles, 32 registers",
        "generic": "no FMA or only 128-bit vectors used: many times slower than AVX2",
    }[target.tier]
    sparse = (
        "element and vector grains in vector registers; gains start where few enough weights remain"
        if target.tier != "generic"
        else "works, but its vectors are narrow: gains need higher sparsity"
    )
    if target.has("avx512vnni") or target.has("avxvnni"):
        int8 = "VNNI: u8 x s8 dot products at up to 4 x the float rate"
    elif target.has("dotprod"):
        int8 = "dot-product instructions: up to 4 x the float rate"
    else:
        int8 = "no VNNI or dot-product instructions: little arithmetic gain, smaller weights only"
    if target.has("avx512vpopcntdq"):
        binary = "VPOPCNTDQ: 512-bit population count in one instruction"
    elif target.arch == "aarch64":
        binary = "byte-wise population count (CNT), then widening adds"
    else:
        binary = "no VPOPCNTDQ: population counts by table look-up, several times slower"
    activation_sparse = (
        "VPCOMPRESSD: 16 activations are searched for non-zeros at a time"
        if target.tier == "avx512"
        else "non-zeros among activations are searched for one by one"
    )
    return (
        Expectation("dense", dense),
        Expectation("sparse", sparse),
        Expectation("int8", int8),
        Expectation("binary", binary),
        Expectation("activation_sparse", activation_sparse),
    )


@functools.cache
def measure_peak(target: CpuTarget, seconds: float = 0.5) -> Rate:
    """Multiply-add rate in GFLOP/s (2 per FMA) of `target.threads` threads that never leave
    registers."""
    from schedules.machine_probes import fma_accumulators, fma_probe

    steps = 50_000 if target.lanes > 4 else 10_000
    operations = target.threads * steps * fma_accumulators(target) * target.lanes * 2
    return _measure(fma_probe(target, steps), target, 1, operations, seconds)


@functools.cache
def measure_bandwidth(
    target: CpuTarget, seconds: float = 0.5, size: int = 128 << 20, pieces: int = 16
) -> Rate:
    """Streaming read rate in GB/s of `size` bytes per thread, from wherever so many bytes live: by
    default from memory, in pieces so short that some are read without an interruption."""
    from schedules.machine_probes import read_probe

    unit = 8 * target.lanes
    elements = size // 4 // pieces // unit * unit
    count = target.threads * elements
    return _measure(read_probe(target, elements), target, count, 4 * count, seconds, pieces)


@functools.cache
def roofline_bandwidths(target: CpuTarget) -> tuple[float, float]:
    """GB/s out of the second-level cache, and out of what lies behind it: the fastest that a kernel
    whose data fit the former, or do not, can be fed in a network that keeps its activations in
    caches."""
    near = measure_bandwidth(target, 0.2, target.l2_bytes // 2, 1).best
    return near, min(near, measure_bandwidth(target, 0.2, 4 * target.l2_bytes, 1).best)


def _measure(
    func, target: CpuTarget, count: int, amount: int, seconds: float, pieces: int = 1
) -> Rate:
    """Rate in 1e9 per second of a probe kernel that takes `count` float32 values, of `pieces`
    arrays in turn, and does `amount` per call."""
    import numpy as np
    import tvm

    kernel = tvm.compile(func, target.tvm())["main"]
    arrays = itertools.cycle([tvm.runtime.tensor(np.ones(count, "float32")) for _ in range(pieces)])
    out = tvm.runtime.tensor(np.zeros(target.threads * target.lanes, "float32"))
    if target.threads > 1:
        tvm.get_global_func("runtime.config_threadpool")(1, target.threads)
    times = _time(lambda: kernel(next(arrays), out), seconds)
    return Rate(
        amount / statistics.median(times) / 1e9,
        amount / min(times) / 1e9,
        len(times),
        target.threads,
    )


def _time(call: Callable[[], None], seconds: float) -> list[float]:
    call()
    times = []
    stop = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _cpu_name() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return ""


def _caches() -> dict[str, int]:
    found = {}
    for index in sorted((_CPU_DIR / "cache").glob("index*")):
        kind, level, size = (_read(index / name) for name in ("type", "level", "size"))
        if kind != "Instruction" and size.endswith("K"):
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = int(size[:-1]) * 1024
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
