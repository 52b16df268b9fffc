# SPDX-License-Identifier: Apache-2.0
"""The study's own parts: its data have what it says, networks of both kinds train, tables and figures say what was found."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def study():
    path = Path(__file__).resolve().parents[2] / "tools" / "parametric_efficiency.py"
    spec = importlib.util.spec_from_file_location("kerf_parametric_efficiency", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_products_need_interactions(study):
    data = study.products()
    pairs = data.x[:, :6].reshape(-1, 3, 2).prod(2).sum(1)
    assert torch.equal(data.y, (pairs > 0).long())
    assert len(data.y) == 3000 and len(data.test_y) == 1000


def test_quadratic_neurons_win_on_rings(study):
    task = replace(study.TASKS["rings"], widths=(1,), steps=300)
    ordinary, quadratic = study.study("rings", task, seeds=1, seconds=0)
    assert (ordinary.kind, quadratic.kind) == ("ordinary", "quadratic")
    assert ordinary.parameters == 3 + 8 and quadratic.parameters == 9 + 8
    assert quadratic.accuracy > ordinary.accuracy + 10


def test_table_and_figure(study, tmp_path):
    def result(kind, width, parameters, accuracy, latency):
        return study.Result("rings", kind, width, parameters, accuracy, 0.5, latency)

    results = [
        result("ordinary", 4, 40, 80.0, 10.0), result("ordinary", 8, 80, 95.0, 12.0),
        result("quadratic", 2, 50, 96.0, 9.0),
    ]  # fmt: skip
    assert study.within_reach(results) == 94.0
    table = study.markdown(results).splitlines()
    assert table[2] == (
        "| rings | 94.0 | 80 (width 8) | 50 (width 2) | 0.62 | 12.0 (width 8) | 9.0 (width 2) | 0.75 |"
    )
    assert table[-1] == "| rings | quadratic | 2 | 50 | 96.0 ± 0.5 | 9.0 |"
    pytest.importorskip("matplotlib")
    study.figure(results, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"
