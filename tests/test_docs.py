# SPDX-License-Identifier: Apache-2.0
"""The code in the documents runs, and their figures agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import passes
from passes import treat_layers

ROOT = Path(__file__).parents[1]
FAMILIES = ROOT / "docs" / "families.md"


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


def tables(page: Path) -> list[dict[str, dict[str, str]]]:
    """The tables of a page: rows by their first cell, cells by their column."""
    found, columns = [], None
    for line in page.read_text().splitlines():
        if not line.startswith("|"):
            columns = None
            continue
        cells = [c.strip() for c in line.strip("|").split("|")]
        if columns is None:
            columns = cells
            found.append({})
        elif not set(line) <= set("|-: "):
            found[-1].setdefault(cells[0], dict(zip(columns[1:], cells[1:])))
    return found


def ratio(cell: str) -> float | None:
    """The number a cell begins with."""
    return float(re.match(r"[0-9.]+", cell)[0]) if cell else None


def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    floats, int8, *_ = tables(ROOT / "docs" / "benchmarks.md")
    (quoted,) = [t for t in tables(ROOT / "README.md") if "ResNet-50" in t]
    names = {"ResNet-50": "resnet50", "ResNet-18": "resnet18", "MobileNetV2": "mobilenetv2",
             "RegNet-Y-400MF": "regnet_y", "ViT-S/16": "vit_s16", "BERT-base, 128 tokens": "bert"}  # fmt: skip
    columns = {
        "Kerf dense / faster of ONNX Runtime and OpenVINO": (floats, "dense / faster peer"),
        "90 % pruned, vectors of 4 / Kerf dense": (floats, "90 % out:4 / dense"),
        "int8 / Kerf dense": (int8, "int8 / dense"),
        "int8 / OpenVINO's int8": (int8, "int8 / OpenVINO int8"),
    }
    assert set(quoted) == set(names)
    for title, network in names.items():
        for column, (table, measured) in columns.items():
            row = next(row for name, row in table.items() if name.split()[0] == network)
            shown, wanted = ratio(quoted[title][column]), ratio(row[measured])
            if shown is None or wanted is None:
                assert shown is wanted is None, f"{title}: {column}"
            else:
                assert abs(shown - wanted) < 0.0051, f"{title}: {column}"
