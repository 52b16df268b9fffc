# SPDX-License-Identifier: Apache-2.0
"""The model's inputs are read wherever they lie, with the same results; whatever else kernels read stays aligned."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from compiler import pipeline
from compiler.arrays import ALIGNMENT
from compiler.divergence import find_first_divergence
from compiler.frontend import TensorSpec
from compiler.runtime import from_variant
from passes.layers import conv2d, shape_of
from passes.quantized import operators as quantized
from passes.samples import Layers, graph
from passes.sparse.operators import sparse_call
from schedules.target import NAMED, detect_host

OP = relax.op


def placed(array, offset):
    """A copy of `array` whose memory begins `offset` bytes behind a multiple of ALIGNMENT."""
    memory = np.empty(array.nbytes + 2 * ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT + offset
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _stem(layers: Layers, x):
    """A first layer that pools, between planes."""
    weight = layers.constant(32, 3, 7, 7)
    y = conv2d(x, weight, name="stem", strides=(2, 2), padding=(3, 3, 3, 3))
    y = layers.emit(OP.nn.relu(layers.emit(y)))
    return layers.emit(OP.nn.max_pool2d(y, (3, 3), (2, 2), padding=(1, 1)))


def _sparse(layers: Layers, x):
    weight = layers.rng.standard_normal((32, 32, 3, 3)) * (layers.rng.random((32, 32, 3, 3)) < 0.2)
    weight = relax.const(weight.astype("float32"))
    return layers.emit(
        sparse_call(conv2d(x, weight, name="a", padding=(1, 1, 1, 1)), grain="element")
    )


def _bytes(layers: Layers, x):
    quantized.register()
    weight = layers.rng.integers(-127, 128, (32, 3, 3, 3)).astype("int8")
    q = layers.emit(quantized.quantize(x, scale=0.02, zero_point=114))
    y = quantized.int8_conv2d(
        q, relax.const(weight), name="a", zero_point=114, padding=(1, 1, 1, 1)
    )
    return layers.emit(OP.astype(layers.emit(y), "float32"))


def _view(layers: Layers, x):
    y = layers.emit(OP.reshape(x, (12, 80)))
    return layers.emit(OP.exp(layers.dense("head", y, 33)))


NETWORKS = {
    "first layer that pools": graph((1, 3, 130, 130), _stem),
    "sparse": graph((1, 32, 9, 9), _sparse),
    "bytes": graph((2, 3, 17, 17), _bytes),
    "view": graph((3, 4, 80), _view),
    "elementwise": graph((1, 4, 7, 7), lambda layers, x: layers.emit(OP.exp(x))),
}


def compiled(mod, target):
    """The compiled variant, the model and its input's shape."""
    fused = pipeline.fuse_graph(pipeline.lay_out(mod), target)
    variant = pipeline.compile_graph("dense", fused, target)
    main = mod["main"]
    shape = shape_of(main.params[0])
    specs = (
        [TensorSpec("x", shape, "float32")],
        [TensorSpec("y", shape_of(main.body.body), "float32")],
    )
    return variant, from_variant(variant, *specs, target), shape


@pytest.mark.parametrize("network", NETWORKS)
def test_results_are_the_same_wherever_the_input_lies_and_nothing_is_copied(
    network, rng, host_tiers
):
    mod = NETWORKS[network](rng)
    tiers = [detect_host(), *(t for t in host_tiers if network == "bytes")]
    for target in tiers:
        variant, model, shape = compiled(mod, target)
        x = rng.standard_normal(shape).astype("float32")
        wanted = model(placed(x, 0))
        for offset in (4, 16, 60):
            given = placed(x, offset)
            np.testing.assert_array_equal(model(given), wanted, err_msg=target.name)
            read = np.from_dlpack(model.bind([given])[0]).ctypes.data
            assert (read == given.ctypes.data) == target.reads_unaligned
        # Definitions, which verification runs on the same inputs, assume more than kernels do.
        assert find_first_divergence(model, variant.unscheduled, [placed(x, 4)]) is None
        assert (variant.input_alignment < ALIGNMENT) == target.reads_unaligned


def test_only_what_reads_an_input_is_told_so(rng, monkeypatch):
    alignments = {}
    generate = pipeline.generate_code

    def spy(functions, *rest):
        for name, func in functions.items():
            alignments[name] = [int(p.data_alignment) for p in func.params]
        return generate(functions, *rest)

    monkeypatch.setattr(pipeline, "generate_code", spy)

    def body(layers: Layers, x):
        y = layers.emit(OP.nn.relu(layers.conv2d("a", x, 16)))
        return layers.emit(OP.nn.relu(layers.conv2d("b", y, 8)))

    target = NAMED["avx2"]
    variant, *_ = compiled(graph((1, 3, 9, 9), body)(rng), target)
    found = {k.layers[0]: alignments[k.function] for k in variant.kernels if k.layers}
    assert set(found["b"]) == {ALIGNMENT}
    assert sorted(found["a"]) == [4] + [ALIGNMENT] * (len(found["a"]) - 1)
    assert found["a"][-1] == ALIGNMENT  # what it writes
    alignments.clear()
    variant, *_ = compiled(graph((1, 3, 9, 9), body)(rng), NAMED["generic"])
    assert {a for each in alignments.values() for a in each} == {ALIGNMENT}
    assert variant.input_alignment == ALIGNMENT
