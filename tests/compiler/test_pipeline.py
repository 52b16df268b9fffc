# SPDX-License-Identifier: Apache-2.0
"""From a canonical graph to kernels: names survive fusion, weights leave the library, results are right."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from compiler import pipeline
from compiler.frontend import TensorSpec
from compiler.runtime import from_variant
from passes.evaluate import evaluate
from passes.family import Context
from passes.layers import conv2d, dense, register
from passes.treat_layers import treat_layers
from passes.treatment import Treatment
from schedules.fused import Fused
from schedules.target import NAMED, detect_host

SHAPE = (1, 8, 12, 12)


@pytest.fixture
def residual(rng):
    """conv -> relu -> conv -> + residual -> relu -> pool -> dense, two convolutions of one shape."""
    register()

    def const(*shape):
        return relax.const(
            (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("float32")
        )

    op, bb = relax.op, relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            y = x
            for name in ("block.conv1", "block.conv2"):
                y = bb.emit(conv2d(y, const(8, 8, 3, 3), name=name, padding=(1, 1, 1, 1)))
                y = bb.emit(op.nn.relu(bb.emit(op.add(y, const(1, 8, 1, 1)))))
            y = bb.emit(op.nn.relu(bb.emit(op.add(y, x))))
            y = bb.emit(op.mean(y, axis=[2, 3]))
            y = bb.emit_output(dense(y, const(5, 8), name="head"))
        bb.emit_func_output(y)
    return bb.finalize()


def compiled(mod, target):
    return pipeline.compile_graph(
        "dense", pipeline.fuse_graph(pipeline.lay_out(mod), target), target
    )


def loaded(variant, target):
    specs = [TensorSpec("x", SHAPE, "float32")], [TensorSpec("y", (1, 5), "float32")]
    return from_variant(variant, *specs, target)


def test_every_layer_is_found_again_behind_its_kernel(residual):
    variant = compiled(residual, NAMED["avx2"])
    assert [layer for kernel in variant.kernels for layer in kernel.layers] == [
        "block.conv1",
        "block.conv2",
        "head",
    ]
    first, second, head = [kernel for kernel in variant.kernels if kernel.layers]
    assert first.flops == second.flops == 2 * 8 * 8 * 9 * 144
    assert head.flops == 2 * 5 * 8
    # Bias, activation and residual are in the kernels of the layers, not kernels of their own.
    assert "add" in second.function and "relu" in second.function
    assert not [k.function for k in variant.kernels if not k.layers and "relu" in k.function]


def test_layers_of_one_shape_share_their_code_but_not_their_weights(residual):
    variant = compiled(residual, NAMED["avx2"])
    owners = [name.split("/")[0] for name in variant.constant_names]
    assert {"block.conv1", "block.conv2", "head"} <= set(owners)
    assert len(variant.constant_names) == len(set(variant.constant_names)) == len(variant.constants)


def test_every_tier_computes_what_the_graph_says(residual, rng, host_tiers):
    x = rng.standard_normal(SHAPE).astype("float32")
    wanted = evaluate(residual, [x])[0]
    for target in host_tiers:
        np.testing.assert_allclose(
            loaded(compiled(residual, target), target)(x),
            wanted,
            rtol=0,
            atol=2e-6,
            err_msg=target.name,
        )


def _after_dense(tail):
    """`tail(bb, dense(x))` as a module; 12 columns are no multiple of most vectors."""
    register()
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((3, 8), "float32"))
    weight = np.random.default_rng(0).standard_normal((12, 8)).astype("float32")
    with bb.function("main", [x]):
        with bb.dataflow():
            y = bb.emit(dense(x, relax.const(weight), name="head"))
            y = bb.emit_output(tail(bb, y))
        bb.emit_func_output(y)
    return bb.finalize()


def _masked(bb, y):
    inside = bb.emit(relax.op.logical_not(bb.emit(relax.op.greater(y, relax.const(0.5)))))
    return relax.op.where(inside, y, bb.emit(relax.op.negative(y)))


@pytest.mark.parametrize(
    "tail, dtype",
    [
        (lambda _bb, y: relax.op.greater(y, relax.const(0.0)), "bool"),
        (_masked, "float32"),
        (lambda _bb, y: relax.op.cumsum(y, 1), "float32"),
    ],
    ids=["truth values", "masked", "cumulative sum"],
)
def test_what_follows_a_layer(tail, dtype, rng, host_tiers):
    mod = _after_dense(tail)
    x = rng.standard_normal((3, 8)).astype("float32")
    wanted = evaluate(mod, [x])[0]
    specs = [TensorSpec("x", (3, 8), "float32")], [TensorSpec("y", (3, 12), dtype)]
    for target in host_tiers:
        found = from_variant(compiled(mod, target), *specs, target)(x)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6, err_msg=target.name)


_ACTIVATIONS = (relax.op.nn.silu, relax.op.tanh, relax.op.nn.gelu, relax.op.sigmoid) * 2


def _many_activations(bb, y):
    for activation in _ACTIVATIONS:
        y = bb.emit(activation(y))
    return relax.op.multiply(y, y)


def _gated(bb, y):
    """A recurrent cell's: what one kernel computes from several activations of one value, again and again."""
    for _ in range(3):
        gate, state = bb.emit(relax.op.sigmoid(y)), bb.emit(relax.op.tanh(y))
        y = bb.emit(relax.op.add(bb.emit(relax.op.multiply(gate, state)), y))
    return relax.op.greater(y, relax.const(0.5))


