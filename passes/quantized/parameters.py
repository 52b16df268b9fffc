# SPDX-License-Identifier: Apache-2.0
"""What a recipe may say of int8 layers."""

from __future__ import annotations

from collections.abc import Mapping

from passes.quantized import tricks
from passes.quantized.operators import GRAINS
from passes.quantized.ranges import OBSERVERS
from passes.sparse import prune as pruning
from passes.treatment import as_number, parse_density

DEFAULTS = {
    "observer": "mse",
    "percentile": 99.99,
    "per_channel": True,
    "symmetric": False,
    "tables": True,
    **tricks.DEFAULTS,
}


def _observer(value: object) -> str:
    if value not in OBSERVERS:
        raise ValueError(f"unknown observer {value!r}; known are {', '.join(OBSERVERS)}")
    return str(value)


def _percentile(value: object) -> float:
    number = as_number(value)
    if not 50 < number <= 100:
        raise ValueError(f"percentile must be above 50 and at most 100, not {value!r}")
    return number


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"true or false, not {value!r}")
    return value


def _grain(value: object) -> str:
    if value not in GRAINS:
        raise ValueError(f"unknown grain {value!r} for int8; known are {', '.join(GRAINS)}")
    return str(value)


PARAMETERS = {
    "observer": _observer,
    "percentile": _percentile,
    "per_channel": _switch,
    "symmetric": _switch,
    "tables": _switch,
    "density": parse_density,
    "grain": _grain,
    **tricks.PARAMETERS,
}


def check(parameters: Mapping[str, object], prune: bool) -> None:
    """See `Family.check`."""
    pruning.check(parameters, prune)
    if "percentile" in parameters and parameters.get("observer") != "percentile":
        raise ValueError(
            'only the observer "percentile" reads percentile. Add observer = "percentile"'
        )
