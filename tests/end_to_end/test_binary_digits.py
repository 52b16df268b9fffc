# SPDX-License-Identifier: Apache-2.0
"""A small binary network, trained on digits and exported both ways: the compiled predictions are torch's."""

from __future__ import annotations

import numpy as np
import pytest

import compiler
from compiler.recipe import Recipe, Rule

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("sklearn.datasets")

from torch import nn

from compiler.nn.binary import BinaryBlock, BinaryConv2d, sign

_TEST_DIGITS = 360


class Digits(nn.Module):
    """A real stem; a block with its shortcut; two binary convolutions with nothing but a batch norm between."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.block = BinaryBlock(16, 32, stride=2)
        self.first = BinaryConv2d(32, 40, 3, padding=1, pad_value=1.0)
        self.norm = nn.BatchNorm2d(40)
        self.second = BinaryConv2d(40, 32, 3, padding=1)
        self.last = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.block(self.stem(x))
        x = sign(self.norm(self.first(sign(x))))
        return self.head(self.last(self.second(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def trained():
    """(network, test images [360, 1, 8, 8], labels, as many images of those it was trained on)."""
    torch.manual_seed(0)
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images.astype("float32") / 8 - 1)[:, None]
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images))
    test, rest = order[:_TEST_DIGITS], order[_TEST_DIGITS:]
    model = Digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(4):
        for batch in rest[torch.randperm(len(rest))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval(), images[test], labels[test], images[rest[:_TEST_DIGITS]]


@pytest.mark.parametrize("export", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_every_digit_gets_the_prediction_of_torch(export, trained, tmp_path):
    model, images, labels, _ = trained
    path = tmp_path / ("digits.pt2" if export == "torch" else "digits.onnx")
    with torch.no_grad():
        wanted = model(images).numpy()
        if export == "torch":
            torch.export.save(torch.export.export(model, (images,)), path)
        else:
            torch.onnx.export(model, (images,), str(path), dynamo=True, verbose=False)
    built = compiler.compile_model(path, recipe="binary", choose="asked")
    rows = {row["name"]: row for row in built.layers}
    binary = [name for name, row in rows.items() if row["treatment"] == "binary"]
    # torch's ONNX exporter computes the block's weight and names it after the operator.
    assert len(binary) == 3 and binary[1:] == ["first", "second"]
    assert rows["second"]["found"]["signs"] == "bits of first, thresholds folded"
    found = _outputs(built, images)
    np.testing.assert_array_equal(found.argmax(1), wanted.argmax(1))
    assert (found.argmax(1) == labels.numpy()).mean() > 0.8  # it has learned something to compare


def test_what_is_not_binary_becomes_int8_and_loses_little(trained, tmp_path):
    model, *data = trained
    images, labels, seen = (part[:120] for part in data)
    path = tmp_path / "digits.pt2"
    torch.export.save(torch.export.export(model, (images,)), path)
    # Without what int8 can do for accuracy, each of which observes the network once more.
    plain = {"equalize": False, "bias_correction": False}
    recipe = Recipe("both", (Rule("*", "binary", pass_on=True), Rule("*", "int8", plain)))
    built = compiler.compile_model(path, recipe=recipe, calibration=[seen.numpy()], choose="asked")
    treatments = {row["name"]: row["treatment"] for row in built.layers}
    assert treatments["stem.0"] == treatments["head"] == "int8"
    assert [t for n, t in treatments.items() if n not in ("stem.0", "head")] == ["binary"] * 3
    passed = {row["name"]: row["passed_on"] for row in built.layers}
    assert "real numbers" in passed["head"]["binary"] and not passed["first"]
    steps = built.manifest["verify"]["kernels"]["compressed"]["steps"]
    assert steps["tensors"] == 4 and not steps["wrong"]  # what stem, block, first and head read
    with torch.no_grad():
        wanted = model(images).argmax(1).numpy()
    found = _outputs(built, images).argmax(1)
    assert (found == wanted).mean() > 0.95
    assert (found == labels.numpy()).mean() > (wanted == labels.numpy()).mean() - 0.02


def _outputs(built, images) -> np.ndarray:
    found = compiler.load(built.path)(images.numpy())
    return np.asarray(found[0] if isinstance(found, (list, tuple)) else found)
