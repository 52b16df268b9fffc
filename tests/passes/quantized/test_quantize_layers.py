# SPDX-License-Identifier: Apache-2.0
"""Layers on bytes: what lies in bytes, what is folded away, and how far the result is from the float graph."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from compiler import pipeline
from passes import layers
from passes.evaluate import evaluate
from passes.family import Context
from passes.layers import attrs_of, const_array, is_call
from passes.quantized import FAMILY, treat_graph
from passes.quantized import operators as int8
from passes.quantized.plan_bytes import plan_bytes
from passes.rewriting import bindings_of
from passes.treat_layers import layers_of, treat_layers
from passes.treatment import Treatment
from schedules.dispatch import schedule_module
from schedules.errors import UserError
from schedules.target import NAMED

op = relax.op
PLAIN = {"bias_correction": False, "equalize": False, "observer": "min_max"}


def floats(rng, *shape):
    return rng.standard_normal(shape).astype("float32")


def conv(b, x, rng, outputs, kernel=3, *, name, bias=True, **attrs):
    inputs = layers.shape_of(x)[1] // attrs.get("groups", 1)
    w = floats(rng, outputs, inputs, kernel, kernel) / np.sqrt(inputs * kernel * kernel)
    attrs.setdefault("padding", (kernel // 2,) * 4)
    y = b.emit(layers.conv2d(x, relax.const(w), name=name, **attrs))
    return b.emit(op.add(y, relax.const(floats(rng, 1, outputs, 1, 1)))) if bias else y


def dense(b, x, rng, outputs, *, name):
    w = floats(rng, outputs, layers.shape_of(x)[-1]) / np.sqrt(layers.shape_of(x)[-1])
    y = b.emit(layers.dense(x, relax.const(w), name=name))
    return b.emit(op.add(y, relax.const(floats(rng, outputs))))


@pytest.fixture
def quantized(build, observing, rng):
    """`quantized(shape, body, asked=None, **parameters)`: the graph, what int8 makes of it, and its relative error."""

    def make(shape, body, asked=None, **parameters):
        mod = build([shape], body)
        samples = [[floats(rng, *shape)] for _ in range(4)]
        names = asked or [x.name for x in layers_of(mod)]
        treatment = Treatment("int8", {**PLAIN, **parameters})
        context = Context(NAMED["avx512"], observing(samples))
        found = treat_layers(mod, dict.fromkeys(names, treatment), context)
        wanted = evaluate(mod, samples[0])
        got = evaluate(found.treated, samples[0], references=FAMILY.references)
        for a, b in zip(wanted, got):
            assert a.dtype == b.dtype
        return mod, found, max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(wanted, got))

    return make


def names(mod) -> list[str]:
    return [b.value.op.name.split(".")[-1] for b in bindings_of(mod["main"])]


def calls(mod, name):
    return [b.value for b in bindings_of(mod["main"]) if is_call(b.value, name)]


def test_a_chain_stays_in_bytes(quantized, rng):
    def body(b, x):
        for name, groups in (("a", 1), ("b", 8), ("c", 1)):
            x = b.emit(op.nn.relu(conv(b, x, rng, 8, name=name, groups=groups)))
        return x

    _, found, error = quantized((1, 8, 9, 7), body)
    # relu vanishes where it is followed by bytes; the last one is the output's
    step = ["int8_conv2d", "add", "astype", "multiply"]
    assert names(found.treated) == ["quantize", *step, "quantize", *step, "quantize", *step, "relu"]
    first, *others = [attrs_of(q) for q in calls(found.treated, int8.QUANTIZE)]
    assert all(q["scale"] == 1.0 and q["bounded"] for q in others)
    assert "bounded" not in first  # the input may be anything
    assert error < 0.02
    assert [d.treatment for d in found.decisions] == ["int8"] * 3
    assert found.reference is found.treated


@pytest.mark.parametrize("activation", [op.nn.silu, op.nn.gelu, op.sigmoid])
def test_an_exponential_that_is_rounded_to_bytes_does_not_grow_where_it_is_read(
    quantized, rng, activation
):
    """TVM's simplifier puts what is bound in the place of each reader: four readings of four vectors in each store."""

    def body(b, x):
        y = b.emit(activation(conv(b, x, rng, 96, 1, name="a")))
        return conv(b, y, rng, 8, 1, name="b")

    _, found, _ = quantized((1, 24, 4, 4), body)
    target = NAMED["avx512-vnni"]
    graph = pipeline.fuse_graph(pipeline.lay_out(found.treated), target)
    scheduled, kernels = schedule_module(graph.mod, target)
    (name,) = [n for n, k in kernels.items() if k.loops == "int8_contraction" and "quantize" in n]
    before = tvm.IRModule({name: scheduled[name]})
    assert len(str(tvm.tirx.transform.StmtSimplify()(before))) < 3 * len(str(before))


