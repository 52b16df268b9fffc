# SPDX-License-Identifier: Apache-2.0
"""Quadratic neurons written out in many ways are found, their near misses are not, and nothing changes value."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tvm import relax

from passes import families, layers
from passes.evaluate import evaluate
from passes.family import Context
from passes.layers import attrs_of
from passes.quadratic import FAMILY
from passes.quadratic.operators import is_quadratic, shifts_of, weights_of
from passes.rewriting import bindings_of
from passes.treat_layers import treat_layers
from passes.treatment import Treatment
from schedules.target import NAMED

op = relax.op
IMAGE, ROWS = (2, 5, 7, 6), (3, 4, 9)
RNG = np.random.default_rng(7)


def const(*shape):
    return relax.const(RNG.standard_normal(shape).astype("float32"))


class Net:
    """Makes layers of one kind with random weights: `net("r", x)` is a convolution or a dense layer called r."""

    def __init__(self, conv: bool, builder):
        self.conv, self.builder, self.geometry = conv, builder, {"padding": (1, 1, 1, 1)}
        self.outputs = 4

    def emit(self, value):
        return self.builder.emit(value)

    def __call__(self, name: str, x, weight=None, **geometry):
        if not self.conv:
            weight = const(self.outputs, 9) if weight is None else weight
            return self.emit(layers.dense(x, weight, name=name))
        weight = const(self.outputs, 5, 3, 3) if weight is None else weight
        return self.emit(layers.conv2d(x, weight, name=name, **{**self.geometry, **geometry}))

    def bias(self):
        return const(1, self.outputs, 1, 1) if self.conv else const(self.outputs)

    def biased(self, name: str, x):
        return self.emit(op.add(self(name, x), self.bias()))


def square(net, x):
    return net.emit(op.multiply(x, x))


def by_power(net, x):
    return net.emit(op.power(x, relax.const(2.0)))


def product(net, x):
    return net.emit(op.multiply(net.biased("r", x), net.biased("g", x)))


def turned(net, x):
    """x, or what it was made of, with its last axes of other sizes."""
    return net.emit(op.reshape(x, (2, 5, 6, 7) if net.conv else (1, 12, 9)))


def turned_image(net, x):
    """x with its rows as columns: of the shape of `turned`, but of other values."""
    return net.emit(op.permute_dims(x, [0, 1, 3, 2]))


# name -> (body(net, x), [(form, layers)])
FOUND = {
    "fan": (
        lambda n, x: op.add(product(n, x), n.biased("b", square(n, x))), [("rgb", "rgb")],
    ),
    "constants outside": (
        lambda n, x: op.add(n.bias(), n.emit(op.add(n("b", square(n, x)), product(n, x)))), [("rgb", "rgb")],
    ),
    "constants between": (
        lambda n, x: op.add(n.emit(op.add(product(n, x), n.bias())), n("b", square(n, x))), [("rgb", "rgb")],
    ),
    "square by power": (
        lambda n, x: op.add(product(n, x), n("b", by_power(n, x))), [("rgb", "rgb")],
    ),
    "square by square": (
        lambda n, x: op.add(product(n, x), n("b", n.emit(op.square(x)))), [("rgb", "rgb")],
    ),
    "subtracted square": (
        lambda n, x: op.subtract(product(n, x), n.biased("b", square(n, x))), [("rgb", "rgb")],
    ),
    "subtracted product": (
        lambda n, x: op.subtract(n.biased("b", square(n, x)), product(n, x)), [("rgb", "rgb")],
    ),
    "without constants": (
        lambda n, x: op.add(n.emit(op.multiply(n("r", x), n("g", x))), n("b", square(n, x))), [("rgb", "rgb")],
    ),
    "residual": (
        lambda n, x: op.add(n.emit(op.add(product(n, x), n("other", square(n, square(n, x))))), n("b", square(n, x))),
        [("rgb", "rgb"), ("b", "o")],
    ),
    "t4": (lambda n, x: product(n, x), [("rg", "rg")]),
    "quadralib": (lambda n, x: op.add(n.biased("l", x), product(n, x)), [("rgl", "rgl")]),
    "compact": (
        lambda n, x: (lambda r: op.add(n.emit(op.add(n.emit(op.multiply(r, n("g", x))), r)), n.bias()))(n("r", x)), [("rg", "rg")],
    ),
    "compact, subtracted": (
        lambda n, x: (lambda r: op.subtract(n.emit(op.multiply(n.biased("g", x), r)), r))(n.biased("r", x)), [("rg", "rg")],
    ),
    "one weight in two places": (
        lambda n, x: (lambda w: op.add(n.emit(op.multiply(n("r", x), n("g", x, w))), n("g", square(n, x), w)))(
            const(4, 5, 3, 3) if n.conv else const(4, 9)
        ),
        [("rgb", "rg")],
    ),
    "x reshaped for each branch": (
        lambda n, x: op.multiply(*(n(name, n.emit(op.reshape(x, (2, 5, 6, 7) if n.conv else (12, 9)))) for name in "rg")), [("rg", "rg")],
    ),
    "x reshaped, and its square in two steps": (
        lambda n, x: op.add(product(n, turned(n, x)), n("b", turned(n, square(n, n.emit(op.reshape(x, (-1,))))))), [("rgb", "rgb")],
    ),
    "square of x before it is reshaped": (
        lambda n, x: op.add(product(n, turned(n, x)), n("b", turned(n, square(n, x)))), [("rgb", "rgb")],
    ),
    "t2": (lambda n, x: op.add(n("b", square(n, x)), n.bias()), [("b", "b")]),
    "square and linear": (lambda n, x: op.add(n.biased("l", x), n("b", square(n, x))), [("bl", "bl")]),
    "batch norm after": (
        lambda n, x: op.add(
            n.emit(op.multiply(n.emit(op.add(product(n, x), n.biased("b", square(n, x)))), n.bias())), n.bias()
        ),
        [("rgb", "rgb")],
    ),
    "relu after": (
        lambda n, x: op.nn.relu(n.emit(op.add(product(n, x), n.biased("b", square(n, x))))), [("rgb", "rgb")],
    ),
    "a factor of negative sign, which canonical graphs have in the weight": (
        lambda n, x: op.multiply(n.emit(op.subtract(n("r", x), n.bias())), n.emit(op.subtract(n.bias(), n("g", x)))),
        [],
    ),
    "two neurons": (
        lambda n, x: op.multiply(product(n, x), n.emit(op.add(n("u", x), n("v", square(n, x))))),
        [("rg", "rg"), ("bl", "vu")],
    ),
}  # fmt: skip


def rewritten(build, conv: bool, body, inputs=None, asked=None):
    """(graph before, what the family made of it)."""

    def with_net(builder, *xs):
        return body(Net(conv, builder), *xs)

    FAMILY.register()
    mod = build(inputs or [IMAGE if conv else ROWS], with_net)
    names = [
        attrs_of(b.value)["name"]
        for b in bindings_of(mod["main"])
        if "kerf" in str(getattr(b.value, "op", ""))
    ]
    treatments = {n: Treatment("quadratic") for n in names if asked is None or n in asked}
    return mod, FAMILY.rewrite(mod, treatments, Context(NAMED["avx512"]))


def neurons(mod) -> list[tuple[str, str]]:
    """(form, first letters of its layers) of every quadratic operator."""
    found = [attrs_of(b.value) for b in bindings_of(mod["main"]) if is_quadratic(b.value)]
    return sorted((a["form"], "".join(n[0] for n in a["layers"])) for a in found)


def same(before, after, tolerance=1e-6) -> None:
    x = [RNG.standard_normal(layers.shape_of(p)).astype("float32") for p in before["main"].params]
    wanted = evaluate(before, x)
    for a, b in zip(wanted, evaluate(after, x, references=FAMILY.references), strict=True):
        # Weights that a scale was folded into are rounded to float32 once more.
        assert np.abs(a - b).max() <= tolerance * np.abs(a).max()


@pytest.mark.parametrize("conv", [True, False], ids=["conv", "dense"])
@pytest.mark.parametrize("spelling", FOUND)
def test_written_out_neurons_are_found(spelling, conv, build):
    body, wanted = FOUND[spelling]
    mod, done = rewritten(build, conv, body)
    assert neurons(done.treated) == sorted(wanted)
    same(mod, done.treated)
    taken = {
        name
        for b in bindings_of(done.treated["main"])
        if is_quadratic(b.value)
        for name in attrs_of(b.value)["layers"]
    }
    for decision in done.decisions:
        assert (
            (decision.treatment == "quadratic")
            == (decision.layer in taken)
            == (decision.declined is None)
        )
        if decision.layer in taken and len(wanted) == 1 and wanted[0][0] != "b":
            assert decision.unit == wanted[0][1][0]


def other_input(n, x, y):
    return op.multiply(n("r", x), n("g", y))


def read_twice(n, x):
    r = n("r", x)
    return op.add(n.emit(op.multiply(r, n("g", x))), n.emit(op.nn.relu(r)))


def rows_and_columns(n, x):
    """The same values as one row and as one column, so that the product of two layers broadcasts."""
    row, column = (n.emit(op.reshape(x, shape)) for shape in ((2, 5, 1, 42), (2, 5, 42, 1)))
    return op.multiply(n("r", row), n("g", column))


NEAR_MISSES = {
    "another input": (other_input, 2, "reads another input"),
    "another shape": (rows_and_columns, 1, "reads another input"),
    "read twice": (read_twice, 1, "read by 2 others"),
    "another stride": (
        lambda n, x: op.multiply(n("r", x, strides=(2, 1), padding=(1, 0, 1, 0)), n("g", x, strides=(2, 1), padding=(0, 0, 2, 0))),
        1, "reads another input, has another geometry",
    ),
    "activation between": (
        lambda n, x: op.multiply(n.emit(op.nn.relu(n("r", x))), n("g", x)), 1, "something that is not a layer",
    ),
    "multiplied by the input of a gate": (
        lambda n, x: op.multiply(n("r", x), n.emit(op.sigmoid(n("g", x)))), 1, "something that is not a layer",
    ),
    "square of one layer": (
        lambda n, x: (lambda r: op.multiply(r, r))(n.biased("r", x)), 1, r"T3\) needs one sum",
    ),
    "product of different inputs is no square": (
        lambda n, x, y: n("b", n.emit(op.multiply(x, y))), 2, "an output of the model",
    ),
    "cube": (
        lambda n, x: n("b", n.emit(op.power(x, relax.const(3.0)))), 1, "an output of the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name, build):
    body, count, reason = NEAR_MISSES[name]
    mod, done = rewritten(build, True, body, [IMAGE] * count)
    assert neurons(done.treated) == [] and done.treated is mod
    assert all(d.treatment == "dense" and d.declined for d in done.decisions)
    assert any(re.search(reason, d.declined) for d in done.decisions), done.decisions


SQUARES_OF_OTHERS = {
    "another input": (lambda n, x, y: op.add(product(n, x), n("b", square(n, y))), 2),
    "the same values in another order": (
        lambda n, x: op.add(product(n, turned(n, x)), n("b", turned_image(n, square(n, x)))), 1,
    ),
    "the same values in another order before a reshape": (
        lambda n, x: op.add(
            product(n, x), n("b", n.emit(op.reshape(square(n, turned_image(n, x)), IMAGE)))
        ), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SQUARES_OF_OTHERS)
def test_a_square_of_something_else_stays_a_layer_of_its_own(name, build):
    body, count = SQUARES_OF_OTHERS[name]
    mod, done = rewritten(build, True, body, [IMAGE] * count)
    assert neurons(done.treated) == [("b", "b"), ("rg", "rg")]
    same(mod, done.treated)


def test_only_what_was_asked_for(build):
    fan = FOUND["fan"][0]
    mod, done = rewritten(build, True, fan, asked=["r", "g"])
    assert neurons(done.treated) == [("rg", "rg")] and len(done.decisions) == 2
    same(mod, done.treated)
    mod, done = rewritten(build, True, fan, asked=["r", "b"])
    assert neurons(done.treated) == [("b", "b")]
    (declined,) = [d for d in done.decisions if d.declined]
    assert (declined.layer, declined.declined) == (
        "r",
        "its other factor g was not asked to be quadratic",
    )


def zeros(n):
    return relax.const(np.zeros((4, 5, 3, 3) if n.conv else (4, 9), "float32"))


DEAD = {
    "no square": (lambda n, x: op.add(product(n, x), n("b", square(n, x), zeros(n))), [("rg", "rgb")]),
    "no g": (
        lambda n, x: op.add(
            n.emit(op.multiply(n.biased("r", x), n.emit(op.add(n("g", x, zeros(n)), n.bias())))), n("b", square(n, x))
        ),
        [("bl", "rgb")],
    ),
    "no r": (
        lambda n, x: op.multiply(n.emit(op.add(n("r", x, zeros(n)), n.bias())), n.biased("g", x)), [],
    ),
    "the initialisation": (
        lambda n, x: op.add(
            n.emit(op.multiply(n.biased("r", x), n.emit(op.add(n("g", x, zeros(n)), relax.const(np.float32(1)))))),
            n("b", square(n, x), zeros(n)),
        ),
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("conv", [True, False], ids=["conv", "dense"])
@pytest.mark.parametrize("name", DEAD)
def test_dead_branches_vanish(name, conv, build):
    body, wanted = DEAD[name]
    mod, done = rewritten(build, conv, body)
    assert neurons(done.treated) == wanted
    same(mod, done.treated)
    assert all(d.treatment == "quadratic" and d.unit == "r" for d in done.decisions)
    if not wanted:  # one plain layer is left
        calls = [b.value.op.name for b in bindings_of(done.treated["main"])]
        assert sum(c.startswith("kerf.") for c in calls) == 1


def test_a_batch_norm_after_the_neuron_scales_one_factor(build):
    mod, done = rewritten(build, True, FOUND["batch norm after"][0])
    (call,) = [b.value for b in bindings_of(done.treated["main"]) if is_quadratic(b.value)]
    before = {
        attrs_of(b.value)["name"]: layers.const_array(b.value.args[1])
        for b in bindings_of(mod["main"])
        if "kerf" in b.value.op.name
    }
    after = weights_of(call)
    np.testing.assert_array_equal(after["g"], before["g"])
    scale = after["r"][:, 0, 0, 0] / before["r"][:, 0, 0, 0]
    np.testing.assert_allclose(after["b"], before["b"] * scale[:, None, None, None], rtol=1e-6)
    assert shifts_of(call).shape == (2, 4)
    operators = [b.value.op.name for b in bindings_of(done.treated["main"])]
    assert operators == ["kerf.quadratic_conv2d", "relax.add"]


def test_inspect_sees_neurons(build):
    mod, _ = rewritten(build, True, FOUND["fan"][0])
    found = FAMILY.found_in(mod)
    assert found == {n: {"quadratic": "rgb", "neuron": "r, g, b"} for n in "rgb"}
    mod, _ = rewritten(build, True, lambda n, x: n("r", x))
    assert FAMILY.found_in(mod) == {}


OTHERS = {
    "sparse": Treatment("sparse", {"density": 0.1, "grain": "element"}, prune=True),
    "int8": Treatment("int8"),
}


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize(("name", "forms"), [("b", ["rg"]), ("g", ["b"])])
def test_a_branch_of_another_family_stays_outside_the_kernel(name, forms, family, build):
    """A compressed square beside a fused product; a compressed factor, which leaves no product to fuse."""
    image = (1, 128, 28, 28)  # where one weight in ten is worth leaving the others out

    def fan(b, x):
        square_of_x = b.emit(op.multiply(x, x))
        r, g, added = (
            b.emit(layers.conv2d(v, const(128, 128, 1, 1), name=n))
            for n, v in (("r", x), ("g", x), ("b", square_of_x))
        )
        return op.add(b.emit(op.multiply(r, g)), added)

    mod = build([image], fan)
    x = [RNG.standard_normal(image).astype("float32")]
    references = {k: v for each in families() for k, v in each.references.items()}

    def observe(graph, names):
        values = {"x0": x[0]}
        evaluate(graph, x, references=references, observe=values.__setitem__)
        yield {n: values[n] for n in names}

    asked = {n: OTHERS[family] if n == name else Treatment("quadratic") for n in "rgb"}
    done = treat_layers(mod, asked, Context(NAMED["avx512"], observe))
    assert [form for form, _ in neurons(done.treated)] == forms
    decisions = {d.layer: d for d in done.decisions}
    assert decisions[name].treatment == family, decisions[name].declined
    if name == "g":
        assert decisions["r"].declined == (
            f"its other factor g is computed by kerf.{family}_conv2d; the fused kernel takes dense float32 weights"
        )
    wanted = evaluate(done.reference, x, references=references)[0]
    found = evaluate(done.treated, x, references=references)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
