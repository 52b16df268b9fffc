# SPDX-License-Identifier: Apache-2.0
"""What a kernel generator needs to know of a processor: vector width, registers, caches, instruction sets."""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from schedules.errors import TargetError

# Linux's names in /proc/cpuinfo (x86) and in the Features line (aarch64) -> LLVM's names of the same feature.
_LINUX_TO_LLVM = {
    "sse4_2": "sse4.2", "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "bmi2": "bmi2", "popcnt": "popcnt",
    "avx512f": "avx512f", "avx512dq": "avx512dq", "avx512bw": "avx512bw", "avx512vl": "avx512vl", "avx512cd": "avx512cd",
    "avx512_vnni": "avx512vnni", "avx512_vpopcntdq": "avx512vpopcntdq", "avx512_bitalg": "avx512bitalg",
    "avx512_vbmi": "avx512vbmi", "avx512_bf16": "avx512bf16", "avx_vnni": "avxvnni",
    "asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "sve": "sve",
}  # fmt: skip
_AVX2 = ("sse4.2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl")


class PointSource(Protocol):
    """Kernel parameters that are not the default ones; carried by `CpuTarget.records`."""

    def lookup(self, target: CpuTarget, loops: str, problem: Mapping) -> Mapping | None:
        """The fields of the `Point` to use for this problem, or None for the default."""


@dataclass(frozen=True)
class CpuTarget:
    """A processor by features, not by model name. Cache sizes in bytes; `threads` the most a kernel may use.

    `records` holds kernel parameters that tuning found for it; it is no part of the target's identity.
    """

    name: str
    arch: str  # "x86_64" or "aarch64"
    features: tuple[str, ...] = ()  # LLVM names
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 1024 * 1024
    threads: int = 1
    records: PointSource | None = field(default=None, compare=False, repr=False)

    def has(self, *features: str) -> bool:
        return all(f in self.features for f in features)

    @property
    def tier(self) -> str:
        """avx512, avx2, neon or generic: which kernels apply."""
        if self.has("avx512f", "avx512bw", "avx512dq", "avx512vl"):
            return "avx512"
        if self.has("avx2", "fma"):
            return "avx2"
        return "neon" if self.has("neon") else "generic"

    @property
    def lanes(self) -> int:
        """float32 values in one vector register."""
        return {"avx512": 16, "avx2": 8, "neon": 4, "generic": 4}[self.tier]

    @property
    def registers(self) -> int:
        """Vector registers."""
        return {"avx512": 32, "avx2": 16, "neon": 32, "generic": 16}[self.tier]

    @property
    def reads_unaligned(self) -> bool:
        """Whether every instruction reads memory from any address. Operands of SSE's have to be aligned, and LLVM makes
        operands of what it should not (floats that are rounded)."""
        return self.arch != "x86_64" or self.has("avx")

    @property
    def is_host(self) -> bool:
        """Whether code for this target can run on this machine."""
        host = detect_host()
        return self.arch == host.arch and self.has_only(host.features)

    def has_only(self, available: tuple[str, ...]) -> bool:
        return set(self.features) <= set(available)

    def missing_on_host(self) -> list[str]:
        """Features this target needs and this machine lacks (an architecture counts as one)."""
        host = detect_host()
        if self.arch != host.arch:
            return [self.arch]
        return sorted(set(self.features) - set(host.features))

    def with_threads(self, threads: int) -> CpuTarget:
        return replace(self, threads=threads)

    def with_records(self, records: PointSource | None) -> CpuTarget:
        return replace(self, records=records)

    def tvm(self):
        """The TVM target: features spelled out, so that nothing depends on a CPU's name."""
        import tvm

        spec = {
            "kind": "llvm",
            "num-cores": self.threads,
            "mattr": [f"+{f}" for f in self.features],
        }
        if self.arch == "aarch64":
            spec["mtriple"] = "aarch64-linux-gnu"
        else:
            # A baseline CPU name sets LLVM's scheduling model; `mattr` decides what may be used.
            spec["mcpu"] = {"avx512": "x86-64-v4", "avx2": "x86-64-v3"}.get(self.tier, "x86-64")
        if self.tier == "avx512":
            # LLVM prefers 256-bit vectors on some server CPUs; our tiles are counted in 512-bit registers.
            spec["mattr"] = [*spec["mattr"], "-prefer-256-bit"]
        return tvm.target.Target(spec)

    def to_json(self) -> dict:
        fields = asdict(replace(self, records=None))
        del fields["records"]
        return fields


