# SPDX-License-Identifier: Apache-2.0
"""Builds, verifications, measurements and profiles as tables that fit 100 columns, and as markdown.

Each function gives a list of things for `rich` to print. What to do next comes last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from compiler.accuracy_report import accuracy_lines
from compiler.layer_rows import layer_rows

if TYPE_CHECKING:
    from compiler.artifact import Artifact
    from compiler.comparison import Verification
    from compiler.measure import Measurement
    from compiler.profile import Profile

Row = Mapping[str, Any]


def build(artifact: Artifact) -> list:
    """What was built: a row per layer, sizes, how it was proven, what to do next."""
    rows = layer_rows(artifact)
    parts: list = [layer_table(rows), *why_not(rows)]
    sizes = _table(
        ("variant", "left"),
        ("library", "right"),
        ("weights", "right"),
        ("of it index", "right"),
        ("in memory", "right"),
        ("layers compressed", "right"),
    )
    for name, info in artifact.variants.items():
        count = sum(r["treatment"] != "dense" for r in rows) if name != "dense" else 0
        in_memory = sum(dict(zip(info.constants, info.constant_bytes)).values())
        sized = (*(info.bytes[key] for key in ("library", "weights", "index")), in_memory)
        sizes.add_row(name, *map(_bytes, sized), f"{count} of {len(rows)}")
    parts += [Text(), sizes, Text(), *verify_lines(artifact.manifest.get("verify") or {})]
    parts += accuracy_lines(artifact.manifest.get("accuracy"))
    notes = artifact.manifest.get("source", {}).get("notes") or []
    parts += [Text(f"note: {note}") for note in notes]
    if len(artifact.variants) == 1 and any(r["asked"] != "dense" for r in rows):
        parts.append(Text("Nothing was compressed: the one variant is dense."))
    return [*parts, *_hint_lines(hints(rows)), Text(f"wrote {artifact.path}")]


def verification(found: Verification) -> list:
    """Differences of each variant: from its own graph in float64, and from the original model."""
    return verify_lines(found.to_json())


def bench(found: Measurement) -> list:
    """Latencies side by side, ratios with their intervals, memory, sizes, a row per layer, next
    steps."""
    table = _table(
        ("engine", "left"),
        ("median ms", "right"),
        ("p90", "right"),
        ("p99", "right"),
        ("min", "right"),
        ("IQR", "right"),
        ("runs", "right"),
        ("peak memory", "right"),
        ("on disk", "right"),
    )
    for name, latency in found.latency.items():
        memory, disk = found.memory.get(name), found.disk.get(name)
        label = f"{name} {found.peers[name]}" if name in found.peers else name
        table.add_row(
            label,
            *(
                f"{v:.3f}"
                for v in (latency.median, latency.p90, latency.p99, latency.min, latency.iqr)
            ),
            str(latency.runs),
            _bytes(memory["peak"]) if memory else "",
            _disk(disk) if disk else "",
        )
    parts: list = [table, Text()]
    for name, ratio in found.ratios.items():
        parts.append(
            Text(f"{name}: {ratio.median:.3f} (95 % interval {ratio.low:.3f} to {ratio.high:.3f})")
        )
    for name, used in found.memory.items():
        own = _bytes(used["peak"] - used["start"])
        parts.append(
            Text(f"{name}: of its peak memory {own} are the model's, the rest Python and TVM")
        )
    parts += [Text(f"warning: {warning}", style="yellow") for warning in found.warnings]
    parts += [Text(_environment_line(found.environment))]
    if found.layers:
        parts += [Text(), layer_table(found.layers), *why_not(found.layers)]
    return [*parts, Text(), *verify_lines(found.verify), *_hint_lines(hints(found.layers))]


def _disk(disk: Mapping[str, int]) -> str:
    """A variant's size, and what it would be if zeros were stored, where that is much more."""
    total, whole = disk["total"], disk.get("with_zeros", 0)
    return _bytes(total) + (f" ({_bytes(whole)} with zeros)" if whole > 1.1 * total else "")


