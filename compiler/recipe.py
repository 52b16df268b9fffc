# SPDX-License-Identifier: Apache-2.0
"""Recipes: which layers get which treatment, as TOML or as the same frozen dataclasses.

    winograd = "auto"                 # or "never"

    [[rule]]
    match = "layer1.*"                # a glob over layer names; the first that matches decides
    treatment = "sparse"
    density = 0.1                     # everything else is a parameter of the treatment
    grain = "out:4"
    prune = true                      # Kerf may set weights to zero, not only use those there

A layer that no rule matches stays dense. Importing this module does not load TVM: what needs the
families (whether a treatment exists, what its parameters may be) happens in `validate` and
`resolve`.
"""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from passes.treatment import Treatment
from schedules.errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The families by name: `passes.families()`, which loads TVM, has the same.
BUILT_IN = ("dense", "sparse", "int8", "binary", "quadratic", "activation_sparse")
WINOGRAD = ("auto", "never")
_TOP_LEVEL_KEYS = ("winograd", "rule")
_RULE_KEYS = ("match", "treatment", "prune", "pass_on")


@dataclass(frozen=True)
class Rule:
    """`treatment` with `parameters`, as written, for every layer whose name matches the glob
    `match`; with `pass_on` the next rule that matches is asked for what this one declines."""

    match: str
    treatment: str = "dense"
    parameters: Mapping[str, object] = field(default_factory=dict)
    prune: bool = False
    where: str = ""  # of the rule, for messages: "recipe.toml:4"
    key_lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    pass_on: bool = False

    def place(self, key: str = "") -> str:
        """Where `key` of this rule is written, as far as that is known."""
        return self.key_lines.get(key) or self.where or f"rule {self.match!r}"


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; `winograd="never"` forbids Winograd convolution, whose rounding error is
    larger, everywhere."""

    name: str
    rules: tuple[Rule, ...] = ()
    winograd: str = "auto"
    built_in: bool = False

    def __post_init__(self):
        if self.winograd not in WINOGRAD:
            raise RecipeError(
                "unknown winograd setting",
                where=self.name,
                found=repr(self.winograd),
                wanted=" or ".join(WINOGRAD),
            )

    def to_json(self) -> dict:
        """Plain values for the manifest: enough to write the same recipe again."""
        rules = [
            {
                "match": r.match,
                "treatment": r.treatment,
                "prune": r.prune,
                **({"pass_on": True} if r.pass_on else {}),
                **r.parameters,
            }
            for r in self.rules
        ]
        return {"name": self.name, "winograd": self.winograd, "rule": rules}


def _option(key: str) -> str:
    """How the command line gives a parameter of a built-in recipe."""
    return f"--{key}" if key in ("density", "grain", "prune") else f"--set {key}"


def built_in(name: str, **parameters) -> Recipe:
    """`dense`: nothing is compressed. Any other family's name: every layer that this family takes, the others dense."""
    prune = bool(parameters.pop("prune", False))
    if name == "dense":
        for key in parameters:
            raise RecipeError(
                f"the recipe 'dense' takes no {key}",
                where=_option(key),
                todo="Give --recipe sparse",
            )
        if prune:
            raise RecipeError(
                "the recipe 'dense' prunes nothing", where="--prune", todo="Give --recipe sparse"
            )
        return Recipe("dense", built_in=True)
    places = {key: _option(key) for key in (*parameters, "prune")}
    rule = Rule("*", name, dict(parameters), prune, f"--recipe {name}", places)
    return Recipe(name, (rule,), built_in=True)


def _is_built_in(source: object) -> bool:
    """Whether this names families of `BUILT_IN`, one or several joined by "+"."""
    return isinstance(source, str) and all(name in BUILT_IN for name in source.split("+"))


def _in_turn(name: str, given: Mapping[str, object], prune: bool) -> Recipe:
    """`binary+int8`: every layer is offered to the first family, what it declines to the next."""
    families = name.split("+")
    if given or prune:
        raise RecipeError(
            "cannot be combined with several families",
            where=", ".join(_option(k) for k in (*given, *(["prune"] if prune else []))),
            todo="Write it in the rule of a recipe file, with pass_on = true in the rules before the last",
        )
    if "dense" in families or len(set(families)) < len(families):
        raise RecipeError("not families to ask in turn", where=f"--recipe {name}")
    where = f"--recipe {name}"
    rules = [Rule("*", family, where=where, pass_on=True) for family in families]
    rules[-1] = replace(rules[-1], pass_on=False)
    return Recipe(name, tuple(rules), built_in=True)