def test_a_channel_whose_weights_are_all_zero_is_scaled_like_the_others(quantized, rng):
    """Only its bias is left of it, which is rounded no more coarsely, and its sums are known to be as small."""

    def body(b, x):
        w = floats(rng, 8, 4, 1, 1) * 0.05
        w[3] = 0
        y = b.emit(layers.conv2d(x, relax.const(w), name="pruned"))
        y = b.emit(
            op.nn.relu(b.emit(op.add(y, relax.const(np.full((1, 8, 1, 1), 0.1, "float32")))))
        )
        return conv(b, y, rng, 4, name="next")

    _, found, error = quantized((1, 4, 6, 6), body)
    _, between = [attrs_of(q) for q in calls(found.treated, int8.QUANTIZE)]
    assert between["bounded"] and error < 0.02


def test_relu_stays_where_zero_is_not_the_first_step(quantized, rng):
    def body(b, x):
        y = b.emit(op.nn.relu(conv(b, x, rng, 8, name="a")))
        z = conv(b, x, rng, 8, name="b")
        return conv(b, b.emit(op.concat([y, z], 1)), rng, 4, name="c")

    _, found, error = quantized((1, 4, 6, 6), body)
    assert names(found.treated).count("relu") == 1
    (joined,) = calls(found.treated, "relax.concat")
    assert str(joined.ty.dtype) == "uint8"
    parts = calls(found.treated, int8.QUANTIZE)
    assert len({attrs_of(q)["step"] for q in parts}) == 2  # x has its own, both parts share one
    assert error < 0.02


def test_the_ceiling_of_relu6_vanishes_only_if_bytes_end_there(quantized, rng):
    def body(ceiling):
        def build_it(b, x):
            y = b.emit(op.nn.relu(conv(b, x, rng, 8, name="a")))
            y = b.emit(op.minimum(y, relax.const(np.float32(ceiling))))
            return conv(b, y, rng, 4, 1, name="b", padding=(0, 0, 0, 0))

        return build_it

    reached = quantized((1, 4, 8, 8), body(0.5))
    assert "minimum" not in names(reached[1].treated) and reached[2] < 0.02
    clipped = quantized((1, 4, 8, 8), body(0.5), observer="percentile", percentile=60.0)
    assert "minimum" not in names(clipped[1].treated)


def test_a_ceiling_per_channel_stays_but_the_relu_below_it_goes(quantized, rng):
    def body(b, x):
        y = b.emit(op.nn.relu(conv(b, x, rng, 4, name="a")))
        y = b.emit(
            op.minimum(y, relax.const(np.array([0.1, 0.5, 2, 9], "float32").reshape(1, 4, 1, 1)))
        )
        return conv(b, y, rng, 4, 1, name="b", padding=(0, 0, 0, 0))

    _, found, error = quantized((1, 4, 8, 8), body)
    assert "relu" not in names(found.treated) and names(found.treated).count("minimum") == 1
    assert error < 0.02


