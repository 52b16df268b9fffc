# SPDX-License-Identifier: Apache-2.0
"""The demo's own parts: what it prunes, and that pruned weights stay zero through training."""

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


@pytest.mark.parametrize("group", [1, 4, 16])
def test_masks_drop_whole_groups_of_output_channels(demo, group):
    torch.manual_seed(0)
    masks = demo.magnitude_masks(demo.DigitNet(), 0.1, group)
    assert "block1.body.0.0.weight" in masks
    assert not [name for name in masks if name.startswith(("stem", "head"))]
    for mask in masks.values():
        blocks = mask.reshape(mask.shape[0] // group, group, -1)
        assert torch.equal(blocks.amin(1), blocks.amax(1))
        assert mask.mean().item() == pytest.approx(0.1, abs=0.01)


def test_pruned_weights_stay_zero_while_training(demo):
    torch.manual_seed(0)
    images, labels, _, _ = demo.digits()
    model = demo.DigitNet()
    masks = demo.magnitude_masks(model, 0.1, 4)
    demo.apply_masks(model, masks)
    before = model.block1.body[0][0].weight.detach().clone()
    demo.train(model, images[:128], labels[:128], epochs=1, rate=1e-3, masks=masks)
    weights = dict(model.named_parameters())
    assert all((weights[name][mask == 0] == 0).all() for name, mask in masks.items())
    assert not torch.equal(before, model.block1.body[0][0].weight)


def test_training_and_test_images_do_not_overlap(demo):
    images, labels, test_images, test_labels = demo.digits()
    assert (len(images), len(test_images)) == (1437, 360)
    assert len(labels) == 1437 and len(test_labels) == 360
    assert images.shape[1:] == (1, demo.SIZE, demo.SIZE)
