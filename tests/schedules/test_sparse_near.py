# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse convolution of single output channels between planes, against a float64 sum over the non-zeros."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from passes.sparse import lowering
from passes.sparse.format import run_of
from passes.sparse.grains import Grain
from schedules import sparse_groups, sparse_near, sparse_planes, sparse_windows
from schedules.spaces import space_of
from schedules.sparse_problem import Problem
from schedules.target import NAMED
from tests.schedules.test_sparse_groups import BETWEEN_PLANES, conv
from tests.schedules.test_sparse_planes import (
    build,
    check_planes,
    fused_kernel,
    run,
    sparse_weight,
    to_planes,
)

Point = sparse_near.Point
PROBLEM = Problem(
    1, 28, 28, 32, 32, 28, 28, (3, 3), padding=(1, 1, 1, 1), stored=900, planes_in=True, planes_out=True,
)  # fmt: skip
SAMPLES = {
    "plain": conv((1, 7, 7, 12), (17, 12, 3, 3), "element", 1),
    "images": conv((2, 9, 13, 16), (16, 16, 3, 3), "element", 1),
    "strided": conv((1, 14, 17, 33), (24, 33, 3, 3), "element", 1, strides=(2, 2)),
    "dilated": conv((1, 13, 14, 8), (7, 8, 5, 5), "element", 1, dilation=(2, 1), padding=(2, 2, 2, 2)),
    "uneven_padding": conv((1, 9, 33, 5), (16, 5, 3, 3), "element", 1, padding=(1, 0, 2, 1)),
    "beyond_the_image": conv((1, 5, 6, 8), (8, 8, 3, 3), "element", 1, padding=(4, 3, 4, 3)),
    "one_output": conv((1, 8, 8, 9), (1, 9, 3, 1), "element", 1, density=0.1, padding=(1, 0, 1, 0)),
}  # fmt: skip


def test_between_planes(host_tiers, rng):
    """Strides, dilation, several images, padding wider than the kernel; panels, bands and tiles with and without remainder."""
    cases = {name: (sample, None, BETWEEN_PLANES) for name, sample in SAMPLES.items()}
    cases["panels"] = (SAMPLES["plain"], Point(4, 1, 7, 5, 17), BETWEEN_PLANES)
    cases["bands"] = (SAMPLES["strided"], Point(1, 1, 3, 7, 24), BETWEEN_PLANES)
    cases["tiles"] = (SAMPLES["images"], Point(4, 1, 9, 4, 16), BETWEEN_PLANES)
    check_planes(cases, host_tiers[0], rng)


@pytest.mark.parametrize("whole", ["row", "kernel"])
def test_taps_that_are_zero_together_share_an_index(host_tiers, rng, whole):
    """Whatever kernel walks them: near planes, a group's, an image's, or windows channels last."""

    def weights(rng, shape, _grain, density):
        blocks = Grain.parse(whole)
        kept = rng.random(blocks.grid(shape)) < density
        kept.flat[0] = True
        weight = blocks.spread(kept, shape) * rng.standard_normal(shape).astype(np.float32)
        assert run_of(weight) == (shape[3] if whole == "row" else shape[2] * shape[3])
        return weight

    names = ("plain", "strided", "dilated", "uneven_padding", "beyond_the_image")
    cases = {name: (SAMPLES[name], None, BETWEEN_PLANES) for name in names}
    cases["panels"] = (SAMPLES["plain"], Point(4, 1, 7, 5, 17), BETWEEN_PLANES)
    cases["groups"] = (conv((2, 9, 8, 12), (6, 4, 3, 3), "element", 3), None, BETWEEN_PLANES)
    image = conv((1, 20, 37, 3), (20, 3, 7, 7), "element", 1, strides=(2, 2), padding=(3, 3, 3, 3))
    cases["image"] = (image, None, BETWEEN_PLANES)
    cases["last"] = (image, None, (False, False))
    cases["panel_rows"] = (SAMPLES["plain"], None, (False, False))
    check_planes(cases, host_tiers[0], rng, weights)


def test_other_tiers_and_threads(host_tiers, rng):
    few = {name: (SAMPLES[name], None, BETWEEN_PLANES) for name in ("images", "strided")}
    check_planes(few, host_tiers[-1], rng)
    few["shared"] = (SAMPLES["plain"], Point(4, 1, 7, 5, 8, splits=2), BETWEEN_PLANES)
    check_planes(few, host_tiers[0].with_threads(2), rng)


def test_special_values_stay_within_reach_of_the_kernel(host_tiers, rng):
    sample = SAMPLES["images"]
    weight = sparse_weight(rng, sample.w, sample.grain, 1.0)
    _, kernel, arrays, _, shape = fused_kernel(
        sample, weight, host_tiers[0], epilogue="", planes=BETWEEN_PLANES
    )
    x = rng.standard_normal(sample.x).astype(np.float32)
    x[1, 0, 12, 3], x[1, 4, 4, 15] = np.nan, np.inf
    got = run(build({"main": kernel}, host_tiers[0]), "main", to_planes(x, sample), arrays, shape)
    got = got[..., : 9 * 13].reshape(2, 16, 9, 13)
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1, :, :2, 11:]).all() and np.isinf(got[1, :, 3:6, 3:6]).all()
    got[1, :, :2, 11:] = got[1, :, 3:6, 3:6] = 0
    assert np.isfinite(got).all()


def test_only_single_output_channels_between_planes_are_taken():
    def chosen(**changes):
        return lowering.structure_for(replace(PROBLEM, **changes))

    assert chosen() is sparse_near
    assert chosen(strides=(2, 2), out_height=14, out_width=14) is sparse_near
    assert chosen(block=4) is sparse_windows
    assert chosen(groups=4) is sparse_groups
    assert chosen(channels=3) is sparse_groups
    assert chosen(together=4) is sparse_near
    assert chosen(planes_in=False) is sparse_windows
    assert chosen(planes_in=False, planes_out=False) is sparse_planes
    assert chosen(kernel=(1, 1), padding=(0, 0, 0, 0)) is not sparse_near


@pytest.mark.parametrize("target", ["avx512", "avx2", "generic", "aarch64"])
def test_points_are_legal_and_what_tiles_read_stays_near(target):
    cpu = NAMED[target]
    large = replace(PROBLEM, height=224, width=224, out_height=224, out_width=224)
    for problem in (PROBLEM, replace(PROBLEM, channels=1024, outputs=7), large):
        default = sparse_near.default_point(problem, cpu)
        assert 4 * sparse_near.panel_elements(problem, default) <= cpu.l2_bytes // 2
        line = sparse_windows.window_of(problem, default.lines).line
        read = 4 * default.channels * (default.vectors * cpu.lanes + 2 * line)
        assert read <= 1.2 * cpu.l1_bytes or default.channels == 1
        space = space_of("sparse_near", problem, default, cpu)
        assert space.indices_of(default) is not None and len(space.points) > 1
        for point in space.points:
            assert 1 <= point.lines <= problem.out_height and point.vectors < cpu.registers
            assert 1 <= point.channels <= problem.channels
            assert space.estimate(point) > 0
    threads = sparse_near.default_point(PROBLEM, cpu.with_threads(64))
    assert threads.part * threads.splits <= PROBLEM.outputs