def load_recipe(
    source: str | Path | Recipe,
    *,
    prune: bool | None = None,
    winograd: str | None = None,
    **parameters,
) -> Recipe:
    """A built-in recipe by name, a TOML file, or a `Recipe` as it is; options given here come from
    the command line.

    `parameters` (None: not given) are those of a built-in recipe's treatment; `prune` and
    `winograd` apply to any recipe. Raises RecipeError, naming file and line.
    """
    given = {k: v for k, v in parameters.items() if v is not None}
    if _is_built_in(source):
        if "+" in source:
            recipe = _in_turn(source, given, bool(prune))
        else:
            recipe = built_in(source, prune=prune, **given)
    elif given:
        raise RecipeError(
            "cannot be combined with a recipe of your own",
            where=", ".join(_option(k) for k in given),
            todo="Write it in the rule",
        )
    else:
        recipe = source if isinstance(source, Recipe) else parse_recipe(*_read(source))
        if prune:
            rules = tuple(replace(r, prune=r.prune or r.treatment != "dense") for r in recipe.rules)
            recipe = replace(recipe, rules=rules)
    return replace(recipe, winograd=winograd) if winograd is not None else recipe


def _read(source: str | Path) -> tuple[str, str]:
    path = Path(source)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except FileNotFoundError:
        known = ", ".join(BUILT_IN)
        wanted = f"one of {known}, several joined by +, or a TOML file"
        raise RecipeError("no such recipe", where=str(path), wanted=wanted) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"not a text file: {error}", where=str(path)) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path)) from None


class _Lines:
    """Line numbers of keys, which TOML parsers do not give: found by searching the text."""

    def __init__(self, text: str, file: str):
        self.file = file
        self.starts: list[int] = []
        self.keys: list[dict[str, int]] = [{}]  # [0]: before the first rule
        for number, line in enumerate(text.splitlines(), 1):
            if re.match(r"\s*\[\[\s*[\"']?rule[\"']?\s*\]\]", line):
                self.starts.append(number)
                self.keys.append({})
            elif key := re.match(r"\s*[\"']?([A-Za-z0-9_-]+)[\"']?\s*=", line):
                self.keys[-1].setdefault(key[1], number)
            elif table := re.match(r"\s*\[+\s*[\"']?([A-Za-z0-9_-]+)", line):
                self.keys[0].setdefault(table[1], number)

    def top(self, key: str) -> str:
        return self._place(self.keys[0].get(key))

    def rule(self, index: int) -> str:
        return self._place(self.starts[index] if index < len(self.starts) else None)

    def rule_keys(self, index: int) -> dict[str, str]:
        if index + 1 >= len(self.keys):
            return {}
        return {key: self._place(line) for key, line in self.keys[index + 1].items()}

    def _place(self, line: int | None) -> str:
        return f"{self.file}:{line}" if line else self.file


