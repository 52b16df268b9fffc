# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from compiler import verify as verification
from compiler.artifact import KernelCall, ReferenceRun, open_artifact
from compiler.comparison import (
    UNIT,
    Verification,
    check_graph,
    check_kernels,
    compare,
    difference,
    require_passed,
    rounding_terms,
    verify,
)
from compiler.divergence import find_first_divergence, written_parameters
from compiler.frontend import TensorSpec
from compiler.runtime import from_variant
from compiler.samples import index_ranges, sample_inputs
from compiler.verify import random_inputs, verify_artifact
from schedules.errors import UserError, VerificationError

NAN, INF = math.nan, math.inf


# ---- comparing


@pytest.mark.parametrize(
    ("found", "wanted", "error"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([INF, -INF], [INF, -INF], 0.0),
        ([INF], [-INF], INF),
        ([1e30], [INF], INF),
        ([0.0], [-0.0], 0.0),
        ([], [], 0.0),
    ],
)
def test_difference_takes_nothing_for_equal_that_is_not(found, wanted, error):
    assert difference(np.array(found), np.array(wanted)) == error


def test_difference_of_other_shapes_is_infinite_even_if_they_broadcast():
    assert difference(np.ones((2, 1)), np.ones((1, 1))) == INF


def test_difference_does_not_wrap_around():
    assert difference(np.array([0], "uint8"), np.array([255], "uint8")) == 255


def test_compare_takes_the_worst_of_all_runs(rng):
    good = rng.standard_normal((3, 10))
    bad = good.copy()
    bad[0] = -bad[0]
    found = compare([[good], [bad]], [[good], [good]])
    assert found.max_abs == 2 * np.abs(good[0]).max()
    assert found.max_rel == pytest.approx(found.max_abs / np.abs(good).max())
    assert found.cosine < 0.9
    assert found.top1_agreement == pytest.approx(5 / 6)


def test_compare_without_rows_has_no_top1():
    assert compare([[np.ones(3)]], [[np.ones(3)]]).top1_agreement is None
    assert compare([[np.ones((3, 1))]], [[np.ones((3, 1))]]).top1_agreement is None


def test_compare_of_zeros():
    zero = np.zeros((2, 3))
    assert compare([[zero]], [[zero]]).cosine == 1.0
    assert compare([[zero + 1]], [[zero]]).cosine == 0.0


def test_another_number_of_outputs_is_an_error():
    with pytest.raises(VerificationError, match="number of outputs"):
        compare([[np.ones(3)]], [[np.ones(3), np.ones(3)]])


# ---- tolerance


def one(array):
    return [[np.asarray(array)]]


def test_tolerance_follows_what_float32_itself_does():
    exact, plain = one([1.0, 100.0]), one(np.array([1.0, 100.001], "float32"))
    close, far = (one(np.array([1.0, v], "float32")) for v in (100.007, 100.02))
    assert check_kernels(close, exact, plain, terms=1).passed
    failed = check_kernels(far, exact, plain, terms=1)
    assert not failed.passed
    assert failed.tolerance == pytest.approx(0.008, rel=0.1)


def test_tolerance_has_a_bound_where_float32_is_lucky():
    exact = one([1.0, -100.0])
    check = check_kernels(one([1.0, -100.0001]), exact, exact, terms=10_000)
    assert check.passed
    assert check.bound == check.tolerance == pytest.approx(100 * UNIT * 100)
    assert not check_kernels(one([1.0, -100.01]), exact, exact, terms=10_000).passed


def test_a_nan_does_not_pass_whatever_the_tolerance():
    assert not check_kernels(one([NAN]), one([1.0]), one([1.0]), terms=1e12).passed
    assert not check_kernels(one([NAN]), one([1.0]), one([NAN]), terms=1e12).passed
    assert check_kernels(one([NAN]), one([NAN]), one([NAN]), terms=1).passed


def test_integer_outputs_must_be_equal():
    exact = one(np.array([3, 4]))
    assert check_kernels(exact, exact, exact, terms=1e12).passed
    assert not check_kernels(one(np.array([3, 5])), exact, exact, terms=1e12).passed


def test_every_output_has_its_own_scale():
    """A large first output must not hide an error of a small second one."""
    exact = [[np.array([1e6]), np.array([1e-3])]]
    found = [[np.array([1e6]), np.array([2e-3])]]
    assert not check_kernels(found, exact, exact, terms=100).passed


