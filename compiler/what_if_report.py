# SPDX-License-Identifier: Apache-2.0
"""What-if studies as a table for a terminal and as a figure."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from compiler.arrays import check_writable
from compiler.what_if import Point, WhatIf
from schedules.errors import UserError

_FORMATS = (".png", ".svg", ".pdf")


def table(found: WhatIf) -> list:
    """One row per point; the dense network first."""
    rows = Table(box=None, header_style="bold", pad_edge=False)
    for name in (
        "grain",
        "density",
        "ms",
        "of dense",
        "MiB",
        "of dense",
        "stored MiB",
        "layers treated",
    ):
        rows.add_column(name, justify="left" if name == "grain" else "right")
    rows.add_row("dense", "100%", *_against(found.latency_us / 1e3, found.latency_us / 1e3), *_against(found.weights_bytes / 2**20, found.weights_bytes / 2**20), "", "")  # fmt: skip
    for point in found.points:
        rows.add_row(
            point.grain,
            f"{point.density:.3g}" if point.density < 0.01 else f"{point.density:.0%}",
            *_against(point.latency_us / 1e3, found.latency_us / 1e3),
            *_against(point.weights_bytes / 2**20, found.weights_bytes / 2**20),
            f"{point.storage_bytes / 2**20:.2f}",
            f"{point.treated} of {len(point.layers)}",
        )
    threads = found.environment.get("threads", 1)
    note = (
        f"\n{found.model}: predicted from each layer's kernels with random masks, {threads} "
        f"thread{'s' * (threads != 1)}; MiB as an artifact holds them, layers that stay dense whole; stored: all layers "
        "in the compact format, indices included"
    )
    return [rows, Text(note), *_declined(found)]


def _against(value: float, dense: float) -> tuple[str, str]:
    return f"{value:.2f}", f"{value / dense:.2f}"


def _declined(found: WhatIf) -> list[Text]:
    """Why layers stay dense, of the point with the most of them."""
    worst = max(found.points, key=lambda p: sum(bool(x.declined) for x in p.layers), default=None)
    reasons: dict[str, int] = {}
    for layer in worst.layers if worst else ():
        if layer.declined:
            reasons[layer.declined] = reasons.get(layer.declined, 0) + 1
    most = sorted(reasons.items(), key=lambda item: -item[1])[:3]
    return [Text(f"{worst.grain} at {worst.density:.0%}: {n} dense: {why}") for why, n in most]


def check_plot(path: Path) -> None:
    """That a figure can be drawn to `path`: to be asked before the work. Raises UserError."""
    if path.suffix not in _FORMATS:
        raise UserError("unknown kind of figure", where=str(path), wanted=" or ".join(_FORMATS))
    check_writable(path)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "figures need matplotlib", todo="pip install 'kerf-compiler[plot]'"
        ) from None


def plot(found: WhatIf, path: Path) -> None:
    """Latency and size over density, one line per grain, as shares of the dense network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    grains: dict[str, list[Point]] = {}
    for point in found.points:
        grains.setdefault(point.grain, []).append(point)
    panels = (
        ("latency / dense", lambda p: p.latency_us / found.latency_us),
        ("size of the weights / dense", lambda p: p.weights_bytes / found.weights_bytes),
    )
    for axes, (label, value) in zip(figure.subplots(1, 2), panels):
        for grain, points in grains.items():
            points = sorted(points, key=lambda p: p.density)
            axes.plot([p.density for p in points], [value(p) for p in points], "o-", label=grain)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xlabel="density", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(f"{Path(found.model).name}: {found.latency_us / 1e3:.2f} ms dense")
    figure.savefig(path, dpi=130)
