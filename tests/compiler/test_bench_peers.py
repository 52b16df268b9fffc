# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).resolve().parents[2] / "tools" / "bench_peers.py"
    spec = importlib.util.spec_from_file_location("bench_peers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(name, **ratios):
    latency = {
        n: {"median": 10.0, "noisy": n == "openvino"} for n in ("dense", "onnxruntime", "openvino")
    }
    return {
        "network": name,
        "faster_peer": "openvino",
        "latency_ms": latency,
        "ratios": {k: {"median": v, "low": v - 0.01, "high": v + 0.01} for k, v in ratios.items()},
        "environment": {
            "cpu": {"model": "A CPU"},
            "threads": 1,
            "git_commit": "abc",
            "date": "today",
        },
    }


def test_rows_are_added_one_by_one_in_the_tables_order(tool, tmp_path):
    path = tmp_path / "peers.json"
    assert tool.read_rows(path) == []
    tool.add_row(path, row("bert"))
    tool.add_row(path, row("resnet50"))
    again = row("bert", **{"dense/openvino": 0.9})
    tool.add_row(path, again)
    assert [r["network"] for r in tool.read_rows(path)] == ["resnet50", "bert"]
    assert tool.read_rows(path)[1] == again
    assert [p.name for p in tmp_path.iterdir()] == ["peers.json"]


def test_the_table_shows_ratios_with_intervals_and_marks_noise(tool):
    text = tool.markdown([row("vit_s16", **{"dense/openvino": 0.9, "out4/dense": 0.25})])
    line = next(part for part in text.splitlines() if part.startswith("| vit_s16"))
    assert (
        line
        == "| vit_s16 | 10.00 | 10.00 | 10.00* | 0.900 (0.890-0.910) |  | 0.250 (0.240-0.260) |"
    )


def test_short_names_stand_for_networks(tool):
    options = tool.parse(["vit", "resnet50", "regnet"])
    assert options.networks == ["vit_s16", "resnet50", "regnet_y"]
    assert [*tool.parse([]).networks, "bert_token"] == list(tool.NETWORKS)


@pytest.mark.parametrize("bad", [["alexnet"], ["--builds", "element"], ["--builds", "dense,int4"]])
def test_unknown_names_are_refused(tool, bad, capsys):
    with pytest.raises(SystemExit):
        tool.parse(bad)
    assert "must hold dense" in (err := capsys.readouterr().err) or "unknown network" in err


def test_what_was_measured_is_not_measured_again(tool, tmp_path, monkeypatch, capsys):
    path = tmp_path / "peers.json"
    tool.add_row(path, row("resnet18"))
    monkeypatch.setattr(tool, "prepare", lambda *a, **k: pytest.fail("not to be built"))
    table = tmp_path / "peers.md"
    assert tool.main(["resnet18", "--json", str(path), "--markdown", str(table)]) == 0
    captured = capsys.readouterr()
    assert "measured already" in captured.err and "| resnet18 |" in table.read_text()


def test_every_network_is_in_the_zoo(tool):
    torch = pytest.importorskip("torch")
    assert torch
    from tools import zoo

    assert set(tool.NETWORKS) <= set(zoo.ZOO)
    assert set(tool.SHORT.values()) <= set(tool.NETWORKS)
