# SPDX-License-Identifier: Apache-2.0
"""Zeroth biases fold exactly, where they may; their near misses stay."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from passes.activation_sparse.fold_zeroth_bias import fold_zeroth_biases
from passes.evaluate import evaluate
from passes.layers import dense, is_call
from passes.rewriting import bindings_of

T, D, H = 5, 12, 20
op = relax.op


def constant(rng, *shape):
    return relax.const(rng.standard_normal(shape).astype(np.float32))


def adds(mod) -> int:
    return sum(is_call(b.value, "relax.add") for b in bindings_of(mod["main"]))


def check(mod, folded, rng, adds_before: int, adds_after: int) -> None:
    assert (adds(mod), adds(folded)) == (adds_before, adds_after)
    x = rng.standard_normal([int(d) for d in mod["main"].params[0].ty.shape])
    for before, after in zip(evaluate(mod, [x]), evaluate(folded, [x]), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def at_input(rng, d, *, weight=None, also=None):
    def body(bb, x):
        shifted = bb.emit(op.add(x, d))
        w = constant(rng, H, D) if weight is None else weight
        y = bb.emit(dense(shifted, w, name="fc1"))
        y = bb.emit(op.add(y, constant(rng, H)))
        return relax.Tuple([y, shifted]) if also else y

    return body


@pytest.mark.parametrize("shape", [(T, D), (1, T, D), (1, D), (D,)])
def test_at_the_input_it_becomes_a_table_of_biases(build, rng, shape):
    mod = build([(2, T, D)], at_input(rng, constant(rng, *shape)))
    check(mod, fold_zeroth_biases(mod, {"fc1"}), rng, 2, 1)


def test_at_the_output_it_joins_the_bias(build, rng):
    def body(bb, x):
        y = bb.emit(dense(x, constant(rng, H, D), name="fc2"))
        y = bb.emit(op.add(y, constant(rng, H)))
        return op.add(y, constant(rng, T, H))

    mod = build([(2, T, D)], body)
    check(mod, fold_zeroth_biases(mod, {"fc2"}), rng, 2, 1)


def test_what_others_read_stays(build, rng):
    mod = build([(1, T, D)], at_input(rng, constant(rng, T, D), also=True))
    assert adds(fold_zeroth_biases(mod, {"fc1"})) == 2


def test_layers_not_named_stay(build, rng):
    mod = build([(1, T, D)], at_input(rng, constant(rng, T, D)))
    tvm.ir.assert_structural_equal(fold_zeroth_biases(mod, {"other"}), mod)


def test_a_table_larger_than_the_weight_stays(build, rng):
    mod = build([(1, 40, D)], at_input(rng, constant(rng, 40, D)))
    assert adds(fold_zeroth_biases(mod, {"fc1"})) == 2


def test_a_scalar_is_no_zeroth_bias(build, rng):
    mod = build([(1, T, D)], at_input(rng, relax.const(1.5, "float32")))
    assert adds(fold_zeroth_biases(mod, {"fc1"})) == 2


def test_a_result_between_that_others_read_stays(build, rng):
    def body(bb, x):
        y = bb.emit(dense(x, constant(rng, H, D), name="fc2"))
        y = bb.emit(op.add(y, constant(rng, H)))
        return relax.Tuple([bb.emit(op.add(y, constant(rng, T, H))), bb.emit(op.exp(y))])

    mod = build([(1, T, D)], body)
    assert adds(fold_zeroth_biases(mod, {"fc2"})) == 2
