# SPDX-License-Identifier: Apache-2.0
"""Which regularity of weight sparsity pays here? Accuracy, storage, loads and latency of every grain, side by side.

    python tools/regularity.py --directory .regularity [--networks vgg16,resnet50] [--figure docs/regularity.png]

After Mao et al. 2017 (arXiv 1705.08922), with the grains that suit vector registers beside theirs. Accuracy is real: a small CNN
is trained on scikit-learn's digits, pruned gradually at each grain and density, and fine-tuned. Latency and
size are those of `compile-model what-if` with random masks on the shapes of large networks. Everything found is kept in the
directory as JSON; a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import demo

GRAINS = ("element", "row", "kernel", "out:4", "out:8", "out:16", "block:4x4", "filter")
CONSTRAINED = ("2:4", "1:4")
ACCURACY_DENSITIES = (0.05, 0.1, 0.2, 0.4)
NETWORK_DENSITIES = "0.1,0.05,0.3"


def kept(path: Path, key: str, compute: Callable[[], object]):
    """The value under `key` of a JSON file, computed and stored where it is missing."""
    known = json.loads(path.read_text()) if path.exists() else {}
    if key not in known:
        value = compute()
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, key: value}, indent=1))
        return value
    return known[key]


def asked(grain: str, density: float) -> float:
    """The density to ask a grain for so that it keeps this share of the weights: inputs leave with the filters before."""
    return round(density**0.5, 2) if grain == "filter" else density


# Accuracy


def train(model: nn.Module, images, labels, epochs: int, rate: float, pruner=None) -> None:
    """Adam with a one-cycle rate."""
    from contextlib import nullcontext

    optimizer = torch.optim.Adam(model.parameters(), rate)
    batches = len(images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    model.train()
    with pruner.attached(optimizer) if pruner is not None else nullcontext():
        for _ in range(epochs):
            for batch in torch.randperm(len(images))[: batches * 64].split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
    model.eval()


class SmallNet(nn.Module):
    """Two residual blocks of 3x3 convolutions; x [N, 1, 8, 8] -> [N, 10]. 103,000 weights: few enough for pruning to hurt."""

    def __init__(self):
        super().__init__()
        block = demo.ConvBlock
        self.stem = block(1, 32, 3)
        self.block1 = demo.Residual(block(32, 32, 3), block(32, 32, 3, relu=False))
        self.down = block(32, 64, 3, stride=2)
        self.block2 = demo.Residual(block(64, 64, 3), block(64, 64, 3, relu=False))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.block2(self.down(self.block1(self.stem(x)))).mean((2, 3)))


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, then test images and labels; the last 360 are the test set. 8x8, as they are."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    return images[:-360], labels[:-360], images[-360:], labels[-360:]


def accuracy_study(directory: Path, seeds: int, epochs: int) -> dict[str, dict[float, float]]:
    """Test accuracy by grain and density, the mean over seeds; "dense" under density 1."""
    from compiler.nn.pruning import Pruner, prune_and_fine_tune
    from passes.sparse.grains import Grain

    path = directory / "accuracy.json"
    x, y, test_x, test_y = digits()
    trained: dict[int, nn.Module] = {}

    def base(seed: int) -> nn.Module:
        if seed not in trained:
            torch.manual_seed(seed)
            trained[seed] = SmallNet()
            train(trained[seed], x, y, 8, 4e-3)
        return trained[seed]

    def pruned(grain: str, density: float, seed: int) -> float:
        model = copy.deepcopy(base(seed))
        torch.manual_seed(seed)
        example = (test_x[:1],) if grain == "filter" else None
        # The first convolution is small and the most sensitive, the last layer is small.
        pruner = Pruner(model, grain, skip=("stem.0", "head"), example=example)
        own = None if pruner.grain.of else density
        prune_and_fine_tune(
            pruner,
            own,
            lambda p: train(p.model, x, y, epochs, 2e-3, p),
            rounds=1 if own is None else 2,
        )
        return demo.accuracy(model, test_x, test_y)

    found: dict[str, dict[float, float]] = {}
    dense = [
        kept(path, f"dense/{s}", lambda s=s: demo.accuracy(base(s), test_x, test_y))
        for s in range(seeds)
    ]
    found["dense"] = {1.0: float(np.mean(dense))}
    points = [(g, d) for g in GRAINS for d in ACCURACY_DENSITIES]
    points += [(g, Grain.parse(g).density) for g in CONSTRAINED]
    start = time.perf_counter()
    for i, (grain, density) in enumerate(points):
        values = [
            kept(
                path,
                f"{grain}/{density}/{epochs} epochs/{s}",
                lambda s=s, g=grain, d=density: pruned(g, asked(g, d), s),
            )
            for s in range(seeds)
        ]
        found.setdefault(grain, {})[density] = float(np.mean(values))
        print(f"[{time.perf_counter() - start:5.0f} s] {i + 1} of {len(points)}: {grain} at {density:.0%}: {np.mean(values):.1%} right", flush=True)  # fmt: skip
    return found


# Latency, storage, loads


def network(name: str) -> tuple[nn.Module, tuple]:
    """A network of the zoo with random weights, and example inputs. Of VGG-16 the convolutions: its dense layers, for one
    row, read 490 MB of weights and would hide everything else."""
    import zoo

    if name != "vgg16":
        return zoo.build(name, tiny=False, batch=1)
    model = zoo.Vgg(((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3), 1, 10, grid=1)
    model.classifier = nn.Sequential(nn.Linear(512, 10))
    return model.eval(), (torch.zeros(1, 3, 224, 224),)


def network_study(
    directory: Path, name: str, densities: Sequence[float], say: Callable[[str], None]
):
    """The what-if study of one network, at the first of these densities first."""
    from compiler.what_if import what_if
    from passes.sparse.grains import Grain

    points = [(g, asked(g, d)) for d in densities for g in GRAINS]
    points[len(GRAINS) : len(GRAINS)] = [(g, Grain.parse(g).density) for g in CONSTRAINED]
    module, example = network(name)
    return what_if(
        module,
        points=points,
        example=example,
        state=directory / f"{name}.json",
        progress=lambda text: say(f"{name}: {text}"),
    )


def loads_study(directory: Path, name: str, density: float) -> dict[str, dict[str, float]]:
    """Loads that the kernels of all convolutions issue for one image, by grain: of indices, weights, activations."""
    return kept(directory / "loads.json", f"{name}/{density}", lambda: _count_loads(name, density))


def _count_loads(name: str, density: float) -> dict[str, dict[str, float]]:
    from compiler.frontend import import_model
    from compiler.pipeline import canonicalize, lay_out
    from compiler.what_if_study import layer_calls, masked_at
    from passes.family import Layer
    from passes.sparse.grains import Grain
    from passes.sparse.lowering import default_point
    from schedules.target import detect_host

    module, example = network(name)
    mod = canonicalize(import_model(module, example=example).mod)
    target = detect_host()
    calls = layer_calls(lay_out(mod)).values()
    found = {"dense": _sum(_dense_loads(c, target) for c in calls)}
    for grain in map(Grain.parse, (*GRAINS, *CONSTRAINED)):
        masked = layer_calls(lay_out(masked_at(mod, grain, grain.density or density))).values()
        if grain.name == "filter":  # what is left is dense
            found["filter"] = {k: v * density for k, v in found["dense"].items()}
            continue
        masked = [Layer(c) for c in masked if c.op.name == "kerf.conv2d"]
        problems = [_between_planes(layer, grain.runs_as()) for layer in masked]
        points = ((p, default_point(p, target)) for p in problems)
        counts = [_sparse_loads(p, at, target.lanes) for p, at in points if hasattr(at, "vectors")]
        found[grain.name] = _sum(counts)
    return found


def _between_planes(layer, grain: str):
    """The problem of a layer whose neighbours are sparse as well."""
    from passes.sparse.format import run_of
    from passes.sparse.treat import layer_problem

    problem = layer_problem(layer, grain)
    run = run_of(layer.weight) if problem.block == 1 and problem.taps > 1 else 1
    planes = {
        "input_plane": -(-problem.height * problem.width // 16) * 16,
        "output_plane": -(-problem.image_pixels // 16) * 16,
    }
    return replace(problem, planes_in=True, planes_out=True, run=run, **planes)


def _dense_loads(call, target) -> dict[str, float]:
    """A register tile of mr pixels and nv vectors of outputs loads nv vectors and mr broadcasts per step of the sum."""
    from passes.dense.conv2d import problem_of
    from schedules.contraction import default_point

    if call.op.name != "kerf.conv2d":
        return {}
    problem = problem_of(call)
    point = default_point(problem, target)
    pixels, steps = (
        problem.n * problem.oh * problem.ow,
        problem.c // problem.groups * problem.r * problem.s,
    )
    vectors = -(-problem.o // target.lanes)
    return {
        "index": 0.0,
        "weight": pixels / point.mr * steps * vectors,
        "activation": pixels * steps * vectors / point.nv,
    }


def _sparse_loads(problem, point, lanes: int) -> dict[str, float]:
    """A tile of `vectors` pixel vectors walks the stored blocks once per `rows` of their outputs: an index per run of taps, a
    broadcast per weight, and `vectors` loads of activations, which all outputs of the block share."""
    vectors = -(-problem.pixels // lanes)
    tiles = -(-vectors // point.vectors)
    walks = problem.stored * max(1, problem.block // point.rows)
    return {
        "index": tiles * walks / problem.run,
        "weight": float(tiles * problem.stored * problem.block),
        "activation": float(vectors * walks),
    }


def _sum(counts) -> dict[str, float]:
    total = {"index": 0.0, "weight": 0.0, "activation": 0.0}
    for count in counts:
        for key, value in count.items():
            total[key] += value
    return total


def storage(grain: str, density: float, value_bytes: int = 4) -> tuple[float, float]:
    """Bytes per weight of a 3x3 layer with 256 channels at a grain, and the share of them that are indices."""
    from passes.sparse.grains import Grain
    from passes.sparse.storage import storage_bytes

    if grain == "filter":  # inputs and outputs shrink, and nothing needs an index
        return density * value_bytes, 0.0
    shape, parsed = (256, 256, 3, 3), Grain.parse(grain)
    total = storage_bytes(shape, grain, parsed.density or density, value_bytes=value_bytes)
    values = (parsed.density or density) * np.prod(shape) * value_bytes
    return total / float(np.prod(shape)), 1 - values / total


# Table and figure


def table(accuracy, studies, loads, density: float) -> str:
    """Markdown: one row per grain, at one density (of N:M grains their own)."""
    from passes.sparse.grains import Grain

    head = ["grain", "density", "accuracy", "bytes per weight", "of them indices"]
    head += [f"{n}: time / dense" for n in studies]
    head += [f"{n}: loads index + weight + activation = all, of element's" for n in loads]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    lines.append(f"| dense | 100 % | {accuracy['dense'][1.0]:.1%} | 4.00 | 0 % |" + " 1.00 |" * len(studies) + _load_cells(loads, "dense"))  # fmt: skip
    for grain in (*GRAINS, *CONSTRAINED):
        d = Grain.parse(grain).density or density
        size, indices = storage(grain, d)
        cells = [grain, f"{d:.0%}", f"{accuracy[grain][d]:.1%}", f"{size:.2f}", f"{indices:.0%}"]
        for study in studies.values():
            found = [p for p in study.points if (p.grain, p.density) == (grain, asked(grain, d))]
            cells.append(f"{found[0].latency_us / study.latency_us:.2f}" if found else "")
        lines.append("| " + " | ".join(cells) + " |" + _load_cells(loads, grain))
    return "\n".join(lines)


def _load_cells(loads, grain: str) -> str:
    cells = ""
    for counts in loads.values():
        whole = sum(counts["element"].values())
        parts = [counts[grain][k] / whole for k in ("index", "weight", "activation")]
        cells += " " + " + ".join(f"{p:.2f}" for p in parts) + f" = {sum(parts):.2f} |"
    return cells


def figure(accuracy, studies, path: Path) -> None:
    """Accuracy and storage over density, and time over density for each network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5 * (2 + len(studies)), 4.2), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = list(drawn.subplots(1, 2 + len(studies)))
    for i, grain in enumerate((*GRAINS, *CONSTRAINED)):
        style = {"color": f"C{i}", "marker": "o", "label": grain}
        points = sorted(accuracy[grain].items())
        panels[0].plot([d for d, _ in points], [a for _, a in points], **style)
        panels[1].plot(
            [d for d, _ in points], [storage(grain, d)[0] / 4 for d, _ in points], **style
        )
        for axes, study in zip(panels[2:], studies.values()):
            own = sorted(
                (p.density**2 if grain == "filter" else p.density, p.latency_us / study.latency_us)
                for p in study.points
                if p.grain == grain
            )
            axes.plot([d for d, _ in own], [r for _, r in own], **style)
    panels[0].axhline(accuracy["dense"][1.0], color="grey", linewidth=0.8)
    panels[0].set(title="digits: test accuracy", xlabel="share of the weights")
    panels[1].set(
        title="stored bytes / dense, indices included",
        xlabel="share of the weights",
        ylim=(0, None),
    )
    for axes, name in zip(panels[2:], studies):
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(title=f"{name}: time / dense", xlabel="share of the weights")
        axes.set(xlim=(0, 0.55), ylim=(0, None))
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[0].legend()
    drawn.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(".regularity"))
    parser.add_argument("--networks", default="vgg16,resnet50")
    parser.add_argument(
        "--densities", default=NETWORK_DENSITIES, help="of the networks; the table is of the first"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--epochs", type=int, default=4, help="of fine-tuning, after each of two prunings"
    )
    parser.add_argument(
        "--figure", type=Path, help="where to draw, for example docs/regularity.png"
    )
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    accuracy = accuracy_study(options.directory, options.seeds, options.epochs)
    names = [n for n in options.networks.split(",") if n]
    densities = [float(d) for d in options.densities.split(",")]
    studies = {
        n: network_study(options.directory, n, densities, lambda t: print(t, flush=True))
        for n in names
    }
    loads = {n: loads_study(options.directory, n, densities[0]) for n in names}
    print("\n" + table(accuracy, studies, loads, densities[0]))
    if options.figure:
        figure(accuracy, studies, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