def profile(found: Profile) -> list:
    """Kernels in call order by variant, then layers dense beside compressed."""
    parts: list = []
    for name, variant in found.variants.items():
        table = _table(
            ("", "right"),
            (f"{name}: kernel", "left"),
            ("layer", "left"),
            ("us", "right"),
            ("share", "right"),
            ("GFLOP/s", "right"),
            ("useful", "right"),
            ("roofline", "right"),
        )
        total = sum(k.us for k in variant.kernels) or 1.0
        for k in variant.kernels:
            table.add_row(
                str(k.index),
                k.loops,
                ", ".join(k.layers) or k.function,
                f"{k.us:.1f}",
                f"{k.us / total:.1%}",
                f"{k.gflops:.1f}" if k.flops else "",
                f"{k.useful_gflops:.1f}" if k.flops else "",
                f"{k.roofline:.0%}" if k.roofline else "",
            )
        # Two medians of a wandering clock: their difference may come out negative.
        rest = max(variant.total_us - sum(k.us for k in variant.kernels), 0.0)
        parts += [
            table,
            Text(
                f"kernels {total / 1e3:.3f} ms, whole run {variant.total_us / 1e3:.3f} ms, "
                f"between kernels {rest:.0f} us"
            ),
            Text(),
        ]
    parts.append(
        Text(
            f"roofline: {found.peak_gflops:.0f} GFLOP/s, caches {found.cache_gbs[0]:.0f} and "
            f"{found.cache_gbs[1]:.0f} GB/s (memory {found.bandwidth_gbs:.1f}) measured, "
            f"{found.threads} "
            f"thread{'s' * (found.threads > 1)}; medians of {found.runs} runs, timer's "
            f"{found.callback_us[3]:.1f} us per kernel subtracted"
        )
    )
    return [*parts, Text(), layer_table(found.layers), *why_not(found.layers)]


# ---- layers


def layer_table(rows: Sequence[Row]) -> Table:
    """Per layer: found, treatment, kernel, times, gain, size; layers that something else was asked for refer to `why_not`
    by number."""
    timed = any(r.get("dense_us") is not None for r in rows)
    times = [("dense us", "right"), ("us", "right"), ("gain", "right")] if timed else []
    table = _table(
        ("layer", "left"),
        ("found", "left"),
        ("runs as", "left"),
        ("kernel", "left"),
        *times,
        ("KiB", "right"),
    )
    numbers = {reason: i for i, reason in enumerate(_reasons(rows), 1)}
    for row in rows:
        why = _why(row)
        ran = row["treatment"] + (f" [{numbers[_template(why)]}]" if why else "")
        grain = (row.get("found") or {}).get("grain")
        # Other families may leave the zeros that were found alone.
        skips = row["treatment"] == "sparse" or (row.get("kernel") or "").startswith("sparse")
        if skips and grain:
            ran += f" {grain}"
        dense_us, us = row.get("dense_us"), row.get("compressed_us")
        gain = f"{dense_us / us:.2f}x" if dense_us and us else ""
        cells = [_us(dense_us), _us(us), gain] if timed else []
        table.add_row(
            row["name"],
            describe_found(row.get("found") or {}),
            Text(ran),
            _kernel_name(row.get("kernel") or ""),
            *cells,
            f"{row.get('bytes', 0) / 1024:.0f}",
        )
    if timed:
        table.add_section()
        totals = [sum(r.get(k) or 0.0 for r in rows) for k in ("dense_us", "compressed_us")]
        gain = f"{totals[0] / totals[1]:.2f}x" if all(totals) else ""
        size = sum(r.get("bytes", 0) for r in rows) / 1024
        table.add_row(
            "all layers", "", "", "", _us(totals[0]), _us(totals[1] or None), gain, f"{size:.0f}"
        )
    return table


def _kernel_name(kernel: str) -> str:
    """The loop structure of a described kernel, and whether it is tuned."""
    loops, _, rest = kernel.partition(" ")
    return f"{loops} tuned" if rest.endswith("tuned") else loops


