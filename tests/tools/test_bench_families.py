# SPDX-License-Identifier: Apache-2.0
"""The figures of the families: cases are found, one is measured, and told in JSON and as a table."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
from tvm import relax

from passes.samples import graph
from tools import bench_families
from tools.bench_families import FAMILIES, Case, Measured


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_names_its_cases(family):
    names = [case.name for case in importlib.import_module(FAMILIES[family]).cases()]
    assert names and len(set(names)) == len(names)


def tiny() -> Measured:
    """The same layer with its output once and twice rectified: equal results."""

    def body(times: int):
        def make(layers, x):
            y = layers.dense("fc", x, 24)
            for _ in range(times):
                y = layers.emit(relax.op.nn.relu(y))
            return y

        return make

    graphs = {
        n: graph((1, 16), body(t))(np.random.default_rng(0))
        for n, t in (("dense", 1), ("twice", 2))
    }
    return Measured(graphs, {"ones": [np.ones((1, 16), np.float32)]}, {"units": 24})


def test_a_case_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_families, "_COLD_BYTES", 4096)
    cases = [Case("tiny", tiny, {"twice": 1.5}), Case("other", tiny)]
    module = type("Module", (), {"cases": staticmethod(lambda: cases)})
    monkeypatch.setitem(sys.modules, "cases_of_a_test", module)
    monkeypatch.setitem(FAMILIES, "quadratic", "cases_of_a_test")
    file, table = tmp_path / "f.json", tmp_path / "f.md"
    options = ["quadratic", "--json", str(file), "--markdown", str(table)]
    options += ["--only", "tiny", "--seconds", "0.01", "--runs", "3"]
    bench_families.main(options)
    (case,) = json.loads(file.read_text())["cases"]
    (row,) = case["rows"]
    assert (case["case"], case["base"], row["input"]) == ("tiny", "dense", "ones")
    assert row["latency_ms"]["twice"]["runs"] >= 3 and row["difference"]["twice"] == 0
    assert row["ratios"]["twice"]["low"] <= row["ratios"]["twice"]["median"]
    assert "| tiny | ones |" in table.read_text() and "twice 1.5" in table.read_text()
    monkeypatch.setattr(bench_families, "run", pytest.fail)
    bench_families.main(options)  # what is in the file is not measured again
