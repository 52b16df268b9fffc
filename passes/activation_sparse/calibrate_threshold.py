# SPDX-License-Identifier: Apache-2.0
"""A threshold below which activations count as zero, from calibration data and a bound on the error.

The largest t such that, over the calibration tokens, |(h - h') W^T| <= bound * |h W^T| in the Frobenius norm, where h' is
h without the values of magnitude at most t: training-free activation sparsity as in TEAL (Liu et al. 2024), with the
layer's own output as the measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

_TOKENS = 256
_STEPS = 14


def collect_tokens(
    samples: Iterable[Mapping[str, np.ndarray]], names: Sequence[str], seed: int = 0
) -> dict[str, np.ndarray]:
    """At most `_TOKENS` rows [n, K] of each value, drawn evenly from all samples."""
    rng = np.random.default_rng(seed)
    kept: dict[str, list[np.ndarray]] = {name: [] for name in names}
    seen = dict.fromkeys(names, 0)
    for sample in samples:
        for name in names:
            for row in sample[name].reshape(-1, sample[name].shape[-1]):
                seen[name] += 1
                if len(kept[name]) < _TOKENS:
                    kept[name].append(row.copy())
                elif (slot := int(rng.integers(seen[name]))) < _TOKENS:
                    kept[name][slot] = row.copy()
    return {name: np.stack(rows) for name, rows in kept.items()}


def calibrate_threshold(hidden: np.ndarray, weight: np.ndarray, bound: float) -> float:
    """The threshold for tokens `hidden` [n, K] and a weight [O, K]; 0 where no value can be left out."""
    magnitudes = np.sort(np.abs(hidden[np.isfinite(hidden)]))
    whole = float(np.linalg.norm(hidden @ weight.T))
    if not magnitudes.size or not np.isfinite(whole):
        return 0.0
    low, high = 0, magnitudes.size  # values left out: as many as may be, and too many
    for _ in range(_STEPS):
        middle = (low + high) // 2
        threshold = magnitudes[middle - 1] if middle else 0.0
        dropped = np.where(np.abs(hidden) <= threshold, hidden, 0)
        if float(np.linalg.norm(dropped @ weight.T)) <= bound * whole:
            low = middle
        else:
            high = middle
        if high - low <= 1:
            break
    if not low:
        return 0.0
    # Between two values that were seen: on none of them may rounding decide.
    above = magnitudes[low] if low < magnitudes.size else magnitudes[low - 1]
    return float((magnitudes[low - 1] + above) / 2)
