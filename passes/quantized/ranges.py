# SPDX-License-Identifier: Apache-2.0
"""From what was observed of an activation to the scale and zero point of its bytes.

    x is stored as q = clip(round(x / scale) + zero_point, 0, 255), and stands for (q - zero_point) * scale

The range always holds zero, which padding and ReLU need exactly.

    min_max           everything that was seen
    moving_average    extremes averaged over samples (momentum 0.9): an outlier in one sample counts less
    percentile        without the largest and smallest values, a share of 100 - percentile each
    mse               the range with the least mean squared error of rounding and clipping together
    entropy           the range with the least Kullback-Leibler divergence to the histogram (Migacz, 8-bit Inference with
                      TensorRT, GTC 2017)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from passes.quantized.observers import Statistics

STEPS = 255
_SHRINKS = np.linspace(1.0, 0.2, 81)  # candidates for mse and entropy, of the range seen
_REFINED = np.linspace(1.0, 0.2, 41)


@dataclass(frozen=True)
class Affine:
    """How a tensor lies in bytes. `scale` is a float32 number, positive and normal."""

    scale: float
    zero_point: int

    @property
    def low(self) -> float:
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        return (STEPS - self.zero_point) * self.scale


def affine(low: float, high: float, *, symmetric: bool = False) -> Affine:
    """The bytes for values in [low, high]. Symmetric: zero at 128, or at 0 where nothing is negative.

    Raises ValueError for a range without extent or with one that float32 cannot hold.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric and low < 0:
        scale = float(np.float32(max(-low / 128, high / 127)))
        zero_point = 128
    else:
        scale = float(np.float32((high - low) / STEPS))
        zero_point = round(-low / scale) if scale else 0
    if not (np.finfo(np.float32).tiny <= scale <= np.finfo(np.float32).max / STEPS):
        raise ValueError(f"no scale for values between {low:.3g} and {high:.3g}")
    return Affine(scale, int(np.clip(zero_point, 0, STEPS)))


def min_max(seen: Statistics, **_parameters) -> tuple[float, float]:
    return seen.low, seen.high


def moving_average(seen: Statistics, **_parameters) -> tuple[float, float]:
    return seen.average_low, seen.average_high


def percentile(
    seen: Statistics, *, percentile: float = 99.99, **_parameters
) -> tuple[float, float]:
    """Quantiles of the histogram, to the resolution of its bins."""
    centres, counts = seen.histogram.occupied()
    below = int(np.searchsorted(centres, 0.0))
    values = np.insert(centres, below, 0.0)
    totals = np.cumsum(np.insert(counts, below, seen.histogram.zeros))
    cut = totals[-1] * (1 - percentile / 100)
    low = values[np.searchsorted(totals, cut, side="right")]
    high = values[np.searchsorted(totals, totals[-1] - cut, side="left")]
    half = seen.histogram.width / 2  # what a centre stands for reaches so far; zero is zero
    low, high = low - half * (low != 0), high + half * (high != 0)
    return max(float(low), seen.low), min(float(high), seen.high)


def mean_squared_error(seen: Statistics, *, symmetric: bool = False, **_parameters):
    """The range whose bytes differ least from the values, in the mean of squares."""
    centres, counts = seen.histogram.occupied()

    def loss(low: float, high: float) -> float:
        bytes_ = affine(low, high, symmetric=symmetric)
        q = np.clip(np.rint(centres / bytes_.scale) + bytes_.zero_point, 0, STEPS)
        return float(counts @ ((q - bytes_.zero_point) * bytes_.scale - centres) ** 2)

    return _search(seen, loss)


def entropy(seen: Statistics, *, symmetric: bool = False, **_parameters):
    """The range in which as many levels as there are bytes lose least information."""
    centres, counts = seen.histogram.occupied()

    def loss(low: float, high: float) -> float:
        bytes_ = affine(low, high, symmetric=symmetric)
        inside = (centres >= bytes_.low) & (centres <= bytes_.high)
        kept = counts[inside].astype("float64")
        if not kept.size:
            return math.inf
        wanted = kept.copy()  # what lies outside is clipped to the outermost values
        wanted[0] += counts[centres < bytes_.low].sum()
        wanted[-1] += counts[centres > bytes_.high].sum()
        levels = np.rint(centres[inside] / bytes_.scale).astype(int) + bytes_.zero_point
        mass = np.bincount(levels, kept, STEPS + 2)[levels]
        found = mass / np.bincount(levels, minlength=STEPS + 2)[levels]
        p, q = wanted / wanted.sum(), found / found.sum()
        return float(p @ np.log(p / q))

    return _search(seen, loss)


def _search(seen: Statistics, loss: Callable[[float, float], float]) -> tuple[float, float]:
    """The best of ranges shrunk from the one seen: both ends together, then each end alone."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    best = min(_SHRINKS, key=lambda s: loss(low * s, high * s))
    low, high = low * best, high * best
    if low < 0 < high:
        low = low * min(_REFINED, key=lambda s: loss(low * s, high))
        high = high * min(_REFINED, key=lambda s: loss(low, high * s))
    return low, high


OBSERVERS: dict[str, Callable[..., tuple[float, float]]] = {
    "min_max": min_max,
    "moving_average": moving_average,
    "percentile": percentile,
    "mse": mean_squared_error,
    "entropy": entropy,
}
NEED_HISTOGRAM = ("percentile", "mse", "entropy")


def choose_range(
    seen: Sequence[Statistics], observer: str, *, symmetric: bool = False, **parameters
) -> Affine:
    """The bytes of tensors that share them: the union of the ranges the observer gives each.

    Raises ValueError, to be shown as a reason, where no range makes sense.
    """
    if not all(s.finite for s in seen):
        raise ValueError("calibration gives values that are not finite")
    if not all(s.samples for s in seen):
        raise ValueError("calibration gives no values")
    if all(s.is_zero for s in seen):
        raise ValueError("zero on every calibration sample, so there is no scale")
    choose = OBSERVERS[observer]
    found = [choose(s, symmetric=symmetric, **parameters) for s in seen if not s.is_zero]
    return affine(min(f[0] for f in found), max(f[1] for f in found), symmetric=symmetric)
