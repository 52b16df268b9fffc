# SPDX-License-Identifier: Apache-2.0
"""What is wanted of a layer (`Treatment`) and what became of it (`Decision`). Imports neither TVM nor torch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Treatment:
    """One layer's treatment: a family, its parameters, and whether weights may be changed (`prune`) to get there;
    `otherwise` what is asked for if that family declines the layer."""

    family: str = "dense"
    parameters: Mapping[str, object] = field(default_factory=dict)
    prune: bool = False
    otherwise: Treatment | None = None

    def of(self, family: str) -> Treatment:
        """This treatment or the one behind it that is of `family`. Raises KeyError if there is none."""
        found: Treatment | None = self
        while found is not None and found.family != family:
            found = found.otherwise
        if found is None:
            raise KeyError(family)
        return found


@dataclass(frozen=True)
class Decision:
    """One layer's fate.

    `declined` is the reason why it runs dense although something else was asked for, else None. `passed_on` has the
    reasons of the families that declined it before, by name, where the recipe then asks for another: `asked` is the last.
    `unit` names the layers that stand or fall together because one operator computes them (a
    multilayer perceptron, the branches of a quadratic neuron); None: the layer alone.
    """

    layer: str
    operator: str
    weight_shape: tuple[int, ...]
    asked: str
    treatment: str
    declined: str | None = None
    found: Mapping[str, object] = field(default_factory=dict)
    parameters: Mapping[str, object] = field(default_factory=dict)
    pruned: bool = False
    unit: str | None = None
    passed_on: Mapping[str, str] = field(default_factory=dict)


def parse_share(value: object, name: str, *, one: bool) -> float:
    """The parameter `name` as a number in (0, 1], or in (0, 1) without `one`. Raises ValueError."""
    share = as_number(value)
    if not (0 < share < 1 or (one and share == 1)):
        raise ValueError(f"{name} must be in (0, 1{']' if one else ')'}, not {value!r}")
    return share


def parse_density(value: object) -> float:
    """A density in (0, 1]. Raises ValueError."""
    return parse_share(value, "density", one=True)


def as_number(value: object) -> float:
    """A parameter as a float; NaN, which no range holds, for what is no number. To Python true is 1, and "3" no error."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]
