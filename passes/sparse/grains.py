# SPDX-License-Identifier: Apache-2.0
"""Grains of weight sparsity: which weights are zero together, by name.

A grain is a block shape over a weight [O, I/groups, R, S] (a matrix [O, K] counts as [O, K, 1, 1]), or an N:M constraint:

    element   one weight                          out:B      B output channels, B = 4, 8, 16
    row       W[o, i, r, :], a kernel row         in:4       4 input channels (int8 dot products)
    kernel    W[o, i, :, :]                       block:BxC  B output times C input channels
    filter    W[o, :, :, :], an output channel    N:M        at most N of every M input channels are not zero
    channel   W[:, i, :, :], an input channel

The first four are those of Mao et al. 2017 (arXiv 1705.08922). Blocks start at multiples of their size; where the size
does not divide an axis, the last block is padded with zeros, which are stored and counted as fill.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

WHOLE = 0  # a block that spans its axis
_NAMED = {
    "element": (1, 1, 1, 1),
    "row": (1, 1, 1, WHOLE),
    "kernel": (1, 1, WHOLE, WHOLE),
    "filter": (1, WHOLE, WHOLE, WHOLE),
    "channel": (WHOLE, 1, WHOLE, WHOLE),
}
_OUT, _IN, _LARGEST = (4, 8, 16), (4,), 64
KNOWN = "element, row, kernel, filter, channel, out:4, out:8, out:16, in:4, block:BxC (such as block:4x4), N:M (such as 2:4)"


@dataclass(frozen=True)
class Grain:
    """`block`: output channels, input channels, kernel rows, kernel columns of one block, `WHOLE` for all of them.
    With `of`, instead: at most `keep` of every `of` neighbouring input channels are not zero."""

    block: tuple[int, int, int, int] = (1, 1, 1, 1)
    keep: int = 0
    of: int = 0

    @staticmethod
    def parse(name: object) -> Grain:
        """The grain of that name (or the grain itself). Raises ValueError, listing the names there are."""
        if isinstance(name, Grain):
            return name
        text = str(name)
        if text in _NAMED:
            return Grain(_NAMED[text])
        numbers = [int(n) for n in re.findall(r"[0-9]{1,3}", text)]
        if re.fullmatch(r"out:\d+", text) and numbers[0] in _OUT:
            return Grain((numbers[0], 1, 1, 1))
        if re.fullmatch(r"in:\d+", text) and numbers[0] in _IN:
            return Grain((1, numbers[0], 1, 1))
        if (
            re.fullmatch(r"block:\d{1,2}x\d{1,2}", text)
            and 1 <= min(numbers) <= max(numbers) <= _LARGEST
        ):
            return Grain((*numbers, 1, 1))
        if re.fullmatch(r"\d{1,2}:\d{1,2}", text) and 1 <= numbers[0] < numbers[1] <= _LARGEST:
            return Grain(keep=numbers[0], of=numbers[1])
        raise ValueError(f"unknown grain {text!r}; known are {KNOWN}")

    @property
    def name(self) -> str:
        if self.of:
            return f"{self.keep}:{self.of}"
        for name, block in _NAMED.items():
            if self.block == block:
                return name
        out, inputs = self.block[:2]
        if inputs == 1 and out in _OUT:
            return f"out:{out}"
        return f"in:{inputs}" if out == 1 and inputs in _IN else f"block:{out}x{inputs}"

    @property
    def density(self) -> float | None:
        """The share of weights that an N:M grain keeps; None where it is free."""
        return self.keep / self.of if self.of else None

    def block_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Weights of one block along each axis, for a weight of this shape."""
        return tuple(b or axis for b, axis in zip(self.block, as_4d(shape)))

    def size(self, shape: tuple[int, ...]) -> int:
        """Weights of one block, for a weight of this shape."""
        return math.prod(self.block_shape(shape))

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Blocks along each axis, the last of each padded."""
        return tuple(-(-axis // b) for axis, b in zip(as_4d(shape), self.block_shape(shape)))

    def blocks(self, weight: np.ndarray) -> np.ndarray:
        """The weight as [*grid, *block], padded with zeros."""
        shape, grid = self.block_shape(weight.shape), self.grid(weight.shape)
        whole = weight.reshape(as_4d(weight.shape))
        padding = [(0, b * n - axis) for b, n, axis in zip(shape, grid, whole.shape)]
        if any(after for _, after in padding):
            whole = np.pad(whole, padding)
        split = whole.reshape([size for pair in zip(grid, shape) for size in pair])
        return split.transpose(0, 2, 4, 6, 1, 3, 5, 7)

    def join(self, blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The inverse of `blocks`: a weight of `shape` from [*grid, *block], the padding cut off."""
        grid, block = blocks.shape[:4], blocks.shape[4:]
        whole = blocks.transpose(0, 4, 1, 5, 2, 6, 3, 7).reshape(
            [g * b for g, b in zip(grid, block)]
        )
        return whole[tuple(slice(0, n) for n in as_4d(shape))].reshape(shape)

    def pattern(self, weight: np.ndarray) -> np.ndarray:
        """bool [*grid]: the blocks that hold anything but zeros (-0 is zero, NaN is not). Of an N:M grain, the weights."""
        return self.blocks(weight != 0).any(axis=(4, 5, 6, 7))

    def spread(self, kept: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """bool [*shape]: the weights of the blocks that are true in `kept` [*grid]."""
        block = self.block_shape(shape)
        return self.join(
            np.broadcast_to(kept[..., None, None, None, None], (*kept.shape, *block)), shape
        )

    def groups_of(self, weight: np.ndarray) -> np.ndarray:
        """An N:M grain's weight as [O, ceil(I / M), R, S, M], padded with zeros."""
        cut = Grain((1, self.of, 1, 1)).blocks(weight)
        return cut.reshape(*cut.shape[:4], self.of)

    def stored(self, weight: np.ndarray) -> int:
        """Weights that the format must hold, fill and padding included."""
        if self.of:
            groups = self.groups_of(weight)
            return groups.size // self.of * self.keep
        return int(self.pattern(weight).sum()) * self.size(weight.shape)

    def fits(self, weight: np.ndarray) -> bool:
        """Whether an N:M grain's constraint holds; blocks always do, at the price of fill."""
        return not self.of or bool(
            (np.count_nonzero(self.groups_of(weight), axis=-1) <= self.keep).all()
        )

    def runs_as(self, groups_outputs: int | None = None) -> str:
        """The kernel format that represents this grain most coarsely: `element` or `out:B`. `groups_outputs`: output
        channels of one group, which blocks must not straddle."""
        out = self.block[0]
        if self.of or out in (1, WHOLE):
            return "element"
        usable = [
            b for b in _OUT if out % b == 0 and (groups_outputs is None or groups_outputs % b == 0)
        ]
        return f"out:{max(usable)}" if usable else "element"


def as_4d(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """[O, I, R, S] of a weight's shape; trailing axes of a matrix are 1."""
    return (*shape, *(1,) * (4 - len(shape)))
