# SPDX-License-Identifier: Apache-2.0
"""The study's own parts: its data have what it says, networks of both kinds train, tables and figures say what was found."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
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


def test_tables_and_figures(study, tmp_path):
    def result(kind, width, parameters, accuracy, latency):
        return study.Result("rings", kind, width, parameters, accuracy, 0.5, latency)

    results = [
        result("ordinary", 4, 40, 80.0, 0.010), result("ordinary", 8, 80, 95.0, 0.012),
        result("quadratic", 2, 50, 96.0, 0.009),
    ]  # fmt: skip
    text = study.compare(results)
    assert text == (
        "At 94.0 %: ordinary 80 parameters (width 8), quadratic 50 (width 2), ratio 0.62; "
        "latency 12.0 and 9.0 us, ratio 0.75."
    )
    page = tmp_path / "study.md"
    study.write_page(page, results, study.markdown(results))
    assert "| quadratic | 2 | 50 | 96.0 ± 0.5 | 9.0 |" in page.read_text()
    for name in ("study_parameters.svg", "study_latency.svg"):
        figure = ElementTree.parse(tmp_path / name).getroot()
        assert len(figure.findall("{*}circle")) == 3
