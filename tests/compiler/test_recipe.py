# SPDX-License-Identifier: Apache-2.0
"""Recipes: parsing, messages that name the line, first match wins, parameters checked by the
families."""

from __future__ import annotations

import pytest

from compiler.recipe import Recipe, Rule, load_recipe, parse_recipe, resolve, validate
from passes.treatment import Treatment
from schedules.errors import RecipeError

GOOD = """\
winograd = "never"

[[rule]]            # the first convolution stays dense
match = "stem*"
treatment = "dense"

[[rule]]
match = "layer1.*"
treatment = "sparse"
density = 0.1
grain = "out:4"
prune = true
"""
LAYERS = ["stem.conv", "layer1.0.conv1", "layer1.0.conv2", "head"]


def test_a_recipe_file_and_dataclasses_say_the_same(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(GOOD)
    read = load_recipe(path)
    written = Recipe(
        str(path),
        (
            Rule("stem*", "dense", where=f"{path}:3"),
            Rule("layer1.*", "sparse", {"density": 0.1, "grain": "out:4"}, True, f"{path}:7"),
        ),
        "never",
    )
    assert read == written
    assert read.rules[1].place("grain") == f"{path}:11"
    assert read.to_json()["rule"][1] == {
        "match": "layer1.*", "treatment": "sparse", "prune": True, "density": 0.1, "grain": "out:4"
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("depth = 3", "r.toml:1: unknown key 'depth'"),
        ("\n[rules]\nx = 1", "r.toml:2: unknown key 'rules'"),
        ("a = 1\nb =", "r.toml:2: malformed TOML"),
        ("[[rule]]\nmatch = 'a'\nmatch = 'b'", "r.toml:3: malformed TOML"),
        ("[[rule]]\nmatch = 3\ntreatment = 'dense'", "r.toml:2: match is not a string; found 3"),
        ("[[rule]]\ntreatment = 'dense'", "r.toml:1: the rule has no 'match'"),
        ("\n\n[[rule]]\nmatch = 'a'", "r.toml:3: the rule has no 'treatment'"),
        (
            "[[rule]]\nmatch = 'a'\ntreatment = 'sparse'\nprune = 1",
            "r.toml:4: prune is not a boolean",
        ),
        ("[rule]\nmatch = 'a'", "r.toml:1: rules are written as [[rule]]"),
        ("\nwinograd = 'sometimes'", "r.toml:2: unknown winograd setting; found 'sometimes'"),
    ],
)
def test_a_malformed_recipe_names_its_line(text, message):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.toml")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "line, message",
    [
        ("treatment = 'squeeze'", "r.toml:5: unknown treatment; found 'squeeze'"),
        ("treatment = 'sparse'\ndensity = 0.0", "r.toml:6: density: "),
        ("treatment = 'sparse'\ndensity = 1.5", "r.toml:6: density: "),
        ("treatment = 'sparse'\ndensity = nan", "r.toml:6: density: "),
        ("treatment = 'sparse'\ndensity = 'half'", "r.toml:6: density: "),
        ("treatment = 'sparse'\ngrain = 'out:5'", "r.toml:6: grain: "),
        ("treatment = 'sparse'\ngrain = 4", "r.toml:6: grain: "),
        ("treatment = 'sparse'\ngrian = 'out:4'", "r.toml:6: unknown key 'grian'"),
        ("treatment = 'dense'\ndensity = 0.5", "r.toml:6: unknown key 'density'"),
        ("treatment = 'dense'\nprune = true", "r.toml:6: the treatment 'dense' prunes nothing"),
        ("treatment = 'sparse'\nprune = true", "r.toml:6: pruning needs to know the density"),
        ("treatment = 'int8'\nprune = true", "r.toml:6: pruning needs to know the density"),
        (
            "treatment = 'int8'\ndensity = [1]",
            "r.toml:6: density: density must be in (0, 1], not [1]",
        ),
        ("treatment = 'quadratic'\nfit_error = true", "r.toml:6: fit_error: fit_error must be"),
        ("treatment = 'activation_sparse'\ndensity = 'x'", "r.toml:6: density: density must be"),
        ("treatment = 'binary'\nzero = 2", "r.toml:6: zero: zero must be"),
    ],
)
def test_what_families_reject_names_its_line(line, message):
    text = "# a comment\n\n[[rule]]\nmatch = '*'\n" + line
    recipe = parse_recipe(text, "r.toml")
    with pytest.raises(RecipeError) as caught:
        validate(recipe)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("density", [1e-9, 0.5, 1, 1.0])
def test_a_density_in_range_is_accepted(density):
    (treatment,) = validate(Recipe("r", (Rule("*", "sparse", {"density": density}),)))
    assert treatment.parameters["density"] == density


@pytest.mark.parametrize("grain", ["element", "out:4", "out:8", "out:16"])
def test_every_grain_is_accepted(grain):
    (treatment,) = validate(load_recipe("sparse", grain=grain))
    assert set(treatment.parameters) == {"grain"}


def test_the_first_matching_rule_decides_and_the_rest_stays_dense():
    text = GOOD + "\n[[rule]]\nmatch = '*conv*'\ntreatment = 'sparse'\n"
    treatments = resolve(parse_recipe(text), LAYERS)
    assert list(treatments) == LAYERS
    assert treatments["stem.conv"] == Treatment("dense")
    assert treatments["layer1.0.conv2"].prune
    assert treatments["layer1.0.conv2"].parameters["density"] == 0.1
    assert treatments["head"] == Treatment("dense")


