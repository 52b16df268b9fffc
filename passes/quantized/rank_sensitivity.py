# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: which layers lose most when they alone are quantized.

The noise of a network is close to the sum of what its layers add, so the layers with the largest share are the ones whose
float32 buys most accuracy for its time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np


def rank_sensitivity(
    layers: Sequence[str], outputs: Callable[[Collection[str]], list[np.ndarray]]
) -> dict[str, float]:
    """Noise over signal, in power, of the worst output when one layer alone is quantized; the most sensitive layer first.

    `outputs(names)` are the network's outputs on all calibration data with these layers quantized, each flat.
    """
    wanted = outputs(())
    found = {layer: _noise(wanted, outputs({layer})) for layer in layers}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def most_sensitive(sensitivity: Mapping[str, float], count: int) -> list[str]:
    """The `count` layers that lose most."""
    return sorted(sensitivity, key=lambda layer: -sensitivity[layer])[:count]


def joined(samples: Iterable[Mapping[str, np.ndarray]], names: Sequence[str]) -> list[np.ndarray]:
    """The values of each name over all samples, flat, float64."""
    parts = [[sample[name].reshape(-1) for name in names] for sample in samples]
    return [np.concatenate(values).astype("float64") for values in zip(*parts)]


def _noise(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    ratios = []
    for a, b in zip(wanted, found, strict=True):
        signal = float(a @ a)
        noise = float((a - b) @ (a - b))
        ratios.append(noise / signal if signal else float(noise > 0))
    return max(ratios, default=0.0)
