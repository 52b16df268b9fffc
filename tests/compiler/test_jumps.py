# SPDX-License-Identifier: Apache-2.0
"""Networks that round to steps: verified tensor by tensor; a flip at a tie is no bug, and no bug is taken for one."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from compiler import pipeline, verify
from compiler.comparison import Steps, check_kernels, require_passed
from compiler.frontend import TensorSpec
from compiler.jumps import (
    Replay,
    closest,
    jumping_operators,
    jumps_in,
    moved_steps,
    written_tensors,
)
from compiler.runtime import from_variant
from passes.family import Context
from passes.layers import attrs_of, const_array, conv2d, dense, is_call, operator_call, register
from passes.quantized import operators as int8
from passes.quantized.reference import quantize
from passes.rewriting import Graph, bindings_of, constant, rewrite_module
from passes.treat_layers import treat_layers
from passes.treatment import Treatment
from schedules.errors import VerificationError
from schedules.target import detect_host

op = relax.op
SHAPE = (1, 6, 9, 7)


def floats(rng, *shape):
    return rng.standard_normal(shape).astype("float32")


@pytest.fixture(scope="module")
def network():
    """A float network with a residual and two layers, its int8 form, and an input."""
    rng = np.random.default_rng(5)
    register()
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            w = floats(rng, 8, 6, 3, 3) / 7
            y = bb.emit(conv2d(x, relax.const(w), name="a", padding=(1, 1, 1, 1)))
            y = bb.emit(op.nn.relu(bb.emit(op.add(y, relax.const(floats(rng, 1, 8, 1, 1))))))
            w = floats(rng, 8, 8, 3, 3) / 8
            z = bb.emit(conv2d(y, relax.const(w), name="b", padding=(1, 1, 1, 1)))
            z = bb.emit(op.nn.relu(bb.emit(op.add(z, y))))
            z = bb.emit(op.mean(z, [2, 3]))
            out = bb.emit_output(dense(z, relax.const(floats(rng, 5, 8)), name="c"))
        bb.emit_func_output(out)
    mod = bb.get()
    samples = [[floats(rng, *SHAPE)] for _ in range(3)]

    def observe(graph, names):
        from passes.evaluate import evaluate

        for sample in samples:
            seen = {"x": sample[0]}
            evaluate(graph, sample, dtype="float32", observe=seen.__setitem__)
            yield seen

    target = detect_host()
    asked = dict.fromkeys("abc", Treatment("int8", {"equalize": False}))
    return treat_layers(mod, asked, Context(target, observe)).treated, samples[0]


def compiled(mod):
    target = detect_host()
    variant = pipeline.compile_graph(
        "compressed", pipeline.fuse_graph(pipeline.lay_out(mod), target), target
    )
    specs = [TensorSpec("x", SHAPE, "float32")], [TensorSpec("y", (1, 5), "float32")]
    return from_variant(variant, *specs, target)


def judged(graph, model, inputs):
    """The check of `model` against `graph`, as a build makes it."""
    results, steps = verify._evaluate_jumping(graph, inputs, model, jumping_operators())
    found = [[np.asarray(model(*inputs))]]
    return check_kernels(found, [results["float64"]], [results["float32"]], 16.0, steps=steps)


def changed(mod, operator, layer, change):
    """`mod` with one call of an operator replaced by `change(call)`."""

    def rewrite(func):
        graph = Graph(func)
        for binding in bindings_of(func):
            value, graph.current = graph.substitute(binding.value), binding.var
            if is_call(value, operator) and layer in (attrs_of(value).get("name"), None):
                value = change(value)
            graph.define(binding.var, value)
        return graph.finish(func)

    return rewrite_module(mod, rewrite)


def test_what_the_kernels_compute_passes_and_every_tensor_was_looked_at(network):
    graph, inputs = network
    assert jumps_in(graph, jumping_operators())
    model = compiled(graph)
    check = judged(graph, model, inputs)
    assert check.passed and check.steps.wrong == 0
    assert check.steps.tensors == sum(
        is_call(b.value, int8.QUANTIZE) for b in bindings_of(graph["main"])
    )
    assert len(written_tensors(model, inputs)) >= check.steps.tensors
    # No wider a tolerance than a network of floats would have.
    assert check.tolerance < 1e-4 * np.abs(model(*inputs)).max()


def other_weight(call):
    """One weight of the layer off by one step."""
    w = const_array(call.args[1]).copy()
    w.reshape(-1)[-1] += 1 if w.reshape(-1)[-1] < 0 else -1
    return relax.Call(call.op, [call.args[0], constant(w)], call.attrs, ret_ty=call.ty)


def other_border(call):
    """Pixels outside the image count as something else than zero."""
    attrs = attrs_of(call)
    return operator_call(
        call.op.name, list(call.args), **{**attrs, "zero_point": attrs["zero_point"] + 1}
    )


def truncated(call):
    """Rounding down instead of to the nearest."""
    attrs = attrs_of(call)
    half = op.subtract(call.args[0], relax.const(np.float32(0.499 * attrs["scale"])))
    return operator_call(call.op.name, [half], **attrs)


@pytest.mark.parametrize(
    ("operator", "layer", "bug"),
    [(int8.INT8_CONV2D, "b", other_weight), (int8.INT8_CONV2D, "a", other_border),
     (int8.QUANTIZE, None, truncated)],
)  # fmt: skip
def test_a_bug_is_found(network, operator, layer, bug):
    graph, inputs = network
    check = judged(graph, compiled(changed(graph, operator, layer, bug)), inputs)
    assert check.steps.wrong > 0 and not check.passed
    with pytest.raises(VerificationError, match="another step"):
        from compiler.comparison import Verification

        require_passed(Verification(1, {"compressed": check}, {}))


# ---- one tensor


ATTRS = {"scale": 1.0, "zero_point": 10}


def replayed(exact, plain, written, terms=16.0) -> Steps:
    replay = Replay([written], terms)
    replay.exact(quantize)(ATTRS, np.asarray(exact, "float64"))
    replay.plain(quantize)(ATTRS, np.asarray(plain, "float32"))
    return sum(replay.steps, Steps())


def test_at_a_tie_either_step_is_right():
    exact = np.array([2.5 - 1e-7, 7.0, 2.5 + 1e-7, -3.0])
    for ends in ([12, 17, 13, 7], [13, 17, 12, 7]):
        found = replayed(exact, exact, np.array(ends, "uint8"))
        assert (found.wrong, found.elements) == (0, 4)
    assert replayed(exact, exact, np.array([13, 17, 12, 7], "uint8")).ties == 2


@pytest.mark.parametrize(
    "ends",
    [[14, 17, 13, 7], [12, 18, 13, 7], [12, 17, 13, 6], [11, 17, 12, 7]],
    ids=["two steps at a tie", "one step elsewhere", "one step below", "the wrong side of a tie"],
)
def test_away_from_a_tie_nothing_else_is(ends):
    exact = np.array([2.5 - 1e-7, 7.0, 2.5 + 1e-7, -3.0])
    assert replayed(exact, exact, np.array(ends, "uint8")).wrong == 1


def test_how_near_a_tie_is_follows_what_float32_does():
    exact = np.array([2.498, 100.0])
    other = np.array([13, 110], "uint8")
    assert replayed(exact, exact, other).wrong == 1
    assert replayed(exact, exact + np.array([0.0005, 0]), other).wrong == 0


def test_a_tensor_that_no_kernel_wrote_is_wrong():
    found = replayed(np.zeros(4), np.zeros(4), np.zeros(5, "uint8"))
    assert found.wrong == found.elements == 4


def test_tensors_are_found_by_what_they_hold(rng):
    wanted = rng.integers(0, 255, (1, 3, 4, 5)).astype("uint8")
    noise = rng.integers(0, 255, (1, 4, 5, 3)).astype("uint8")
    last = wanted.transpose(0, 2, 3, 1)
    padded = np.pad(last, ((0, 0), (0, 0), (0, 0), (0, 1)))
    bordered = np.pad(last, ((0, 0), (2, 1), (0, 3), (0, 0)), constant_values=9)
    flattened = (
        wanted.reshape(-1),
        wanted.reshape(1, -1),
        last.reshape(1, -1),
        last.reshape(1, 20, 3),
    )
    for held in (wanted, last, padded, bordered, *flattened):
        np.testing.assert_array_equal(closest([noise, held.copy()], wanted), wanted)
    assert closest([last.astype("int8")], wanted) is None


def test_a_matrix_is_found_without_its_unused_columns(rng):
    wanted = rng.integers(0, 255, (3, 18)).astype("uint8")
    padded = np.pad(wanted, ((0, 0), (0, 2)))
    np.testing.assert_array_equal(closest([padded], wanted), wanted)
    assert closest([padded[:2]], wanted) is None and closest([padded[:, :16]], wanted) is None


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_an_image_is_found_without_the_spare_channels_of_its_groups(rng, groups):
    wanted = rng.integers(0, 256, (1, 6, 4, 3)).astype("uint8")
    each = wanted.reshape(1, groups, 6 // groups, 4, 3)
    spare = [(0, 0), (0, 0), (0, -(6 // groups) % 4), (0, 0), (0, 0)]
    padded = np.pad(each, spare).reshape(1, -1, 4, 3).transpose(0, 2, 3, 1)
    noise = rng.integers(0, 256, padded.shape).astype("uint8")
    np.testing.assert_array_equal(closest([noise, padded], wanted), wanted)
    assert closest([padded[..., :5]], wanted) is None


@pytest.fixture(scope="module")
def joined():
    """Two tensors of steps that are joined, one of them moved first: as a kernel may write them."""
    bb = relax.BlockBuilder()
    a, b = (relax.Var(n, relax.TensorType(s, "float32")) for n, s in (("a", (1, 3, 4, 5)), ("b", (1, 20, 6))))  # fmt: skip
    with bb.function("main", [a, b]):
        with bb.dataflow():
            q, r = (bb.emit(int8.quantize(v, scale=1.0, zero_point=10)) for v in (a, b))
            r = bb.emit(op.reshape(bb.emit(op.permute_dims(r, [0, 2, 1])), (1, 6, 4, 5)))
            out = bb.emit_output(bb.emit(op.concat([q, r], 1)))
        bb.emit_func_output(out)
    return bb.get()


def test_tensors_are_found_in_what_is_made_of_them_by_moving(rng, joined):
    q, r = (rng.integers(0, 256, s).astype("uint8") for s in ((1, 3, 4, 5), (1, 20, 6)))
    moved = r.transpose(0, 2, 1).reshape(1, 6, 4, 5)
    written = np.concatenate([q, moved], 1)
    noise = rng.integers(0, 256, (1, 20, 6)).astype("uint8")
    first, second = moved_steps(joined, jumping_operators())
    for held in (written, written.transpose(0, 2, 3, 1).copy()):
        np.testing.assert_array_equal(closest([noise, held], q, first), q)
        np.testing.assert_array_equal(closest([noise, held], r, second), r)
    # A wrong element is still wrong, and what no kernel wrote is not found.
    wrong = written.copy()
    wrong[0, 4, 2, 1] ^= 64
    assert np.count_nonzero(closest([wrong], r, second) != r) == 1
    assert closest([moved], q, first) is None
    assert np.count_nonzero(closest([noise], r, second) != r) > 90


def test_a_kernel_that_rounds_and_joins_is_verified(rng):
    """Resized images that are joined for an int8 layer: the graph rounds each, one kernel rounds and joins them."""
    register()
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            parts = []
            for i, size in enumerate(((3, 4), (5, 2))):
                y = bb.emit(op.image.resize2d(x, relax.ShapeExpr(size), layout="NCHW", method="linear"))  # fmt: skip
                y = bb.emit(op.image.resize2d(y, relax.ShapeExpr((6, 6)), layout="NCHW", method="linear"))  # fmt: skip
                parts.append(bb.emit(int8.quantize(y, scale=0.03, zero_point=100 + i)))
            y = bb.emit(op.concat(parts, 1))
            w = rng.integers(-99, 99, (5, 12, 6, 6)).astype("int8")
            y = bb.emit(int8.int8_conv2d(y, constant(w), name="l", zero_point=100))
            y = bb.emit(op.multiply(op.astype(y, "float32"), constant(np.float32(1e-4))))
            out = bb.emit_output(op.reshape(y, (1, 5)))
        bb.emit_func_output(out)
    mod, inputs = bb.get(), [floats(rng, *SHAPE)]
    check = judged(mod, compiled(mod), inputs)
    assert (check.steps.tensors, check.steps.wrong) == (2, 0)