NAMED = {
    "avx512-vnni-vpopcntdq": CpuTarget(
        "avx512-vnni-vpopcntdq", "x86_64", (*_AVX512, "avx512vnni", "avx512vpopcntdq")
    ),
    "avx512-vnni": CpuTarget("avx512-vnni", "x86_64", (*_AVX512, "avx512vnni")),
    "avx512": CpuTarget("avx512", "x86_64", _AVX512),
    "avx2": CpuTarget("avx2", "x86_64", _AVX2),
    "generic": CpuTarget("generic", "x86_64", ()),
    "aarch64": CpuTarget("aarch64", "aarch64", ("neon",), l1_bytes=64 * 1024),
    "aarch64-dotprod": CpuTarget(
        "aarch64-dotprod", "aarch64", ("neon", "dotprod"), l1_bytes=64 * 1024
    ),
}


def _cache_bytes(level: int, default: int) -> int:
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (
                int((index / "level").read_text()) == level
                and (index / "type").read_text().strip() != "Instruction"
            ):
                return int((index / "size").read_text().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return default


@functools.cache
def detect_host() -> CpuTarget:
    """This machine, from /proc/cpuinfo and /sys; where those do not exist, the generic tier of its architecture."""
    arch = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    flags: set[str] = set()
    for line in info.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    features = tuple(llvm for linux, llvm in _LINUX_TO_LLVM.items() if linux in flags)
    if arch == "aarch64" and not features:
        features = ("neon",)  # part of the base architecture
    return CpuTarget(
        "native", arch, features, _cache_bytes(1, 32 * 1024), _cache_bytes(2, 1024 * 1024)
    )


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_target(text: str, threads: int = 1) -> CpuTarget:
    """A target from the command line: `native`, a name, or JSON with `CpuTarget`'s fields.

    Raises TargetError for an unknown name, malformed JSON or an unknown key.
    """
    if text == "native":
        return detect_host().with_threads(threads)
    if text in NAMED:
        return NAMED[text].with_threads(threads)
    known = ", ".join(["native", *NAMED])
    if not text.lstrip().startswith("{"):
        raise TargetError(
            "unknown target", where="--target", found=repr(text), wanted=f"one of {known}, or JSON"
        )
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise TargetError(f"malformed JSON: {error}", where="--target") from None
    allowed = {"name", "arch", "features", "l1_bytes", "l2_bytes"}
    if unknown := set(fields) - allowed:
        raise TargetError(
            "unknown key",
            where="--target",
            found=", ".join(sorted(unknown)),
            wanted=", ".join(sorted(allowed)),
        )
    features = fields.get("features", [])
    if not isinstance(features, list) or not all(f in _LINUX_TO_LLVM.values() for f in features):
        raise TargetError(
            "unknown CPU feature",
            where="--target",
            found=str(features),
            wanted="a list of " + ", ".join(sorted(set(_LINUX_TO_LLVM.values()))),
        )
    arch = fields.get("arch", "x86_64")
    if arch not in ("x86_64", "aarch64"):
        raise TargetError(
            "unknown architecture", where="--target", found=repr(arch), wanted="x86_64 or aarch64"
        )
    sizes = {k: fields[k] for k in ("l1_bytes", "l2_bytes") if k in fields}
    if bad := [k for k, v in sizes.items() if not isinstance(v, int) or v <= 0]:
        raise TargetError(
            "not a positive number of bytes", where="--target", found=f"{bad[0]}={sizes[bad[0]]!r}"
        )
    return CpuTarget(
        str(fields.get("name", "custom")), arch, tuple(features), threads=threads, **sizes
    )
