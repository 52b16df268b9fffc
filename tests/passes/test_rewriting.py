# SPDX-License-Identifier: Apache-2.0

import pytest
import tvm
from tvm import relax
from tvm.script import relax as R

from passes.layers import is_call, register, shape_of
from passes.rewriting import bindings_of, rewrite_function, rewrite_module
from schedules.errors import KerfError, UserError

op = relax.op


def exp_to_tanh(value, _graph):
    """exp(x) -> tanh(relu(x)): one operator becomes two."""
    return op.tanh(op.nn.relu(value.args[0])) if is_call(value, "relax.exp") else None


def apply(mod, *rules):
    return rewrite_module(mod, lambda func: rewrite_function(func, rules))


def named(b, x):
    y = b.emit(op.exp(x), name_hint="features")
    b.emit(op.abs(y), name_hint="unused")
    return b.emit(op.negative(y), name_hint="scores")


def test_names_stay_and_unused_bindings_go(build):
    found = apply(build([(2, 3)], named), exp_to_tanh)
    assert [b.var.name for b in bindings_of(found["main"])][:3] == [
        "features_relu",
        "features",
        "scores",
    ]
    relax.analysis.well_formed(found)


def test_a_function_no_rule_applies_to_is_the_same_object(build):
    mod = build([(2, 3)], lambda _b, x: op.abs(x))
    assert apply(mod, exp_to_tanh).same_as(mod)


def test_rules_are_applied_until_none_applies(build):
    def shorten(value, graph):
        inner = graph.call(value.args[0], "relax.abs") if is_call(value, "relax.abs") else None
        return value.args[0] if inner is not None else None

    found = apply(build([(3,)], lambda _b, x: op.abs(op.abs(op.abs(op.abs(x))))), shorten)
    assert len([b for b in bindings_of(found["main"]) if is_call(b.value, "relax.abs")]) == 1


def test_rules_that_never_settle_are_an_error(build):
    def swap(value, _graph):
        return op.add(*list(value.args)[::-1]) if is_call(value, "relax.add") else None

    func = build([(3,), (3,)], lambda _b, x, y: op.add(x, y))["main"]
    with pytest.raises(KerfError, match="do not settle"):
        rewrite_function(func, (swap,))


def test_a_rule_that_changes_a_shape_is_an_error(build):
    def flatten(value, _graph):
        return op.reshape(value.args[0], (6,)) if is_call(value, "relax.exp") else None

    func = build([(2, 3)], named)["main"]
    with pytest.raises(KerfError, match=r"features: a rewrite changed a type.*\(6,\).*\(2, 3\)"):
        rewrite_function(func, (flatten,))


def test_several_outputs_and_parameters_that_are_outputs(build):
    def body(b, x, y):
        return relax.Tuple([b.emit(op.exp(x)), y])

    found = apply(build([(2, 3), (4,)], body), exp_to_tanh)
    relax.analysis.well_formed(found)
    assert [shape_of(p) for p in found["main"].params] == [(2, 3), (4,)]


def test_control_flow_is_refused():
    @R.function
    def choose(flag: R.Tensor((), "bool"), x: R.Tensor((2,), "float32")) -> R.Tensor(
        (2,), "float32"
    ):
        if flag:
            y = R.exp(x)
        else:
            y = R.abs(x)
        return y

    with pytest.raises(KerfError, match="control flow"):
        rewrite_function(choose, (exp_to_tanh,))


def test_module_attributes_stay(build):
    mod = build([(2, 3)], named).with_attr("note", "kept")
    assert apply(mod, exp_to_tanh).attrs["note"] == "kept"
    assert isinstance(apply(mod, exp_to_tanh), tvm.IRModule)


def test_what_a_rewrite_reads_as_well_is_not_read_once(build):
    """abs(exp(y)) is made to read y past an exp that stays: y has two readers from then on."""
    counts = []

    def bypass(value, graph):
        if is_call(value, "relax.abs"):
            return op.tanh(graph.call(value.args[0], "relax.exp").args[0])
        if is_call(value, "relax.negative"):
            counts.append(graph.is_read_once(graph.definition(value.args[0]).args[0]))
        return None

    def body(b, x):
        y = b.emit(op.sqrt(x))
        e = b.emit(op.exp(y))
        return op.add(b.emit(op.abs(e)), op.negative(e))

    apply(build([(3,)], body), bypass)
    assert counts[0] is False


def test_an_error_inside_a_pass_stays_what_it_was(build):
    register()

    @tvm.transform.module_pass(opt_level=0, name="kerf.Refuse")
    class Refuse:
        def transform_module(self, _mod, _context):
            raise UserError("no such thing", where="layer", todo="Leave it out")

    with pytest.raises(UserError, match=r"^layer: no such thing\. Leave it out$"):
        tvm.transform.Sequential([Refuse()])(build([(3,)], lambda _b, x: op.abs(x)))
