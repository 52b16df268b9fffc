# SPDX-License-Identifier: Apache-2.0
"""Which MLPs are taken, which are declined and why, and that the function stays what it was."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.activation_sparse import FAMILY
from passes.activation_sparse.operators import DENSE, GATED
from passes.evaluate import evaluate
from passes.family import Context
from passes.layers import conv2d, dense, is_call, is_const
from passes.rewriting import bindings_of
from passes.treatment import Treatment
from schedules.target import NAMED

op = relax.op
D, H = 24, 40
# Nothing is measured for a processor that is not here.
TARGET = NAMED["aarch64"]


class Body:
    """Layers with weights of their own, by name; `shift` makes most of what a ReLU sees negative."""

    def __init__(self, rng, shift: float = -8.0):
        self.rng, self.shift = rng, shift

    def layer(self, bb, x, name: str, outputs: int, shift: float = 0.0, weight=None):
        inputs = int(x.ty.shape[-1])
        if weight is None:
            weight = self.rng.standard_normal((outputs, inputs)).astype(np.float32)
        y = bb.emit(dense(x, relax.const(weight), name=name))
        bias = self.rng.standard_normal(outputs).astype(np.float32) + np.float32(shift)
        return bb.emit(op.add(y, relax.const(bias)))

    def hidden(self, bb, x, name: str = "fc1"):
        return bb.emit(op.nn.relu(self.layer(bb, x, name, H, self.shift)))


def observer(rng, samples: int = 3):
    """Values as numpy computes them, on random inputs."""

    def observe(mod, names):
        params = mod["main"].params
        for _ in range(samples):
            inputs = [rng.standard_normal([int(d) for d in p.ty.shape]) for p in params]
            seen = {p.name: x for p, x in zip(params, inputs)}
            evaluate(mod, inputs, observe=seen.__setitem__, references=FAMILY.references)
            yield {name: seen[name] for name in names}

    return observe


def rewrite(mod, rng=None, asked=None, **parameters):
    names = asked or [
        b.value.attrs["name"]
        for b in bindings_of(mod["main"])
        if is_call(b.value, "kerf.dense") or is_call(b.value, "kerf.conv2d")
    ]
    context = Context(TARGET, None if rng is None else observer(rng))
    treatments = {str(n): Treatment("activation_sparse", parameters) for n in names}
    done = FAMILY.rewrite(mod, treatments, context)
    assert [d.layer for d in done.decisions] == list(treatments)
    return done, {d.layer: d for d in done.decisions}


def operators(mod) -> list[str]:
    names = [b.value.op.name for b in bindings_of(mod["main"]) if isinstance(b.value, relax.Call)]
    return [n for n in names if n in (DENSE, GATED)]


def check_values(before, after, rng) -> None:
    relax.analysis.well_formed(after)
    inputs = [rng.standard_normal([int(d) for d in p.ty.shape]) for p in before["main"].params]
    outputs = [evaluate(m, inputs, references=FAMILY.references) for m in (before, after)]
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)


@pytest.fixture
def mlp(build, rng):
    """`mlp(rows, tail)`: fc1, ReLU, `tail(bb, hidden)`, fc2."""

    def make(rows=(1, 3), tail=lambda bb, h: h, **options):
        made = Body(rng, **options)

        def body(bb, x):
            h = tail(bb, made.hidden(bb, x))
            return made.layer(bb, h, "fc2", D)

        return build([(*rows, D)], body)

    return make


def test_an_mlp_is_one_unit_and_computes_the_same(mlp, rng):
    mod = mlp()
    done, decisions = rewrite(mod, rng)
    assert operators(done.treated) == [DENSE]
    assert done.reference is None
    assert {d.treatment for d in decisions.values()} == {"activation_sparse"}
    assert {d.unit for d in decisions.values()} == {"fc1"}
    found = decisions["fc2"].found
    assert 0 < found["activation_density"] < 0.2
    assert found["activation_density"] <= found["activation_density_union"]
    check_values(mod, done.treated, rng)


def test_the_graph_shows_what_could_be_taken(mlp):
    assert FAMILY.found_in(mlp()) == {"fc2": {"input_zeros": "relu"}}


@pytest.mark.parametrize(
    "tail",
    [
        lambda bb, h: bb.emit(op.reshape(h, (1, 1, 3, H))),
        lambda bb, h: bb.emit(op.multiply(h, h)),
        lambda bb, h: bb.emit(op.permute_dims(h, [1, 0, 2])),
    ],
    ids=["reshape", "square", "transpose"],
)
def test_what_lies_between_is_followed(mlp, rng, tail):
    mod = mlp(tail=tail)
    done, _ = rewrite(mod, rng)
    assert operators(done.treated) == [DENSE]
    check_values(mod, done.treated, rng)


def test_hidden_values_may_have_other_readers(build, rng):
    made = Body(rng)

    def body(bb, x):
        h = made.hidden(bb, x)
        return relax.Tuple([made.layer(bb, h, "fc2", D), h, bb.emit(op.exp(h))])

    mod = build([(2, D)], body)
    done, _ = rewrite(mod, rng)
    assert operators(done.treated) == [DENSE]
    check_values(mod, done.treated, rng)


def test_a_chain_has_a_unit_for_every_layer_that_skips(build, rng):
    made = Body(rng)

    def body(bb, x):
        h = made.hidden(bb, made.hidden(bb, x), "fc2")
        return made.layer(bb, h, "fc3", D)

    mod = build([(1, D)], body)
    done, decisions = rewrite(mod, rng)
    assert operators(done.treated) == [DENSE, DENSE]
    assert [d.unit for d in decisions.values()] == ["fc1", "fc1", "fc3"]
    check_values(mod, done.treated, rng)


def test_a_given_density_stands_in_for_data(mlp):
    done, decisions = rewrite(mlp(), density=0.05)
    assert operators(done.treated) == [DENSE]
    assert decisions["fc2"].parameters == {"density": 0.05}


def test_only_the_second_layer_need_be_asked_for(mlp, rng):
    done, decisions = rewrite(mlp(), rng, asked=["fc2"])
    assert operators(done.treated) == [DENSE] and decisions["fc2"].unit == "fc2"
    done, decisions = rewrite(mlp(), rng, asked=["fc1"])
    assert operators(done.treated) == [] and "not the output of" in decisions["fc1"].declined


def declined(done, decisions, reason: str, layer: str = "fc2") -> None:
    assert operators(done.treated) == []
    assert decisions[layer].treatment == "dense"
    assert reason in decisions[layer].declined


def test_declines_without_data(mlp):
    done, decisions = rewrite(mlp())
    declined(done, decisions, "give --calibration")
    assert "skipped in fc2" in decisions["fc1"].declined


def test_declines_above_the_crossover(mlp, rng):
    done, decisions = rewrite(mlp(shift=1.0), rng)
    declined(done, decisions, "dense is faster above")
    assert decisions["fc2"].found["activation_density"] > 0.3


def test_declines_another_activation(build, rng):
    made = Body(rng)

    def body(bb, x):
        h = bb.emit(op.nn.gelu(made.layer(bb, x, "fc1", H)))
        return made.layer(bb, h, "fc2", D)

    declined(*rewrite(build([(1, D)], body), rng), "gelu leaves no zeros; threshold_error")


def test_declines_weights_that_are_not_finite(build, rng):
    made = Body(rng)
    weight = rng.standard_normal((D, H)).astype(np.float32)
    weight[3, 3] = np.inf

    def body(bb, x):
        return made.layer(bb, made.hidden(bb, x), "fc2", D, weight=weight)

    declined(*rewrite(build([(1, D)], body), rng), "NaN or infinity")


def test_declines_a_convolution(build, rng):
    def body(bb, x):
        w = rng.standard_normal((8, 4, 1, 1)).astype(np.float32)
        y = bb.emit(op.nn.relu(bb.emit(conv2d(x, relax.const(w), name="a"))))
        w = rng.standard_normal((4, 8, 1, 1)).astype(np.float32)
        return conv2d(y, relax.const(w), name="b")

    declined(*rewrite(build([(1, 4, 5, 5)], body), rng), "a convolution", layer="b")


# ---- gates


def gated(rng, build, rows, *, share=False, gate_first=True):
    made = Body(rng)

    def body(bb, x):
        gate, up = made.hidden(bb, x, "gate"), made.layer(bb, x, "up", H)
        h = bb.emit(op.multiply(gate, up) if gate_first else op.multiply(up, gate))
        y = made.layer(bb, h, "down", D)
        return relax.Tuple([y, up]) if share else y

    return build([(*rows, D)], body)


@pytest.mark.parametrize("gate_first", [True, False])
def test_one_row_needs_up_where_the_gate_is_open(build, rng, gate_first):
    mod = gated(rng, build, (1, 1), gate_first=gate_first)
    done, decisions = rewrite(mod, rng)
    assert operators(done.treated) == [GATED]
    assert {d.unit for d in decisions.values()} == {"gate"}
    check_values(mod, done.treated, rng)


@pytest.mark.parametrize("rows,share", [((1, 3), False), ((1, 1), True)], ids=["rows", "shared up"])
def test_otherwise_only_down_skips(build, rng, rows, share):
    mod = gated(rng, build, rows, share=share)
    done, _ = rewrite(mod, rng)
    assert operators(done.treated) == [DENSE]
    check_values(mod, done.treated, rng)


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_up_is_computed_in_full_where_it_holds_nan_or_infinity(build, rng, where):
    """Zeros of the gate make NaN of them, which rows left out would hide."""
    made = Body(rng)
    weight = rng.standard_normal((H, D)).astype(np.float32)
    shift = np.zeros(H, np.float32)
    if where == "weight":
        weight[2, 3] = np.nan
    else:
        shift[2] = np.inf

    def body(bb, x):
        gate = made.hidden(bb, x, "gate")
        up = made.layer(bb, x, "up", H, shift, weight)
        return made.layer(bb, bb.emit(op.multiply(gate, up)), "down", D)

    done, _ = rewrite(build([(1, D)], body), rng)
    assert operators(done.treated) == [DENSE]


# ---- weights in bytes


@pytest.mark.parametrize("rows", [(1, 1), (1, 3)])
def test_int8_weights_are_the_reference(mlp, rng, rows):
    mod = mlp(rows=rows)
    done, decisions = rewrite(mod, rng, weights="int8")
    assert operators(done.treated) == [DENSE]
    assert constants(done.treated, DENSE) == ["int8"]
    assert {d.treatment for d in decisions.values()} == {"activation_sparse"}
    assert 0 < decisions["fc2"].found["int8_weight_error"] < 0.01
    assert "int8_weight_error" not in decisions["fc1"].found
    check_values(done.reference, done.treated, rng)
    check_near(mod, done.reference, rng)


def constants(mod, operator: str) -> list[str]:
    """The dtypes of the weights of all calls of an operator."""
    calls = [b.value for b in bindings_of(mod["main"]) if is_call(b.value, operator)]
    return [str(a.ty.dtype) for c in calls for a in c.args if len(a.ty.shape) == 2 and is_const(a)]


def check_near(before, after, rng) -> None:
    """The same function but for what bytes do to weights, a few tenths of a percent."""
    x = [rng.standard_normal([int(d) for d in p.ty.shape]) for p in before["main"].params]
    (a,), (b,) = (evaluate(m, x, references=FAMILY.references) for m in (before, after))
    assert 0 < np.linalg.norm(a - b) < 0.02 * np.linalg.norm(a)


@pytest.mark.parametrize(
    "asked,kept",
    [(("gate", "up", "down"), ["int8", "int8"]), (("gate", "down"), ["float32", "int8"])],
)
def test_a_gated_pair_has_the_bytes_it_was_asked_for(build, rng, asked, kept):
    mod = gated(rng, build, (1, 1))
    done, decisions = rewrite(mod, rng, asked=list(asked), weights="int8")
    assert operators(done.treated) == [GATED]
    assert constants(done.treated, GATED) == kept
    check_values(done.reference, done.treated, rng)
    check_near(mod, done.reference, rng)
    assert "int8_weight_error" in decisions["down"].found


def test_int8_weights_and_a_threshold(build, rng):
    done, decisions = rewrite(gelu_mlp(rng, build), rng, threshold_error=0.1, weights="int8")
    assert constants(done.treated, DENSE) == ["int8"]
    assert {"activation_threshold", "int8_weight_error"} <= decisions["fc2"].found.keys()
    check_values(done.reference, done.treated, rng)


def test_declines_int8_weights_for_many_tokens(mlp, rng):
    outcome = rewrite(mlp(rows=(1, 17)), rng, weights="int8")
    declined(*outcome, "up to 16 tokens, not with 17")
    assert outcome[0].reference is None


def test_declines_int8_weights_that_are_all_zero(build, rng):
    made = Body(rng)
    weight = np.zeros((D, H), np.float32)

    def body(bb, x):
        return made.layer(bb, made.hidden(bb, x), "fc2", D, weight=weight)

    declined(*rewrite(build([(1, D)], body), rng, weights="int8"), "no scale")


# ---- thresholds


def gelu_mlp(rng, build):
    made = Body(rng)

    def body(bb, x):
        h = bb.emit(op.nn.gelu(made.layer(bb, x, "fc1", H, shift=-6.0)))
        return made.layer(bb, h, "fc2", D)

    return build([(1, 6, D)], body)


def test_a_threshold_gives_the_reference_of_its_own_and_stays_within_the_bound(build, rng):
    mod = gelu_mlp(rng, build)
    done, decisions = rewrite(mod, rng, threshold_error=0.1)
    assert operators(done.treated) == [DENSE]
    assert decisions["fc2"].found["activation_threshold"] > 0
    assert {d.unit for d in decisions.values()} == {"fc1"}
    check_values(done.reference, done.treated, rng)
    x = rng.standard_normal((1, 6, D))
    (exact,) = evaluate(mod, [x])
    (cut,) = evaluate(done.reference, [x], references=FAMILY.references)
    assert 0 < np.linalg.norm(exact - cut) / np.linalg.norm(exact) < 0.2


def test_a_threshold_hands_nan_on(build, rng):
    done, _ = rewrite(gelu_mlp(rng, build), rng, threshold_error=0.1)
    (out,) = evaluate(done.treated, [np.full((1, 6, D), np.nan)], references=FAMILY.references)
    assert np.isnan(out).all()


def test_a_threshold_needs_data(build, rng):
    done, decisions = rewrite(gelu_mlp(rng, build), density=0.1, threshold_error=0.1)
    declined(done, decisions, "threshold needs calibration data")
    assert done.reference is None


@pytest.mark.parametrize(
    "name,value",
    [
        ("density", 0),
        ("density", True),
        ("density", 1.5),
        ("threshold_error", 1.0),
        ("weights", "int4"),
        ("weights", 8),
    ],
)
def test_parameters_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        FAMILY.parameters[name](value)


def test_zeroth_biases_fold_on_the_way(build, rng):
    made = Body(rng)
    table = rng.standard_normal((3, D)).astype(np.float32)

    def body(bb, x):
        h = made.hidden(bb, bb.emit(op.add(x, relax.const(table))))
        return made.layer(bb, h, "fc2", D)

    mod = build([(1, 3, D)], body)
    done, _ = rewrite(mod, rng)
    adds = [b for b in bindings_of(done.treated["main"]) if b.value.op.name == "relax.add"]
    assert len(adds) == 2 and operators(done.treated) == [DENSE]
    x = rng.standard_normal((1, 3, D))
    (before,), (after,) = (
        evaluate(m, [x], references=FAMILY.references) for m in (mod, done.treated)
    )
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
