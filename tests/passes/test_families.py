# SPDX-License-Identifier: Apache-2.0
"""What every family must do with the samples it brings: take them or say why not, change no value, and compile."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tvm import relax

from compiler import pipeline
from compiler.divergence import find_first_divergence
from compiler.frontend import TensorSpec
from compiler.recipe import BUILT_IN
from compiler.runtime import from_variant
from passes import families
from passes.evaluate import evaluate
from passes.family import Context
from passes.layers import CONV2D, DENSE, shape_of
from passes.rewriting import bindings_of
from passes.treat_layers import treat_layers
from schedules.target import detect_host

SAMPLES = {
    f"{family.name}: {sample.name}": (family, sample)
    for family in families()
    for sample in family.samples()
}
REFERENCES = {name: f for family in families() for name, f in family.references.items()}


def operators(mod) -> set[str]:
    calls = [b.value for b in bindings_of(mod["main"]) if isinstance(b.value, relax.Call)]
    return {c.op.name for c in calls}


@pytest.fixture(params=SAMPLES)
def treated(request, rng):
    """The sample, its graph, inputs for it, and what treating made of it."""
    family, sample = SAMPLES[request.param]
    mod = sample.graph(rng)
    shape = shape_of(mod["main"].params[0])
    inputs = [rng.standard_normal(shape).astype("float32") for _ in range(2)]

    def observe(graph, names):
        for x in inputs:
            seen = {"x": x}
            evaluate(graph, [x], dtype="float32", references=REFERENCES, observe=seen.__setitem__)
            yield {name: seen[name] for name in names}

    context = Context(detect_host(), observe)
    return family, sample, mod, inputs, treat_layers(mod, sample.asked, context)


def test_the_family_does_what_its_samples_say(treated):
    family, sample, mod, inputs, found = treated
    decisions = [d for d in found.decisions if d.layer in sample.asked]
    assert len(decisions) == len(sample.asked)
    if sample.declines is not None:
        assert {d.treatment for d in decisions} == {"dense"}
        assert all(re.search(sample.declines, d.declined) for d in decisions)
        assert not operators(found.treated) & set(family.lowerings)
        return
    assert {(d.layer, d.treatment, d.declined) for d in decisions} == {
        (name, family.name, None) for name in sample.asked
    }
    # Its operators are there, and those they replace are not.
    assert operators(found.treated) & set(family.lowerings)
    assert len(operators(found.treated) & {CONV2D, DENSE}) <= len(operators(mod) & {CONV2D, DENSE})
    for x in inputs:
        (wanted,) = evaluate(found.reference, [x], references=REFERENCES)
        (got,) = evaluate(found.treated, [x], references=REFERENCES)
        # Weights are rounded to float32 again where factors move into them.
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
        assert np.abs(wanted).max() > 0


def test_the_kernels_compute_what_the_graph_says(treated, rng):
    _family, sample, mod, inputs, found = treated
    if sample.declines is not None:
        pytest.skip("nothing is compiled of what is declined")
    target = detect_host()
    graph = pipeline.fuse_graph(pipeline.lay_out(found.treated), target)
    variant = pipeline.compile_graph("compressed", graph, target)
    main = mod["main"]
    specs = [TensorSpec("x", shape_of(main.params[0]), "float32")]
    outputs = [TensorSpec("y", shape_of(main.body.body), "float32")]
    model = from_variant(variant, specs, outputs, target)
    for x in inputs:
        assert find_first_divergence(model, variant.unscheduled, [x]) is None
        (wanted,) = evaluate(found.treated, [x], dtype="float32", references=REFERENCES)
        got = model.run({"x": x})["y"]
        # One step of a byte, where a sum lies at a tie, may come out of a layer differently.
        assert np.median(np.abs(got - wanted)) <= 1e-5 * np.abs(wanted).max()
    kernels = {layer for call in variant.kernels for layer in call.layers}
    assert kernels >= {d.layer for d in found.decisions if d.treatment != "dense"}


def test_every_family_but_dense_brings_one_sample_it_takes_and_one_it_declines():
    for family in families():
        declined = {sample.declines is not None for sample in family.samples()}
        assert family.name == "dense" or declined == {True, False}, family.name


def test_every_family_is_a_recipe():
    assert {family.name for family in families()} == set(BUILT_IN)
