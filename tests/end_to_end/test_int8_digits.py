# SPDX-License-Identifier: Apache-2.0
"""A trained network in int8, from training to the report: handwritten digits, depthwise layers, channels of wildly
different size."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from torch import nn

from compiler import driver
from compiler.artifact import open_artifact
from compiler.runtime import load

_TRAINED_ON = 1200


def separable(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.BatchNorm2d(inputs), nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU(),
    ]  # fmt: skip


def make_wild(layers: nn.Sequential) -> None:
    """Scale the channels between a depthwise and the pointwise layer behind it by 1/64 to 64, and back: the same function."""
    for i in range(len(layers) - 3):
        first, norm, _, after = layers[i : i + 4]
        if (
            isinstance(first, nn.Conv2d)
            and isinstance(norm, nn.BatchNorm2d)
            and isinstance(after, nn.Conv2d)
        ):
            if after.groups > 1:
                continue
            scale = 2.0 ** torch.randint(-6, 7, (first.out_channels,)).float()
            with torch.no_grad():
                norm.weight.mul_(scale)
                norm.bias.mul_(scale)
                after.weight.div_(scale.reshape(1, -1, 1, 1))


@pytest.fixture(scope="module")
def trained():
    """(network in evaluation mode, its accuracy on what it was not trained on, images, labels)."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), *separable(16, 32),
        nn.MaxPool2d(2), *separable(32, 48), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    for _ in range(10):
        for rows in torch.randperm(_TRAINED_ON).split(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        before = net(x[_TRAINED_ON:])
        make_wild(net)
        torch.testing.assert_close(net(x[_TRAINED_ON:]), before, rtol=1e-3, atol=1e-3)
    accuracy = float((before.argmax(1) == y[_TRAINED_ON:]).float().mean())
    assert accuracy > 0.9
    return net, accuracy, x.numpy(), y.numpy()


def test_the_default_recipe_costs_next_to_nothing(trained, tmp_path):
    net, accuracy, x, y = trained
    np.savez(tmp_path / "calibration.npz", x=x[:200])
    np.savez(tmp_path / "test.npz", x=x[_TRAINED_ON:], labels=y[_TRAINED_ON:])
    program = torch.export.export(net, (torch.from_numpy(x[:1]),))
    torch.export.save(program, tmp_path / "digits.pt2")
    from compiler.cli import main

    line = [
        "build",
        tmp_path / "digits.pt2",
        "-o",
        tmp_path / "out",
        "--recipe",
        "int8",
        "--choose",
        "asked",
    ]
    line += [
        "--calibration",
        tmp_path / "calibration.npz",
        "--eval",
        tmp_path / "test.npz",
        "--max-drop",
        0.3,
    ]
    done = CliRunner().invoke(main, [str(part) for part in line])
    assert done.exit_code == 0, done.output
    assert "top-1" in done.output and "noisiest" in done.output
    built = open_artifact(tmp_path / "out")
    found = built.manifest["accuracy"]
    assert found["dense_top1"] == pytest.approx(accuracy, abs=2e-3)
    assert found["dense_top1"] - found["compressed_top1"] <= 0.003
    assert found["kept_float"] == [] and found["drop"] <= 0.3
    worst = [t["sqnr_db"] for t in found["tensors"]]
    assert worst == sorted(worst) and worst[0] > 10
    steps = built.manifest["verify"]["kernels"]["compressed"]["steps"]
    assert steps["tensors"] >= 10 and steps["wrong"] == 0
    assert {row["treatment"] for row in built.layers} == {"int8"}
    calibration = built.manifest["source"]["calibration"]
    assert calibration["samples"] == 200 and len(calibration["sha256"]) == 64
    model = load(tmp_path / "out", "compressed")
    right = np.mean([model(x[i : i + 1]).argmax() == y[i] for i in range(_TRAINED_ON, len(x))])
    assert right == pytest.approx(found["compressed_top1"])
    json.dumps(built.manifest)


def test_without_calibration_nothing_is_built(trained, tmp_path):
    net, _, x, _ = trained
    from schedules.errors import UserError

    with pytest.raises(UserError, match="--calibration"):
        driver.build(net, tmp_path / "out", example=(torch.from_numpy(x[:1]),), recipe="int8")
    assert not (tmp_path / "out").exists()