@pytest.mark.timeout(
    60
)  # each activation took twenty times as long to compile as the one before it
@pytest.mark.parametrize(
    "tail, dtype",
    [(_many_activations, "float32"), (_gated, "bool")],
    ids=["one after the other", "gated"],
)
@pytest.mark.parametrize("layer", [True, False], ids=["behind a layer", "alone"])
def test_activations_of_activations_compile_in_seconds(layer, tail, dtype, rng):
    target = detect_host()
    mod = _after_dense(tail) if layer else _alone(tail)
    x = rng.standard_normal((3, 8)).astype("float32")
    wanted = evaluate(mod, [x], dtype="float64")[0]
    variant = compiled(mod, target)
    assert len(variant.kernels) == 1
    outputs = [TensorSpec("y", wanted.shape, dtype)]
    found = from_variant(variant, [TensorSpec("x", (3, 8), "float32")], outputs, target)(x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6)


def _alone(tail):
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((3, 8), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            y = bb.emit_output(tail(bb, x))
        bb.emit_func_output(y)
    return bb.finalize()


def test_products_of_activations_count_their_operations():
    """Causal attention only what it sees: 3 queries see 1, 2 and 3 of 5 keys."""

    def products(mask):
        block = relax.BlockBuilder()
        q, m = (
            relax.Var(n, relax.TensorType(s, "float32"))
            for n, s in (("q", (2, 3, 4, 8)), ("m", (7, 8, 6)))
        )
        k = relax.Var("k", relax.TensorType((2, 5, 4, 8), "float32"))
        with block.function("main", [q, k, m]):
            with block.dataflow():
                seen = block.emit(relax.op.nn.attention(q, k, k, causal_mask=mask))
                flat = block.emit(relax.op.reshape(seen, (1, 24, 8)))
                out = block.emit_output(relax.op.matmul(flat, m))
            block.emit_func_output(out)
        kernels = compiled(block.get(), NAMED["avx2"]).kernels
        return {k.loops: k.flops for k in kernels if k.flops}

    matmul = 2 * 7 * 24 * 8 * 6
    assert products(None) == {"attention": 2 * 2 * 4 * 3 * 5 * 16, "batch_matmul": matmul}
    assert products("TopLeft") == {"attention": 2 * 2 * 4 * 6 * 16, "batch_matmul": matmul}


def test_winograd_can_be_forbidden():
    target = NAMED["avx512"]
    register()
    large = _wide()
    assert "winograd" in {k.loops for k in compiled(large, target).kernels}
    assert "winograd" not in {
        k.loops for k in compiled(pipeline.forbid_winograd(large), target).kernels
    }


def _wide():
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 64, 56, 56), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            weight = relax.const(np.ones((64, 64, 3, 3), "float32"))
            y = bb.emit_output(conv2d(x, weight, name="wide", padding=(1, 1, 1, 1)))
        bb.emit_func_output(y)
    return bb.finalize()


def test_only_what_a_lowering_names_counts_as_index(rng):
    """A sparse layer's pointers and columns do; a table of integers that the model itself holds does not."""
    table = relax.const(rng.integers(0, 9, (5, 7)).astype("int32"))
    weight = rng.standard_normal((32, 64, 1, 1)).astype("float32")
    weight[rng.random(weight.shape) < 0.95] = 0
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 64, 6, 6), "float32"))
    ids = relax.Var("ids", relax.TensorType((3,), "int32"))
    with builder.function("main", [x, ids]):
        with builder.dataflow():
            y = builder.emit(conv2d(x, relax.const(weight), name="c"))
            rows = builder.emit(relax.op.take(table, ids, axis=0))
            out = builder.emit_output(relax.Tuple([y, rows]))
        builder.emit_func_output(out)
    context = Context(detect_host())
    found = treat_layers(builder.get(), {"c": Treatment("sparse")}, context)
    assert found.decisions[0].declined is None
    graph = pipeline.fuse_graph(pipeline.lay_out(found.treated), context.target)
    variant = pipeline.compile_graph("compressed", graph, context.target)
    kinds = {(name.split("/")[0], np.asarray(c).dtype.kind, index)
             for name, c, index in zip(variant.constant_names, variant.constants, variant.index)}  # fmt: skip
    assert ("shared", "i", False) in kinds and ("c", "f", False) in kinds
    assert any(layer == "c" and index for layer, _, index in kinds)
    assert all(index for layer, kind, index in kinds if layer == "c" and kind != "f")