def test_a_residual_joins_as_bytes(quantized, rng):
    def body(b, x):
        x = b.emit(op.nn.relu(conv(b, x, rng, 8, name="stem")))
        y = b.emit(op.nn.relu(conv(b, x, rng, 8, name="a")))
        y = b.emit(op.nn.relu(b.emit(op.add(conv(b, y, rng, 8, name="b"), x))))
        return conv(b, y, rng, 4, name="c")

    _, found, error = quantized((1, 4, 8, 8), body)
    assert len(calls(found.treated, int8.DEQUANTIZE_ADD)) == 1
    assert "dequantize" not in names(found.treated)
    assert error < 0.02


def test_of_two_branches_the_later_becomes_bytes_and_comes_right_before_the_sum(quantized, rng):
    def body(b, x):
        y = conv(b, x, rng, 8, name="main", strides=(2, 2))
        z = conv(b, x, rng, 8, 1, name="shortcut", strides=(2, 2), padding=(0, 0, 0, 0))
        return conv(b, b.emit(op.nn.relu(b.emit(op.add(y, z)))), rng, 4, name="c")

    _, found, error = quantized((1, 4, 9, 9), body)
    order = names(found.treated)
    at = order.index("dequantize_add")
    assert order[at - 1] == "quantize" and order.count("dequantize_add") == 1
    main = calls(found.treated, int8.INT8_CONV2D)[0]
    assert attrs_of(main)["name"] == "main"
    assert error < 0.02


def test_max_pooling_and_flattening_move_bytes(quantized, rng):
    def body(b, x):
        y = b.emit(op.nn.relu(conv(b, x, rng, 4, name="a")))
        y = b.emit(op.nn.max_pool2d(y, (2, 2), (2, 2)))
        return dense(b, b.emit(op.reshape(y, (1, 64))), rng, 5, name="fc")

    _, found, error = quantized((1, 3, 8, 8), body)
    for name in ("relax.nn.max_pool2d", "relax.reshape"):
        assert str(calls(found.treated, name)[0].ty.dtype) == "uint8"
    assert error < 0.02


@pytest.mark.parametrize("pool", ["mean", "mean_flat", "avg_pool"])
def test_means_read_bytes(quantized, rng, pool):
    def body(b, x):
        y = b.emit(op.nn.relu(conv(b, x, rng, 4, name="a")))
        if pool == "avg_pool":
            y = b.emit(op.nn.avg_pool2d(y, (3, 3), (2, 2), (1, 1, 1, 1)))
            y = b.emit(op.reshape(y, (1, 64)))
        else:
            y = b.emit(op.mean(y, [2, 3], keepdims=pool == "mean"))
            y = b.emit(op.reshape(y, (1, 4))) if pool == "mean" else y
        return dense(b, y, rng, 5, name="fc")

    _, found, error = quantized((1, 3, 8, 8), body)
    assert len(calls(found.treated, int8.INT8_AVERAGE_POOL)) == 1
    assert not {"mean", "avg_pool2d", "dequantize"} & set(names(found.treated))
    assert error < 0.03


def test_squeeze_and_excitation_scales_bytes(quantized, rng):
    def body(b, x):
        y = b.emit(op.nn.relu(conv(b, x, rng, 8, name="a")))
        s = b.emit(op.mean(y, [2, 3], keepdims=True))
        s = b.emit(op.sigmoid(conv(b, s, rng, 8, 1, name="gate", padding=(0, 0, 0, 0))))
        return conv(b, b.emit(op.multiply(y, s)), rng, 4, 1, name="c", padding=(0, 0, 0, 0))

    _, found, error = quantized((1, 3, 8, 8), body)
    assert names(found.treated).count("dequantize") == 1
    assert len(calls(found.treated, int8.INT8_AVERAGE_POOL)) == 1
    assert error < 0.03


def test_a_layer_left_float_reads_floats(quantized, rng):
    def body(b, x):
        y = b.emit(op.nn.relu(conv(b, x, rng, 8, name="a")))
        y = b.emit(op.nn.relu(conv(b, y, rng, 8, name="b")))
        return conv(b, y, rng, 4, name="c")

    _, found, error = quantized((1, 3, 8, 8), body, asked=["a", "c"])
    assert len(calls(found.treated, "kerf.conv2d")) == 1
    assert [d.treatment for d in found.decisions] == ["int8", "dense", "int8"]
    assert error < 0.02


