# SPDX-License-Identifier: Apache-2.0
"""NameLayers: what becomes a named layer, under which name, and what must stay as it is."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from passes.layers import attrs_of, const_array, is_call
from passes.name_layers import NameLayers

RNG = np.random.default_rng(0)


def weight(*shape, dtype="float32"):
    return relax.const(tvm.runtime.tensor(RNG.standard_normal(shape).astype(dtype)))


def module(shape, build, dtype="float32"):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(build(builder, x))
        builder.emit_func_output(result)
    return builder.finalize()


def calls(mod):
    bindings = [b for block in mod["main"].body.blocks for b in block.bindings]
    return [b.value for b in bindings if isinstance(b.value, relax.Call)]


def named(mod):
    return [c for c in calls(mod) if c.op.name.startswith("kerf.")]


def test_convolution():
    w = weight(4, 3, 3, 2)
    before = module(
        (1, 6, 8, 9),
        lambda b, x: op.nn.conv2d(x, w, strides=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    )
    (call,) = calls(NameLayers({w: "layer1.0.conv1"})(before))
    assert call.op.name == "kerf.conv2d" and call.args[1].same_as(w)
    assert attrs_of(call) == {
        "name": "layer1.0.conv1", "strides": [2, 1], "padding": [1, 0, 1, 0], "dilation": [1, 2], "groups": 2, "layout": "NCHW",
    }  # fmt: skip
    assert [int(d) for d in call.ty.shape] == [int(d) for d in before["main"].ret_ty.shape]


def test_convolution_in_one_dimension_gets_a_height_of_one():
    w = weight(4, 3, 5)
    after = NameLayers({w: "stem"})(
        module((2, 3, 20), lambda b, x: op.nn.conv1d(x, w, strides=3, padding=(2, 1)))
    )
    names = [c.op.name for c in calls(after)]
    assert names == ["relax.reshape", "kerf.conv2d", "relax.reshape"]
    (call,) = named(after)
    assert attrs_of(call)["padding"] == [0, 2, 0, 1] and attrs_of(call)["strides"] == [1, 3]
    np.testing.assert_array_equal(const_array(call.args[1])[:, :, 0], const_array(w))


@pytest.mark.parametrize("stored", ["rows are outputs", "rows are inputs"])
def test_matrix_product(stored):
    transposed = stored == "rows are outputs"
    w = weight(*((7, 5) if transposed else (5, 7)))
    after = NameLayers({w: "fc"})(
        module(
            (2, 3, 5), lambda b, x: op.matmul(x, b.emit(op.permute_dims(w)) if transposed else w)
        )
    )
    (call,) = calls(after)
    assert is_call(call, "kerf.dense") and attrs_of(call)["name"] == "fc"
    np.testing.assert_array_equal(
        const_array(call.args[1]), const_array(w) if transposed else const_array(w).T
    )


def test_a_weight_used_twice_is_one_weight_with_one_name():
    w = weight(5, 5)
    after = NameLayers({w: "shared"})(
        module((2, 5), lambda b, x: op.matmul(b.emit(op.matmul(x, w)), w))
    )
    first, second = named(after)
    assert attrs_of(first)["name"] == attrs_of(second)["name"] == "shared"
    assert first.args[1].same_as(second.args[1])


def test_two_weights_of_one_name_and_weights_without():
    given, same, unknown = weight(5, 5), weight(5, 5), weight(5, 5)
    build = lambda b, x: op.matmul(b.emit(op.matmul(b.emit(op.matmul(x, given)), same)), unknown)  # noqa: E731
    after = NameLayers({given: "fc", same: "fc"})(module((2, 5), build))
    assert [attrs_of(c)["name"] for c in named(after)] == ["fc", "fc#2", "dense_1"]


@pytest.mark.parametrize(
    "build",
    [
        lambda b, x: op.matmul(x, b.emit(op.permute_dims(x, [1, 0]))),  # no constant
        lambda b, x: op.matmul(weight(3, 4), x),  # the constant on the left
        lambda b, x: op.matmul(x, weight(2, 4, 6)),  # a batch of matrices
        lambda b, x: op.matmul(x, weight(4)),  # a vector
        lambda b, x: op.matmul(
            x, b.emit(op.permute_dims(weight(4, 4), [0, 1]))
        ),  # not a transposition
    ],
    ids=["computed", "left", "batched", "vector", "identity permutation"],
)
def test_stays_a_matrix_product(build):
    assert not named(NameLayers()(module((4, 4), build)))


def test_other_layouts_and_types_stay():
    nhwc = module(
        (1, 8, 8, 3), lambda b, x: op.nn.conv2d(x, weight(4, 3, 3, 3), data_layout="NHWC")
    )
    half = module((2, 5), lambda b, x: op.matmul(x, weight(5, 7, dtype="float16")), "float16")
    transposed = module(
        (1, 3, 8, 8), lambda b, x: op.nn.conv2d_transpose(x, weight(3, 4, 3, 3), dilation=(2, 2))
    )
    assert not any(named(NameLayers()(m)) for m in (nhwc, half, transposed))
