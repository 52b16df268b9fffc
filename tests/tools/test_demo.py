# SPDX-License-Identifier: Apache-2.0
"""The demo's own parts: that pruned weights stay zero through training, and what it trains and tests on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def demo():
    path = Path(__file__).resolve().parents[2] / "tools" / "demo.py"
    spec = importlib.util.spec_from_file_location("kerf_demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pruned_weights_stay_zero_while_training(demo):
    torch.manual_seed(0)
    images, labels, _, _ = demo.digits()
    model = demo.DigitNet()
    pruner = demo.Pruner(model, "out:4", skip=("stem.0", "head"))
    pruner.prune(0.1)
    before = model.block1.body[0][0].weight.detach().clone()
    demo.train(model, images[:128], labels[:128], epochs=1, rate=1e-3, pruner=pruner)
    assert not pruner.revived()
    assert {"stem.0", "head"}.isdisjoint(pruner.masks) and "block1.body.0.0" in pruner.masks
    assert not torch.equal(before, model.block1.body[0][0].weight)


def test_training_and_test_images_do_not_overlap(demo):
    images, labels, test_images, test_labels = demo.digits()
    assert (len(images), len(test_images)) == (1437, 360)
    assert len(labels) == 1437 and len(test_labels) == 360
    assert images.shape[1:] == (1, demo.SIZE, demo.SIZE)