def test_winograd_widens_the_bound_of_its_own_layers_only():
    kernels = [
        KernelCall("conv", ["a"], "winograd", {}, 0, 0),
        KernelCall("conv", ["b"], "contraction", {}, 0, 0),
    ]
    assert rounding_terms({"a": 100, "b": 50}, kernels) == 32**2 * 100 + 50
    assert rounding_terms({}, ()) == 1


# ---- the whole


@pytest.fixture
def references(tiny):
    def plain(name, x):
        w1, w2 = tiny.weights[name]
        return np.maximum(x @ w1, 0) @ w2

    return [
        ReferenceRun(
            [x],
            [plain("dense", x)],
            {name: [tiny.expected(name, x)] for name in tiny.weights},
            {name: [plain(name, x)] for name in tiny.weights},
        )
        for (x,) in sample_inputs(tiny.inputs, runs=3)
    ]


LENGTHS = {"fc1": 64, "fc2": 32}


def verified(tiny, references, variants) -> Verification:
    return verify(
        {v.name: from_variant(v, tiny.inputs, tiny.outputs, tiny.target) for v in variants},
        references,
        lengths=LENGTHS,
        kernels={v.name: v.kernels for v in variants},
        graph=check_graph(references, LENGTHS),
    )


def test_both_questions_are_answered_and_kept_apart(tiny, references):
    found = verified(tiny, references, tiny.variants)
    require_passed(found)
    assert found.passed and found.runs == 3
    for check in found.kernels.values():
        assert 0 < check.max_abs < 1e-4
    assert found.original["dense"].max_abs < 1e-4
    # The pruned network is another network: its kernels are right and it is far from the original.
    assert found.original["compressed"].max_abs > 1
    assert found.original["compressed"].cosine < 0.99
    top = found.to_json()
    assert top["variant"] == "compressed"
    assert top["max_abs"] == found.original["compressed"].max_abs


def test_a_wrong_kernel_stops_the_build_and_is_named(tiny, compile_tiny, references):
    wrong = compile_tiny("dense", *tiny.weights["dense"], tiny.target, wrong=True)
    found = verified(tiny, references, [wrong])
    assert not found.passed
    model = from_variant(wrong, tiny.inputs, tiny.outputs, tiny.target)

    def culprit(_variant):
        return str(find_first_divergence(model, wrong.unscheduled, references[0].inputs))

    with pytest.raises(
        VerificationError,
        match=r"first diverging kernel matmul\S* \(fc2; call 1.*found a difference",
    ):
        require_passed(found, culprit)


def test_a_wrong_import_does_not_pass_as_rounding(tiny, references):
    """Kernels that compute a wrongly imported graph exactly must not be let through by a wide
    tolerance."""
    moved = [dataclasses.replace(r, outputs=[r.outputs[0] + np.float32(0.01)]) for r in references]
    assert check_graph(references, LENGTHS).passed
    assert not check_graph(moved, LENGTHS).passed
    found = verified(tiny, moved, tiny.variants)
    assert all(check.passed for check in found.kernels.values()) and not found.passed
    with pytest.raises(VerificationError, match="the imported graph is not the model"):
        require_passed(found)


def test_no_divergence_where_there_is_none(tiny, references):
    for variant in tiny.variants:
        model = from_variant(variant, tiny.inputs, tiny.outputs, tiny.target)
        assert find_first_divergence(model, variant.unscheduled, references[0].inputs) is None
        np.testing.assert_allclose(
            model(*references[0].inputs), references[0].exact[variant.name][0], rtol=1e-4, atol=1e-4
        )


def test_written_parameters_are_the_outputs(tiny):
    mod = tiny.variants[0].unscheduled
    for kernel in tiny.variants[0].kernels:
        assert written_parameters(mod[kernel.function]) == [False, False, True]


def test_the_json_has_no_infinity(tiny, references):
    import json

    check = check_kernels(one([NAN]), one([1.0]), one([1.0]), terms=1)
    json.dumps(check.to_json(), allow_nan=False)
    json.dumps(compare(one([[NAN, 1.0]]), one([[1.0, 1.0]])).to_json(), allow_nan=False)


# ---- inputs


