# SPDX-License-Identifier: Apache-2.0
"""What the zeros of a weight are: their share, and the coarsest grain they lie in, whoever put them there."""

from __future__ import annotations

import math

import numpy as np

from passes.sparse.grains import Grain, as_4d

# Where two grains of the same size fit, the first.
_BLOCKS = (
    "filter", "channel", "kernel", "row", "out:16", "out:8", "out:4", "in:4",
    "block:4x4", "block:8x8", "block:16x16", "block:32x32",
)  # fmt: skip
_CONSTRAINTS = ("1:2", "1:4", "2:4", "1:8", "2:8", "4:8")
# A grain is what the zeros lie in while its blocks cover at most this many times the non-zeros.
_TOLERATED_FILL = 1.05
# An N:M constraint is told from chance by how nearly it is used up.
_USED = 0.9
# Output channels looked at together.
_ROWS = 64
# Shown for every weight with zeros: what the kernels with shared output vectors would have to store.
_SHOWN = ("element", "out:4", "out:8", "out:16")


def covered(grain: Grain, pattern: np.ndarray, shape: tuple[int, ...]) -> int:
    """Weights of a weight of `shape` that lie in the true blocks of `pattern` [*grid], padding not counted."""
    count = pattern.astype(np.int64)
    for axis, block in zip(reversed(as_4d(shape)), reversed(grain.block_shape(shape))):
        inside = np.minimum(block, axis - block * np.arange(count.shape[-1]))
        count = count @ inside
    return int(count)


def density_at(grain: str | Grain, weight: np.ndarray) -> float:
    """Share of the weights that lie in blocks with a non-zero."""
    grain = Grain.parse(grain)
    return covered(grain, grain.pattern(weight), weight.shape) / weight.size


def coarsest_grain(weight: np.ndarray) -> Grain | None:
    """The grain with the most weights per block whose blocks hold at most 5 % fill; None where nothing is zero.

    Of N:M constraints only those are found that the weight nearly uses up, and only where no block does.
    """
    nonzero = weight != 0
    kept = np.count_nonzero(nonzero)
    if kept == weight.size:
        return None
    element = Grain.parse("element")
    if kept == 0:
        return Grain.parse("filter")
    shape = as_4d(weight.shape)
    # Weights of one block, padding not counted: where there is one input channel, four of them are no grain.
    sizes = {
        grain: math.prod(map(min, grain.block_shape(shape), shape))
        for grain in map(Grain.parse, _BLOCKS)
    }
    candidates = [grain for grain, size in sizes.items() if size > 1]
    # A few zeros are no grain that would not drop a single block.
    limit = min((_TOLERATED_FILL - 1) * kept, weight.size - kept - 1)
    # The sort is stable: ties keep the order of the list.
    for grain in sorted(candidates, key=lambda g: -sizes[g]):
        if _fill_is_tolerated(grain, nonzero, limit):
            return grain
    for grain in map(Grain.parse, _CONSTRAINTS):
        if (
            grain.of <= weight.shape[1]
            and kept >= _USED * grain.density * weight.size
            and grain.fits(nonzero)
        ):
            return grain
    return element


def _fill_is_tolerated(grain: Grain, nonzero: np.ndarray, limit: float) -> bool:
    """Whether the blocks that hold a non-zero hold at most `limit` zeros. Some rows at a time: most grains fail early."""
    outputs = len(nonzero)
    block = grain.block_shape(nonzero.shape)[0]
    step = max(block, _ROWS // block * block)
    fill = 0
    for first in range(0, outputs, step):
        part = nonzero[first : first + step]
        fill += covered(grain, grain.pattern(part), part.shape) - np.count_nonzero(part)
        if fill > limit:
            return False
    return True


def found(weight: np.ndarray) -> dict:
    """`density` and number of `zeros`, the coarsest `grain` the zeros lie in with the density it stores, the kernel
    format that it `runs_as` where that is another one, and the density at each kernel format."""
    zeros = int(weight.size - np.count_nonzero(weight))
    grain = coarsest_grain(weight) if weight.size else None
    if grain is None:
        return {
            "density": 1.0,
            "zeros": 0,
            "grain": None,
            "grain_density": dict.fromkeys(_SHOWN, 1.0),
        }
    shown = {name: density_at(name, weight) for name in _SHOWN}
    if grain.name not in shown:
        shown[grain.name] = density_at(grain, weight) if not grain.of else float(grain.density)
    facts = {
        "density": 1 - zeros / weight.size,
        "zeros": zeros,
        "grain": grain.name,
        "grain_density": shown,
    }
    # Dead channels leave the network instead (kerf.RemoveDeadFilters).
    if grain.runs_as() != grain.name and grain.name not in ("filter", "channel"):
        facts["runs_as"] = grain.runs_as()
    return facts
