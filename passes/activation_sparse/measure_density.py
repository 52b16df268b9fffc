# SPDX-License-Identifier: Apache-2.0
"""How many of the activations that a layer reads are not zero, on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class DensityMeter:
    """Shares of non-zeros, gathered sample by sample; NaN counts as one.

    A row of [..., K] is a token. `union` is the share of the K that any token of a sample needs: what several tokens
    together read of the weights.
    """

    tokens: int = 0
    _sum: float = 0.0
    _densest: float = 0.0
    _unions: float = 0.0
    _samples: int = 0

    def add(self, hidden: np.ndarray) -> None:
        """One sample's activations [..., K]."""
        used = hidden.reshape(-1, hidden.shape[-1]) != 0
        per_token = used.mean(axis=1)
        self.tokens += len(per_token)
        self._sum += float(per_token.sum())
        self._densest = max(self._densest, float(per_token.max()))
        self._unions += float(used.any(axis=0).mean())
        self._samples += 1

    @property
    def density(self) -> float:
        """Mean over all tokens."""
        return self._sum / self.tokens

    def to_json(self) -> dict[str, float]:
        """What the report shows of a layer's input."""
        return {
            "activation_density": round(self.density, 5),
            "activation_density_densest_token": round(self._densest, 5),
            "activation_density_union": round(self._unions / self._samples, 5),
        }


def measure_density(
    samples: Iterable[Mapping[str, np.ndarray]], names: Sequence[str]
) -> dict[str, DensityMeter]:
    """A meter for each of these values over all samples."""
    meters = {name: DensityMeter() for name in names}
    for sample in samples:
        for name, meter in meters.items():
            meter.add(sample[name])
    return meters
