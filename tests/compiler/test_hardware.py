# SPDX-License-Identifier: Apache-2.0
"""Hardware: the probes compute what they should, and expectations follow the features."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.hardware import Hardware, describe_hardware, expectations, measure_peak
from schedules.target import NAMED, CpuTarget, detect_host, usable_cores


def test_this_machine_is_described_without_measuring():
    machine = describe_hardware(measure=False)
    assert isinstance(machine, Hardware)
    assert machine.usable_cores == usable_cores() <= machine.cores
    assert set(machine.missing).isdisjoint(machine.features)
    assert all(size >= 1024 for size in machine.caches.values())
    assert machine.memory_bytes > 1 << 28


@pytest.mark.parametrize(
    "target, family, said",
    [
        ("avx512-vnni-vpopcntdq", "binary", "VPOPCNTDQ: 512-bit"),
        ("avx512-vnni", "binary", "no VPOPCNTDQ"),
        ("avx512-vnni", "int8", "VNNI: u8 x s8"),
        ("avx512", "int8", "no VNNI"),
        ("avx2", "dense", "16 registers"),
        ("generic", "dense", "many times slower"),
        ("aarch64", "int8", "no VNNI or dot-product"),
        ("aarch64-dotprod", "int8", "dot-product instructions"),
    ],
)
def test_expectations_follow_the_features(target, family, said):
    (text,) = [e.text for e in expectations(NAMED[target]) if e.family == family]
    assert said in text


def test_the_multiply_add_probe_converges_to_what_it_computes(host_tiers):
    """a -> a / 2 + x settles at 2 x, so the sum over all chains is 2 x chains: every step was
    done."""
    import tvm

    from schedules.machine_probes import fma_accumulators, fma_probe

    for target in host_tiers:
        kernel = tvm.compile(fma_probe(target, 200), target.tvm())["main"]
        out = tvm.runtime.tensor(np.zeros(target.lanes, "float32"))
        kernel(tvm.runtime.tensor(np.full(1, 3, "float32")), out)
        np.testing.assert_array_equal(out.numpy(), 6 * fma_accumulators(target))


def test_few_steps_of_the_multiply_add_probe_have_not_settled():
    import tvm

    from schedules.machine_probes import fma_accumulators, fma_probe

    target = NAMED["generic"] if detect_host().arch == "x86_64" else detect_host()
    kernel = tvm.compile(fma_probe(target, 2), target.tvm())["main"]
    out = tvm.runtime.tensor(np.zeros(target.lanes, "float32"))
    kernel(tvm.runtime.tensor(np.ones(1, "float32")), out)
    chains = np.arange(fma_accumulators(target), dtype="float64")
    np.testing.assert_allclose(out.numpy(), np.sum((chains / 2 + 1) / 2 + 1))


def test_the_read_probe_reads_every_value_once(host_tiers, rng):
    import tvm

    from schedules.machine_probes import read_probe

    x = rng.integers(-8, 8, 8 * 16 * 3).astype("float32")  # sums of small integers are exact
    for target in host_tiers:
        kernel = tvm.compile(read_probe(target, x.size), target.tvm())["main"]
        out = tvm.runtime.tensor(np.zeros(target.lanes, "float32"))
        kernel(tvm.runtime.tensor(x), out)
        assert out.numpy().sum() == x.sum()


@pytest.mark.timing
def test_the_measured_peak_is_plausible():
    """Between one scalar operation and 64 lanes of FMA per nanosecond, and the same order twice."""
    target: CpuTarget = detect_host()
    rate = measure_peak(target, 0.1)
    assert 1 < rate.median <= rate.best < 640
    assert rate.samples >= 5
