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


@pytest.mark.parametrize(
    "bad",
    [
        ["alexnet"],
        ["--builds", "element"],
        ["--builds", "dense,int4"],
        ["--builds", "dense,filter_shape"],
    ],
)
def test_unknown_names_are_refused(tool, bad, capsys):
    with pytest.raises(SystemExit):
        tool.parse(bad)
    wanted = ("must hold dense", "unknown network", "name both")
    assert any(text in err for err in [capsys.readouterr().err] for text in wanted)


def test_what_was_measured_is_not_measured_again(tool, tmp_path, monkeypatch, capsys):
    path = tmp_path / "peers.json"
    tool.add_row(path, row("resnet18"))
    monkeypatch.setattr(tool, "prepare", lambda *a, **k: pytest.fail("not to be built"))
    table = tmp_path / "peers.md"
    assert tool.main(["resnet18", "--json", str(path), "--markdown", str(table)]) == 0
    captured = capsys.readouterr()
    assert "measured already" in captured.err and "| resnet18 |" in table.read_text()


def test_dense_is_what_lies_beside_a_build_of_the_whole_network(tool):
    # those of another shape, or pruned before, have another dense variant
    assert tool.artifact_of("dense", ["dense", "filter_shape", "element"]) == "element"
    assert tool.artifact_of("dense", ["dense", "pruned"]) == "dense"
    assert tool.artifact_of("filter_shape", ["dense", "filter_shape"]) == "filter_shape"
    variants = {name: build.variant for name, build in tool.BUILDS.items()}
    assert [n for n, v in variants.items() if v == "dense"] == ["dense", "filter_shape"]


def test_every_build_has_a_line_with_what_it_is_beside(tool):
    ratios = {"filter/dense": 0.5, "filter/filter_shape": 0.99}
    measured = row("resnet50", **ratios)
    measured["latency_ms"]["filter"] = {"median": 5.0, "noisy": False}
    measured |= {
        "layers_alone_us": {"dense": 900.0, "filter": 450.0},
        "bytes": {"dense": [90, 10], "filter": [45, 5]},
        "layers_compressed": {"dense": [0, 54], "filter": [54, 54]},
    }
    line = next(p for p in tool.markdown([measured]).splitlines() if "| filter |" in p)
    assert line == (
        "| resnet50 | filter | 5.00 | 0.500 (0.490-0.510) | 0.500 | 0.500 | 54 of 54 "
        "| filter_shape 0.990 (0.980-1.000) |"
    )


def test_every_network_is_in_the_zoo(tool):
    torch = pytest.importorskip("torch")
    assert torch
    from tools import zoo

    assert set(tool.NETWORKS) <= set(zoo.ZOO)
    assert set(tool.SHORT.values()) <= set(tool.NETWORKS)
