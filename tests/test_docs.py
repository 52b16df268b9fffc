# SPDX-License-Identifier: Apache-2.0
"""The code in the documents runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import passes
from passes import treat_layers

FAMILIES = Path(__file__).parents[1] / "docs" / "families.md"


@pytest.fixture
def family_page(monkeypatch):
    """The names that the page's blocks define, its family among the others."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", FAMILIES.read_text(), re.DOTALL):
        exec(compile(block, str(FAMILIES), "exec"), names)
    every = (*passes.families(), names["FAMILY"])
    for module in (passes, treat_layers):
        monkeypatch.setattr(module, "families", lambda: every)
    return names


def test_the_family_of_the_page_passes_its_tests(family_page):
    family_page["test_low_rank"]()


def test_the_family_of_the_page_goes_through_a_whole_build(family_page, monkeypatch, tmp_path):
    import torch

    import compiler
    from compiler import recipe

    monkeypatch.setattr(recipe, "BUILT_IN", (*recipe.BUILT_IN, "low_rank"))
    net = torch.nn.Sequential(
        torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)
    ).eval()
    chosen = recipe.load_recipe("low_rank", rank=8, prune=True)
    built = compiler.compile_model(net, (torch.randn(16, 512),), recipe=chosen, choose="asked")
    rows = {row["name"]: row for row in built.layers}
    assert rows["0"]["treatment"] == "low_rank" and rows["0"]["pruned"]
    assert rows["0"]["found"]["rank"] == 8
    assert rows["2"]["treatment"] == "low_rank"
    assert built.manifest["verify"]["passed"]
