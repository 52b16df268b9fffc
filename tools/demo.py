# SPDX-License-Identifier: Apache-2.0
"""Train a small CNN on scikit-learn's digits, prune it, export ONNX, and take it through
compile-model: as a sparse network and as an int8 one.

`make demo` runs this. Everything is written below .demo/ (or --directory).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compiler.nn.pruning import Pruner

SIZE = 16  # the 8x8 digits are enlarged: at 8x8 a layer is over in microseconds


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, relu: bool = True):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU() if relu else nn.Identity())


class Residual(nn.Module):
    """relu(x + f(x))"""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*blocks)

    def forward(self, x):
        return F.relu(x + self.body(x))


class DigitNet(nn.Module):
    """A small ResNet: 3x3 and 1x1 convolutions, strides, residual sums; x [N, 1, 16, 16] -> [N,
    10]."""

    def __init__(self):
        super().__init__()
        self.stem = ConvBlock(1, 64, 3)
        self.block1 = Residual(ConvBlock(64, 64, 3), ConvBlock(64, 64, 3, relu=False))
        self.down = ConvBlock(64, 128, 3, stride=2)
        self.block2 = Residual(
            ConvBlock(128, 64, 1), ConvBlock(64, 64, 3), ConvBlock(64, 128, 1, relu=False)
        )
        self.block3 = Residual(ConvBlock(128, 256, 1), ConvBlock(256, 128, 1, relu=False))
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        x = self.down(self.block1(self.stem(x)))
        x = self.block3(self.block2(x))
        return self.head(x.mean((2, 3)))


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, then test images and labels; the last 360 are the test set."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, (SIZE, SIZE), mode="bilinear")
    labels = torch.tensor(data.target)
    return images[:-360], labels[:-360], images[-360:], labels[-360:]


def train(
    model: nn.Module, images, labels, *, epochs: int, rate: float, pruner: Pruner | None = None
) -> None:
    """Adam with a one-cycle rate; what `pruner` masked stays zero."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    with pruner.attached(optimizer) if pruner else contextlib.nullcontext():
        for _ in range(epochs):
            for batch in torch.randperm(len(images))[: len(images) // 64 * 64].split(64):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images, labels) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def compiled_accuracy(artifact: Path, images, labels) -> float:
    """Of the compiled model, one image at a time."""
    import compiler

    model = compiler.load(artifact)
    hits = [int(np.argmax(model(x[None].numpy())[0])) == int(y) for x, y in zip(images, labels)]
    return float(np.mean(hits))


def export(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    """ONNX in one file. The exporter's notes about packages it could use are kept off the
    screen."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.to(memory_format=torch.contiguous_format),
            (example,),
            path,
            input_names=["x"],
            output_names=["y"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def command(*arguments: str) -> None:
    """Run compile-model as a user would, showing the command line."""
    print("\n$ compile-model " + shlex.join(arguments), flush=True)
    done = subprocess.run([sys.executable, "-m", "compiler.cli", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(".demo"))
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--grain", default="out:4", help="what is pruned together")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    start = time.perf_counter()
    x, y, test_x, test_y = digits()
    model = DigitNet().to(memory_format=torch.channels_last)
    train(model, x, y, epochs=options.epochs, rate=4e-3)
    right = accuracy(model, test_x, test_y)
    print(f"trained in {time.perf_counter() - start:.0f} s: {right:.1%} right")
    # The first and the last layer are small, and the accuracy depends on them.
    pruner = Pruner(model, options.grain, skip=("stem.0", "head"))
    pruner.prune(options.density)
    right = accuracy(model, test_x, test_y)
    print(f"pruned to {options.density:.0%} of the weights: {right:.1%} right")
    train(model, x, y, epochs=options.epochs, rate=2e-3, pruner=pruner)
    print(f"fine-tuned: {accuracy(model, test_x, test_y):.1%} right")

    source, artifact = options.directory / "digits.onnx", options.directory / "digits.kerf"
    export(pruner.finish(), test_x[:1], source)
    command("inspect", str(source))
    command("build", str(source), "-o", str(artifact), "--recipe", "sparse", "--force")
    command("verify", str(artifact))
    command("bench", str(artifact), "--duration", "5", "--against", "onnxruntime")

    samples, labelled = options.directory / "samples.npz", options.directory / "labelled.npz"
    np.savez(samples, x=x[:64].numpy())
    np.savez(labelled, x=test_x.numpy(), labels=test_y.numpy())
    int8 = options.directory / "digits.int8.kerf"
    command(
        "build", str(source), "-o", str(int8), "--recipe", "int8", "--force",
        "--calibration", str(samples), "--eval", str(labelled),
    )  # fmt: skip
    right = compiled_accuracy(artifact, test_x, test_y)
    print(f"\nthe compiled sparse model: {right:.1%} right")
    print(f"the compiled int8 model: {compiled_accuracy(int8, test_x, test_y):.1%} right")
    print(f"the demo took {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
