# SPDX-License-Identifier: Apache-2.0
"""What is remembered of an activation, and the bytes that every observer makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from passes.quantized.observers import HALF, Histogram, Statistics
from passes.quantized.ranges import OBSERVERS, affine, choose_range


def seen(*samples) -> Statistics:
    statistics = Statistics()
    for sample in samples:
        statistics.add(np.asarray(sample, "float32"))
    return statistics


def squared_error(x, bytes_) -> float:
    q = np.clip(np.rint(x / bytes_.scale) + bytes_.zero_point, 0, 255)
    return float((((q - bytes_.zero_point) * bytes_.scale - x) ** 2).mean())


def test_a_histogram_keeps_every_count_however_its_range_grows(rng):
    samples = [rng.standard_normal(500) * 10.0**i for i in (-3, 2, 0, 6)]
    grown = Histogram()
    for sample in samples:
        grown.add(sample)
    whole = np.concatenate(samples)
    bins = np.floor(whole / grown.width).astype(int) + HALF
    np.testing.assert_array_equal(grown.counts, np.bincount(bins, minlength=2 * HALF))


def test_merged_histograms_are_the_histogram_of_both(rng):
    parts = [rng.standard_normal(300), rng.standard_normal(200) * 50, np.zeros(7)]
    merged, whole = Histogram(), Histogram()
    for part in parts:
        own = Histogram()
        own.add(part)
        merged.merge(own)
        whole.add(part)
    assert (merged.width, merged.zeros) == (whole.width, 7)
    np.testing.assert_array_equal(merged.counts, whole.counts)


@pytest.mark.parametrize("edge", [1.0, 2.0, 0.5, 1024.0, 3e-39])
def test_powers_of_two_fall_inside(edge):
    histogram = Histogram()
    histogram.add(np.array([edge, -edge, edge * 2, -edge * 2]))
    assert histogram.counts.sum() == 4


def test_memory_does_not_grow_with_the_data(rng):
    statistics = seen(*(rng.standard_normal(1000) for _ in range(20)))
    assert statistics.histogram.counts.nbytes == 2 * HALF * 8
    assert statistics.histogram.counts.sum() == 20_000


@pytest.mark.parametrize(
    ("low", "high"), [(-1, 3), (0, 6), (-5, 0), (2, 3), (-3, -1), (1e-30, 4e-30)]
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_is_a_step_and_the_range_fits(low, high, symmetric):
    found = affine(low, high, symmetric=symmetric)
    assert 0 <= found.zero_point <= 255
    # Zero is exact; the ends are off by the rounding of the zero point, half a step.
    assert found.low <= min(low, 0) + 0.51 * found.scale
    assert found.high >= max(high, 0) - 0.51 * found.scale
    if symmetric:
        assert found.zero_point in (0, 128)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1e-45), (-1e39, 1e39)])
def test_a_range_without_scale_is_refused(low, high):
    with pytest.raises(ValueError, match="no scale"):
        affine(low, high)


def test_min_max_holds_everything_and_moving_average_does_not(rng):
    samples = [rng.uniform(-1, 1, 200) for _ in range(30)]
    samples[3][5] = 40.0
    everything = choose_range([seen(*samples)], "min_max")
    assert everything.high == pytest.approx(40, rel=0.02)
    averaged = choose_range([seen(*samples)], "moving_average")
    assert averaged.high < 10


def test_percentile_cuts_the_share_it_is_told(rng):
    x = rng.permutation(np.arange(1, 100_001)) / 100_000
    found = choose_range([seen(*np.split(x, 10))], "percentile", percentile=99.0)
    assert found.high == pytest.approx(0.99, abs=2e-3)
    assert found.zero_point == 0
    assert choose_range([seen(x)], "percentile", percentile=100.0).high == pytest.approx(
        1, abs=1e-3
    )


def test_percentile_counts_zeros(rng):
    x = np.concatenate([np.zeros(99_000), np.full(1000, 8.0)])
    assert choose_range([seen(x)], "percentile", percentile=99.5).high == pytest.approx(8, rel=0.01)
    with pytest.raises(ValueError, match="no scale"):  # all that is left are zeros
        choose_range([seen(x)], "percentile", percentile=98.0)


@pytest.mark.parametrize("observer", ["entropy", "percentile"])
def test_outliers_are_clipped(rng, observer):
    x = rng.standard_normal(50_000)
    x[:2] = 300.0, -250.0
    found = choose_range([seen(x)], observer)
    assert 2.5 < found.high < 60
    assert found.high < choose_range([seen(x)], "min_max").high / 5


def test_mse_is_the_best_range(rng):
    x = (rng.standard_normal(20_000) * np.exp(rng.standard_normal(20_000))).astype("float32")
    best = squared_error(x, choose_range([seen(x)], "mse"))
    for shrink in (1.0, 0.7, 0.5, 0.35, 0.25):
        tried = affine(float(x.min()) * shrink, float(x.max()) * shrink)
        assert best <= squared_error(x, tried) * 1.05


@pytest.mark.parametrize("observer", OBSERVERS)
def test_what_has_no_range_says_why(observer):
    with pytest.raises(ValueError, match="zero on every"):
        choose_range([seen([0, 0], [0, -0.0])], observer)
    with pytest.raises(ValueError, match="not finite"):
        choose_range([seen([1, np.nan])], observer)
    with pytest.raises(ValueError, match="no values"):
        choose_range([Statistics()], observer)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_one_repeated_value_and_a_shared_scale(observer):
    alone = choose_range([seen(np.full(100, 3.0))], observer)
    assert alone.high == pytest.approx(3, rel=0.05) and alone.zero_point == 0
    shared = choose_range(
        [seen(np.full(100, 3.0)), seen(np.full(100, -1.0)), seen([0.0])], observer
    )
    assert shared.low == pytest.approx(-1, rel=0.1) and shared.high == pytest.approx(3, rel=0.1)