def test_a_slice_from_zero_on_is_not_fused_into_the_kernel_before_it():
    """TVM takes it for elementwise; the kernel would write all rows into a tensor of three."""
    register()
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((1, 4, 9, 8), "float32"))
    weight = relax.const(np.ones((8, 4, 3, 3), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(conv2d(x, weight, name="layer", padding=(1, 1, 1, 1)))
            y = builder.emit_output(relax.op.strided_slice(y, [2], [0], [3]))
        builder.emit_func_output(y)
    graph = pipeline.fuse_graph(pipeline.lay_out(builder.get()), NAMED["avx512"])
    anchors = [
        found
        for _, func in graph.mod.functions_items()
        if isinstance(func, tirx.PrimFunc) and (found := Fused.read(func)) is not None
    ]
    assert [fused.shape for fused in anchors] == [(1, 9, 8, 8)]


def test_kernels_without_weights_serve_the_layers_that_read_them(residual):
    """Into channels last for both convolutions; the mean over the image for the dense layer."""
    kernels = compiled(residual, NAMED["avx2"]).kernels
    served = [k.serves for k in kernels if not k.layers]
    assert served == [["block.conv1", "block.conv2"], ["head"]]
    assert not any(k.serves for k in kernels if k.layers)


class _Buffers:
    """`main` as the virtual machine gets it, less its kernel calls: tensors that are allocated, views, what is returned."""

    def __init__(self):
        self.bindings = []
        self.x = self._var("x")

    def _var(self, name: str) -> relax.Var:
        return relax.Var(name, relax.TensorType((4,), "float32"))

    def _bind(self, name: str, op, args) -> relax.Var:
        var = self._var(name)
        self.bindings.append(relax.VarBinding(var, relax.Call(op, args)))
        return var

    def tensor(self, name: str) -> relax.Var:
        return self._bind(name, tvm.ir.Op.get("relax.vm.alloc_tensor"), [self.x])

    def view(self, of: relax.Var) -> relax.Var:
        reshape = relax.ExternFunc("vm.builtin.reshape")
        return self._bind("view", reshape, [of, relax.ShapeExpr([2, 2])])

    def free(self, var: relax.Var) -> None:
        self._bind("freed", tvm.ir.Op.get("relax.vm.kill_object"), [var])

    def main(self, result: relax.Expr) -> relax.Function:
        body = relax.SeqExpr([relax.BindingBlock(self.bindings)], result)
        return relax.Function([self.x], body, relax.TensorType((4,), "float32"))


def test_what_a_kernel_without_layers_serves():
    """Layers that read what it wrote, itself, as a view, or through kernels like it; not those after it was overwritten."""
    b = _Buffers()
    moved, padded, hidden, out = (b.tensor(n) for n in ("moved", "padded", "hidden", "out"))
    view = b.view(moved)
    b.free(moved)
    arguments = [
        [b.x, moved],  # glue
        [view, padded],  # glue, of a view
        [padded, hidden],  # a
        [moved, hidden, hidden],  # b, which adds to what is there
        [hidden, out],  # c
    ]
    layers = [[], [], ["a"], ["b"], ["c"]]
    assert pipeline._served(b.main(out), arguments, layers) == [["a", "b"], ["a"], [], [], []]
    # A kernel whose result a layer writes over serves that layer, and not the one that reads it afterwards.
    layers[2] = []
    assert pipeline._served(b.main(out), arguments, layers)[:3] == [["b"], ["b"], ["b"]]


def test_a_kernel_serves_no_layer_where_its_result_goes_elsewhere_too():
    b = _Buffers()
    moved, other, out = (b.tensor(n) for n in ("moved", "other", "out"))
    arguments = [[b.x, moved], [moved, out], [moved, other]]
    layers = [[], ["a"], ["b"]]
    assert pipeline._served(b.main(out), arguments, layers)[0] == ["a", "b"]
    # One of its readers is a kernel that serves no layer: its result is the model's.
    assert pipeline._served(b.main(other), arguments, [[], ["a"], []]) == [[], [], []]
    # The model returns it, alone or among others, as it is or as a view.
    for result in (moved, relax.Tuple([out, moved]), b.view(moved)):
        assert pipeline._served(b.main(result), arguments, layers) == [[], [], []]
    # Something that is no kernel reads it.
    b._bind("host", relax.ExternFunc("vm.builtin.copy"), [moved])
    assert pipeline._served(b.main(out), arguments, layers) == [[], [], []]
