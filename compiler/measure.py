# SPDX-License-Identifier: Apache-2.0
"""Time engines against each other: alternating blocks in one process, pinned, every sample kept.

A machine changes speed by the second, so only engines that ran side by side are compared: a round
is one block of runs of every engine, in an order that rotates, and a ratio's interval comes from
resampling whole rounds.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compiler.arrays import aligned
from compiler.artifact import Artifact, read_references
from compiler.environment import describe_environment
from compiler.layer_rows import layer_rows
from compiler.profile import layer_us
from compiler.runtime import LoadedModel, load_variants
from schedules.errors import MeasurementError

NOISY = 0.10  # of the median: an interquartile range beyond it is reported
_BLOCK_SECONDS = 0.05
_LONGEST_BLOCK = 50
_BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Latency:
    """Milliseconds per run. `samples` in the order taken; `rounds` how many of them each round
    has."""

    median: float
    p90: float
    p99: float
    min: float
    max: float
    mean: float
    iqr: float
    runs: int
    samples: tuple[float, ...] = field(repr=False)
    rounds: tuple[int, ...] = field(repr=False)

    @property
    def noisy(self) -> bool:
        return self.iqr > NOISY * self.median

    @staticmethod
    def of(blocks: Sequence[Sequence[float]]) -> Latency:
        values = np.concatenate([np.asarray(b, "float64") for b in blocks])
        low, middle, high, p90, p99 = np.percentile(values, [25, 50, 75, 90, 99])
        return Latency(
            float(middle), float(p90), float(p99), float(values.min()), float(values.max()),
            float(values.mean()), float(high - low), len(values), tuple(map(float, values)),
            tuple(len(b) for b in blocks),
        )  # fmt: skip

    def blocks(self) -> list[np.ndarray]:
        return np.split(np.asarray(self.samples), np.cumsum(self.rounds)[:-1])

    def to_json(self) -> dict:
        found = asdict(self)
        found.pop("samples"), found.pop("rounds")
        return {**found, "noisy": self.noisy}


@dataclass(frozen=True)
class Ratio:
    """Ratio of two medians and its 95 % interval, of paired rounds resampled."""

    median: float
    low: float
    high: float

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Measurement:
    """What `bench` found. `latency` by variant or peer, `memory` and `disk` bytes by variant,
    `peers` the versions of other engines; `verify` from the manifest, `layers` as in
    `compiler.layer_rows`."""

    latency: Mapping[str, Latency]
    ratios: Mapping[str, Ratio]
    peers: Mapping[str, str]
    memory: Mapping[str, Mapping[str, int]]
    disk: Mapping[str, Mapping[str, int]]
    environment: Mapping[str, Any]
    verify: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()

    def to_json(self) -> dict:
        """See docs/report.md."""

        def entry(name: str, more: Mapping) -> dict:
            found = self.latency[name]
            samples = {"samples_ms": list(found.samples), "rounds": list(found.rounds)}
            return {"latency_ms": found.to_json(), **more, **samples}

        variants = [n for n in self.latency if n not in self.peers]
        return {
            "format": "kerf-bench",
            "format_version": 1,
            "variants": {
                n: entry(n, {"memory_bytes": self.memory.get(n), "disk_bytes": self.disk.get(n)})
                for n in variants
            },
            "peers": {n: entry(n, {"version": v}) for n, v in self.peers.items()},
            "ratios": {name: found.to_json() for name, found in self.ratios.items()},
            "verify": dict(self.verify),
            "layers": [dict(row) for row in self.layers],
            "environment": dict(self.environment),
            "warnings": list(self.warnings),
        }


def interleave(
    engines: Mapping[str, Callable[[], Any]],
    *,
    runs: int = 50,
    seconds: float = 10.0,
    warm_up: int = 3,
) -> dict[str, Latency]:
    """Time `engines`, functions without arguments: at least `runs` runs each, and `seconds` in all.

    Each is run `warm_up` times first, and once untimed at the start of each of its blocks, so
    that no engine pays for the caches that another left.
    """
    block = {name: _block_length(call, warm_up) for name, call in engines.items()}
    blocks: dict[str, list[list[float]]] = {name: [] for name in engines}
    names = list(engines)
    done, stop = 0, time.perf_counter() + seconds
    while time.perf_counter() < stop or any(done * block[n] < runs for n in names):
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            blocks[name].append(_timed_block(engines[name], block[name]))
        done += 1
    return {name: Latency.of(b) for name, b in blocks.items()}


def _block_length(call: Callable[[], Any], warm_up: int) -> int:
    took = math.inf
    for _ in range(max(warm_up, 1)):
        start = time.perf_counter()
        call()
        took = min(took, time.perf_counter() - start)
    return max(1, min(_LONGEST_BLOCK, math.ceil(_BLOCK_SECONDS / max(took, 1e-9))))


def _timed_block(call: Callable[[], Any], length: int) -> list[float]:
    clock = time.perf_counter_ns
    call()
    times = []
    for _ in range(length):
        start = clock()
        call()
        times.append((clock() - start) / 1e6)
    return times


def ratio(top: Latency, bottom: Latency, seed: int = 0) -> Ratio:
    """Ratio of medians with a 95 % bootstrap interval over paired rounds of `interleave`."""
    tops, bottoms = top.blocks(), bottom.blocks()
    if len(tops) != len(bottoms):
        raise MeasurementError("only engines timed together have a ratio")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(_BOOTSTRAPS):
        chosen = rng.integers(0, len(tops), len(tops))
        found.append(
            np.median(np.concatenate([tops[i] for i in chosen]))
            / np.median(np.concatenate([bottoms[i] for i in chosen]))
        )
    low, high = np.percentile(found, [2.5, 97.5])
    return Ratio(top.median / bottom.median, float(low), float(high))


@contextmanager
def pinned(threads: int) -> Iterator[list[int]]:
    """Keep this process, threads it has and will have, on `threads` cores; yields the cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield []
        return
    before = os.sched_getaffinity(0)
    # The last ones: core 0 usually has more of the system's own work.
    cores = sorted(before)[-threads:]
    _set_affinity(set(cores))
    try:
        yield cores
    finally:
        _set_affinity(before)


