# SPDX-License-Identifier: Apache-2.0
"""The tricks of post-training quantization that a recipe can switch, and the order of those on the float graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import tvm

from passes.family import Context
from passes.quantized.absorb_biases import absorb_biases
from passes.quantized.equalize_channels import equalize_channels
from passes.quantized.fold_input_normalization import fold_input_normalization
from passes.quantized.migrate_outliers import migrate_outliers
from passes.treatment import Treatment

ROUNDINGS = ("nearest", "reconstruct")

DEFAULTS: Mapping[str, object] = {
    "fold_input_normalization": False,
    "equalize": True,
    "absorb_biases": False,
    "smooth": 0.0,
    "clip_weights": False,
    "rounding": "nearest",
    "bias_correction": True,
    "keep_float": 0,
}


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"true or false, not {value!r}")
    return value


def _alpha(value: object) -> float:
    """How much of an outlier moves into the weights; 0 switches it off."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"a number from 0 to 1, not {value!r}")
    return float(value)


def _rounding(value: object) -> str:
    if value not in ROUNDINGS:
        raise ValueError(f"unknown rounding {value!r}; known are {', '.join(ROUNDINGS)}")
    return str(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"a number of layers, not {value!r}")
    return value


PARAMETERS: Mapping[str, Callable] = {
    "fold_input_normalization": _switch,
    "equalize": _switch,
    "absorb_biases": _switch,
    "smooth": _alpha,
    "clip_weights": _switch,
    "rounding": _rounding,
    "bias_correction": _switch,
    "keep_float": _count,
}


# Why a trick that a recipe asks for may do nothing anywhere.
_NOWHERE = {
    "fold_input_normalization": "no constants between an input and the one layer that reads it",
    "equalize": "no channels between two of these layers that nothing else reads",
    "absorb_biases": "no channel that is above zero on all samples, between a ReLU and a layer that does not pad",
    "smooth": "no layer norm before these layers",
}


@dataclass(frozen=True)
class Prepared:
    """`notes` says by layer what each trick did there, or why it could not."""

    mod: tvm.IRModule
    notes: Mapping[str, Mapping[str, object]]


def prepare(mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context) -> Prepared:
    """The float graph after the tricks that its layers' recipes ask for, each on the layers that ask for it."""
    wanted = {name: {**DEFAULTS, **t.parameters} for name, t in treatments.items()}
    notes: dict[str, dict[str, object]] = {name: {} for name in wanted}

    def asking(trick: str) -> set[str]:
        return {name for name, of in wanted.items() if of[trick]}

    def note(trick: str, found: Mapping[str, object]) -> None:
        for name, text in found.items():
            if name in notes:
                notes[name][trick] = text

    if layers := asking("fold_input_normalization"):
        mod, folded = fold_input_normalization(mod, layers)
        note("fold_input_normalization", dict.fromkeys(folded, True))
    if layers := asking("equalize"):
        equalized = equalize_channels(mod, layers)
        mod = equalized.mod
        note("equalize", {n: _spread(s) for n, s in equalized.scales.items()})
    if layers := asking("absorb_biases"):
        if context.observe is None:
            note("absorb_biases", dict.fromkeys(layers, "no calibration data"))
        else:
            absorbed = absorb_biases(mod, context.observe, layers)
            mod = absorbed.mod
            note("absorb_biases", {n: int((s > 0).sum()) for n, s in absorbed.shifts.items()})
    layers = asking("smooth")
    if layers and context.observe is None:
        note("smooth", dict.fromkeys(layers, "no calibration data"))
    elif layers:
        for alpha in sorted({wanted[n]["smooth"] for n in layers}):
            same = {n for n in layers if wanted[n]["smooth"] == alpha}
            migrated = migrate_outliers(mod, context.observe, alpha, same)
            mod = migrated.mod
            note("smooth", {n: _spread(s) for n, s in migrated.scales.items()})
    for trick, why in _NOWHERE.items():
        asked = [n for n, t in treatments.items() if t.parameters.get(trick)]
        if not any(trick in notes[n] for n in asked):
            note(trick, dict.fromkeys(asked, f"nowhere: {why}"))
    return Prepared(mod, notes)


def _spread(scales) -> float:
    """The ratio of the largest to the smallest factor."""
    return float(scales.max() / scales.min())
