# SPDX-License-Identifier: Apache-2.0
"""The public functions: compile_model and load, from a module in memory to arrays and back."""

from __future__ import annotations

import numpy as np
import pytest

import compiler
from compiler.recipe import Recipe, Rule

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)]
    model = torch.nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[0].weight.mul_((torch.arange(64) % 16 == 0).float())  # 1 of 16 inputs is used
    return model


@pytest.fixture(scope="module")
def example():
    torch.manual_seed(1)
    return (torch.randn(32, 64),)


def test_a_module_becomes_an_artifact_that_computes_the_same(module, example, tmp_path):
    artifact = compiler.compile_model(module, example, output=tmp_path / "out")
    assert artifact.path == tmp_path / "out"
    wanted = module(*example).detach().numpy()
    model = compiler.load(tmp_path / "out")
    np.testing.assert_allclose(model(example[0].numpy()), wanted, rtol=1e-4, atol=1e-5)
    (name,) = [spec.name for spec in model.inputs]
    (found,) = model.run({name: example[0]}).values()  # a torch tensor, by DLPack
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert compiler.load(tmp_path / "out", variant="dense").variant == model.variant


def test_without_output_the_artifact_lives_as_long_as_the_object(module, example):
    artifact = compiler.compile_model(module, example)
    path = artifact.path
    assert compiler.load(path)(*example).shape == (32, 10)
    del artifact
    assert not path.exists()


def test_a_recipe_of_dataclasses_compresses_the_layers_it_names(module, example, tmp_path):
    recipe = Recipe("mine", (Rule("0", "sparse"),))
    options = {"recipe": recipe, "output": tmp_path / "out", "choose": "asked"}
    artifact = compiler.compile_model(module, example, **options)
    treatment = {row["name"]: row["treatment"] for row in artifact.layers}
    assert treatment == {"0": "sparse", "2": "dense"}
    wanted = module(*example).detach().numpy()
    for variant in ("dense", "compressed"):
        model = compiler.load(tmp_path / "out", variant=variant)
        assert model.variant == variant
        np.testing.assert_allclose(model(*example), wanted, rtol=1e-4, atol=1e-5)


def test_a_recipe_that_matches_nothing_writes_nothing(module, example, tmp_path):
    recipe = Recipe("mine", (Rule("encoder.*", "sparse"),))
    with pytest.raises(compiler.RecipeError, match="matches no layer"):
        compiler.compile_model(module, example, recipe=recipe, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unknown_way_to_choose_is_refused(module, example):
    with pytest.raises(compiler.UserError, match=r"unknown way to choose.*measured or asked"):
        compiler.compile_model(module, example, choose="faster")