def test_a_glob_that_matches_no_layer_is_an_error_naming_its_line():
    text = GOOD + "\n[[rule]]\nmatch = 'layer9.*'\ntreatment = 'sparse'\n"
    with pytest.raises(RecipeError, match=r"r.toml:15: match: matches no layer.*'layer9.\*'"):
        resolve(parse_recipe(text, "r.toml"), LAYERS)


def test_a_rule_shadowed_by_an_earlier_one_is_not_an_error():
    text = "[[rule]]\nmatch='*'\ntreatment='dense'\n[[rule]]\nmatch='head'\ntreatment='sparse'\n"
    assert resolve(parse_recipe(text), LAYERS)["head"] == Treatment("dense")


def test_names_with_glob_characters_match_themselves():
    recipe = parse_recipe("[[rule]]\nmatch = 'blocks[0].fc'\ntreatment = 'sparse'\n")
    assert resolve(recipe, ["blocks[0].fc"])["blocks[0].fc"].family == "sparse"


def test_globs_distinguish_case():
    with pytest.raises(RecipeError, match="matches no layer"):
        resolve(parse_recipe("[[rule]]\nmatch = 'HEAD'\ntreatment = 'sparse'\n"), LAYERS)


def test_built_in_recipes_accept_a_model_without_layers():
    assert resolve(load_recipe("dense"), []) == {}
    assert resolve(load_recipe("sparse"), []) == {}


def test_the_command_line_gives_parameters_to_built_in_recipes():
    recipe = load_recipe("sparse", density=0.25, grain="out:8", prune=True, winograd="never")
    (treatment,) = validate(recipe)
    assert treatment.family == "sparse" and treatment.prune
    assert treatment.parameters["density"] == 0.25
    assert recipe.winograd == "never"


def test_the_command_line_does_not_change_parameters_of_a_file(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(GOOD)
    with pytest.raises(RecipeError, match="--density: cannot be combined"):
        load_recipe(path, density=0.5)
    assert load_recipe(path, winograd="auto").winograd == "auto"


def test_prune_on_the_command_line_concerns_compressing_rules_only(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(GOOD.replace("prune = true\n", ""))
    assert [r.prune for r in load_recipe(path).rules] == [False, False]
    assert [r.prune for r in load_recipe(path, prune=True).rules] == [False, True]


@pytest.mark.parametrize("option", [{"density": 0.1}, {"grain": "out:4"}, {"prune": True}])
def test_dense_takes_no_parameters(option):
    with pytest.raises(RecipeError, match=f"--{next(iter(option))}"):
        load_recipe("dense", **option)


def test_a_missing_or_binary_recipe_file(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe; wanted one of dense, sparse"):
        load_recipe("spares")
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(tmp_path / "r.toml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("given, meant", [(1, "+1"), (-1, "-1"), ("+1", "+1"), ("exact", "exact")])
def test_the_sign_of_zero_as_a_number_or_a_word(given, meant):
    rule = Rule("*", "binary", {"zero": given})
    assert validate(Recipe("r", (rule,)))[0].parameters["zero"] == meant


IN_TURN = """\
[[rule]]
match = "*"
treatment = "binary"
pass_on = true

[[rule]]
match = "stem*"
treatment = "dense"

[[rule]]
match = "*"
treatment = "int8"
observer = "min_max"
"""


def test_what_a_rule_passes_on_is_asked_of_the_next_that_matches():
    treatments = resolve(parse_recipe(IN_TURN), LAYERS)
    int8 = Treatment("int8", {"observer": "min_max"})
    assert treatments["head"] == Treatment("binary", otherwise=int8)
    assert treatments["stem.conv"] == Treatment("binary", otherwise=Treatment("dense"))
    assert treatments["head"].of("int8") is treatments["head"].otherwise
    with pytest.raises(KeyError):
        treatments["head"].of("sparse")


def test_without_a_rule_to_pass_on_to_layers_stay_dense():
    first = IN_TURN.split("\n\n")[0]
    assert resolve(parse_recipe(first), ["a"]) == {"a": Treatment("binary")}


def test_families_joined_by_plus_are_asked_in_turn():
    recipe = load_recipe("binary+int8")
    assert recipe.to_json()["rule"] == [
        {"match": "*", "treatment": "binary", "prune": False, "pass_on": True},
        {"match": "*", "treatment": "int8", "prune": False},
    ]
    assert resolve(recipe, ["a"])["a"] == Treatment("binary", otherwise=Treatment("int8"))
    assert resolve(recipe, []) == {}


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("binary+int9", {}, "no such recipe"),
        ("binary+", {}, "no such recipe"),
        ("binary+dense", {}, "not families to ask in turn"),
        ("int8+int8", {}, "not families to ask in turn"),
        ("binary+int8", {"density": 0.1}, "--density: cannot be combined with several families"),
        ("binary+int8", {"prune": True}, "--prune: cannot be combined with several families"),
    ],
)
def test_what_cannot_be_asked_in_turn(name, options, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(name, **options)


def test_a_rule_that_declines_nothing_passes_nothing_on():
    text = "[[rule]]\nmatch = 'a'\ntreatment = 'dense'\npass_on = true\n"
    with pytest.raises(RecipeError, match=r"r\.toml:4: the treatment 'dense' declines"):
        validate(parse_recipe(text, "r.toml"))
    with pytest.raises(RecipeError, match=r"r\.toml:4: pass_on is not a boolean"):
        parse_recipe(text.replace("true", "'yes'"), "r.toml")
