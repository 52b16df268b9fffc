# SPDX-License-Identifier: Apache-2.0
"""One row per layer: what was found, what became of it, which kernel computes it, how long and
how large."""

from __future__ import annotations

from collections.abc import Mapping

from compiler.artifact import Artifact, KernelCall, VariantInfo

Times = Mapping[str, Mapping[str, float]]


def layer_rows(artifact: Artifact, times: Times | None = None) -> list[dict]:
    """Rows in program order with the keys of docs/report.md.

    `times` are microseconds by variant and layer. Of a dense build, `compressed_us` is None.
    """
    dense, compressed = artifact.variant("dense"), artifact.variant("compressed")
    single = dense.name == compressed.name
    sizes = {v.name: layer_bytes(v) for v in artifact.variants.values()}
    kernels = {v.name: layer_kernels(v) for v in artifact.variants.values()}
    times = times or {}
    rows = []
    for row in artifact.layers:
        name = row["name"]
        size = sizes[compressed.name].get(name, {})
        rows.append(
            {
                **row,
                "kernel": kernels[compressed.name].get(name),
                "dense_kernel": kernels[dense.name].get(name),
                "dense_us": times.get(dense.name, {}).get(name),
                "compressed_us": None if single else times.get(compressed.name, {}).get(name),
                "bytes": size.get("bytes", 0),
                "index_bytes": size.get("index", 0),
                "dense_bytes": sizes[dense.name].get(name, {}).get("bytes", 0),
            }
        )
    return rows


def layer_bytes(variant: VariantInfo) -> dict[str, dict[str, int]]:
    """Layer -> bytes of its constants on disk, and of those that say where values are; shared ones
    under "shared"."""
    sizes: dict[str, dict[str, int]] = {}
    stored = zip(variant.constant_names, variant.stored_bytes, variant.index_bytes)
    for name, size, index in stored:
        entry = sizes.setdefault(name.rpartition("/")[0], {"bytes": 0, "index": 0})
        entry["bytes"] += size
        entry["index"] += index
    return sizes


def layer_kernels(variant: VariantInfo) -> dict[str, str]:
    """Layer -> the loop structure of its kernel with its parameters, of the first if it has
    several."""
    found: dict[str, str] = {}
    for call in variant.kernels:
        for layer in call.layers:
            found.setdefault(layer, describe_kernel(call))
    return found


def describe_kernel(call: KernelCall) -> str:
    """`contraction mr=8 nv=2`, and `tuned` at the end if tuning found the parameters."""
    fields = call.point.get("point", call.point)
    point = [f"{k}={v}" for k, v in fields.items() if not isinstance(v, (dict, list))]
    return " ".join([call.loops, *point, *(["tuned"] if call.point.get("tuned") else [])])
