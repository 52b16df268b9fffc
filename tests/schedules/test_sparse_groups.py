# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse convolution in groups between planes, against a float64 sum over the non-zeros."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from passes.sparse import lowering
from passes.sparse.problems import SampleProblem
from schedules import sparse_groups, sparse_windows
from schedules.spaces import space_of
from schedules.sparse_problem import Problem
from schedules.target import NAMED
from tests.schedules.test_sparse_planes import (
    build,
    check_planes,
    fused_kernel,
    run,
    sparse_weight,
    to_planes,
)

BETWEEN_PLANES = (True, True)
PROBLEM = Problem(
    1, 28, 28, 32, 32, 28, 28, (3, 3), padding=(1, 1, 1, 1), groups=4, block=4, stored=60,
    planes_in=True, planes_out=True,
)  # fmt: skip


def conv(x, w, grain, groups, density=0.3, **changes) -> SampleProblem:
    attrs = {"strides": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": groups}
    return SampleProblem(
        "kerf.sparse_conv2d", x, w, grain, density, tuple((attrs | changes).items())
    )


SAMPLES = {
    "plain": conv((1, 7, 7, 24), (24, 8, 3, 3), "out:4", 3),
    "images": conv((2, 9, 13, 16), (16, 8, 3, 3), "out:8", 2),
    "strided": conv((2, 14, 17, 16), (24, 8, 3, 3), "out:4", 2, strides=(2, 2)),
    "long_strided": conv((1, 13, 71, 8), (8, 4, 3, 3), "out:4", 2, strides=(2, 2)),
    "stride_down": conv((1, 15, 33, 8), (8, 4, 3, 3), "out:4", 2, strides=(2, 1)),
    "elements": conv((1, 17, 15, 12), (6, 4, 3, 3), "element", 3),
    "dilated": conv((1, 13, 14, 8), (16, 4, 5, 5), "element", 2, dilation=(2, 1), padding=(2, 2, 2, 2)),
    "uneven_padding": conv((1, 9, 33, 16), (16, 4, 3, 3), "out:4", 4, padding=(1, 0, 2, 1)),
    "image": conv((2, 20, 37, 3), (20, 3, 7, 7), "out:4", 1, strides=(2, 2), padding=(3, 3, 3, 3)),
    "padded_block": conv((1, 12, 19, 3), (10, 3, 3, 3), "out:4", 1),
    "beyond_the_image": conv((1, 5, 6, 8), (8, 4, 3, 3), "out:4", 2, padding=(4, 3, 4, 3)),
}  # fmt: skip


def test_groups_between_planes(host_tiers, rng):
    """Strides, dilation, several images, padding wider than the kernel; bands with and without remainder."""
    cases = {name: (sample, None, BETWEEN_PLANES) for name, sample in SAMPLES.items()}
    Point = sparse_groups.Point
    cases["bands"] = (SAMPLES["strided"], Point(1, 4, 3), BETWEEN_PLANES)
    cases["one_line"] = (SAMPLES["beyond_the_image"], Point(2, 2, 1), BETWEEN_PLANES)
    cases["half_blocks"] = (SAMPLES["images"], Point(3, 4, 4), BETWEEN_PLANES)
    check_planes(cases, host_tiers[0], rng)


def test_other_tiers_and_threads(host_tiers, rng):
    few = {name: (SAMPLES[name], None, BETWEEN_PLANES) for name in ("images", "strided")}
    check_planes(few, host_tiers[-1], rng)
    few["shared"] = (SAMPLES["plain"], sparse_groups.Point(4, 4, 7, splits=2), BETWEEN_PLANES)
    check_planes(few, host_tiers[0].with_threads(2), rng)


def test_lines_of_large_outputs_are_fetched(host_tiers, rng):
    """Bands of lines, whose tiles ask for the lines they are stored in; of what stays near none is asked for."""
    far = conv((1, 230, 45, 3), (16, 3, 3, 3), "out:4", 1, density=0.2)
    weight = sparse_weight(rng, far.w, far.grain, far.density)
    assert "prefetch" in fused_kernel(far, weight, host_tiers[0], planes=BETWEEN_PLANES)[1].script()
    near = sparse_weight(rng, SAMPLES["plain"].w, "out:4", 0.3)
    kernel = fused_kernel(SAMPLES["plain"], near, host_tiers[0], planes=BETWEEN_PLANES)[1]
    assert "prefetch" not in kernel.script()
    check_planes({"far": (far, None, BETWEEN_PLANES)}, host_tiers[0], rng)


def test_special_values_stay_in_their_group(host_tiers, rng):
    sample = SAMPLES["plain"]
    weight = sparse_weight(rng, sample.w, sample.grain, 1.0)
    _, kernel, arrays, _, shape = fused_kernel(
        sample, weight, host_tiers[0], epilogue="", planes=BETWEEN_PLANES
    )
    x = rng.standard_normal(sample.x).astype(np.float32)
    x[0, 0, 6, 3], x[0, 3, 3, 21] = np.nan, np.inf
    got = run(build({"main": kernel}, host_tiers[0]), "main", to_planes(x, sample), arrays, shape)
    got = got[..., :49].reshape(24, 7, 7)
    assert np.isnan(got[:8, :2, 5:]).all() and np.isfinite(got[:8, 2:]).all()
    assert np.isfinite(got[8:16]).all() and np.isfinite(got[:8, :, :5]).all()
    assert np.isinf(got[16:, 2:5, 2:5]).all() and np.isfinite(got[16:, 5:]).all()


def test_only_groups_between_planes_of_floats_are_taken():
    def chosen(**changes):
        return lowering.structure_for(replace(PROBLEM, **changes))

    assert chosen() is sparse_groups
    assert chosen(block=1) is sparse_groups
    assert chosen(groups=1) is sparse_windows
    assert chosen(groups=1, channels=3) is sparse_groups
    assert chosen(groups=1, channels=4) is sparse_windows
    assert chosen(planes_in=False) is sparse_windows
    assert chosen(planes_out=False) is sparse_windows
    assert chosen(together=4) is sparse_windows
    assert chosen(kernel=(1, 1), padding=(0, 0, 0, 0)) is not sparse_groups


@pytest.mark.parametrize("target", ["avx512", "avx2", "generic", "aarch64"])
def test_points_are_legal_and_panels_stay_near(target):
    cpu = NAMED[target]
    for problem in (PROBLEM, replace(PROBLEM, block=1), replace(PROBLEM, height=224, width=224, out_height=224, out_width=224)):  # fmt: skip
        default = sparse_groups.default_point(problem, cpu)
        window = sparse_windows.window_of(problem, default.lines)
        assert default.lines == 1 or 4 * 8 * window.channel <= cpu.l2_bytes // 2
        space = space_of("sparse_groups", problem, default, cpu)
        assert space.indices_of(default) is not None and len(space.points) > 1
        for point in space.points:
            operands = 1 if point.rows == 1 else point.vectors + 1
            assert problem.block % point.rows == 0 and 1 <= point.lines <= problem.out_height
            assert point == default or point.rows * point.vectors + operands <= cpu.registers
            assert space.estimate(point) > 0


def test_places_are_counted_within_the_group():
    places = sparse_groups.group_offsets(PROBLEM, 7)
    window = sparse_windows.window_of(PROBLEM, 7)
    assert places.shape == (8, 3, 3) and len(np.unique(places)) == places.size
    assert places.max() + 6 * window.line + 27 + 15 < 8 * window.channel + sparse_windows.SLACK
