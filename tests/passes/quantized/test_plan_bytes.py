# SPDX-License-Identifier: Apache-2.0
"""Which tensors lie in bytes."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.layers import conv2d, dense
from passes.quantized.plan_bytes import plan_bytes


def square(builder, rng):
    """`layer(data, name)`: a dense layer of 16 inputs and outputs."""

    def layer(data, name):
        weight = relax.const(rng.standard_normal((16, 16)).astype(np.float32))
        return builder.emit(dense(data, weight, name=name))

    return layer


def residual(rng, shared):
    """Two dense layers whose sum an int8 layer reads; the first one's result is read by the second if `shared`."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 16), "float32"))
    layer = square(builder, rng)
    with builder.function("main", [x]):
        with builder.dataflow():
            first = layer(x, "first")
            second = layer(first if shared else x, "second")
            total = builder.emit(relax.op.add(second, first))
            out = builder.emit_output(layer(total, "int8"))
        builder.emit_func_output(out)
    return builder.get(), second, total


@pytest.mark.parametrize("shared", [True, False])
def test_a_float_operand_joins_a_sum_only_where_a_kernel_can_end_with_it(rng, shared):
    mod, second, total = residual(rng, shared)
    held = plan_bytes(mod, ["int8"]).held
    names = {var.name for var in held}
    assert total.name in names
    assert (second.name in names) is not shared


def test_a_part_of_a_layers_result_is_picked_in_the_sum_and_needs_no_bytes(rng):
    """A gate of a recurrent cell: a slice of what one layer computes for all steps and one of what it carries on."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 16), "float32"))
    layer = square(builder, rng)
    with builder.function("main", [x]):
        with builder.dataflow():
            first, second = (
                builder.emit(relax.op.strided_slice(layer(x, name), [1], [0], [16], [2]))
                for name in ("first", "second")
            )
            total = builder.emit(relax.op.add(second, first))
            weight = relax.const(rng.standard_normal((16, 8)).astype(np.float32))
            out = builder.emit_output(builder.emit(dense(total, weight, name="int8")))
        builder.emit_func_output(out)
    held = {var.name for var in plan_bytes(builder.get(), ["int8"]).held}
    assert held == {total.name}


def pooled(rng, reader, *, also_floats=False, layer="stem"):
    """Max pooling behind two convolutions; `reader(builder, maxima)` makes the output of what it gives."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 4, 9, 9), "float32"))

    def conv(data, name):
        weight = relax.const(rng.standard_normal((4, 4, 3, 3)).astype(np.float32))
        made = builder.emit(conv2d(data, weight, name=name, padding=[1] * 4))
        return builder.emit(relax.op.nn.relu(made))

    with builder.function("main", [x]):
        with builder.dataflow():
            y = conv(x, layer)
            maxima = builder.emit(relax.op.nn.max_pool2d(y, (3, 3), (2, 2), (1, 1, 1, 1)))
            found = reader(builder, maxima)
            extra = [builder.emit_output(y)] if also_floats else []
            out = builder.emit_output(found)
        builder.emit_func_output(relax.Tuple([out, *extra]) if extra else out)
    return builder.get(), maxima


def compared_and_added(builder, maxima):
    above = builder.emit(relax.op.greater_equal(maxima, relax.const(np.float32(0.5))))
    chosen = builder.emit(relax.op.where(above, relax.const(1.0), relax.const(-1.0)))
    return builder.emit(relax.op.add(chosen, maxima))


def meant(builder, maxima):
    return builder.emit(relax.op.add(relax.op.mean(maxima, axis=[2, 3]), relax.const(1.0)))


def convolved(builder, maxima):
    weight = relax.const(np.ones((4, 4, 1, 1), np.float32))
    return builder.emit(conv2d(maxima, weight, name="float"))


@pytest.mark.parametrize("reader", [compared_and_added, meant])
def test_maxima_of_an_int8_layer_lie_in_bytes_for_readers_by_element(rng, reader):
    mod, maxima = pooled(rng, reader)
    held = plan_bytes(mod, ["stem"]).held
    operand = plan_bytes(mod, ["stem"]).uses.definitions[maxima].args[0]
    assert {maxima.name, operand.name} <= {var.name for var in held}


@pytest.mark.parametrize(
    "reader, options",
    [
        (convolved, {}),  # a layer that was left float wants floats
        (compared_and_added, {"also_floats": True}),  # what is pooled is stored as floats anyway
        (compared_and_added, {"layer": "other"}),  # which is not int8
        (lambda builder, maxima: builder.emit(relax.op.nn.softmax(maxima)), {}),
    ],
)
def test_maxima_that_floats_are_wanted_of_stay_floats(rng, reader, options):
    mod, maxima = pooled(rng, reader, **options)
    assert maxima.name not in {var.name for var in plan_bytes(mod, ["stem"]).held}