# What else may be found in a layer, as the layer table shows it.
_FACTS = {
    "activation_threshold": "threshold {:.3g}",
    "int8_weight_error": "weights off {:.2%}",
    "quadratic": "quadratic {}",
    "fit_error": "fitted, off {:.2%}",
    "output_error": "outputs {:.2%}",
    "weights": "weights {}",
}

# What is said below that table of layers that were taken.
_REMARKS = {
    "signs": "signs {}",
    "not_pruned": "not pruned: {}",
    "zeros_unused": "zeros are not skipped: {}",
    "one_grain_kept": "{}",
    "dead_filters_stay": "dead filters stay: {}",
    "padded_outputs": "{} output channels of zeros fill its last block",
}


def describe_found(found: Mapping) -> str:
    """`90% zeros, out:4; 64 -> 45 filters`: the zeros of a weight, the coarsest grain they lie in, and what left; the share
    of a layer's inputs that are not zero; the neuron it is part of, what a fitted one is off by."""
    parts = []
    density = found.get("density")
    if density is not None and density != 1:
        grain = found.get("grain")
        parts.append(
            f"{1 - density:.0%} zeros" + (f", {grain}" if grain and grain != "element" else "")
        )
    for key, name in (("outputs", "filters"), ("inputs", "inputs")):
        before, after = found.get(key, (0, 0))
        if before != after:
            parts.append(f"{before} -> {after} {name}")
    if (active := found.get("activation_density")) is not None:
        densest, union = (found[f"activation_density_{k}"] for k in ("densest_token", "union"))
        parts.append(f"{active:.1%} active (densest token {densest:.1%}, union {union:.1%})")
    parts += [text.format(found[key]) for key, text in _FACTS.items() if key in found]
    return "; ".join(parts)


def _template(reason: str) -> str:
    """A reason without its numbers: layers that declined alike are shown together."""
    return re.sub(r"\d+(\.\d+)?", "#", reason)


def _why(row: Row) -> str:
    """Why a layer is not what was asked for, first or at all, or what else is to say of how it was taken."""
    parts = [f"not {name}: {reason}" for name, reason in (row.get("passed_on") or {}).items()]
    if row.get("declined"):
        parts.append(row["declined"])
    else:
        found = row.get("found") or {}
        parts += [text.format(found[key]) for key, text in _REMARKS.items() if key in found]
    return "; ".join(parts)


