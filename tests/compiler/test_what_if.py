# SPDX-License-Identifier: Apache-2.0
"""What-if studies: every point is treated as a build would treat it, and predicts what a build then measures."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from click.testing import CliRunner
from torch import nn

import compiler
from compiler import what_if as study
from compiler import what_if_report
from compiler.cli import main
from compiler.what_if import WhatIf, points_of, what_if
from compiler.what_if_study import Study, masked_at
from passes.sparse.grains import Grain
from passes.treat_layers import layers_of
from schedules.errors import UserError


class Net(nn.Module):
    """Two equal 3x3 convolutions, a third, and a classifier."""

    def __init__(self, channels=64, size=14):
        super().__init__()
        self.size = size
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.c = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, x):
        for layer in (self.stem, self.a, self.b, self.c):
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))

    @property
    def example(self):
        return (torch.randn(1, 3, self.size, self.size),)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return tmp_path_factory.mktemp("what-if") / "study.json"


@pytest.fixture(scope="module")
def found(net, state) -> WhatIf:
    return what_if(net, ["out:8", "filter"], [0.1], example=net.example, state=state)


def test_every_layer_is_predicted_and_the_sum_is_the_network(found):
    assert [(p.grain, p.density) for p in found.points] == [("out:8", 0.1), ("filter", 0.1)]
    for point in found.points:
        assert [layer.name for layer in point.layers] == ["stem", "a", "b", "c", "head"]
        assert 0 < point.latency_us <= found.latency_us * 1.001
        assert 0 < point.weights_bytes <= found.weights_bytes
    sparse, filters = ({x.name: x for x in p.layers} for p in found.points)
    # a and b are the same kernel
    assert sparse["a"].bytes == sparse["b"].bytes and sparse["a"].ratio is not None
    assert all(layer.ratio is not None or layer.declined for layer in sparse.values())
    # without nine tenths of the filters everything but the head is far smaller
    assert (
        filters["b"].ratio < 0.5 and filters["b"].bytes < 0.05 * sparse["stem"].bytes + 9 * 64 * 64
    )


def test_a_study_goes_on_where_it_was_left(found, net, state, monkeypatch):
    monkeypatch.setattr(Study, "measure_dense", lambda *_: pytest.fail("measured again"))
    again = what_if(net, ["filter", "out:8"], [0.1], example=net.example, state=state)
    assert {p.grain: p.latency_us for p in again.points} == {
        p.grain: p.latency_us for p in found.points
    }
    assert WhatIf.from_json(json.loads(state.read_text())).points == found.points


def test_another_model_or_file_is_not_taken_for_this_one(found, state, tmp_path):
    assert study._read_state(state, "another key") is None
    other = tmp_path / "other.json"
    other.write_text('{"format": "kerf-profile"}')
    with pytest.raises(UserError, match="not the result of an earlier what-if"):
        study._read_state(other, found.key)


def test_the_table_and_the_figure(found, tmp_path):
    import io

    from rich.console import Console

    console = Console(width=200, file=io.StringIO())
    for each in what_if_report.table(found):
        console.print(each, highlight=False)
    text = console.file.getvalue()
    for point, line in zip(found.points, text.splitlines()[2:]):
        assert line.startswith(point.grain) and line.rstrip().endswith(f"{point.treated} of 5")
    pytest.importorskip("matplotlib")
    what_if_report.check_plot(tmp_path / "f.png")
    what_if_report.plot(found, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="unknown kind of figure"):
        what_if_report.check_plot(tmp_path / "f.txt")


def test_points_and_what_they_refuse():
    assert points_of(["row", "2:4"], [0.1, 0.2]) == [("row", 0.1), ("row", 0.2), ("2:4", 0.5)]
    for grains, densities in ((["rows"], [0.1]), (["row"], [0.0]), ([], [0.1]), (["row"], [1.5])):
        with pytest.raises(UserError):
            points_of(grains, densities)


@pytest.mark.parametrize(
    "grain", ["element", "row", "kernel", "out:4", "block:4x4", "2:4", "filter"]
)
def test_masks_are_random_and_of_the_grain(net, grain):
    from compiler.frontend import import_model
    from compiler.pipeline import canonicalize
    from passes.sparse.detect import found as describe

    mod = canonicalize(import_model(net, example=net.example).mod)
    density = Grain.parse(grain).density or 0.25
    layers = {
        layer.name: layer.weight for layer in layers_of(masked_at(mod, Grain.parse(grain), density))
    }
    facts = describe(layers["b"])
    assert facts["grain"] == grain and facts["density"] == pytest.approx(density, abs=0.02)
    if grain != "filter":
        assert not np.array_equal(layers["a"] != 0, layers["b"] != 0)


def test_the_command_checks_before_it_works(tmp_path):
    model = tmp_path / "m.onnx"
    model.write_bytes(b"")
    run = CliRunner().invoke(main, ["what-if", str(model), "--densities", "a"])
    assert run.exit_code == 2 and "not a list of numbers" in run.output
    run = CliRunner().invoke(main, ["what-if", str(tmp_path / "none.onnx")])
    assert run.exit_code == 2 and "no such file" in run.output
    run = CliRunner().invoke(main, ["what-if", str(model), "--plot", str(tmp_path / "p.txt")])
    assert run.exit_code == 2 and "unknown kind of figure" in run.output


def test_slower_layers_go_back_as_in_a_build(net, monkeypatch):
    from compiler.choice import Times
    from compiler.frontend import import_model
    from compiler.what_if_study import SLOWER, _Timing
    from schedules.target import detect_host

    study = Study(import_model(net, example=net.example), detect_host(), 1)
    names = ("stem", "a", "b", "c", "head")
    dense = dict.fromkeys(names, 100.0)
    study.layer_us, study.layer_bytes = dense, dict.fromkeys(names, 1000)
    study.latency, study.weights_bytes = 600.0, 5000

    def point(us: float, others: float):
        after = {"stem": 100.0, "a": 130.0, "b": us, "c": us, "head": 100.0}
        whole = {"dense": 600.0, "compressed": sum(after.values()) + others}
        times = Times({}, {"dense": dense, "compressed": after})
        sizes = {**dict.fromkeys(names, 1000), "a": 200, "b": 200, "c": 200}
        timing = _Timing(times, whole, sum(sizes.values()), sizes)
        monkeypatch.setattr(study, "_timing", lambda _treated: timing)
        return study.measure("out:8", 0.1)

    faster = point(50.0, others=100.0)  # a is 30 us slower than its dense kernel
    assert faster.latency_us == pytest.approx(500.0) and faster.weights_bytes == 3400
    layers = {layer.name: layer for layer in faster.layers}
    assert layers["a"].declined == SLOWER and layers["a"].ratio == 1.3 and layers["a"].us == 100
    assert layers["b"].treated and layers["b"].us == 50 and layers["b"].bytes == 200
    # what is moved between layers takes more than they gain: a build leaves all of them dense
    slower = point(50.0, others=201.0)
    assert (slower.latency_us, slower.weights_bytes, slower.treated) == (600.0, 5000, 0)


def test_large_networks_are_predicted_by_kernel_and_small_ones_by_whole_runs():
    from compiler.choice import Times
    from compiler.what_if_study import _ratio_of_networks, _Timing

    layers = {"dense": {"a": 40.0}, "compressed": {"a": 60.0}}

    def ratio(scale: float, back):
        whole = {"dense": 100.0 * scale, "compressed": 80.0 * scale}
        times = Times({"dense": 90.0, "compressed": 45.0}, layers)
        return _ratio_of_networks(_Timing(times, whole, 0, {}), back)

    assert ratio(1, {}) == 0.8 and ratio(1, {"a": ""}) == 0.6
    assert ratio(1000, {}) == 0.5 and ratio(1000, {"a": ""}) == pytest.approx(25 / 90)


def test_patterns_of_one_kernel_format_are_timed_once():
    from compiler import what_if_study
    from compiler.frontend import import_model
    from compiler.pipeline import canonicalize
    from passes.family import Context
    from passes.sparse.rewrite import rewrite
    from passes.treatment import Treatment
    from schedules.target import detect_host

    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    mod = canonicalize(import_model(model, example=(torch.randn(1, 32, 14, 14),)).mod)
    asked = {layer.name: Treatment("sparse") for layer in layers_of(mod)}

    def kernels(grain, density):
        masked = masked_at(mod, Grain.parse(grain), density)
        calls = what_if_study.layer_calls(rewrite(masked, asked, Context(detect_host())).treated)
        return {
            n: (what_if_study._signature(c), what_if_study._stored_share(c))
            for n, c in calls.items()
        }

    element = kernels("element", 0.2)
    assert what_if_study._alike(kernels("row", 0.2), element)
    assert not what_if_study._alike(kernels("out:4", 0.2), element)
    assert not what_if_study._alike(kernels("element", 0.25), element)


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.timeout(900)
@pytest.mark.parametrize("grain", ["out:8", "filter"])
def test_predictions_are_within_a_quarter_of_the_built_model(net, grain):
    from compiler.profile import total_us
    from compiler.recipe import load_recipe
    from compiler.runtime import load_variants
    from compiler.verify import random_inputs

    predicted = what_if(net, [grain], [0.1], example=net.example)
    recipe = load_recipe("sparse", grain=grain, density=0.1, prune=True)
    artifact = compiler.compile_model(net, net.example, recipe=recipe)
    models = load_variants(artifact, ["dense", "compressed"], 1)
    us = total_us(models, random_inputs(artifact.inputs), seconds=2.0)
    ratio = us["compressed"] / us["dense"]
    assert predicted.points[0].latency_us / predicted.latency_us == pytest.approx(ratio, rel=0.25)
