# SPDX-License-Identifier: Apache-2.0
"""Magnitude pruning by grain: drop the grains with the least sum of magnitudes (L1 saliency) until the density is met."""

from __future__ import annotations

import numpy as np

from passes.sparse.format import ELEMENT, block_of


def saliency(weight: np.ndarray, block: int) -> np.ndarray:
    """float64 [ceil(O / block), K]: sum of |w| over each grain of `block` output channels."""
    rows = np.abs(weight.reshape(weight.shape[0], -1)).astype(np.float64)
    count = -(-rows.shape[0] // block)
    padded = np.zeros((count * block, rows.shape[1]))
    padded[: rows.shape[0]] = rows
    return padded.reshape(count, block, -1).sum(axis=1)


def prune(
    weight: np.ndarray, *, density: float = 0.1, grain: str = ELEMENT, **_other
) -> np.ndarray:
    """`weight` [O, ...] with all but the share `density` of its most salient grains set to zero, ties by position.

    Saliency: L1 norm of the grain (Mao et al. 2017, arXiv 1705.08922). Raises ValueError for a density outside (0, 1], for
    NaN weights and for an unknown grain. Nothing is scaled: kept weights are kept bit for bit.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], not {density}")
    block = block_of(grain)
    scores = saliency(weight, block)
    if np.isnan(scores).any():
        raise ValueError("NaN weights have no magnitude to prune by")
    keep = max(1, round(density * scores.size))
    order = np.argsort(-scores, axis=None, kind="stable")
    kept = np.zeros(scores.size, dtype=bool)
    kept[order[:keep]] = True
    mask = np.repeat(kept.reshape(scores.shape), block, axis=0)[: weight.shape[0]]
    return np.where(mask.reshape(weight.shape), weight, np.zeros((), weight.dtype))
