# SPDX-License-Identifier: Apache-2.0
"""How a weight is stored at each grain: the blocks that are not zero, and where they lie. Packing, unpacking, bytes.

    gaps      uint8: blocks skipped since the last one stored, over the whole layer in order; 255 skips 255 and stores none
    columns   uint16 or uint32 column of each block within its row of blocks, and an int32 pointer per row
    N:M       place of each of the N kept weights within its M, ceil(log2 M) bits each, packed without gaps

This is the layout to count and to keep on disk. Kernels read a layout of their own, which depends on their tile sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from passes.sparse.grains import Grain

GAPS, COLUMNS_16, COLUMNS_32 = "gaps8", "columns16", "columns32"
INDICES = (GAPS, COLUMNS_16, COLUMNS_32)
_SKIP = 255
_WIDTH = {COLUMNS_16: np.uint16, COLUMNS_32: np.uint32}


@dataclass(frozen=True)
class Packed:
    """A weight of `shape` at a grain.

    values   [blocks, *block] of the weight's dtype; of N:M [groups, N]
    index    uint8 gaps, uint16 or uint32 columns; of N:M uint8, bits packed
    pointer  int32 [rows + 1] of columns, else empty
    """

    grain: Grain
    shape: tuple[int, ...]
    indices: str
    values: np.ndarray
    index: np.ndarray
    pointer: np.ndarray
    nonzeros: int

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.index_bytes

    @property
    def index_bytes(self) -> int:
        return self.index.nbytes + self.pointer.nbytes

    @property
    def fill(self) -> int:
        """Zeros that are stored."""
        return self.values.size - self.nonzeros


def pack(weight: np.ndarray, grain: str | Grain, indices: str | None = None) -> Packed:
    """Store a weight [O, I/groups, R, S] or [O, K] of any dtype at a grain; `indices` None: the layout with the fewest bytes.

    Raises ValueError for an unknown grain or layout, for columns that do not fit, and for a weight that breaks an
    N:M constraint.
    """
    grain = Grain.parse(grain)
    if grain.of:
        return _pack_constrained(weight, grain)
    blocks = grain.blocks(weight)
    rows, columns = blocks.shape[0], math.prod(blocks.shape[1:4])
    kept = np.flatnonzero(grain.pattern(weight))
    values = np.ascontiguousarray(blocks).reshape(rows * columns, *blocks.shape[4:])[kept]
    indices = indices or _fewest_bytes(kept, rows, columns)
    pointer = np.zeros(0, np.int32)
    if indices == GAPS:
        index = _gaps(kept)
    elif indices in _WIDTH:
        if columns > np.iinfo(_WIDTH[indices]).max + 1:
            raise ValueError(f"{columns} columns of blocks do not fit into {indices}")
        index = (kept % columns).astype(_WIDTH[indices])
        pointer = np.searchsorted(kept, np.arange(rows + 1) * columns).astype(np.int32)
    else:
        raise ValueError(f"unknown index layout {indices!r}; known are {', '.join(INDICES)}")
    return Packed(
        grain, tuple(weight.shape), indices, values, index, pointer, int(np.count_nonzero(weight))
    )


def unpack(packed: Packed) -> np.ndarray:
    """The weight again, bit for bit except that -0 becomes 0 outside the stored blocks."""
    grain, shape = packed.grain, packed.shape
    if grain.of:
        return _unpack_constrained(packed)
    grid, block = grain.grid(shape), grain.block_shape(shape)
    blocks = np.zeros((math.prod(grid), *block), packed.values.dtype)
    blocks[positions(packed)] = packed.values
    return grain.join(blocks.reshape(*grid, *block), shape)


def positions(packed: Packed) -> np.ndarray:
    """int64 [blocks]: the place of each stored block of a block grain in the order of the grid."""
    if packed.indices == GAPS:
        steps = packed.index.astype(np.int64)
        stored = steps != _SKIP
        return (np.cumsum(steps + stored) - 1)[stored]
    columns = math.prod(packed.grain.grid(packed.shape)[1:])
    rows = np.repeat(np.arange(len(packed.pointer) - 1), np.diff(packed.pointer))
    return rows * columns + packed.index.astype(np.int64)


def storage_bytes(
    shape: tuple[int, ...],
    grain: str | Grain,
    density: float,
    *,
    value_bytes: int = 4,
    indices: str = GAPS,
) -> float:
    """Bytes of a weight at a grain, indices included, by formula: `density` is the share of blocks that are stored.

    Per weight that is `density * (value bytes + index bytes / block size)`, and what gaps longer than 255 and row pointers
    add. Exact for columns and N:M; the expectation over random patterns for gaps.
    """
    grain = Grain.parse(grain)
    grid = grain.grid(shape)
    if grain.of:
        groups = grid[0] * -(-grid[1] // grain.of) * grid[2] * grid[3]
        return groups * grain.keep * value_bytes + math.ceil(groups * grain.keep * _bits(grain) / 8)
    blocks = density * math.prod(grid)
    values = blocks * grain.size(shape) * value_bytes
    if indices == GAPS:
        long = (1 - density) ** _SKIP
        return values + blocks * (1 + (long / (1 - long) if long < 1 else 0.0))
    return values + blocks * np.dtype(_WIDTH[indices]).itemsize + 4 * (grid[0] + 1)


def _gaps(kept: np.ndarray) -> np.ndarray:
    skipped = np.diff(kept, prepend=-1) - 1
    skips, rest = skipped // _SKIP, skipped % _SKIP
    index = np.full(int(skips.sum()) + len(kept), _SKIP, np.uint8)
    index[np.cumsum(skips) + np.arange(len(kept))] = rest
    return index


def _fewest_bytes(kept: np.ndarray, rows: int, columns: int) -> str:
    pointers = 4 * (rows + 1)
    sizes = {GAPS: len(kept) + int(((np.diff(kept, prepend=-1) - 1) // _SKIP).sum())}
    sizes |= {
        name: len(kept) * np.dtype(dtype).itemsize + pointers
        for name, dtype in _WIDTH.items()
        if columns <= np.iinfo(dtype).max + 1
    }
    return min(sizes, key=sizes.__getitem__)


def _bits(grain: Grain) -> int:
    return math.ceil(math.log2(grain.of))


def _pack_constrained(weight: np.ndarray, grain: Grain) -> Packed:
    if not grain.fits(weight):
        raise ValueError(
            f"some {grain.of} neighbouring input channels hold more than {grain.keep} non-zeros"
        )
    groups = grain.groups_of(weight).reshape(-1, grain.of)
    # Non-zeros first, in order; where there are fewer than N, zeros fill up.
    place = np.argsort(groups == 0, axis=1, kind="stable")[:, : grain.keep]
    bits = _bits(grain)
    binary = (place[..., None] >> np.arange(bits)) & 1
    index = np.packbits(binary.astype(np.uint8).reshape(-1), bitorder="little")
    values = np.take_along_axis(groups, place, axis=1)
    none = np.zeros(0, np.int32)
    return Packed(
        grain,
        tuple(weight.shape),
        f"bits{bits}",
        values,
        index,
        none,
        int(np.count_nonzero(weight)),
    )


def _unpack_constrained(packed: Packed) -> np.ndarray:
    grain, bits = packed.grain, _bits(packed.grain)
    count = packed.values.size * bits
    binary = np.unpackbits(packed.index, count=count, bitorder="little").reshape(-1, bits)
    place = (binary.astype(np.int64) << np.arange(bits)).sum(axis=1).reshape(packed.values.shape)
    groups = np.zeros((len(packed.values), grain.of), packed.values.dtype)
    np.put_along_axis(groups, place, packed.values, axis=1)
    cut = Grain((1, grain.of, 1, 1))
    return cut.join(groups.reshape(*cut.grid(packed.shape), 1, grain.of, 1, 1), packed.shape)
