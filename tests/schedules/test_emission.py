# SPDX-License-Identifier: Apache-2.0
"""Pieces of hand-emitted kernels: how extents are cut into vectors, tiles and indices."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from schedules import emission, winograd_matrices, winograd_transforms
from schedules.errors import ScheduleError
from schedules.fused import Fused, annotations


@pytest.mark.parametrize("extent", [1, 2, 7, 15, 16, 17, 31, 33, 64])
@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_pieces_cover_once_and_covering_covers_with_equal_vectors(extent, lanes):
    exact = [
        i for offset, width in emission.pieces(extent, lanes) for i in range(offset, offset + width)
    ]
    assert exact == list(range(extent))
    vectors = emission.covering(extent, lanes)
    assert {i for offset, width in vectors for i in range(offset, offset + width)} == set(
        range(extent)
    )
    assert len({width for _, width in vectors}) == 1 and vectors[0][1] <= lanes
    assert all(0 <= offset and offset + width <= extent for offset, width in vectors)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 4, 1, 3), (2, 1, 3)])
def test_unravel_equals_numpy(shape):
    for flat in range(int(np.prod(shape))):
        indices = emission.unravel(tirx.const(flat, "int32"), shape)
        found = tuple(int(i.value) for i in indices)  # constants fold
        assert found == tuple(int(i) for i in np.unravel_index(flat, shape))


@pytest.mark.parametrize("tier", range(3))
@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_transpose_of_a_block(rng, host_tiers, lanes, tier):
    if tier >= len(host_tiers):
        pytest.skip("this CPU has fewer tiers")
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            x = T.arg("x", T.buffer((lanes, lanes), "float32"))
            y = T.arg("y", T.buffer((lanes, lanes), "float32"))
            T.func_attr({"tirx.noalias": True})
            row = emission.ramp(0, lanes)
            emission.transpose(
                lanes, lambda i: x[i, row], lambda j, v: T.buffer_store(y, v, [j, row])
            )
    block = rng.standard_normal((lanes, lanes)).astype(np.float32)
    out = tvm.runtime.tensor(np.zeros_like(block))
    tvm.compile(builder.get(), host_tiers[tier].tvm())["main"](tvm.runtime.tensor(block), out)
    np.testing.assert_array_equal(out.numpy(), block.T)


def _annotated_sum():
    x, y = (te.placeholder((4, 8), "float32", name=name) for name in "xy")
    first = te.compute((4, 8), lambda *i: x(*i) * y(*i), name="first")
    notes = annotations("softmax")
    return te.create_prim_func(
        [x, y, te.compute((4, 8), lambda *i: first(*i) + x(*i), name="last", attrs=notes)]
    )


def test_operands_come_once_per_load():
    fused = Fused.read(_annotated_sum())
    x, y, _ = fused.params
    assert [o.same_as(p) for o, p in zip(emission.operands(fused), (x, y, x))] == [True] * 3


def test_a_definition_with_other_blocks_is_refused():
    with pytest.raises(ScheduleError, match="not the one this kernel replaces"):
        with emission.emitting(Fused.read(_annotated_sum()), 4):
            pass


@pytest.mark.parametrize("m", [2, 3, 4])
def test_shared_sums_are_fewer_operations_with_the_same_result(monkeypatch, rng, m):
    """`linear` on plain numbers: right, and cheaper than row by row."""
    monkeypatch.setattr(winograd_transforms.T, "bind", lambda value: value)
    monkeypatch.setattr(winograd_transforms, "splat", lambda value, _lanes, _dtype: value)
    for matrix in (winograd_matrices.matrices(m)[0], winograd_matrices.matrices(m)[2]):
        values = list(rng.standard_normal(m + 2))
        np.testing.assert_allclose(
            winograd_transforms.linear(matrix, values, 1), matrix @ values, rtol=1e-12
        )
