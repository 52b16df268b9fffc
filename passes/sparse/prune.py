# SPDX-License-Identifier: Apache-2.0
"""Magnitude pruning by grain: drop the grains with the least sum of magnitudes (L1 saliency) until the density is met."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from passes.sparse.grains import Grain


def saliency(weight: np.ndarray, grain: str | Grain) -> np.ndarray:
    """float64 [*grid]: sum of |w| over each block (Mao et al. 2017, arXiv 1705.08922); of N:M, |w| itself."""
    blocks = np.abs(Grain.parse(grain).blocks(weight)).astype(np.float64)
    return blocks.sum(axis=(4, 5, 6, 7))


def prune(
    weight: np.ndarray, *, density: float | None = None, grain: str | Grain = "element", **_other
) -> np.ndarray:
    """`weight` [O, ...] with all but the share `density` of its most salient grains set to zero, ties by position.

    An N:M grain has its own density. One grain at least is kept, so that no layer is left empty. Nothing is scaled: kept
    weights are kept bit for bit. Raises ValueError for a density outside (0, 1] or that contradicts an N:M grain, for
    NaN weights and for an unknown grain.
    """
    grain = Grain.parse(grain)
    scores = saliency(weight, grain)
    if np.isnan(scores).any():
        raise ValueError("NaN weights have no magnitude to prune by")
    density = density_to_keep(grain, density)
    keep = kept_by_constraint(scores, grain) if grain.of else most_salient(scores, density)
    return np.where(grain.spread(keep, weight.shape), weight, np.zeros((), weight.dtype))


def prune_layer(weight: np.ndarray, *, grain: str | Grain = "element", **parameters) -> np.ndarray:
    """`Family.prune`: as `prune`, but filters stay as they are here. Which of them can leave is up to the graph, where
    `prune_filters` chooses them."""
    return (
        weight if Grain.parse(grain).name == "filter" else prune(weight, grain=grain, **parameters)
    )


def density_to_keep(grain: Grain, density: float | None) -> float:
    """The density asked for, checked; an N:M grain has its own. Raises ValueError."""
    if grain.of:
        if density is not None and not math.isclose(density, grain.density, rel_tol=1e-3):
            raise ValueError(
                f"{grain.name} keeps {grain.density:.0%} of the weights, not {density:.0%}"
            )
        return grain.density
    if density is None or not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], not {density}")
    return density


def one_is_kept(grain: Grain, grains: int, density: float) -> str:
    """What to tell where a density leaves a layer empty but for the one grain that is always kept."""
    return (
        f"density {density:.3g} would leave none of its {grains} grains ({grain.name}); one is kept"
    )


def check(parameters: Mapping[str, object], prune: bool) -> None:
    """That pruning knows what to reach. Raises ValueError."""
    if prune:
        grain, density = Grain.parse(parameters.get("grain", "element")), parameters.get("density")
        if density is None and not grain.of:
            raise ValueError(
                "pruning needs to know the density to reach. Add density, for example 0.1"
            )
        density_to_keep(grain, density)


def most_salient(scores: np.ndarray, density: float) -> np.ndarray:
    """bool, shaped as `scores`: the share `density` of the largest, one at least, ties by position."""
    keep = max(1, round(density * scores.size))
    order = np.argsort(-scores, axis=None, kind="stable")
    kept = np.zeros(scores.size, dtype=bool)
    kept[order[:keep]] = True
    return kept.reshape(scores.shape)


def kept_by_constraint(scores: np.ndarray, grain: Grain) -> np.ndarray:
    """bool [O, I, R, S]: the N largest of every M input channels of an N:M grain."""
    cut = Grain((1, grain.of, 1, 1))
    groups = grain.groups_of(scores)
    # Padding must not win against weights that are zero: it ranks below everything.
    inside = grain.groups_of(np.ones_like(scores))
    order = np.argsort(-np.where(inside > 0, groups, -1.0), axis=-1, kind="stable")[
        ..., : grain.keep
    ]
    kept = np.zeros(groups.shape, dtype=bool)
    np.put_along_axis(kept, order, True, axis=-1)
    return cut.join(kept.reshape(*kept.shape[:4], 1, grain.of, 1, 1), scores.shape)
