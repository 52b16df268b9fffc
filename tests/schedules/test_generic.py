# SPDX-License-Identifier: Apache-2.0
"""Functions without an anchor: scheduled, they compute what they computed unscheduled, whatever they are."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from schedules import generic
from schedules.target import detect_host

op = relax.op
CASES = {
    "image to channels last": (lambda x: op.permute_dims(x, [0, 2, 3, 1]), (1, 3, 20, 24)),
    "channels first": (lambda x: op.permute_dims(x, [0, 3, 1, 2]), (1, 20, 24, 40)),
    "odd channels first": (lambda x: op.permute_dims(x, [0, 3, 1, 2]), (1, 40, 40, 35)),
    "heads": (lambda x: op.permute_dims(x, [0, 2, 1, 3]), (1, 17, 6, 64)),
    "keys": (lambda x: op.permute_dims(x, [0, 1, 3, 2]), (1, 6, 17, 64)),
    "mean over pixels": (lambda x: op.mean(x, [1, 2], True), (2, 64, 32, 40)),
    "mean, odd channels": (lambda x: op.mean(x, [1, 2]), (2, 7, 7, 37)),
    "mean over channels": (lambda x: op.mean(x, [-1], True), (2, 7, 37)),
    "sum of everything": (lambda x: op.sum(x), (2, 7, 37)),
    "variance": (lambda x: op.variance(x, [-1]), (2, 7, 37)),
    "softmax": (lambda x: op.nn.softmax(x, -1), (2, 7, 37)),
    "argmax": (lambda x: op.astype(op.argmax(x, -1), "float32"), (2, 7, 37)),
    "maximum": (lambda x: op.max(x, [-1]), (2, 7, 64)),
    "pad": (lambda x: op.nn.pad(x, [0, 0, 1, 2, 3, 4]), (2, 7, 37)),
    "slice": (lambda x: op.strided_slice(x, [1], [1], [6], [2]), (2, 7, 37)),
    "max pool": (lambda x: op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1)), (1, 5, 17, 18)),
    "adaptive pool": (lambda x: op.nn.adaptive_avg_pool2d(x, (7, 7), layout="NHWC"), (1, 17, 18, 24)),
    "resize": (lambda x: op.image.resize2d(x, (16, 18), layout="NHWC"), (1, 8, 9, 16)),
    "relu": (lambda x: op.nn.relu(x), (1, 64, 64, 32)),
    "odd relu": (lambda x: op.nn.relu(x), (3, 11, 13)),
    "one odd row": (lambda x: op.nn.relu(x), (49,)),
    "scalar": (lambda x: op.add(x, relax.const(1.0)), ()),
    "one value": (lambda x: op.add(x, relax.const(1.0)), (1,)),
}  # fmt: skip


def _function(make, shape) -> tirx.PrimFunc:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.normalize(make(x)))
    passes = [
        relax.transform.Normalize(),
        relax.transform.LegalizeOps(),
        relax.transform.ToNonDataflow(),
    ]
    mod = tvm.transform.Sequential(passes)(builder.finalize())
    functions = [f for _, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    return functions[0]


def _run(func: tirx.PrimFunc, x: np.ndarray) -> np.ndarray:
    library = tvm.compile(
        tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), detect_host().tvm()
    )
    shape, dtype = [int(d) for d in func.params[-1].shape], str(func.params[-1].dtype)
    out = tvm.runtime.tensor(np.zeros(shape, dtype))
    library["main"](tvm.runtime.tensor(x), out)
    return out.numpy()


@pytest.mark.parametrize("name", CASES)
def test_scheduled_equals_unscheduled(name, rng):
    make, shape = CASES[name]
    func = _function(make, shape)
    x = rng.standard_normal([int(d) for d in func.params[0].shape]).astype(np.float32)
    wanted = _run(func, x)
    for threads in (1, 2):
        got = _run(generic.schedule(func, detect_host().with_threads(threads)), x)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_large_elementwise_functions_are_vectorised_and_parallel():
    func = _function(*CASES["relu"])
    text = generic.schedule(func, detect_host().with_threads(2)).script()
    assert "T.parallel" in text and "T.vectorized" in text
    assert "T.parallel" not in generic.schedule(func, detect_host()).script()


def test_small_functions_are_not_parallel():
    func = _function(*CASES["odd relu"])
    assert "T.parallel" not in generic.schedule(func, detect_host().with_threads(2)).script()


def test_a_reduction_of_two_values_at_once_is_left_alone():
    func = _function(lambda x: op.argmax(x, -1), (2, 7, 37))
    assert generic.schedule(func, detect_host()).same_as(func)


def test_odd_rows_run_in_whole_vectors_and_a_rest():
    target = detect_host().with_threads(2)
    make = lambda x: op.multiply(x, x)  # noqa: E731
    text = generic.schedule(_function(make, (1, 2000, 49)), target).script()
    assert f"T.vectorized(T.int64({target.lanes}))" in text and "T.parallel" in text
