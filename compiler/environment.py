# SPDX-License-Identifier: Apache-2.0
"""Where a measurement was taken: processor, versions, governor, load, commit. Loads neither TVM
nor torch."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from schedules.target import detect_host, usable_cores

_PACKAGES = (
    "apache-tvm",
    "apache-tvm-ffi",
    "numpy",
    "safetensors",
    "onnx",
    "onnxruntime",
    "openvino",
    "torch",
)


def versions() -> dict[str, str]:
    """Kerf's and its dependencies' versions by package name; packages that are not installed are
    left out."""
    import compiler

    found = {"kerf-compiler": compiler.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_environment(threads: int, cores: list[int] | None = None) -> dict:
    """The environment of a measurement, for its JSON: see docs/report.md."""
    host = detect_host()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": {
            "model": _cpu_model(),
            "arch": host.arch,
            "features": list(host.features),
            "tier": host.tier,
            "l1_bytes": host.l1_bytes,
            "l2_bytes": host.l2_bytes,
            "governor": _governor(),
            "cores_usable": usable_cores(),
        },
        "os": platform.platform(),
        "threads": threads,
        "cores": sorted(os.sched_getaffinity(0)) if cores is None else list(cores),
        "load_average": list(os.getloadavg()),
        "versions": versions(),
        "git_commit": _commit(),
        "variables": {
            k: v for k, v in os.environ.items() if k.startswith(("TVM_", "OMP_", "KERF_"))
        },
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _governor() -> str:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return "unknown"


def _commit() -> str | None:
    """The commit of the repository this package lies in, with `+` if files changed; None outside
    a repository."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        line = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
