# SPDX-License-Identifier: Apache-2.0
"""Densities, thresholds and crossovers from numbers given by hand."""

from __future__ import annotations

import time

import numpy as np
import pytest

from passes.activation_sparse.calibrate_threshold import calibrate_threshold, collect_tokens
from passes.activation_sparse.crossover import crossover, first_above, relative_times, rising
from passes.activation_sparse.measure_density import measure_density
from schedules.target import NAMED


def test_density_per_token_and_over_tokens():
    first = np.array([[[1, 0, 0, 0], [0, 2, 0, 0]]], np.float32)
    second = np.array([[[np.nan, 0, 0, 1], [0, -0.0, 0, 0]]], np.float32)
    meter = measure_density([{"h": first}, {"h": second}], ["h"])["h"]
    assert meter.tokens == 4
    assert meter.to_json() == {
        "activation_density": 0.25,
        "activation_density_densest_token": 0.5,
        "activation_density_union": 0.5,
    }


def test_tokens_are_drawn_from_every_sample(rng):
    samples = [{"h": np.full((1, 100, 2), i, np.float32)} for i in range(10)]
    tokens = collect_tokens(samples, ["h"])["h"]
    assert tokens.shape == (256, 2)
    assert set(np.unique(tokens)) == set(range(10))


@pytest.mark.parametrize("bound", [0.01, 0.1, 0.5])
def test_threshold_is_the_largest_within_the_bound(rng, bound):
    h, w = rng.standard_normal((60, 40)), rng.standard_normal((30, 40))
    threshold = calibrate_threshold(h, w, bound)

    def error(limit):
        return np.linalg.norm(np.where(np.abs(h) <= limit, h, 0) @ w.T) / np.linalg.norm(h @ w.T)

    assert error(threshold) <= bound
    larger = np.sort(np.abs(h[np.abs(h) > threshold]))
    assert error(larger[len(larger) // 10]) > bound


def test_threshold_is_zero_where_nothing_may_go():
    assert calibrate_threshold(np.ones((4, 3)), np.ones((2, 3)), 1e-9) == 0.0
    assert calibrate_threshold(np.full((4, 3), np.nan), np.ones((2, 3)), 0.5) == 0.0


@pytest.mark.parametrize(
    "ratios,wanted",
    [
        ((0.5, 0.75, 1.25), 0.3),
        ((1.1, 1.2, 1.3), 0.0),
        ((0.2, 0.3, 0.5), 0.4),
    ],
)
def test_crossover_lies_between_what_was_measured(ratios, wanted):
    assert first_above((0.1, 0.2, 0.4), ratios, 1.0) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "measured,wanted",
    [
        ((0.1, 0.2, 0.9), (0.1, 0.2, 0.9)),
        ((1.2, 0.2, 0.4), (0.6, 0.6, 0.6)),
        ((0.1, 0.5, 0.3, 0.9), (0.1, 0.4, 0.4, 0.9)),
    ],
)
def test_one_sample_out_of_order_does_not_decide(measured, wanted):
    assert rising(measured) == pytest.approx(list(wanted))


def test_relative_times_do_not_count_waiting():
    """A thread that sleeps, or is kept from its processor, computes nothing meanwhile."""

    def work(steps: int, pause: float = 0.0):
        def run():
            sum(range(steps))
            time.sleep(pause)

        return run

    half, waiting = relative_times(work(40_000), [work(20_000), work(40_000, 0.004)])
    assert 0.3 < half < 0.75 and 0.7 < waiting < 1.6


def test_one_row_has_no_crossover_and_other_machines_an_estimate():
    target = NAMED["aarch64"]
    assert crossover(1, 64, 64, target, 0.05) == 1.0
    assert 0 < crossover(4, 64, 64, target, 0.05) < 1
    assert 0 < crossover(128, 64, 64, target, 0.05) < 1
