# SPDX-License-Identifier: Apache-2.0
"""Accuracy on evaluation data, and a limit on what may be lost."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compiler.accuracy import (
    Accuracy,
    check_alike,
    check_labels,
    hold,
    load_evaluation,
    measure_accuracy,
    measure_pruned,
)
from compiler.accuracy_report import accuracy_lines
from compiler.calibration import load_calibration
from compiler.frontend import TensorSpec
from passes.treatment import Treatment
from schedules.errors import UserError

SPECS = [TensorSpec("x", (2, 4), "float32")]


@pytest.fixture
def data(tmp_path, rng):
    x = rng.standard_normal((10, 4)).astype("float32")
    np.savez(tmp_path / "e.npz", x=x, labels=x.argmax(axis=1))
    return tmp_path / "e.npz"


def test_top1_of_both_variants_and_what_is_lost(data):
    evaluation = load_evaluation(data, SPECS)
    assert evaluation.description["labels"] and evaluation.description["samples"] == 5
    rows = iter(range(10))

    def spoiled(x):
        out = x.copy()
        for row in out:
            if next(rows) < 3:
                row[:] = -row  # its largest is another now
        return out

    check_labels(evaluation, TensorSpec("y", (2, 4), "float32"))
    found = measure_accuracy(lambda x: x, spoiled, evaluation)
    assert (found.rows, found.dense_top1) == (10, 1.0)
    assert found.compressed_top1 == found.agreement == pytest.approx(0.7)
    assert found.drop == pytest.approx(30)
    assert found.cosine < 1


def test_without_labels_the_dense_variant_is_the_measure(tmp_path, rng):
    np.savez(tmp_path / "e.npz", x=rng.standard_normal((4, 4)).astype("float32"))
    found = measure_accuracy(
        lambda x: x, lambda x: x * 2, load_evaluation(tmp_path / "e.npz", SPECS)
    )
    assert found.dense_top1 is None and found.agreement == 1.0 and found.drop == 0
    assert found.cosine == pytest.approx(1) and found.sqnr_db == pytest.approx(0, abs=1e-9)


def test_outputs_without_classes_lose_cosine(rng):
    evaluation = load_evaluation([np.ones((2, 4), "float32")], SPECS)
    found = measure_accuracy(lambda x: x[0], lambda x: x[0] * [1, 1, 1, 0], evaluation)
    assert found.agreement is None
    assert found.drop == pytest.approx(100 * (1 - math.sqrt(3) / 2))
    exact = measure_accuracy(lambda x: x, lambda x: x, evaluation)
    assert exact.to_json()["sqnr_db"] == 999.0


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros(3, int),
        np.zeros(11, int),
        np.zeros((10, 1), int),
        np.zeros(10),
        np.array(["a"] * 10),
    ],
)
def test_labels_that_do_not_fit(tmp_path, labels):
    np.savez(tmp_path / "e.npz", x=np.zeros((10, 4), "float32"), labels=labels)
    with pytest.raises(UserError, match="labels do not fit"):
        load_evaluation(tmp_path / "e.npz", SPECS)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((2, 3), "classes 2 to 3"),
        ((2, 7, 4), "2 labels"),
        ((2, 1), "y 2x1"),
        ((2,), "y 2"),
        ((), "y"),
    ],
)
def test_labels_for_another_kind_of_output(tmp_path, shape, found):
    np.savez(tmp_path / "e.npz", x=np.zeros((4, 4), "float32"), labels=np.arange(4))
    evaluation = load_evaluation(tmp_path / "e.npz", SPECS)
    with pytest.raises(UserError, match=f"labels do not fit the model.*{found}"):
        check_labels(evaluation, TensorSpec("y", shape, "float32"))


def test_data_prepared_in_two_ways_is_refused(rng):
    pixels = rng.uniform(0, 255, (6, 2, 4)).astype("float32")
    raw, normal = load_calibration(list(pixels), SPECS), load_evaluation(list(pixels / 255), SPECS)
    with pytest.raises(UserError, match="not prepared alike"):
        check_alike(raw, normal, SPECS)
    check_alike(raw, load_evaluation(list(pixels[::2] * 1.5), SPECS), SPECS)


def accuracy(drop: float) -> Accuracy:
    return Accuracy(100, 1 - drop / 100, None, None, 0.99, 30.0, drop)


@pytest.mark.parametrize("needed", [0, 1, 3, 6, 10])
def test_as_few_layers_as_possible_go_back(needed):
    """A limit that `needed` layers in float32 meet is met by exactly so many."""
    treatments = {f"l{i}": Treatment("int8", {"observer": "mse"}) for i in range(10)}
    treatments["other"] = Treatment("sparse", {"density": 0.1})
    tried = []

    def build(wanted):
        assert wanted["other"] is treatments["other"]
        assert wanted["l0"].parameters["observer"] == "mse"
        tried.append(wanted["l0"].parameters["keep_float"])
        return tried[-1]

    made, found = hold(
        0, treatments, build, lambda count: accuracy(max(0, needed - count) * 0.5), 0.25
    )
    assert made == needed and found.drop <= 0.25 and found.max_drop == 0.25
    assert len(tried) <= 8


def test_without_layers_in_bytes_nothing_is_tried():
    made, found = hold("first", {"a": Treatment("sparse")}, None, lambda _: accuracy(9.0), 1.0)
    assert made == "first" and found.drop == 9.0


def test_the_report_says_what_was_lost_and_where():
    from dataclasses import replace

    from compiler.accuracy import TensorError

    found = replace(
        accuracy(0.2), max_drop=0.3, kept_float=("stem",), dense_top1=0.98, compressed_top1=0.978,
        tensors=(TensorError("lv3", ("conv1",), 0.98, 14.0), TensorError("x", (), 0.9999, 40.0)),
    )  # fmt: skip
    text = "\n".join(line.plain for line in accuracy_lines(found.to_json()))
    assert "lost 0.20 points of at most 0.3" in text and "stem" in text
    assert text.index("14.0 dB") < text.index("40.0 dB") and "conv1" in text
    assert accuracy_lines(None) == []


def test_what_pruning_alone_costs_is_measured(data):
    """The pruned graph's outputs come from observing it, one per sample, in the order of the samples."""
    from dataclasses import replace
    from types import SimpleNamespace as Has

    evaluation = load_evaluation(data, SPECS)
    swapped = [sample[0][:, [1, 0, 2, 3]] for sample, _ in evaluation.samples()]
    pruned = {"main": Has(body=Has(body=Has(name="y")))}

    def observe(mod, names):
        assert mod is pruned and names == ["y"]
        return ({"y": y} for y in swapped)

    stage = measure_pruned(lambda x: x, pruned, observe, evaluation)
    wrong = np.concatenate([y.argmax(axis=1) for y in swapped]) != np.load(data)["labels"]
    assert wrong.any() and stage.top1 == 1 - wrong.mean() and stage.drop == 100 * wrong.mean()
    found = replace(accuracy(25.0), dense_top1=1.0, compressed_top1=0.75, stages=(stage,))
    text = "\n".join(line.plain for line in accuracy_lines(found.to_json()))
    assert f"pruned, in float32: top-1 {stage.top1:.2%}" in text
    assert "then quantized: top-1 75.00%, 25.00 points lost" in text
