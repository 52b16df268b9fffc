# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from passes.fold_constants import FoldConstants
from passes.layers import const_array
from passes.rewriting import bindings_of, constant

op = relax.op
W = np.arange(6, dtype="float32").reshape(2, 3)


def test_folds_operators_on_constants(rewrites):
    def before(_b, x):
        moved = op.permute_dims(constant(W), [1, 0])
        return op.matmul(x, op.reshape(op.multiply(moved, relax.const(2.0)), (3, 2)))

    rewrites(FoldConstants(), [(5, 3)], before, lambda _b, x: op.matmul(x, constant(2 * W.T)))


def test_folds_creations_and_keeps_64_bit_integers(rewrites):
    def before(_b, x):
        return op.add(
            x, op.add(op.arange(0, 4, 1, "int64"), op.full((4,), relax.const(3, "int64"), "int64"))
        )

    rewrites(
        FoldConstants(),
        [((4,), "int64")],
        before,
        lambda _b, x: op.add(x, constant(np.arange(4) + 3)),
    )


def test_folds_shapes_of_tensors_that_are_not_constant(rewrites):
    def before(_b, x):
        sizes = op.shape_to_tensor(op.shape_of(x))
        return op.add(
            x, op.astype(op.take(sizes, relax.const(1, "int64"), axis=0, mode="wrap"), "float32")
        )

    rewrites(
        FoldConstants(), [(2, 7)], before, lambda _b, x: op.add(x, constant(np.array(7, "float32")))
    )


def test_folds_parts_of_constant_tuples(rewrites):
    def before(b, x):
        halves = b.emit(op.split(constant(W), [1], axis=1))
        return op.add(x, halves[1])

    rewrites(FoldConstants(), [(2, 2)], before, lambda _b, x: op.add(x, constant(W[:, 1:])))


def test_folds_to_zero_dimensions(rewrites):
    rewrites(
        FoldConstants(),
        [(2,)],
        lambda _b, x: op.multiply(x, op.sum(constant(W))),
        lambda _b, x: op.multiply(x, constant(np.array(15, "float32"))),
    )


def test_declines_what_depends_on_an_input(declines):
    declines(FoldConstants(), [(3, 2)], lambda _b, x: op.matmul(constant(W), x))


def test_declines_creations_too_large_to_store(build):
    mod = build([(8192, 4096)], lambda _b, x: op.add(x, op.zeros((8192, 4096), "float32")))
    tvm.ir.assert_structural_equal(FoldConstants()(mod), mod)


def test_a_constant_result_is_returned(build):
    mod = FoldConstants()(build([(1,)], lambda _b, _x: op.permute_dims(constant(W), [1, 0])))
    (binding,) = bindings_of(mod["main"])
    np.testing.assert_array_equal(const_array(binding.value), W.T)
    relax.analysis.well_formed(mod)