def parse_recipe(text: str, file: str = "recipe") -> Recipe:
    """A recipe from TOML text; `file` is its name in messages. Raises RecipeError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        at_end = "end of document" in str(error)
        number = line[1] if line else len(text.splitlines()) if at_end else ""
        where = f"{file}:{number}" if number else file
        raise RecipeError(f"malformed TOML: {error}", where=where) from None
    lines = _Lines(text, file)
    for key in document:
        if key not in _TOP_LEVEL_KEYS:
            raise RecipeError(
                f"unknown key {key!r}", where=lines.top(key), wanted=" or ".join(_TOP_LEVEL_KEYS)
            )
    rules = document.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(r, dict) for r in rules):
        raise RecipeError("rules are written as [[rule]] tables", where=lines.top("rule"))
    winograd = document.get("winograd", "auto")
    if winograd not in WINOGRAD:
        raise RecipeError(
            "unknown winograd setting",
            where=lines.top("winograd"),
            found=repr(winograd),
            wanted=" or ".join(repr(w) for w in WINOGRAD),
        )
    return Recipe(file, tuple(_parse_rule(r, i, lines) for i, r in enumerate(rules)), winograd)


def _parse_rule(table: Mapping, index: int, lines: _Lines) -> Rule:
    places = lines.rule_keys(index)
    where = lines.rule(index)
    kinds = {"match": str, "treatment": str, "prune": bool, "pass_on": bool}
    for key, kind in kinds.items():
        if key in table and not isinstance(table[key], kind):
            raise RecipeError(
                f"{key} is not a {'string' if kind is str else 'boolean'}",
                where=places.get(key, where),
                found=repr(table[key]),
            )
    for key in ("match", "treatment"):
        if key not in table:
            raise RecipeError(f"the rule has no {key!r}", where=where)
    parameters = {k: v for k, v in table.items() if k not in _RULE_KEYS}
    flags = {key: table.get(key, False) for key in ("prune", "pass_on")}
    return Rule(
        table["match"], table["treatment"], parameters, where=where, key_lines=places, **flags
    )


def validate(recipe: Recipe) -> tuple[Treatment, ...]:
    """The treatment that each rule stands for, its parameters parsed. Raises RecipeError. Loads
    TVM."""
    from passes import families

    known = {family.name: family for family in families()}
    return tuple(_treatment(rule, known) for rule in recipe.rules)


def _treatment(rule: Rule, known: Mapping) -> Treatment:
    family = known.get(rule.treatment)
    if family is None:
        raise RecipeError(
            "unknown treatment",
            where=rule.place("treatment"),
            found=repr(rule.treatment),
            wanted=" or ".join(repr(name) for name in sorted(known)),
        )
    parsed = {}
    for key, value in rule.parameters.items():
        parse = family.parameters.get(key)
        if parse is None:
            names = [*_RULE_KEYS, *sorted(family.parameters)]
            raise RecipeError(
                f"unknown key {key!r} for the treatment {family.name!r}",
                where=rule.place(key),
                wanted="one of " + ", ".join(names),
            )
        try:
            parsed[key] = parse(value)
        except (ValueError, TypeError) as error:
            place = rule.place(key)
            where = place if place == _option(key) else f"{place}: {key}"
            raise RecipeError(str(error), where=where) from None
    if rule.prune and family.prune is None:
        raise RecipeError(
            f"the treatment {family.name!r} prunes nothing", where=rule.place("prune")
        )
    if rule.pass_on and family.rewrite is None:
        raise RecipeError(
            f"the treatment {family.name!r} declines nothing", where=rule.place("pass_on")
        )
    if family.check is not None:
        try:
            family.check(parsed, rule.prune)
        except ValueError as error:
            raise RecipeError(str(error), where=rule.place("prune" if rule.prune else "")) from None
    return Treatment(family.name, parsed, rule.prune)


def resolve(recipe: Recipe, layer_names: Iterable[str]) -> dict[str, Treatment]:
    """Each layer's treatment: that of the first rule whose glob matches its name, dense if none
    does; of a rule that passes layers on, then that of the next.

    Raises RecipeError for what `validate` finds, and for a rule of the user's that matches no layer
    at all.
    """
    names = list(layer_names)
    treatments = validate(recipe)
    for rule in recipe.rules:
        if not recipe.built_in and not any(_matches(rule, name) for name in names):
            raise RecipeError(
                "matches no layer of the model",
                where=f"{rule.place('match')}: match",
                found=repr(rule.match),
                wanted=_some(names),
                todo="`compile-model inspect MODEL` lists them all",
            )
    resolved = {}
    for name in names:
        hits = [(rule, t) for rule, t in zip(recipe.rules, treatments) if _matches(rule, name)]
        last = next((i for i, (rule, _) in enumerate(hits) if not rule.pass_on), len(hits) - 1)
        chosen = None
        for _, treatment in reversed(hits[: last + 1]):
            chosen = replace(treatment, otherwise=chosen)
        resolved[name] = chosen or Treatment()
    return resolved


def _matches(rule: Rule, name: str) -> bool:
    return name == rule.match or fnmatch.fnmatchcase(name, rule.match)


def _some(names: list[str]) -> str:
    if not names:
        return "a model with convolution or linear layers"
    shown = ", ".join(names[:4])
    return f"a glob matching layers such as {shown}" + (", ..." if len(names) > 4 else "")