def test_sample_inputs_are_seeded_and_fit_their_type():
    specs = [
        TensorSpec("image", (2, 3), "float32"),
        TensorSpec("ids", (4, 50), "int64"),
        TensorSpec("mask", (4, 50), "int64"),
        TensorSpec("keep", (4, 50), "bool"),
        TensorSpec("step", (), "int32"),
    ]
    runs = sample_inputs(specs, seed=3, runs=2, ranges={"ids": 7})
    again = sample_inputs(specs, seed=3, runs=2, ranges={"ids": 7})
    for a, b in zip(runs, again):
        for x, y, spec in zip(a, b, specs):
            np.testing.assert_array_equal(x, y)
            assert x.shape == spec.shape and str(x.dtype) == spec.dtype
    assert not np.array_equal(runs[0][0], runs[1][0])
    image, ids, mask, keep, _ = runs[0]
    assert set(np.unique(ids)) == set(range(7))
    assert set(np.unique(mask)) <= {0, 1} and mask[:, 0].all()
    assert (np.diff(mask, axis=1) <= 0).all() and keep.any(axis=1).all()
    assert not np.array_equal(sample_inputs(specs, seed=4)[0][0], image)


def test_index_ranges_follows_an_index_to_its_smallest_table():
    from tvm import relax

    bb = relax.BlockBuilder()
    ids, other = (relax.Var(n, relax.TensorType((2, 5), "int64")) for n in ("ids", "other"))
    words, places = (relax.const(np.zeros((n, 4), "float32")) for n in (30, 9))
    with bb.function("main", [ids, other]):
        with bb.dataflow():
            flat = bb.emit(relax.op.reshape(relax.op.astype(ids, "int32"), (10,)))
            a = bb.emit(relax.op.take(words, flat, axis=0))
            b = bb.emit(relax.op.take(places, flat, axis=0))
            computed = bb.emit(relax.op.reshape(relax.op.add(other, other), (10,)))
            c = bb.emit(relax.op.take(words, computed, axis=0))
            out = bb.emit_output(relax.op.add(relax.op.add(a, b), c))
        bb.emit_func_output(out)
    assert index_ranges(bb.get()) == {"ids": 9}


# ---- artifacts


@pytest.fixture
def proven(write_tiny, references, tmp_path):
    layers = [
        {"name": "fc1", "weight_shape": [32, 64], "pruned": True},
        {"name": "fc2", "weight_shape": [16, 32], "pruned": False},
    ]
    return write_tiny(tmp_path / "out", references=references, layers=layers)


def test_an_artifact_is_verified_without_its_model(proven):
    found = verify_artifact(open_artifact(proven.path))
    assert found.runs == 3 and set(found.kernels) == {"dense", "compressed"}
    assert found.original["compressed"].max_abs > 1 > 1e-4 > found.original["dense"].max_abs


def test_an_artifact_whose_answers_differ_fails(write_tiny, references, tmp_path):
    def moved(answers):
        return {name: [a[0] + np.float32(1)] for name, a in answers.items()}

    wrong = [
        dataclasses.replace(r, exact=moved(r.exact), float32=moved(r.float32)) for r in references
    ]
    written = write_tiny(tmp_path / "out", references=wrong)
    with pytest.raises(VerificationError):
        verify_artifact(written)


def test_inputs_of_the_users_need_the_original_model(proven, tiny):
    x = random_inputs(tiny.inputs)[0]
    with pytest.raises(UserError, match="original model is not there"):
        verify_artifact(proven, {"x": x})


def test_inputs_of_the_users_are_judged_by_the_original(proven, tiny, monkeypatch):
    def plain(arrays):
        w1, w2 = tiny.weights["dense"]
        return [np.maximum(arrays[0] @ w1, 0) @ w2]

    reference = [plain]
    monkeypatch.setattr(
        verification, "original_model", lambda _artifact: SimpleNamespace(reference=reference[0])
    )
    x = {"x": random_inputs(tiny.inputs, seed=5)[0]}
    found = verify_artifact(proven, x)
    assert list(found.kernels) == ["dense"], "the pruned variant is another network"
    assert found.original["compressed"].max_abs > 1
    reference[0] = lambda arrays: [plain(arrays)[0] * 1.01]
    with pytest.raises(VerificationError, match="dense variant"):
        verify_artifact(proven, x)
    with pytest.raises(UserError, match="unknown input 'y'"):
        verify_artifact(proven, {"y": x["x"]})
    with pytest.raises(UserError, match="nothing finite comes out"):
        verify_artifact(proven, {"x": x["x"] * np.nan})


def test_an_artifact_without_answers_says_so(tiny_artifact):
    with pytest.raises(UserError, match="no reference outputs"):
        verify_artifact(tiny_artifact)