def test_a_residual_stream_of_floats_stays_float(quantized, rng):
    """As in a transformer: what is added is read by a normalisation, not by a layer of bytes."""

    def body(b, x):
        ones, zeros = relax.const(np.ones(16, "float32")), relax.const(np.zeros(16, "float32"))
        for i in range(2):
            y = b.emit(op.nn.layer_norm(x, ones, zeros, [-1]))
            y = b.emit(op.nn.gelu(dense(b, y, rng, 32, name=f"up{i}")))
            x = b.emit(op.add(dense(b, y, rng, 16, name=f"down{i}"), x))
        return x

    _, found, error = quantized((5, 16), body)
    assert not calls(found.treated, int8.DEQUANTIZE_ADD) and not calls(
        found.treated, int8.DEQUANTIZE
    )
    assert len(calls(found.treated, int8.QUANTIZE)) == 4
    assert error < 0.03


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_switches(quantized, rng, per_channel, symmetric):
    def body(b, x):
        return conv(b, x, rng, 8, name="a")

    _, found, error = quantized((1, 3, 8, 8), body, per_channel=per_channel, symmetric=symmetric)
    assert error < 0.04
    (call,) = calls(found.treated, int8.INT8_CONV2D)
    assert not symmetric or attrs_of(call)["zero_point"] == 128
    largest = np.abs(const_array(call.args[1])).reshape(8, -1).max(axis=1)
    assert (largest == 127).all() if per_channel else largest.max() == 127 > largest.min()


def test_a_bias_too_large_for_integers_stays_float(quantized, rng):
    def body(b, x):
        y = conv(b, x, rng, 2, name="a", bias=False)
        return b.emit(op.add(y, relax.const(np.array([1e9, -3.0], "float32").reshape(1, 2, 1, 1))))

    mod, found, _ = quantized((1, 3, 6, 6), body)
    x = [np.zeros((1, 3, 6, 6), "float32")]
    got = evaluate(found.treated, x, references=FAMILY.references)[0]
    np.testing.assert_allclose(got, evaluate(mod, x)[0], rtol=1e-6)


def test_what_cannot_be_bytes_says_why(quantized, rng):
    def body(b, x):
        zero = b.emit(op.multiply(x, relax.const(np.float32(0))))
        y = b.emit(layers.conv2d(zero, relax.const(floats(rng, 4, 3, 1, 1)), name="silent"))
        w = np.zeros((4, 3, 1, 1), "float32")
        z = b.emit(layers.conv2d(x, relax.const(w), name="nothing"))
        v = floats(rng, 4, 3, 1, 1)
        v[0] = np.nan
        u = b.emit(layers.conv2d(x, relax.const(v), name="broken"))
        t = b.emit(layers.conv2d(x, relax.const(floats(rng, 4, 3, 1, 1)), name="fine"))
        return b.emit(op.concat([y, z, t, u], 1))

    _, found, _ = quantized((1, 3, 4, 4), body)
    declined = {d.layer: d.declined for d in found.decisions}
    assert "zero on every" in declined["silent"]
    assert "every weight is zero" in declined["nothing"]
    assert "not finite" in declined["broken"]
    assert declined["fine"] is None


def test_without_calibration_the_message_says_what_to_give(build, rng):
    mod = build([(1, 3, 8, 8)], lambda b, x: conv(b, x, rng, 4, name="a"))
    with pytest.raises(UserError, match="--calibration"):
        treat_layers(mod, {"a": Treatment("int8")}, Context(NAMED["avx512"]))


