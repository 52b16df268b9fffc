# SPDX-License-Identifier: Apache-2.0
"""Accuracy against parameters and against measured latency: networks of quadratic neurons and ordinary ones.

    python tools/parametric_efficiency.py --json study.json --markdown docs/parametric_efficiency.md

Four tasks: scikit-learn's digits with a convolutional and with a fully connected network, the sign of a sum of products,
and rings. Each network comes in several widths and two kinds, with the same layers, training steps and learning rate;
the quadratic one starts as the ordinary one and trains with ReLinear's groups. Every network is trained with several
seeds, compiled by Kerf, and all of a task's are timed in alternating runs of one process, one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compiler.nn.quadratic import QuadraticConv2d, QuadraticLinear, relinear_groups

BATCH, RATE, QUADRATIC_RATE = 64, 5e-3, 0.3  # the last: of the rate, for the g and b branches


@dataclass(frozen=True)
class Data:
    """Training and test tensors; y holds classes."""

    x: torch.Tensor
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


@dataclass(frozen=True)
class Result:
    """One network: accuracies in percent over the seeds, milliseconds per sample alone."""

    task: str
    kind: str
    width: int
    parameters: int
    accuracy: float
    spread: float
    latency_ms: float | None = None


def split(x: np.ndarray, y: np.ndarray, train: int) -> Data:
    order = np.random.default_rng(0).permutation(len(y))
    x, y = torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order], dtype=torch.long)
    return Data(x[:train], y[:train], x[train:], y[train:])


def digits(flat: bool) -> Data:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = found.images / 16 - 0.5
    return split(found.data / 16 - 0.5 if flat else images[:, None], found.target, 1297)


def products() -> Data:
    """Whether x1 x2 + x3 x4 + x5 x6 > 0, among ten inputs."""
    x = np.random.default_rng(1).standard_normal((4000, 10))
    return split(x, (x[:, :6].reshape(-1, 3, 2).prod(2).sum(1) > 0).astype(int), 3000)


def rings() -> Data:
    """Which of four rings a point of the plane lies on, with noise."""
    rng = np.random.default_rng(2)
    y = rng.integers(0, 4, 4000)
    radius, angle = 0.5 + 0.5 * y + 0.08 * rng.standard_normal(4000), 2 * np.pi * rng.random(4000)
    return split(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), y, 3000)


def perceptron(width: int, quadratic: bool, inputs: int, classes: int) -> nn.Module:
    """One hidden layer."""
    hidden = QuadraticLinear(inputs, width) if quadratic else nn.Linear(inputs, width)
    return nn.Sequential(hidden, nn.ReLU(), nn.Linear(width, classes))


def convolutional(width: int, quadratic: bool) -> nn.Module:
    """Two convolutions for 8x8 images."""
    layer = QuadraticConv2d if quadratic else nn.Conv2d
    return nn.Sequential(
        layer(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        layer(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is learned, by which network (width, quadratic), at which widths, in how many steps."""

    data: Callable[[], Data]
    network: Callable[[int, bool], nn.Module]
    widths: tuple[int, ...]
    steps: int


TASKS = {
    "digits, convolutions": Task(lambda: digits(False), convolutional, (4, 8, 16, 32), 600),
    "digits, one hidden layer": Task(
        lambda: digits(True), lambda w, q: perceptron(w, q, 64, 10), (4, 8, 16, 32, 64), 800
    ),
    "products": Task(products, lambda w, q: perceptron(w, q, 10, 2), (2, 4, 8, 16, 32), 1500),
    "rings": Task(rings, lambda w, q: perceptron(w, q, 2, 4), (1, 2, 4, 8, 16), 1500),
}


