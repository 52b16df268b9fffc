# SPDX-License-Identifier: Apache-2.0
"""Formats: packing and unpacking are inverses, grains are found, index widths, storage, pruning."""

from __future__ import annotations

import numpy as np
import pytest

from passes.sparse.format import (
    GRAINS,
    best_grain,
    block_of,
    block_pattern,
    grain_densities,
    index_dtype,
    pack,
    run_of,
    stored_bytes,
    unpack,
)
from passes.sparse.prune import prune, saliency


def pruned(rng, shape, grain, density):
    return prune(rng.standard_normal(shape).astype(np.float32), density=density, grain=grain)


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize(
    ("shape", "groups", "chunk", "part"),
    [
        ((32, 20, 3, 3), 1, None, None),
        ((32, 20, 3, 3), 1, 64, 16),
        ((37, 20, 1, 1), 1, 7, 16),
        ((32, 5, 3, 2), 2, 11, 32),
        ((48, 70), 1, 70, 16),
        ((1, 7, 1, 1), 1, None, None),
    ],
)
def test_unpack_undoes_pack(rng, grain, shape, groups, chunk, part):
    weight = pruned(rng, shape, grain, 0.3)
    packed = pack(weight, grain, groups=groups, chunk=chunk, part=part)
    np.testing.assert_array_equal(unpack(packed), weight)
    assert packed.pointer[-1] == len(packed.index) == len(packed.values)
    assert packed.fill == packed.values.size - np.count_nonzero(weight)


def test_taps_stored_together_follow_one_another(rng):
    weight = np.zeros((6, 5, 3, 3), np.float32)
    weight[0, 1, 2, 1] = weight[3, 4, 0, 0] = 1.0
    weight[5] = rng.standard_normal((5, 3, 3))
    for run, stored in ((1, 47), (3, 51), (9, 63)):
        packed = pack(weight, "element", run=run)
        np.testing.assert_array_equal(unpack(packed), weight)
        assert len(packed.index) == stored and packed.fill == stored - 47
        first = packed.index.reshape(-1, run).astype(int)
        np.testing.assert_array_equal(first, first[:, :1] + 5 * np.arange(run))


def test_the_longest_run_that_the_zeros_allow_is_found(rng):
    row = rng.standard_normal((8, 6, 3, 3)).astype(np.float32) * (rng.random((8, 6, 3, 1)) < 0.3)
    kernel = row * 0
    kernel[::2, ::3] = 1.0
    element = row * (rng.random(row.shape) < 0.5)
    assert [run_of(w) for w in (row, kernel, element)] == [3, 9, 1]
    assert run_of(row[..., :1, :1]) == run_of(row[:, :, 0, 0]) == 1
    assert run_of(row[..., :1, :]) == 3 and run_of(kernel[..., :1]) == 3


def test_pack_keeps_special_values_and_drops_negative_zero(rng):
    weight = np.zeros((4, 6), np.float32)
    weight[0, 1], weight[1, 2], weight[2, 3], weight[3, 0] = np.nan, np.inf, -0.0, -np.inf
    packed = pack(weight, "element")
    assert len(packed.values) == 3
    np.testing.assert_array_equal(unpack(packed), weight)


def test_a_block_with_one_nonzero_is_stored_whole_and_its_fill_counted():
    weight = np.zeros((8, 5), np.float32)
    weight[5, 3] = 2.0
    packed = pack(weight, "out:8")
    assert packed.values.tolist() == [[0, 0, 0, 0, 0, 2, 0, 0]]
    assert packed.fill == 7 and packed.index.tolist() == [3] and packed.density == 8 / 40


def test_blocks_must_not_straddle_groups():
    with pytest.raises(ValueError, match="straddle groups of 4"):
        pack(np.ones((8, 2, 3, 3), np.float32), "out:8", groups=2)
    pack(np.ones((8, 2, 3, 3), np.float32), "out:4", groups=2)


def test_index_is_as_narrow_as_the_panel_allows():
    assert [index_dtype(n) for n in (1, 256, 257, 65536, 65537)] == [
        "uint8",
        "uint8",
        "uint16",
        "uint16",
        "uint32",
    ]


def test_stored_bytes_count_every_array():
    weight = np.zeros((16, 300), np.float32)
    weight[:, ::10] = 1
    packed = pack(weight, "out:16")
    assert stored_bytes(packed) == 30 * 16 * 4 + 30 * 2 + 2 * 4 + 1 * 2 + 16 * 2
    assert stored_bytes(packed) < 0.12 * weight.nbytes


@pytest.mark.parametrize("grain", GRAINS)
def test_the_coarsest_format_is_chosen(rng, grain):
    assert best_grain(pruned(rng, (64, 32, 3, 3), grain, 0.1)) == grain


def test_misaligned_blocks_are_not_taken_for_a_coarse_grain(rng):
    weight = np.roll(pruned(rng, (64, 128), "out:4", 0.1), 2, axis=0)
    assert best_grain(weight) == "element"
    assert grain_densities(weight)["out:4"] > 1.5 * grain_densities(weight)["element"]


def test_unknown_grains_are_refused():
    for grain in ("out:5", "row", ""):
        with pytest.raises(ValueError, match="unknown grain"):
            block_of(grain)


@pytest.mark.parametrize("grain", GRAINS)
def test_prune_keeps_the_most_salient_grains(rng, grain):
    weight = rng.standard_normal((32, 10, 3, 3)).astype(np.float32)
    result = prune(weight, density=0.25, grain=grain)
    block = block_of(grain)
    kept = block_pattern(result, block)
    assert kept.sum() == round(0.25 * kept.size)
    scores = saliency(weight, grain).reshape(kept.shape)
    assert scores[kept].min() >= scores[~kept].max()
    np.testing.assert_array_equal(result[result != 0], weight[result != 0])


def test_prune_never_leaves_a_layer_empty_and_density_one_changes_nothing(rng):
    weight = rng.standard_normal((4, 3)).astype(np.float32)
    assert np.count_nonzero(prune(weight, density=0.001)) == 1
    np.testing.assert_array_equal(prune(weight, density=1.0), weight)


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan")])
def test_prune_refuses_densities_outside_its_range(density):
    with pytest.raises(ValueError, match="density"):
        prune(np.ones((4, 4), np.float32), density=density)


def test_prune_refuses_nan_weights():
    with pytest.raises(ValueError, match="NaN"):
        prune(np.full((4, 4), np.nan, np.float32), density=0.5)
