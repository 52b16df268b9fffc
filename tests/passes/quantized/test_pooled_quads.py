# SPDX-License-Identifier: Apache-2.0
"""Sparse integer convolutions with max pooling in their kernel, images whose channels fill no quad: every bit as in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax

from compiler import pipeline
from passes import layers
from passes.evaluate import evaluate
from passes.layers import attrs_of, is_call
from passes.pool_convolutions import PoolConvolutions, left_apart
from passes.quantized import FAMILY
from passes.quantized import operators as int8
from passes.rewriting import bindings_of
from schedules.target import detect_host

op = relax.op


pytestmark = pytest.mark.usefixtures("every_image_is_far")


@dataclass(frozen=True)
class Case:
    """A float image, a convolution of its bytes, a maximum over windows; then a layer that may read planes, if `between`."""

    shape: tuple[int, ...]
    outputs: int
    grain: str
    kernel: int = 3
    stride: int = 2
    size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (2, 2)
    padding: tuple[int, ...] = (1, 1, 1, 1)
    zero_point: int = 114
    between: bool = True
    saturated: bool = False


def sparse_weight(case: Case, rng, o: int, c: int, kernel: int) -> relax.Constant:
    block = int8.GRAINS[case.grain]
    kept = rng.random((-(-o // block), -(-c // 4), kernel, kernel)) < 0.25
    kept.flat[0] = True
    values = rng.integers(-128, 128, (o, c, kernel, kernel))
    values = np.where(values < 0, -128, 127) if case.saturated else values
    return relax.const(values.astype("int8") * kept.repeat(block, 0)[:o].repeat(4, 1)[:, :c])


def network(case: Case, rng) -> tvm.IRModule:
    layers.register()
    int8.register()
    b = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(case.shape, "float32"))
    o, made = case.outputs, 5
    with b.function("main", [x]):
        with b.dataflow():
            y = b.emit(int8.quantize(x, scale=0.02, zero_point=case.zero_point))
            w = sparse_weight(case, rng, o, case.shape[1], case.kernel)
            y = b.emit(
                int8.int8_conv2d(
                    y, w, name="stem", zero_point=case.zero_point, strides=(case.stride,) * 2,
                    padding=(case.kernel // 2,) * 4, grain=case.grain,
                )
            )  # fmt: skip
            bias = rng.integers(-9999, 9999, (1, o, 1, 1)).astype("int32")
            y = b.emit(op.astype(b.emit(op.add(y, relax.const(bias))), "float32"))
            scale = (rng.random((1, o, 1, 1)) * 2e-2 + 1e-3).astype("float32")
            y = b.emit(op.multiply(y, relax.const(scale)))
            y = b.emit(int8.quantize(y, scale=1.0, zero_point=made, bounded=True))
            y = b.emit(op.nn.max_pool2d(y, case.size, case.strides, case.padding))
            if case.between:
                w = sparse_weight(case, rng, 8, o, 1)
                y = b.emit(int8.int8_conv2d(y, w, name="next", zero_point=made, grain=case.grain))
                y = b.emit(op.multiply(b.emit(op.astype(y, "float32")), relax.const(2e-3)))
                y = b.emit(int8.quantize(y, scale=1.0, zero_point=9, bounded=True))
                size = [int(d) for d in y.ty.shape][2:]
                y = b.emit(int8.int8_average_pool(y, pool_size=size, zero_point=9))
            out = b.emit_output(y)
        b.emit_func_output(out)
    return b.finalize()


CASES = {
    "stem": Case((1, 3, 41, 70), 20, "in:4", kernel=7),
    "stem of blocks": Case((1, 3, 41, 70), 16, "block:4x4", kernel=7),
    "blocks beyond the channels": Case((2, 3, 23, 30), 20, "block:8x4", kernel=5),
    "every byte at its end": Case((1, 3, 17, 33), 12, "in:4", zero_point=255, saturated=True),
    "one channel, zero point 0": Case((1, 1, 16, 33), 8, "in:4", zero_point=0),
    "two channels": Case((1, 2, 17, 18), 8, "block:4x4", stride=1),
    "channels last": Case((1, 3, 30, 37), 18, "block:4x4", between=False),
    "few outputs": Case((1, 3, 17, 19), 6, "in:4", between=False),
    "whole quads": Case((2, 8, 12, 33), 8, "block:4x4", stride=1),
    "halves": Case((1, 3, 20, 64), 8, "in:4", size=(2, 2), padding=(0, 0, 0, 0)),
    "uneven": Case((1, 3, 26, 35), 8, "in:4", size=(2, 3), strides=(3, 2), padding=(0, 1, 1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_pooled_sums_are_exact(name, rng):
    case = CASES[name]
    mod = network(case, rng)
    pooled = PoolConvolutions()(mod)
    assert left_apart(mod) == []
    calls = [b.value for b in bindings_of(pooled["main"])]
    assert sum(is_call(c, int8.INT8_POOLED_CONV2D) for c in calls) == 1
    assert not any(is_call(c, "relax.nn.max_pool2d") for c in calls)
    x = rng.standard_normal(case.shape).astype("float32")
    x.flat[: case.shape[-1]] = np.linspace(-9, 9, case.shape[-1])
    references = FAMILY.references
    (want,) = evaluate(mod, [x], dtype="float32", references=references)
    (after,) = evaluate(pooled, [x], dtype="float32", references=references)
    assert np.array_equal(want, after) and len(np.unique(want)) > 3
    laid = pipeline.lay_out(mod)
    (call,) = [
        b.value for b in bindings_of(laid["main"]) if is_call(b.value, int8.INT8_POOLED_CONV2D)
    ]
    sides = tuple(attrs_of(call).get(side, 0) for side in ("planes_in", "planes_out"))
    assert sides == (case.shape[1] < 4, case.between)
    target = detect_host()
    compiled = pipeline.compile_graph("pooled", pipeline.fuse_graph(laid, target), target)
    assert next(k.loops for k in compiled.kernels if k.layers) == "pooled_windows"
    machine = relax.VirtualMachine(compiled.executable, tvm.cpu())
    constants = tuple(tvm.runtime.tensor(np.asarray(c)) for c in compiled.constants)
    got = machine["main"](tvm.runtime.tensor(x), constants).numpy()
    assert np.array_equal(got, want)


def largest(b, y):
    return b.emit(op.nn.max_pool2d(y, (3, 3), (2, 2), (1, 1, 1, 1)))


def quantized_sums(b, x, grain="in:4", after=None):
    y = b.emit(int8.quantize(x, scale=0.02, zero_point=3))
    more = {} if grain is None else {"grain": grain}
    w = relax.const(np.ones((8, 3, 3, 3), "int8"))
    y = b.emit(int8.int8_conv2d(y, w, name="stem", zero_point=3, padding=(1,) * 4, **more))
    y = b.emit(op.multiply(b.emit(op.astype(y, "float32")), relax.const(2e-3)))
    y = y if after is None else after(b, y)
    return b.emit(int8.quantize(y, scale=1.0, zero_point=0))


STAYS = {
    "dense": lambda b, x: largest(b, quantized_sums(b, x, None)),
    "read twice": lambda b, x: (
        lambda y: relax.Tuple([largest(b, y), y])
    )(quantized_sums(b, x)),
    "falls": lambda b, x: largest(b, quantized_sums(b, x, after=lambda b, y: b.emit(op.negative(y)))),
    "another tensor added": lambda b, x: largest(b, quantized_sums(b, x, after=lambda b, y: b.emit(op.add(y, b.emit(op.abs(y)))))),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_is_pooled_as_bytes_stays(declines, name):
    int8.register()
    declines(PoolConvolutions(), [(1, 3, 9, 18)], STAYS[name])


def test_floats_that_may_be_nan_are_rounded_before_they_are_pooled(declines):
    from passes.layers import conv2d
    from passes.sparse.operators import sparse_call

    int8.register()

    def body(b, x):
        w = relax.const(np.ones((8, 3, 3, 3), "float32"))
        y = b.emit(sparse_call(conv2d(x, w, name="stem", padding=(1,) * 4), "out:4"))
        return largest(b, b.emit(int8.quantize(y, scale=1.0, zero_point=0)))

    declines(PoolConvolutions(), [(1, 3, 9, 18)], body)