def test_pruned_weights_keep_their_zeros_and_name_their_grain(build, observing, rng):
    mod = build([(1, 32, 8, 8)], lambda b, x: conv(b, x, rng, 32, name="a"))
    treatment = Treatment("int8", {**PLAIN, "density": 0.1, "grain": "block:4x4"}, prune=True)
    context = Context(NAMED["avx512"], observing([[floats(rng, 1, 32, 8, 8)]]))
    found = treat_layers(mod, {"a": treatment}, context)
    (call,) = calls(found.treated, int8.INT8_CONV2D)
    assert attrs_of(call)["grain"] == "block:4x4"
    assert np.count_nonzero(const_array(call.args[1])) <= 0.1 * 32 * 32 * 9 + 16
    (decision,) = found.decisions
    assert decision.pruned and decision.found["grain"] == "block:4x4"


@pytest.mark.parametrize(
    ("channels", "parameters", "words"),
    [((32, 1), {"density": 0.8, "grain": "in:4"}, "% of the weight are not zero"),
     ((32, 4), {"density": 0.1, "grain": "in:4"}, "in groups"),
     ((3, 1), {"density": 0.4, "grain": "block:4x4"}, "3 input channels fill no quad"),
     ((3, 1), {"density": 0.1, "grain": "block:4x4"}, None),
     ((34, 1), {"density": 0.1, "grain": "block:4x4"}, None),
     ((32, 1), {"density": 0.1, "grain": "block:4x4"}, None)],
)  # fmt: skip
def test_layers_are_pruned_only_where_zeros_are_skipped(
    build, observing, rng, channels, parameters, words
):
    shape, groups = (1, channels[0], 8, 8), channels[1]
    mod = build([shape], lambda b, x: conv(b, x, rng, 32, name="a", groups=groups))
    context = Context(NAMED["avx512"], observing([[floats(rng, *shape)]]))
    treatment = Treatment("int8", {**PLAIN, **parameters}, prune=True)
    found = treat_layers(mod, {"a": treatment}, context)
    (decision,), (call,) = found.decisions, calls(found.treated, int8.INT8_CONV2D)
    assert decision.treatment == "int8" and decision.pruned == (words is None)
    assert ("not_pruned" in decision.found) == (words is not None)
    assert (words or "") in decision.found.get("not_pruned", "")
    assert "zeros_unused" not in decision.found
    assert (np.count_nonzero(const_array(call.args[1])) > 0.9 * np.prod(decision.weight_shape)) == (
        words is not None
    )


def test_zeros_at_another_grain_say_so(build, observing, rng):
    w = np.where(rng.random((32, 32, 3, 3)) < 0.1, floats(rng, 32, 32, 3, 3), np.float32(0))
    body = lambda b, x: b.emit(layers.conv2d(x, relax.const(w), name="a", padding=(1,) * 4))  # noqa: E731
    mod = build([(1, 32, 8, 8)], body)
    context = Context(NAMED["avx512"], observing([[floats(rng, 1, 32, 8, 8)]]))
    (decision,) = treat_layers(mod, {"a": Treatment("int8", {**PLAIN})}, context).decisions
    assert "do not lie in grains of in:4 or block:4x4" in decision.found["zeros_unused"]


def test_layers_are_kept_float_of_those_that_a_rule_matches(build, observing, rng):
    """The layer that bytes ruin is another rule's."""

    def body(b, x):
        y = b.emit(op.nn.relu(conv(b, x, rng, 8, name="a")))
        w = floats(rng, 8, 8, 1, 1) * np.float32(10.0) ** rng.integers(-4, 4, (1, 8, 1, 1))
        y = b.emit(layers.conv2d(y, relax.const(w.astype("float32")), name="b"))
        return conv(b, y, rng, 8, name="c")

    mod = build([(1, 3, 8, 8)], body)
    context = Context(NAMED["avx512"], observing([[floats(rng, 1, 3, 8, 8)]]))
    few = Treatment("int8", {**PLAIN, "per_channel": False, "keep_float": 1})
    none = Treatment("int8", {**PLAIN, "per_channel": False})
    for asked in ({"a": few, "b": none, "c": few}, {"a": none, "b": none, "c": few}):
        found = treat_layers(mod, asked, context)
        left = [d.layer for d in found.decisions if d.treatment == "dense"]
        assert len(left) == 1 and asked[left[0]] is few


