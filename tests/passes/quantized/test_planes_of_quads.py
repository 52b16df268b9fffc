# SPDX-License-Identifier: Apache-2.0
"""Sparse integer layers that hand activations to one another in planes of quads: every bit as channels last in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from compiler import pipeline
from compiler.artifact import CompiledVariant
from passes import layers
from passes.evaluate import evaluate
from passes.layers import attrs_of, is_call
from passes.quantized import FAMILY
from passes.quantized import operators as int8
from passes.rewriting import bindings_of
from passes.sparse.keep_planes import KeepPlanes
from schedules.target import detect_host

op = relax.op
_OUTPUTS = {"in:4": 1, "block:4x4": 4, "block:8x4": 8}


class Network:
    """Emits layers of one grain with what turns their sums into bytes."""

    def __init__(self, builder, grain: str, rng):
        self.emit, self.grain, self.rng, self.count = builder.emit, grain, rng, 0

    def weight(self, o: int, c: int, kernel: int) -> np.ndarray:
        outputs = _OUTPUTS[self.grain]
        kept = self.rng.random((-(-o // outputs), -(-c // 4), kernel, kernel)) < 0.25
        kept.flat[0] = True
        values = self.rng.integers(-128, 128, (o, c, kernel, kernel)).astype("int8")
        return values * kept.repeat(outputs, 0)[:o].repeat(4, 1)[:, :c]

    def conv(self, x, o, kernel=1, stride=1, given=0, made=0, residual=None, relu=True):
        """`given` and `made` are the zero points of x and of the result; `residual` is (bytes, zero point)."""
        self.count += 1
        w = relax.const(self.weight(o, int(x.ty.shape[-1]), kernel))
        y = self.emit(
            int8.int8_conv2d(
                x, w, name=f"l{self.count}", zero_point=given, strides=(stride, stride),
                padding=(kernel // 2,) * 4, layout="NHWC", grain=self.grain,
            )
        )  # fmt: skip
        bias = self.rng.integers(-9999, 9999, (1, 1, 1, o)).astype("int32")
        scale = (self.rng.random((1, 1, 1, o)) * 4e-3).astype("float32")
        y = self.emit(op.astype(self.emit(op.add(y, relax.const(bias))), "float32"))
        y = self.emit(op.multiply(y, relax.const(scale)))
        if residual is not None:
            y = self.emit(int8.dequantize_add(y, residual[0], scale=0.31, zero_point=residual[1]))
        y = self.emit(op.nn.relu(y)) if relu else y
        return self.emit(int8.quantize(y, scale=1.0, zero_point=made, bounded=True))

    def mean(self, x, zero_point=0):
        _, h, w, _ = (int(d) for d in x.ty.shape)
        return self.emit(
            int8.int8_average_pool(x, pool_size=(h, w), zero_point=zero_point, layout="NHWC")
        )


def built(shape: tuple, grain: str, rng, body) -> tvm.IRModule:
    layers.register()
    int8.register()
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "uint8"))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(body(Network(builder, grain, rng), x))
        builder.emit_func_output(out)
    return builder.finalize()


def residuals(few: int, many: int):
    """Shortcuts computed before and after what they are added to, zero points on borders, a layer's own input added to its
    result, strides."""

    def body(net, x):
        shortcut = net.conv(x, many, given=3, made=77, relu=False)
        y = net.conv(net.conv(x, few, given=3, made=9), few, 3, given=9)
        y = net.conv(y, many, residual=(shortcut, 77))
        z = net.conv(y, few)
        z = net.conv(z, few, 3, made=5, residual=(z, 0))
        z = net.conv(z, many, given=5, residual=(y, 0))
        shortcut = net.conv(z, many, stride=2, made=100, relu=False)
        z = net.conv(net.conv(z, few), few, 3, stride=2)
        return net.mean(net.conv(z, many, residual=(shortcut, 100), made=2), 2)

    return body


def sides(mod) -> set:
    found = [
        attrs_of(b.value) for b in bindings_of(mod["main"]) if is_call(b.value, int8.INT8_CONV2D)
    ]
    return {(a.get("planes_in", 0), a.get("planes_out", 0)) for a in found}


def run_in_planes(mod, x: np.ndarray) -> tuple[np.ndarray, CompiledVariant]:
    """What the compiled network makes of x, and its kernels."""
    target = detect_host()
    fused = pipeline.fuse_graph(KeepPlanes()(mod), target)
    compiled = pipeline.compile_graph("planes", fused, target)
    machine = relax.VirtualMachine(compiled.executable, tvm.cpu())
    constants = tuple(tvm.runtime.tensor(np.asarray(c)) for c in compiled.constants)
    return machine["main"](tvm.runtime.tensor(x), constants).numpy(), compiled


@pytest.mark.parametrize(
    ("grain", "shape", "channels"),
    [
        ("block:4x4", (1, 14, 14, 32), (32, 64)),
        ("in:4", (2, 9, 11, 20), (12, 20)),
        ("in:4", (1, 14, 16, 160), (140, 40)),
        ("block:8x4", (2, 9, 11, 20), (12, 20)),
    ],
)
def test_a_residual_network_is_exact_in_planes(grain, shape, channels, rng):
    """Pixels that fill vectors and that do not, several images, blocks that reach past the channels, panels of some channels."""
    mod = built(shape, grain, rng, residuals(*channels))
    kept = KeepPlanes()(mod)
    assert sides(kept) == {(0, 1), (1, 1)}
    x = rng.integers(0, 256, shape).astype("uint8")
    (want,) = evaluate(mod, [x], dtype="float32", references=FAMILY.references)
    got, compiled = run_in_planes(mod, x)
    windows = "sparse_near" if grain == "in:4" else "sparse_windows"
    assert {k.loops for k in compiled.kernels if k.layers} == {"sparse_chain", windows}
    assert len(np.unique(want)) > 3 and np.array_equal(got, want)


@pytest.mark.parametrize("grain", ["in:4", "block:4x4"])
def test_planes_are_read_as_signed_bytes(grain, rng, signed_pixels):
    """As planes hold them, zero points around images too, and not only where channels last are packed."""

    def body(net, x):
        y = net.conv(net.conv(x, 8, given=3, made=9), 8, 3, given=9)
        return net.mean(net.conv(y, 8))

    mod = built((1, 9, 11, 8), grain, rng, body)
    x = rng.integers(0, 256, (1, 9, 11, 8)).astype("uint8")
    (want,) = evaluate(mod, [x], dtype="float32", references=FAMILY.references)
    assert np.array_equal(run_in_planes(mod, x)[0], want)


NEAR_MISSES = {
    "channels that are no quads": lambda n, x: n.mean(n.conv(n.conv(x, 6), 8)),
    "a mean over windows": lambda n, x: n.emit(
        int8.int8_average_pool(n.conv(x, 8), pool_size=(2, 2), zero_point=0, layout="NHWC")
    ),
    "the output of the network": lambda n, x: n.conv(x, 8),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_no_planes_of_quads_stays_channels_last(name, rng):
    kept = KeepPlanes()(built((1, 9, 9, 8), "block:4x4", rng, NEAR_MISSES[name]))
    expected = {(0, 0), (0, 1)} if name.startswith("channels") else {(0, 0)}
    assert sides(kept) == expected