def _set_affinity(cores: set[int]) -> None:
    for task in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(task), cores)
        except OSError:  # the thread has ended
            continue


def bench(
    artifact: Artifact,
    *,
    threads: int = 1,
    against: Sequence[str] = (),
    duration: float = 10.0,
    runs: int = 50,
    inputs: Sequence[Any] | None = None,
    module: Any = None,
    memory: bool = True,
    layers: bool = True,
) -> Measurement:
    """Time every variant of an artifact, and the peers named in `against`, side by side.

    `inputs` in the model's order, by default those stored at build time. Peers run the model that
    the artifact was built from, `module` if it was a module in memory, and must agree with the
    dense variant. Raises MeasurementError for a peer that does not, UserError for one that is not
    there.
    """
    from compiler.peers import open_peers

    inputs = list(inputs) if inputs is not None else default_inputs(artifact)
    # As a framework's own tensors are: no engine has to copy them first.
    inputs = [aligned(a) if isinstance(a, np.ndarray) else a for a in inputs]
    with pinned(threads) as cores:
        models = load_variants(artifact, list(artifact.variants), threads)
        engines: dict[str, Callable[[], Any]] = {n: _call(m, inputs) for n, m in models.items()}
        peers = open_peers(artifact, against, inputs, threads, module)
        wanted = engines["dense"]()
        for name, peer in peers.items():
            require_agreement(name, peer.call(), wanted)
            engines[name] = peer.call
        environment = describe_environment(threads, cores)
        latency = interleave(engines, runs=runs, seconds=duration)
        times = layer_us(models, inputs, seconds=min(duration, 4.0)) if layers else {}
    environment["load_average_after"] = list(os.getloadavg())
    return Measurement(
        latency=latency,
        ratios=ratios_of(latency, list(models)),
        peers={name: peer.version for name, peer in peers.items()},
        memory=measure_memory(artifact, inputs, threads) if memory else {},
        disk={name: dict(info.bytes) for name, info in artifact.variants.items()},
        environment=environment,
        verify=artifact.manifest.get("verify", {}),
        layers=layer_rows(artifact, times),
        warnings=[noise_warning(n, found) for n, found in latency.items() if found.noisy],
    )


def _call(model: LoadedModel, inputs: Sequence[Any]) -> Callable[[], Any]:
    return lambda: model(*inputs)


def default_inputs(artifact: Artifact) -> list[np.ndarray]:
    """The first inputs the artifact was verified with, else random ones."""
    from compiler.samples import sample_inputs

    references = read_references(artifact)
    return list(references[0].inputs) if references else sample_inputs(artifact.inputs, runs=1)[0]


def ratios_of(latency: Mapping[str, Latency], variants: Sequence[str]) -> dict[str, Ratio]:
    """`compressed/dense`, and each variant over each peer."""
    peers = [n for n in latency if n not in variants]
    pairs = [("compressed", "dense")] if {"compressed", "dense"} <= set(variants) else []
    pairs += [(variant, peer) for variant in variants for peer in peers]
    return {f"{a}/{b}": ratio(latency[a], latency[b]) for a, b in pairs}


def noise_warning(name: str, found: Latency) -> str:
    """The line to show for a latency whose interquartile range is beyond `NOISY`."""
    share = found.iqr / found.median
    return f"{name}: noisy, interquartile range {share:.0%} of the median; is the machine idle?"


def require_agreement(name: str, found: Any, wanted: Any) -> None:
    """Raise MeasurementError if a peer computes something else: its time would mean nothing."""
    from compiler.comparison import as_arrays, difference, magnitude

    for f, w in zip(as_arrays(found), as_arrays(wanted), strict=True):
        error, scale = difference(f, w), magnitude(w)
        if not error <= 1e-3 * max(scale, 1e-6):
            raise MeasurementError(
                f"{name} computes something else", found=f"a difference of {error:.3g}",
                wanted=f"at most a thousandth of {scale:.3g}",
            )  # fmt: skip


def measure_memory(
    artifact: Artifact, inputs: Sequence[Any], threads: int, names: Sequence[str] | None = None
) -> dict[str, dict[str, int]]:
    """Bytes by variant, each in a process of its own that loads it and runs it three times.

    `peak` resident at most, `start` resident before the model was opened (Python, NumPy, TVM).
    """
    import tempfile

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        arrays = Path(scratch) / "inputs.npz"
        np.savez(arrays, *[np.asarray(a) for a in inputs])
        for name in names or artifact.variants:
            line = [
                sys.executable,
                "-m",
                "compiler.memory_probe",
                str(artifact.path.absolute()),
                name,
            ]
            root = str(Path(__file__).resolve().parent.parent)
            path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
            done = subprocess.run(
                [*line, str(arrays), str(threads)], capture_output=True, text=True, cwd=scratch,
                env={**os.environ, "PYTHONPATH": path}, check=False,
            )  # fmt: skip
            if done.returncode:
                raise MeasurementError(f"the memory probe failed: {done.stderr.strip()[-300:]}")
            found[name] = json.loads(done.stdout)
    return found