def _reasons(rows: Iterable[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if why := _why(row):
            grouped.setdefault(_template(why), []).append(row)
    return grouped


def why_not(rows: Sequence[Row]) -> list[Text]:
    """The reasons why layers do not run as what was asked for, and where their signs come from, by number."""
    lines = []
    for number, group in enumerate(_reasons(rows).values(), 1):
        distinct = dict.fromkeys(_why(r) for r in group)
        text = next(iter(distinct))
        lines.append(
            Text(
                f"[{number}] {_layers(len(group))}: {text}"
                + (" (and the like)" if len(distinct) > 1 else "")
            )
        )
    return lines


def _layers(count: int, kind: str = "") -> str:
    return f"{count} {kind}layer{'s' * (count != 1)}"


def hints(rows: Sequence[Row]) -> list[str]:
    """What its layers say the user could do next."""
    found = []
    winograd = [
        r
        for r in rows
        if r.get("declined")
        and r.get("asked") == "sparse"
        and "winograd" in (r.get("dense_kernel") or "")
        and (r.get("found") or {}).get("grain") == "element"
    ]
    if winograd:
        found.append(
            f"dense because Winograd beats element sparsity: {_layers(len(winograd), '3x3 ')}; "
            "prune at grain out:4 or coarser there"
        )
    zeroless = [
        r for r in rows if r.get("asked") == "sparse" and (r.get("found") or {}).get("density") == 1
    ]
    if zeroless:
        found.append(
            f"without zeros: {_layers(len(zeroless))}; prune in training, or add --prune "
            "--density 0.1 to see what it would gain"
        )
    unused = [
        r
        for r in rows
        if r.get("asked") == "dense" and (r.get("found") or {}).get("density", 1) <= 0.5
    ]
    if unused:
        found.append(f"at least half zeros: {_layers(len(unused), 'dense ')}; try --recipe sparse")
    return found


def _hint_lines(texts: Sequence[str]) -> list[Text]:
    return [Text(f"next: {text}", style="cyan") for text in texts]


# ---- verification


def verify_lines(document: Mapping) -> list[Text]:
    """The `verify` section of a manifest in words."""
    if not document:
        return []
    lines = []
    for name, check in document.get("kernels", {}).items():
        verdict = "verified" if check["passed"] else "FAILED"
        extra = ""
        if check.get("winograd_kernels"):
            count = check["winograd_kernels"]
            extra = f"; {count} Winograd kernels, whose rounding error is larger (--winograd never)"
        if steps := check.get("steps"):
            extra += (
                f"; {steps['elements']} values in {steps['tensors']} tensors rounded as they should "
                f"be, {steps['ties']} at ties"
                if not steps["wrong"]
                else f"; {steps['wrong']} of {steps['elements']} values rounded to wrong steps"
            )
        lines.append(
            Text(
                f"{name}: {verdict}, kernels within {check['max_abs']:.2g} of float64 "
                f"(allowed {check['tolerance']:.2g}, float32 alone "
                f"{check['float32_error']:.2g}){extra}"
            )
        )
    if not document.get("kernels"):
        lines.append(Text("the kernels were not run: they are for another machine"))
    for name, far in document.get("original", {}).items():
        top = far.get("top1_agreement")
        agree = f", top-1 agreement {top:.1%}" if top is not None else ""
        lines.append(
            Text(
                f"{name} against the original model: max abs {far['max_abs']:.2g}, "
                f"max rel {far['max_rel']:.2g}, "
                f"cosine {far['cosine']:.6f}{agree}"
            )
        )
    return lines


# ---- markdown


def markdown(found: Measurement) -> str:
    """A measurement as markdown: latencies, ratios, layers."""
    lines = [
        "| engine | median ms | p90 | p99 | IQR | runs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, v in found.latency.items():
        lines.append(
            f"| {name} | {v.median:.3f} | {v.p90:.3f} | {v.p99:.3f} | {v.iqr:.3f} | {v.runs} |"
        )
    lines += ["", "| ratio | median | 95 % interval |", "| --- | ---: | --- |"]
    lines += [
        f"| {n} | {r.median:.3f} | {r.low:.3f} to {r.high:.3f} |" for n, r in found.ratios.items()
    ]
    if found.layers:
        lines += [
            "",
            "| layer | found | runs as | kernel | dense us | us | KiB | why not |",
            "| --- | --- | --- | --- | ---: | ---: | ---: | --- |",
        ]
        for r in found.layers:
            lines.append(
                f"| {r['name']} | {describe_found(r.get('found') or {})} | {r['treatment']} "
                f"| {r.get('kernel') or ''} | {_us(r.get('dense_us'))} "
                f"| {_us(r.get('compressed_us'))} | {r.get('bytes', 0) / 1024:.0f} "
                f"| {_why(r)} |"
            )
    return "\n".join([*lines, "", _environment_line(found.environment), ""])


# ---- small things


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold", no_wrap=justify == "right")
    return table


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _bytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size / 1024:.1f} KiB"


def _environment_line(environment: Mapping) -> str:
    cpu = environment.get("cpu", {})
    cores = ",".join(map(str, environment.get("cores", [])))
    threads, load = environment.get("threads"), environment.get("load_average", [0.0])[0]
    return (
        f"{cpu.get('model', '')}, {cpu.get('tier', '')}, {threads} threads on cores {cores}, "
        f"governor {cpu.get('governor')}, load {load:.1f}, {environment.get('date')}"
    )