def test_what_is_kept_float_of_pruned_layers_is_chosen_once(build, observing, rng, monkeypatch):
    """A layer that stays float is whole again, and adds less noise; another one does not go float in its place."""
    orders = iter(["abcd", "dcba", "abcd", "dcba"])  # as pruned, and as whole where they stay float
    ranked = lambda layers, outputs: {n: 1.0 - i / 9 for i, n in enumerate(next(orders))}  # noqa: E731
    monkeypatch.setattr(treat_graph, "rank_sensitivity", ranked)

    def body(b, x):
        for name in "abcd":
            x = b.emit(op.nn.relu(conv(b, x, rng, 32, name=name)))
        return x

    mod = build([(1, 32, 8, 8)], body)
    context = Context(NAMED["avx512"], observing([[floats(rng, 1, 32, 8, 8)] for _ in range(2)]))
    for count in (1, 2):
        few = {**PLAIN, "grain": "in:4", "density": 0.1, "keep_float": count}
        found = treat_layers(
            mod, dict.fromkeys("abcd", Treatment("int8", few, prune=True)), context
        )
        left = [d for d in found.decisions if d.treatment == "dense"]
        assert "".join(d.layer for d in left) == "abcd"[:count]
        assert all("noise" in d.declined and not d.pruned for d in left)
        others = [d for d in found.decisions if d.treatment == "int8"]
        assert len(others) == 4 - count
        assert all(d.pruned and "not_pruned" not in d.found for d in others)


@pytest.mark.parametrize(
    ("key", "value"),
    [("observer", "guess"), ("percentile", 20), ("percentile", True), ("per_channel", "yes"),
     ("symmetric", 1), ("density", 0), ("grain", "out:4")],
)  # fmt: skip
def test_parameters_refuse(key, value):
    with pytest.raises(ValueError):
        FAMILY.parameters[key](value)


def test_a_percentile_that_no_observer_reads_is_refused():
    FAMILY.check({"observer": "percentile", "percentile": 99.0}, False)
    for unread in ({"percentile": 99.0}, {"observer": "mse", "percentile": 99.0}):
        with pytest.raises(ValueError, match="only the observer"):
            FAMILY.check(unread, False)


def test_the_plan_groups_what_shares_a_scale(build, rng):
    def body(b, x):
        y = conv(b, x, rng, 4, name="a")
        p = b.emit(op.nn.max_pool2d(y, (2, 2), (2, 2)))
        return conv(b, p, rng, 4, name="b")

    mod = build([(1, 3, 8, 8)], body)
    plan = plan_bytes(mod, {"a", "b"})
    groups = plan.sources()
    assert sorted(len(s) for s in groups.values()) == [1, 1]
    assert len(plan.held) == 3
    alone = plan_bytes(mod, {"b"})
    assert {v.name for v in alone.held} < {v.name for v in plan.held}


def test_the_layer_that_bytes_ruin_stays_float(build, observing, rng):
    """Its input has one outlier that decides the scale, and the range must hold it."""

    def body(b, x):
        y = b.emit(op.nn.relu(conv(b, x, rng, 8, name="a")))
        big = np.zeros((1, 8, 1, 1), "float32")
        big[0, 3] = 3000.0
        y = b.emit(op.add(y, relax.const(big)))
        w = floats(rng, 8, 8, 1, 1)
        w[:, 3] = 0
        z = b.emit(layers.conv2d(y, relax.const(w), name="b"))
        return conv(b, b.emit(op.nn.relu(z)), rng, 4, name="c")

    mod = build([(1, 3, 8, 8)], body)
    asked = dict.fromkeys("abc", Treatment("int8", {**PLAIN, "keep_float": 1}))
    context = Context(NAMED["avx512"], observing([[floats(rng, 1, 3, 8, 8)] for _ in range(2)]))
    found = treat_layers(mod, asked, context)
    assert {d.layer: d.treatment for d in found.decisions} == {
        "a": "int8",
        "b": "dense",
        "c": "int8",
    }
    assert "noise" in next(d.declined for d in found.decisions if d.layer == "b")
