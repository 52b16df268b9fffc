# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: seeded random numbers, thread limits, golden texts, the targets this CPU can
run."""

from __future__ import annotations

import os

# Before NumPy, TVM or torch are loaded: timings and results of tests must not depend on the number
# of cores.
for _variable in ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import difflib
import zlib
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the golden texts in tests/golden"
    )
    parser.addoption("--skip-slow", action="store_true", help="skip tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--skip-slow"):
        skip = pytest.mark.skip(reason="--skip-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers seeded by the test's own name: the same in every order and every process."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def host_tiers():
    """Targets of every instruction-set tier that this CPU can run, widest first; never empty."""
    from schedules.target import NAMED, CpuTarget, detect_host

    host = detect_host()
    named = [t for t in NAMED.values() if t.arch == host.arch and t.has_only(host.features)]
    tiers = {t.tier: t for t in reversed(named)}
    order = ("avx512", "avx2", "neon", "generic")
    found = [tiers[tier] for tier in order if tier in tiers]
    return found or [CpuTarget("generic", host.arch, ())]


@pytest.fixture
def golden(request):
    """`golden(text)`: equal to tests/golden/<module>/<test>.txt, which --update-golden rewrites."""

    def check(text: str, suffix: str = "") -> None:
        module = Path(request.node.path).relative_to(TESTS).with_suffix("")
        path = TESTS / "golden" / module / f"{request.node.name}{suffix}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"no golden text {path}; run pytest --update-golden and read the diff"
        wanted = path.read_text()
        if text != wanted:
            diff = difflib.unified_diff(
                wanted.splitlines(), text.splitlines(), "golden", "now", lineterm=""
            )
            pytest.fail("differs from " + str(path) + "\n" + "\n".join(diff))

    return check
