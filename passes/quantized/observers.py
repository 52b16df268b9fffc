# SPDX-License-Identifier: Apache-2.0
"""What is remembered of an activation while calibration data streams by: bounded memory, one pass.

A histogram has bins of a power-of-two width, aligned at zero. When a value lies outside, neighbours are merged in pairs,
so that counts stay exact however the range grows, and histograms of several tensors can be added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

HALF = 2048  # bins on either side of zero: at least 8 for each of 255 steps where one side is used
_MOMENTUM = 0.9


class Histogram:
    """Counts of the finite values of a tensor other than zero, and of its zeros.

    Bin i of 2 * HALF holds the values in [(i - HALF) * width, (i + 1 - HALF) * width).
    """

    def __init__(self) -> None:
        self.width = 0.0  # of a bin; 0: nothing but zeros so far
        self.counts = np.zeros(2 * HALF, np.int64)
        self.zeros = 0

    def add(self, values: np.ndarray) -> None:
        """Count the values of an array; all finite."""
        values = values.reshape(-1)
        nonzero = values[values != 0]
        self.zeros += values.size - nonzero.size
        if not nonzero.size:
            return
        self._widen(float(np.abs(nonzero).max()))
        bins = np.floor(nonzero.astype("float64") / self.width).astype(np.int64) + HALF
        self.counts += np.bincount(bins, minlength=2 * HALF)

    def merge(self, other: Histogram) -> None:
        """Add another histogram's counts, which is left as it is."""
        self.zeros += other.zeros
        if not other.width:
            return
        copy = Histogram()
        copy.width, copy.counts = other.width, other.counts.copy()
        largest = max(self.width, other.width) * (HALF - 1)
        copy._widen(largest)
        self._widen(largest)
        self.counts += copy.counts

    def _widen(self, largest: float) -> None:
        """Make room for magnitudes up to `largest`."""
        if not self.width:
            # A power of two: halving and doubling lose nothing.
            self.width = 2.0 ** (math.floor(math.log2(largest)) + 1) / HALF
        while largest >= self.width * HALF:
            pairs = self.counts.reshape(2, HALF // 2, 2).sum(axis=2)
            self.counts = np.zeros(2 * HALF, np.int64)
            self.counts[HALF // 2 : HALF + HALF // 2] = pairs.reshape(-1)
            self.width *= 2

    def occupied(self) -> tuple[np.ndarray, np.ndarray]:
        """Centres and counts of the bins that hold anything, ascending."""
        (bins,) = np.nonzero(self.counts)
        return (bins - HALF + 0.5) * self.width, self.counts[bins]


@dataclass
class Statistics:
    """Of one tensor over all samples seen: extremes, their moving averages, a histogram.

    `finite` is False once a value was not finite; such values are in nothing else.
    """

    keep_histogram: bool = True
    low: float = math.inf
    high: float = -math.inf
    average_low: float = math.nan
    average_high: float = math.nan
    samples: int = 0
    finite: bool = True
    histogram: Histogram = field(default_factory=Histogram)

    def add(self, values: np.ndarray) -> None:
        """One calibration sample of the tensor."""
        if not np.isfinite(values).all():
            self.finite = False
            values = values[np.isfinite(values)]
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.samples:
            low = _MOMENTUM * self.average_low + (1 - _MOMENTUM) * low
            high = _MOMENTUM * self.average_high + (1 - _MOMENTUM) * high
        self.average_low, self.average_high = low, high
        self.samples += 1
        if self.keep_histogram:
            self.histogram.add(values)

    @property
    def is_zero(self) -> bool:
        """Whether nothing but zeros was seen."""
        return self.low == 0.0 and self.high == 0.0
