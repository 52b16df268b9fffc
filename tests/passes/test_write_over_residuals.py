# SPDX-License-Identifier: Apache-2.0
"""Kernels that write over a residual: results as ever, and only where nothing reads the residual afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from compiler import pipeline
from compiler.divergence import find_first_divergence
from compiler.frontend import TensorSpec
from compiler.runtime import from_variant
from passes import layers
from passes.evaluate import evaluate
from passes.sparse.family import FAMILY
from passes.sparse.format import block_of
from passes.sparse.operators import sparse_call
from schedules.target import detect_host

OP = relax.op


class Network:
    """A builder of small graphs in NCHW: `conv` with relu, and a sum before it; weight-sparse where a grain is given."""

    def __init__(self, shape, rng, grain=None):
        layers.register()
        self.grain = grain
        self.rng, self.bb = rng, relax.BlockBuilder()
        self.x = relax.Var("x", relax.TensorType(shape, "float32"))
        self.count = 0

    def conv(self, x, outputs=None, kernel=1, plus=None, groups=1):
        inputs = layers.shape_of(x)[1]
        shape = (outputs or inputs, inputs // groups, kernel, kernel)
        weight = self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        if self.grain is not None:
            mask = self.rng.random((-(-shape[0] // block_of(self.grain)), *shape[1:])) < 0.3
            weight *= np.repeat(mask, block_of(self.grain), axis=0)[: shape[0]]
        self.count += 1
        y = layers.conv2d(
            x,
            relax.const(weight.astype("float32")),
            name=f"layer{self.count}",
            padding=(kernel // 2,) * 4,
            groups=groups,
        )
        y = y if self.grain is None else sparse_call(y, self.grain)
        y = self.bb.emit(y)
        if plus is not None:
            y = self.bb.emit(OP.add(y, plus))
        return self.bb.emit(OP.nn.relu(y))

    def build(self, body) -> tvm.IRModule:
        with self.bb.function("main", [self.x]):
            with self.bb.dataflow():
                results = body(self, self.x)
                results = results if isinstance(results, tuple) else (results,)
                found = [self.bb.emit_output(OP.multiply(r, relax.const(2.0))) for r in results]
            self.bb.emit_func_output(found if len(found) > 1 else found[0])
        return self.bb.finalize()


def run(mod: tvm.IRModule, rng, target):
    """Names of the kernels that wrote over an argument. Results are right, and so is each kernel by its definition."""
    [x] = mod["main"].params
    data = rng.standard_normal(layers.shape_of(x)).astype("float32")
    fused = pipeline.fuse_graph(pipeline.lay_out(mod), target)
    variant = pipeline.compile_graph("dense", fused, target)
    made = mod["main"].ret_ty
    made = made.fields if isinstance(made, tvm.ir.TupleType) else [made]
    outputs = [
        TensorSpec(f"y{i}", tuple(int(d) for d in t.shape), "float32") for i, t in enumerate(made)
    ]
    model = from_variant(variant, [TensorSpec("x", data.shape, "float32")], outputs, target)
    over = []

    def watch(_function, name, before, _result, *arguments):
        if before and name in model.kernel_names:
            *read, output = arguments
            if any(a.data_ptr() == output.data_ptr() for a in read):
                over.append(name)
        return 0

    with model.instrumented(watch):
        model(data)
    if not any(k.loops == "winograd" for k in model.kernels):  # whose definition is slow
        assert find_first_divergence(model, variant.unscheduled, [data]) is None
    got = model(data)
    again = model(data)
    wanted = evaluate(mod, [data], references=FAMILY.references)
    got, again, wanted = (r if isinstance(r, (tuple, list)) else (r,) for r in (got, again, wanted))
    for first, second, exact in zip(got, again, wanted):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, exact, rtol=0, atol=2e-5 * np.abs(exact).max())
    return over


def two_blocks(net, x, kernel=1, outputs=None):
    y = net.conv(x, outputs)
    for _ in range(2):
        inner = net.conv(y)
        y = net.conv(inner, kernel=kernel, plus=y)
    return y


@pytest.mark.parametrize(
    "shape, kernel",
    [
        ((1, 64, 14, 14), 1),  # tiles overlap at the end of all pixels
        ((2, 33, 7, 7), 1),  # channels no multiple of a vector
        ((1, 20, 17, 17), 3),  # rows of tiles that touch padding
        ((3, 16, 1, 1), 1),
        ((1, 64, 22, 22), 3),  # Winograd, blocks overlap
        ((2, 128, 7, 7), 3),  # Winograd with weights transformed in registers
        ((1, 70, 14, 14), 3),  # Winograd, channels no multiple of a vector
    ],
)
def test_blocks_write_over_what_they_add(shape, kernel, rng):
    target = detect_host()
    mod = Network(shape, rng).build(lambda net, x: two_blocks(net, x, kernel))
    fused = pipeline.fuse_graph(pipeline.lay_out(mod), target).mod
    winograd = any("winograd" in gv.name_hint for gv in fused.get_global_vars())
    overlapping = winograd and shape[1] % target.lanes  # the last vectors of a pixel
    assert len(run(mod, rng, target)) == (0 if overlapping else 2)


@pytest.mark.parametrize(
    "shape, kernel, grain, over",
    [
        ((1, 32, 16, 17), 1, "out:4", 2),  # planes of whole vectors
        ((2, 32, 8, 8), 3, "out:8", 2),  # lines of planes
        ((1, 32, 17, 17), 1, "element", 0),  # planes whose last vectors overlap
        ((1, 32, 3, 5), 1, "out:4", 2),  # channels last, pixels no whole vector
        ((1, 32, 32, 32), 1, "element", 2),  # long planes of whole vectors
        ((1, 33, 3, 5), 1, "element", 0),  # channels no multiple of a vector
    ],
)
def test_sparse_blocks_write_over_what_they_add(shape, kernel, grain, over, rng):
    target = detect_host()
    mod = Network(shape, rng, grain).build(lambda net, x: two_blocks(net, x, kernel))
    assert len(run(mod, rng, target)) == over


def test_lines_of_groups_that_overlap_are_not_written_over_a_residual(rng):
    def body(net, x):
        y = net.conv(x)
        return net.conv(net.conv(net.conv(y), kernel=3, plus=y, groups=2))

    target = detect_host()
    mod = Network((1, 32, 24, 24), rng, "out:4").build(body)
    overlapping = 24 % target.lanes
    assert len(run(mod, rng, target)) == (0 if overlapping else 1)


def test_two_threads_write_over_residuals(rng):
    target = detect_host().with_threads(2)
    mod = Network((1, 64, 28, 28), rng).build(two_blocks)
    assert len(run(mod, rng, target)) == 2


def test_the_residual_that_is_returned_is_written_over_too(rng):
    def body(net, x):
        y = net.conv(x)
        return net.conv(net.conv(y), plus=y)

    mod = Network((1, 32, 6, 6), rng).build(body)
    assert len(run(mod, rng, detect_host())) == 1


def input_of_the_network(net, x):
    return net.conv(net.conv(x), plus=x)


def read_later(net, x):
    y = net.conv(x)
    z = net.conv(net.conv(y), plus=y)
    return net.bb.emit(OP.concat([net.conv(z), y], axis=1))


def read_by_the_layer_itself(net, x):
    y = net.conv(x)
    return net.conv(y, plus=y)


def returned(net, x):
    y = net.conv(x)
    return net.conv(net.conv(y), plus=y), y


def seen_through_a_reshape(net, x):
    y = net.conv(x)
    n, c, h, w = layers.shape_of(y)
    rows = net.bb.emit(OP.reshape(y, (n, c, h * w)))
    z = net.conv(net.conv(y), plus=y)
    return net.bb.emit(OP.add(net.bb.emit(OP.reshape(z, (n, c, h * w))), rows))


def kept_by_one_of_two_blocks(net, x):
    y = net.conv(x)
    first = net.conv(net.conv(y), plus=y)
    second = net.conv(net.conv(first), plus=first)
    return net.bb.emit(OP.concat([second, first], axis=1))


@pytest.mark.parametrize(
    "body",
    [
        input_of_the_network,
        read_later,
        read_by_the_layer_itself,
        returned,
        seen_through_a_reshape,
        kept_by_one_of_two_blocks,
    ],
)
def test_a_residual_that_is_still_needed_stays(body, rng):
    mod = Network((1, 32, 9, 5), rng).build(body)
    assert run(mod, rng, detect_host()) == []
