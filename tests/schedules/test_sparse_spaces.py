# SPDX-License-Identifier: Apache-2.0
"""Search spaces of the sparse kernels: the default is in them, every point is legal, records are used."""

from __future__ import annotations

from dataclasses import replace

import pytest

from passes.sparse import lowering
from schedules import sparse_planes, sparse_vector, sparse_windows
from schedules.spaces import point_for, space_of
from schedules.sparse_problem import Problem
from schedules.target import NAMED

CONV = Problem(1, 56, 56, 64, 64, 56, 56, (3, 3), padding=(1, 1, 1, 1), block=4, stored=900)
PROBLEMS = {
    "windows": CONV,
    "element": replace(CONV, block=1, stored=3600),
    "pointwise": replace(CONV, kernel=(1, 1), padding=(0, 0, 0, 0), block=8, stored=50),
    "one_row": Problem(1, 1, 1, 768, 3072, 1, 1, block=16, stored=14000),
    "few_outputs": Problem(1, 1, 100, 50, 3, 1, 100, block=1, stored=15),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("target", ["avx512", "avx2", "generic", "aarch64"])
def test_spaces_hold_the_default_and_legal_points_only(name, target):
    problem, cpu = PROBLEMS[name], NAMED[target]
    structure = lowering.structure_for(problem)
    default = structure.default_point(problem, cpu)
    space = space_of(structure.__name__.rpartition(".")[2], problem, default, cpu)
    assert space.indices_of(default) is not None and len(space.points) > 1
    for point in space.points:
        assert space.estimate(point) > 0
        if structure is sparse_vector:
            assert point.sums * problem.pixels <= 16
            continue
        assert problem.block % point.rows == 0 and point.part % problem.block == 0
        operands = 1 if point.rows == 1 else point.vectors + 1
        assert point == default or point.rows * point.vectors + operands <= cpu.registers
        if structure is sparse_windows:
            assert 1 <= point.lines <= problem.out_height


def test_a_recorded_point_is_used():
    problem, cpu = PROBLEMS["pointwise"], NAMED["avx512"]
    default = sparse_planes.default_point(problem, cpu)
    recorded = replace(default, part=128)

    class Records:
        def lookup(self, target, loops, fields):
            assert loops == "sparse_planes" and Problem.from_dict(dict(fields)) == problem
            return recorded.to_dict()

    assert point_for(sparse_planes, problem, cpu.with_records(Records())) == recorded
