# SPDX-License-Identifier: Apache-2.0
"""What the contraction decides: tiles that fit the registers of every tier, orders, packing, windows at the edge."""

from __future__ import annotations

import numpy as np
import pytest

from passes.dense.conv2d import pack_weights
from schedules.contraction import Point, default_point, packed_shape, panels_per_group
from schedules.target import NAMED
from schedules.windows import Problem, RowTiles, tile_rows, vectors

PROBLEMS = [
    Problem(1, 56, 56, 64, 64, 3, 3, (1, 1), (1, 1, 1, 1)),
    Problem(1, 224, 224, 3, 64, 7, 7, (2, 2), (3, 3, 3, 3)),
    Problem(1, 14, 14, 1024, 256),
    Problem(1, 7, 7, 512, 512, 3, 3, (1, 1), (1, 1, 1, 1)),
    Problem(1, 1, 197, 384, 1536),
    Problem(1, 1, 1, 2048, 1000),
    Problem(1, 1, 1, 96, 4),
    Problem(1, 14, 14, 48, 48, 3, 3, (1, 1), (1, 1, 1, 1), groups=6),
    Problem(1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("target", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_default_points_fit_the_registers(problem, target):
    for threads in (1, 2):
        point = default_point(problem, target.with_threads(threads))
        tile = point.mr * point.nv
        assert point.lanes == target.lanes
        assert 1 <= point.mr <= problem.row
        assert point.sums * tile + point.nv + 1 <= target.registers
        assert 0 <= point.chunk < problem.group_inputs
        assert 1 <= point.sums <= point.unroll <= problem.group_inputs
        assert Point.from_dict(point.to_dict()) == point
    assert Problem.from_dict(problem.to_dict()) == problem


def test_small_weights_stay_and_large_ones_are_read_once():
    target = NAMED["avx512"]
    assert default_point(PROBLEMS[0], target).order == "blocks"
    assert default_point(PROBLEMS[3], target).order == "panels"
    assert default_point(Problem(1, 1, 128, 3072, 768), target).order == "chunks"


def test_chunks_are_for_weights_that_several_tiles_read():
    several, one = (default_point(Problem(1, 1, m, 2048, 512), NAMED["avx512"]) for m in (33, 8))
    assert several.chunk > 0
    assert one.chunk == 0


def test_a_small_tile_sums_in_several_registers():
    point = default_point(Problem(1, 1, 1, 96, 4), NAMED["avx512"])
    assert point.mr * point.nv * point.sums >= 8


@pytest.mark.parametrize(
    "row, largest, wanted",
    [(56, 14, 14), (197, 9, 9), (17, 14, 9), (7, 14, 7), (1, 28, 1), (13, 6, 5)],
)
def test_tile_rows_needs_no_more_tiles_and_overlaps_least(row, largest, wanted):
    assert tile_rows(row, largest) == wanted


def test_vectors_cover_the_channels():
    assert vectors(40, 16) == ((16, 16), (16, 16), (8, 8))
    assert vectors(10, 16) == ((16, 10),)
    assert vectors(7, 16) == ((8, 7),)
    assert vectors(1, 16) == ((4, 1),)
    assert vectors(32, 16) == ((16, 16), (16, 16))
    assert vectors(0, 16) == ()


@pytest.mark.parametrize("groups", [1, 2])
def test_packing_keeps_every_weight_and_adds_zeros(groups, rng):
    problem = Problem(1, 5, 5, 6, 20, 3, 2, groups=groups)
    point = Point(lanes=4, mr=2, nv=3, order="panels")
    weight = rng.standard_normal((20, 6 // groups, 3, 2)).astype(np.float32)
    packed = pack_weights(weight, problem, point)
    assert packed.shape == packed_shape(problem, point)
    per_group = panels_per_group(problem, point)
    for o in range(20):
        group, within = divmod(o, 20 // groups)
        panel, lane = divmod(within, point.panel)
        found = packed[group * per_group + panel, :, :, :, lane]
        np.testing.assert_array_equal(found, weight[o].transpose(1, 2, 0))
    assert np.count_nonzero(packed) == weight.size


def test_edge_tiles_leave_out_the_taps_outside():
    problem = Problem(1, 8, 8, 4, 4, 3, 3, (1, 1), (1, 1, 1, 1))
    row = RowTiles(problem, 4, problem.ow)
    assert row.taps_inside(0, 0) == [1, 2, 3]
    assert row.taps_inside(0, 1) == [0, 1, 2, 3]
    assert row.taps_inside(4, 2) == [0, 1, 2]


def test_the_last_tile_overlaps():
    row = RowTiles(Problem(1, 1, 10, 4, 4), 4, 10)
    assert [row.base(t) for t in range(row.count)] == [0, 4, 6]
