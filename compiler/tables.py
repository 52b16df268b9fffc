# SPDX-License-Identifier: Apache-2.0
"""Inspections and hardware as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from compiler.hardware import Hardware, Rate
from compiler.inspect import Inspection, LayerInfo

if TYPE_CHECKING:
    from compiler.tuning import TuningResult


def inspection(found: Inspection) -> Group:
    """A model's layers, then its totals."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, justify in (
        ("layer", "left"),
        ("operator", "left"),
        ("input", "left"),
        ("weight", "left"),
        ("parameters", "right"),
        ("MFLOP", "right"),
        ("zeros", "right"),
        ("found", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=name in ("layer", "zeros"), overflow="fold")
    for layer in found.layers:
        table.add_row(
            layer.name,
            _operator(layer),
            _shape(layer.input_shape),
            _shape(layer.weight_shape),
            f"{layer.parameters:,}",
            f"{layer.flops / 1e6:,.2f}",
            f"{layer.zeros:.1%}",
            describe_found(layer.found),
        )
    inputs = ", ".join(f"{n} {_shape(s)} {d}" for n, s, d in found.inputs)
    outputs = ", ".join(f"{n} {_shape(s)} {d}" for n, s, d in found.outputs)
    others = ", ".join(f"{name} x{count}" for name, count in found.other_operators.items())
    totals = (
        f"\n{len(found.layers)} layers, {found.parameters:,} weights, "
        f"{found.flops / 1e9:.3f} GFLOP, {found.zeros:.1%} zeros"
        f"\ninputs: {inputs}\noutputs: {outputs}\nother operators: {others or 'none'}"
        "\nunsupported operators: none"
    )
    return Group(table, Text(totals))


def _operator(layer: LayerInfo) -> str:
    a = layer.attributes
    parts = [layer.operator]
    if any(s != 1 for s in a.get("strides", ())):
        parts.append(f"/{a['strides'][0]}")
    if any(d != 1 for d in a.get("dilation", ())):
        parts.append(f"dilation {a['dilation'][0]}")
    if a.get("groups", 1) != 1:
        parts.append(f"groups {a['groups']}")
    return " ".join(parts)


def _shape(shape) -> str:
    return "x".join(str(d) for d in shape) or "scalar"


def describe_found(found: Mapping[str, object]) -> str:
    """What the families see in a weight: `grain out:4 (element 10%, out:4 10%, out:8 19%)`, the
    shares that each grain would store; what says nothing (None, all of it stored) is left out."""
    parts, shares = [], []
    for key, value in found.items():
        if isinstance(value, Mapping):
            if any(share != 1 for share in value.values()):
                shares += [f"{name} {share:.0%}" for name, share in value.items()]
        elif value is not None and key not in ("zeros", "density"):
            parts.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
    return " ".join([", ".join(parts), f"({', '.join(shares)})" if shares else ""]).strip()


def hardware(machine: Hardware) -> Group:
    """This machine, and what each family can expect of it."""
    table = Table(box=None, show_header=False, pad_edge=False)
    caches = ", ".join(f"{level} {_bytes(size)}" for level, size in machine.caches.items())
    rows = [
        ("CPU", f"{machine.cpu or 'unknown'} ({machine.arch})"),
        ("tier", machine.tier),
        ("features", " ".join(machine.features) or "none"),
        ("missing", " ".join(machine.missing) or "none"),
        ("cores", f"{machine.usable_cores} usable of {machine.cores}"),
        ("caches", caches or "unknown"),
        ("memory", _bytes(machine.memory_bytes)),
        ("governor", machine.governor or "unknown"),
        ("peak FMA", _rate(machine.peak_gflops, "GFLOP/s")),
        ("memory read", _rate(machine.bandwidth_gbs, "GB/s")),
    ]
    rows += [(f"family {e.family}", e.text) for e in machine.expectations]
    for key, value in rows:
        table.add_row(Text(key, style="bold"), Text(value))
    return Group(table)


def tuning(found: TuningResult) -> Group:
    """What was searched and what it gained, heaviest task first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("kernel", "calls", "trials", "default us", "tuned us", "saved"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for task in found.tasks:
        tuned = "default" if task.tuned_us is None else f"{task.tuned_us:.1f}"
        note = "" if task.confirmed or task.tuned_us is None else " (unconfirmed)"
        table.add_row(
            task.name,
            str(task.calls),
            str(task.trials),
            f"{task.default_us:.1f}",
            tuned + note,
            f"{task.gain:.1%}",
        )
    end = f" ({found.interrupted})" if found.interrupted else ""
    totals = (
        f"\n{found.trials} trials in {found.seconds:.0f} s{end}; {found.saved:.1%} of their time "
        f"saved; records in {found.records}"
    )
    return Group(table, Text(totals), *(Text(note) for note in found.notes))


def _rate(rate: Rate | None, unit: str) -> str:
    if rate is None:
        return "not measured"
    threads = f"{rate.threads} thread{'s' if rate.threads > 1 else ''}"
    return f"{rate.median:.1f} {unit} median, {rate.best:.1f} best, {threads}, {rate.samples} calls"


def _bytes(size: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size} B"
