# SPDX-License-Identifier: Apache-2.0
"""Accuracy against parameters and against measured latency: networks of quadratic neurons and ordinary ones.

    python tools/parametric_efficiency.py [--json study.json] [--figure docs/parametric_efficiency.png]

Four tasks: scikit-learn's digits with a convolutional and with a fully connected network, the sign of a sum of products,
and rings. Each network comes in several widths and two kinds, with the same layers, training steps and learning rate;
the quadratic one starts as the ordinary one and trains with ReLinear's groups. Every network is trained with several
seeds, compiled by Kerf, and all of a task's are timed in alternating runs of one process, one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compiler.nn.quadratic import QuadraticConv2d, QuadraticLinear, relinear_groups

KINDS = ("ordinary", "quadratic")
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
    """One network: accuracies in percent over the seeds, microseconds for one sample."""

    task: str
    kind: str
    width: int
    parameters: int
    accuracy: float
    spread: float
    latency_us: float | None = None


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
    for width, kind in itertools.product(task.widths, KINDS):
        accuracies = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = task.network(width, kind == "quadratic")
            accuracies.append(train(model, data, task.steps, seed))
        size = sum(p.numel() for p in model.parameters())
        found = Result(
            name, kind, width, size, float(np.mean(accuracies)), float(np.std(accuracies))
        )
        print(f"{name}: {kind} {width}: {size} parameters, {found.accuracy:.2f} %", flush=True)
        results.append(found)
        models[kind, width] = model
    if not seconds:
        return results
    latency = time_models(models, data.test_x[:1], seconds)
    return [replace(r, latency_us=latency[r.kind, r.width]) for r in results]


def time_models(models: dict, x: torch.Tensor, seconds: float) -> dict:
    """Median microseconds of each model compiled by Kerf, on one sample, taken in alternating runs."""
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
    return {key: 1000 * latency.median for key, latency in found.items()}


def least(results: Sequence[Result], kind: str, accuracy: float, measure: str) -> Result:
    """The network of a kind that reaches an accuracy with the least of a measure."""
    good = [r for r in results if r.kind == kind and r.accuracy >= accuracy]
    return min(good, key=lambda r: getattr(r, measure))


def within_reach(own: Sequence[Result]) -> float:
    """The best accuracy that both kinds reach, less a point."""
    return min(max(r.accuracy for r in own if r.kind == kind) for kind in KINDS) - 1


def markdown(results: Sequence[Result]) -> str:
    """What either kind needs for one accuracy, task by task, and all networks."""
    lines = [
        "| task | accuracy % | parameters: ordinary | quadratic | ratio | latency us: ordinary | quadratic | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    tasks = {t: [r for r in results if r.task == t] for t in dict.fromkeys(r.task for r in results)}
    for task, own in tasks.items():
        accuracy = within_reach(own)
        cells = _needs(own, accuracy, "parameters", "{:.0f}")
        if all(r.latency_us for r in own):
            cells += _needs(own, accuracy, "latency_us", "{:.1f}")
        lines.append(f"| {task} | {accuracy:.1f} | " + " | ".join(cells) + " |")
    lines += [
        "", "| task | neurons | width | parameters | accuracy % | latency us |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for r in results:
        latency = "" if r.latency_us is None else f"{r.latency_us:.1f}"
        accuracy = f"{r.accuracy:.1f} ± {r.spread:.1f}"
        lines.append(
            f"| {r.task} | {r.kind} | {r.width} | {r.parameters} | {accuracy} | {latency} |"
        )
    return "\n".join(lines) + "\n"


def _needs(own: Sequence[Result], accuracy: float, measure: str, form: str) -> list[str]:
    """Cells: the least of a measure by kind, with the width, and the ratio."""
    found = [least(own, kind, accuracy, measure) for kind in KINDS]
    values = [getattr(r, measure) for r in found]
    cells = [f"{form.format(v)} (width {r.width})" for v, r in zip(values, found)]
    return [*cells, f"{values[1] / values[0]:.2f}"]


def figure(results: Sequence[Result], path: Path) -> None:
    """Accuracy over parameters, and over latency where it was measured: a row of panels each, one per task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(r.task for r in results))
    measures = {"parameters": "parameters"}
    if all(r.latency_us for r in results):
        measures["latency_us"] = "latency, us"
    drawn = Figure(figsize=(3.6 * len(tasks), 3.2 * len(measures)), layout="constrained")
    FigureCanvasAgg(drawn)
    grid = drawn.subplots(len(measures), len(tasks), squeeze=False)
    for row, (measure, label) in zip(grid, measures.items()):
        for axes, task in zip(row, tasks):
            for kind, marker in zip(KINDS, "os"):
                own = [r for r in results if (r.task, r.kind) == (task, kind)]
                own.sort(key=lambda r: r.width)
                axes.errorbar(
                    [getattr(r, measure) for r in own], [r.accuracy for r in own],
                    yerr=[r.spread for r in own], marker=marker, capsize=2, label=kind,
                )  # fmt: skip
            axes.set(title=task, xlabel=label)
            if measure == "parameters":
                axes.set_xscale("log")
            else:
                axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("test accuracy, %")
    grid[0][0].legend()
    drawn.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing per task; 0: none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="the tables")
    parser.add_argument(
        "--figure", type=Path, help="where to draw, for example docs/parametric_efficiency.png"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = [r for t in options.tasks for r in study(t, TASKS[t], options.seeds, options.seconds)]
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    tables = markdown(results)
    print(tables)
    if options.markdown:
        options.markdown.write_text(tables)
    if options.figure:
        figure(results, options.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