def train(model: nn.Module, data: Data, steps: int, seed: int) -> float:
    """Percent of the test set that the trained model gets right."""
    groups = relinear_groups(model, RATE, factor_g=QUADRATIC_RATE, factor_b=QUADRATIC_RATE)
    optimizer = torch.optim.Adam(groups, lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(data.y), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return 100 * (model(data.test_x).argmax(1) == data.test_y).float().mean().item()


def study(name: str, task: Task, seeds: int, seconds: float) -> list[Result]:
    """Every width in both kinds: trained, then timed together."""
    data, results, models = task.data(), [], {}
    for width in task.widths:
        for quadratic in (False, True):
            accuracies = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = task.network(width, quadratic)
                accuracies.append(train(model, data, task.steps, seed))
            kind = "quadratic" if quadratic else "ordinary"
            size = sum(p.numel() for p in model.parameters())
            results.append(
                Result(
                    name, kind, width, size, float(np.mean(accuracies)), float(np.std(accuracies))
                )
            )
            models[kind, width] = model
            print(
                f"{name}: {kind} {width}: {size} parameters, {np.mean(accuracies):.2f} %",
                flush=True,
            )
    if not seconds:
        return results
    latency = time_models(models, data.test_x[:1], seconds)
    return [Result(**{**asdict(r), "latency_ms": latency[r.kind, r.width]}) for r in results]


def time_models(models: dict, x: torch.Tensor, seconds: float) -> dict:
    """Median milliseconds of each model compiled by Kerf, on one sample, taken in alternating runs."""
    import compiler
    from compiler.measure import interleave, pinned
    from compiler.recipe import Recipe, Rule

    recipes = {"quadratic": Recipe("quadratic", (Rule("*", "quadratic"),)), "ordinary": "dense"}
    artifacts, calls = {}, {}
    for (kind, width), model in models.items():
        artifact = compiler.compile_model(model, (x,), recipe=recipes[kind], choose="asked")
        artifacts[kind, width] = artifact
        loaded = compiler.load(
            artifact.path, variant="compressed" if kind == "quadratic" else "dense"
        )
        tensors = loaded.bind([x.numpy()])
        calls[kind, width] = lambda loaded=loaded, tensors=tensors: loaded.invoke(tensors)
    with pinned(1):
        found = interleave(calls, seconds=seconds)
    return {key: latency.median for key, latency in found.items()}


def cheapest(results: Sequence[Result], kind: str, accuracy: float) -> Result | None:
    """The network of a kind with the fewest parameters that reaches an accuracy."""
    good = [r for r in results if r.kind == kind and r.accuracy >= accuracy]
    return min(good, key=lambda r: r.parameters) if good else None


def markdown(results: Sequence[Result]) -> str:
    """All networks, and per task the smallest of each kind that reaches the best accuracy both can, less a point."""
    lines = []
    for task in dict.fromkeys(r.task for r in results):
        own = [r for r in results if r.task == task]
        lines += [
            f"### {task}",
            "",
            "| neurons | width | parameters | accuracy % | latency us |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for r in own:
            latency = "" if r.latency_ms is None else f"{1000 * r.latency_ms:.1f}"
            lines.append(
                f"| {r.kind} | {r.width} | {r.parameters} | {r.accuracy:.1f} ± {r.spread:.1f} | {latency} |"
            )
        lines += ["", compare(own), ""]
    return "\n".join(lines)


def compare(own: Sequence[Result]) -> str:
    """In words, where one kind needs less than the other."""
    reach = min(max(r.accuracy for r in own if r.kind == k) for k in ("ordinary", "quadratic")) - 1
    a, b = (cheapest(own, kind, reach) for kind in ("ordinary", "quadratic"))
    text = f"At {reach:.1f} %: ordinary {a.parameters} parameters (width {a.width}), quadratic {b.parameters} (width {b.width}), ratio {b.parameters / a.parameters:.2f}"
    if a.latency_ms and b.latency_ms:
        text += f"; latency {1000 * a.latency_ms:.1f} and {1000 * b.latency_ms:.1f} us, ratio {b.latency_ms / a.latency_ms:.2f}"
    return text + "."


def figure(results: Sequence[Result], measure: str, label: str) -> str:
    """An SVG with one panel per task: accuracy over the logarithm of `measure`."""
    tasks = list(dict.fromkeys(r.task for r in results))
    width, height, margin = 260, 190, 42
    colours = {"ordinary": "#4477aa", "quadratic": "#cc6677"}
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(tasks) * (width + margin) + margin}" height="{height + 2 * margin + 20}" font-family="sans-serif" font-size="11">', '<rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for i, task in enumerate(tasks):
        own = [r for r in results if r.task == task and getattr(r, measure)]
        xs = np.log10([getattr(r, measure) for r in own])
        ys = np.array([r.accuracy for r in own])
        left, low, high = margin + i * (width + margin), xs.min(), xs.max()
        bottom, top = min(ys.min(), 99.0), 100.0

        def place(x, y, left=left, low=low, high=high, bottom=bottom, top=top):
            across = left + (x - low) / max(high - low, 1e-9) * width
            return across, margin + (top - y) / (top - bottom) * height

        parts.append(
            f'<rect x="{left}" y="{margin}" width="{width}" height="{height}" fill="none" stroke="#999"/>'
        )
        parts.append(f'<text x="{left}" y="{margin - 8}">{task}</text>')
        for x, anchor in ((low, "start"), (high, "end")):
            parts.append(
                f'<text x="{place(x, 0)[0]:.0f}" y="{margin + height + 14}" text-anchor="{anchor}">{10**x:.3g}</text>'
            )
        for y in (bottom, top):
            parts.append(
                f'<text x="{left - 4}" y="{place(low, y)[1] + 4:.0f}" text-anchor="end">{y:.0f}</text>'
            )
        for kind, colour in colours.items():
            points = sorted(place(x, r.accuracy) for x, r in zip(xs, own) if r.kind == kind)
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            )
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points
            ]
    for j, (kind, colour) in enumerate(colours.items()):
        parts.append(
            f'<text x="{margin + 90 * j}" y="{height + 2 * margin + 8}" fill="{colour}">{kind}</text>'
        )
    parts.append(
        f'<text x="{margin + 200}" y="{height + 2 * margin + 8}">accuracy (%) over {label}, logarithmic</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing per task; 0: none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="the tables, with figures beside them")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = [r for t in options.tasks for r in study(t, TASKS[t], options.seeds, options.seconds)]
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    tables = markdown(results)
    print(tables)
    if options.markdown:
        write_page(options.markdown, results, tables)
    return 0


def write_page(path: Path, results: Sequence[Result], tables: str) -> None:
    """The page and its figures."""
    lines = [
        "# Parametric efficiency", "",
        "Networks of quadratic and of ordinary neurons at several widths: `python tools/parametric_efficiency.py` trains, compiles and",
        "times them (one thread, one sample, alternating runs of one process) and writes this page.", "",
    ]  # fmt: skip
    measures = {"parameters": "parameters"}
    if all(r.latency_ms for r in results):
        measures["latency_ms"] = "latency in ms"
    for measure, label in measures.items():
        name = f"{path.stem}_{measure.removesuffix('_ms')}.svg"
        (path.parent / name).write_text(figure(results, measure, label))
        lines += [f"![Accuracy over {label}]({name})", ""]
    path.write_text("\n".join(lines) + "\n" + tables)


if __name__ == "__main__":
    raise SystemExit(main())
