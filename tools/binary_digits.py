# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a binary network on handwritten digits beside its float twin's, trained with and without latent weights, and compiled.

    python tools/binary_digits.py

A real stem and head, three blocks of RSign, 3x3 binary convolution and RPReLU with real shortcuts; 1,437 digits of
scikit-learn to train on, 360 to test.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compiler.nn.binary import BinaryBlock, SecondOrderFilter, parameter_groups

_BLOCKS = ((32, 32, 1), (32, 64, 2), (64, 64, 1))
# name -> whether it is binary, trained by the gradient filter, and how its binary weights are scaled
NETWORKS = {
    "float": (False, False, "mean"),
    "binary, latent weights": (True, False, "mean"),
    "binary, gradient filter": (True, True, "none"),
}


@dataclass(frozen=True)
class Digits:
    """Images float32 [N, 1, 8, 8] in [0, 1] and labels int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @staticmethod
    def load() -> Digits:
        """scikit-learn's digits in a fixed random order."""
        from sklearn.datasets import load_digits

        found = load_digits()
        x = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
        y = torch.tensor(found.target)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        train, test = order[:1437], order[1437:]
        return Digits(x[train], y[train], x[test], y[test])


class Network(nn.Module):
    """A Bi-Real-style network for 8x8 images; its float twin has the same shapes, ordinary convolutions and no sign."""

    def __init__(self, binary: bool, scale: str = "mean"):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.blocks = nn.Sequential(
            *(BinaryBlock(i, o, stride=s, scale=scale) for i, o, s in _BLOCKS)
        )
        if not binary:
            for (i, o, s), block in zip(_BLOCKS, self.blocks):
                block.binarize = nn.Identity()
                block.conv = nn.Conv2d(i, o, 3, s, padding=1, bias=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def train(
    name: str, data: Digits, steps: int = 300
) -> tuple[Network, float, SecondOrderFilter | None]:
    """A trained network of `NETWORKS`, its accuracy on the test digits in percent, and the filter if one trained it."""
    binary, filtered, scale = NETWORKS[name]
    torch.manual_seed(0)
    model = Network(binary, scale)
    groups = parameter_groups(model)
    real = [*groups.real, *groups.norm, *([] if filtered else groups.binary)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(real, lr=5e-3)]
    gradient_filter = None
    if filtered:
        gradient_filter = SecondOrderFilter(groups.binary, gamma=0.1, alpha=1e-2, total_steps=steps)
        optimizers.append(gradient_filter)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizers[0], 1, 0.01, steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randint(len(data.labels), (96,), generator=generator)
        loss = F.cross_entropy(model(data.images[batch]), data.labels[batch])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return model, _percent(model(data.test_images).argmax(1), data.test_labels), gradient_filter


def _percent(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return 100 * (found == wanted).float().mean().item()


def compiled_predictions(
    model: Network, images: torch.Tensor, calibration: torch.Tensor | None = None
) -> torch.Tensor:
    """Classes that the compiled binary network gives to all images; its real layers are int8 where there are images to
    calibrate on."""
    import numpy as np

    import compiler

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "digits.pt2"
        torch.export.save(torch.export.export(model, (images,)), path)
        options: dict = {"recipe": "binary"}
        if calibration is not None:
            samples = calibration[: len(calibration) // len(images) * len(images)]
            options = {"recipe": "binary+int8", "calibration": samples.split(len(images))}
        built = compiler.compile_model(path, choose="asked", **options)
        found = compiler.load(built.path)(images.numpy())
    return torch.from_numpy(np.asarray(found)).argmax(1)


def main() -> int:
    data = Digits.load()
    print("| network | test digits right | compiled | as in torch | rest int8 | as in torch |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (binary, _, _) in NETWORKS.items():
        model, accuracy, _ = train(name, data)
        cells = [""] * 4
        if binary:
            with torch.no_grad():
                wanted = model(data.test_images).argmax(1)
            predicted = [
                compiled_predictions(model, data.test_images, c) for c in (None, data.images)
            ]
            figures = [_percent(p, w) for p in predicted for w in (data.test_labels, wanted)]
            cells = [f"{figure:.1f} %" for figure in figures]
        print(f"| {name} | {accuracy:.1f} % | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
