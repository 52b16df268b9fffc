# SPDX-License-Identifier: Apache-2.0
"""Dense integer first layers with max pooling in their kernel: every bit as in numpy; other windows stay apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from tvm import relax

from compiler import pipeline
from compiler.frontend import TensorSpec
from compiler.runtime import from_variant
from passes import layers
from passes.evaluate import evaluate
from passes.layers import is_call, shape_of
from passes.pool_convolutions import PoolConvolutions, left_apart
from passes.quantized import FAMILY, lowering
from passes.quantized import operators as int8
from passes.rewriting import bindings_of
from schedules.errors import ScheduleError
from schedules.target import NAMED, detect_host

op = relax.op


pytestmark = pytest.mark.usefixtures("every_image_is_far")


@dataclass(frozen=True)
class Case:
    """A float image, a convolution of its bytes with a bias, a maximum over windows, and what follows."""

    shape: tuple[int, ...]
    outputs: int
    kernel: int = 7
    strides: tuple[int, int] = (2, 2)
    size: int = 3
    windows: int = 2
    before: int = 1
    zero_point: int = 114
    tail: str = "bytes"


def network(case: Case, rng) -> tvm.IRModule:
    layers.register()
    int8.register()
    b = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(case.shape, "float32"))
    o = case.outputs
    shape = (o, case.shape[1], case.kernel, case.kernel)
    weight = relax.const(rng.integers(-128, 128, shape).astype("int8"))
    with b.function("main", [x]):
        with b.dataflow():
            y = b.emit(int8.quantize(x, scale=0.02, zero_point=case.zero_point))
            y = b.emit(
                int8.int8_conv2d(
                    y, weight, name="stem", zero_point=case.zero_point, strides=case.strides,
                    padding=(case.kernel // 2,) * 4,
                )
            )  # fmt: skip
            bias = rng.integers(-9999, 9999, (1, o, 1, 1)).astype("int32")
            y = b.emit(op.add(y, relax.const(bias)))
            if case.tail == "bytes":
                y = b.emit(op.astype(y, "float32"))
                scale = (rng.random((1, o, 1, 1)) * 2e-3 + 1e-4).astype("float32")
                y = b.emit(op.multiply(y, relax.const(scale)))
                y = b.emit(int8.quantize(y, scale=1.0, zero_point=5, bounded=True))
            y = op.nn.max_pool2d(y, (case.size,) * 2, (case.windows,) * 2, (case.before,) * 4)
            y = b.emit(y)
            if case.tail == "falling":  # which may not go before the maximum, and reads pixels
                more = rng.integers(-99, 99, shape_of(y)).astype("int32")
                y = b.emit(op.multiply(y, relax.const(np.int32(-3))))
                y = b.emit(op.add(y, relax.const(more)))
            out = b.emit_output(y)
        b.emit_func_output(out)
    return b.finalize()


def pooled_calls(mod) -> int:
    return sum(is_call(b.value, int8.INT8_POOLED_CONV2D) for b in bindings_of(mod["main"]))


def run(mod, x, target):
    """What the kernels give, and their loop structures."""
    fused = pipeline.fuse_graph(pipeline.lay_out(mod), target)
    variant = pipeline.compile_graph("pooled", fused, target)
    made = mod["main"].ret_ty
    outputs = [TensorSpec("y", tuple(int(d) for d in made.shape), str(made.dtype))]
    model = from_variant(variant, [TensorSpec("x", x.shape, "float32")], outputs, target)
    return model(x), [k.loops for k in variant.kernels]


CASES = {
    "stem": Case((1, 3, 44, 60), 64),
    "one vector and a rest": Case((2, 3, 28, 36), 17, kernel=5, zero_point=0),
    "few outputs": Case((1, 1, 20, 12), 3, kernel=3, zero_point=255),
    "stride 1": Case((1, 2, 10, 14), 33, kernel=3, strides=(1, 1)),
    "two rows": Case((1, 3, 4, 4), 40, kernel=3),
    "what follows falls": Case((2, 3, 20, 28), 24, tail="falling"),
}


@pytest.mark.parametrize("name", CASES)
def test_pooled_sums_are_exact(name, rng, host_tiers):
    case = CASES[name]
    mod = network(case, rng)
    assert left_apart(mod) == [] and pooled_calls(PoolConvolutions()(mod)) == 1
    x = rng.standard_normal(case.shape).astype("float32")
    x.flat[: case.shape[-1]] = np.linspace(-9, 9, case.shape[-1])
    (want,) = evaluate(mod, [x], dtype="float32", references=FAMILY.references)
    assert len(np.unique(want)) > 3
    targets = [detect_host(), detect_host().with_threads(3)]
    for target in [*targets, *host_tiers] if name == "stem" else targets:
        got, loops = run(mod, x, target)
        assert "int8_pooled" in loops
        np.testing.assert_array_equal(got, want, err_msg=f"{target.name} {target.threads}")


def test_sums_of_signed_pixels_are_exact(signed_pixels, rng):
    mod = network(CASES["two rows"], rng)
    x = rng.standard_normal(CASES["two rows"].shape).astype("float32")
    (want,) = evaluate(mod, [x], dtype="float32", references=FAMILY.references)
    got, loops = run(mod, x, NAMED["avx2"])
    assert "int8_pooled" in loops
    np.testing.assert_array_equal(got, want)


_STEM = Case((1, 3, 24, 24), 8)


@pytest.mark.parametrize(
    "case, told",
    [
        (replace(_STEM, size=2, before=0), True),
        (replace(_STEM, windows=1), True),
        (replace(_STEM, before=0), True),
        (replace(_STEM, shape=(1, 3, 22, 24)), True),  # an odd number of rows
        (replace(_STEM, shape=(1, 3, 24, 22)), True),
        (replace(_STEM, shape=(1, 4, 24, 24)), False),  # whole quads
        (replace(_STEM, kernel=1), False),
    ],
)
def test_other_windows_and_layers_stay_apart(case, told, rng):
    mod = network(case, rng)
    assert pooled_calls(PoolConvolutions()(mod)) == 0
    assert [("3x3 and stride 2" in line) for line in left_apart(mod)] == [True] * told


def test_a_layer_that_no_kernel_pools_is_refused(rng, monkeypatch):
    mod = PoolConvolutions()(network(_STEM, rng))
    assert pooled_calls(mod) == 1
    monkeypatch.setattr(lowering, "row_quads", lambda problem: None)
    with pytest.raises(ScheduleError, match="no kernel pools this layer"):
        run(mod, np.zeros(_STEM.shape, np.float32), NAMED["avx2"])
