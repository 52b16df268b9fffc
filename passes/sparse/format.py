# SPDX-License-Identifier: Apache-2.0
"""The formats that the sparse kernels read: which output channels share one pattern, and the arrays packed for a kernel.

A weight [O, I/groups, R, S] (or [O, K]) is seen as a matrix: one row per output channel, one column per
(input channel, tap). A format says how many neighbouring rows share their non-zero columns: `element` one, `out:B` B of
them. Every other grain (`passes/sparse/grains.py`) runs as one of these. A block that has one non-zero is stored whole; the zeros inside are its fill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from passes.sparse.grains import Grain
from schedules.sparse_problem import INDICES_BEHIND, parts_of

ELEMENT = "element"
GRAINS = (ELEMENT, "out:4", "out:8", "out:16")


def block_of(grain: str) -> int:
    """Output channels that share one pattern. Raises ValueError for an unknown grain."""
    if grain not in GRAINS:
        raise ValueError(f"unknown grain {grain!r}; known are {', '.join(GRAINS)}")
    return 1 if grain == ELEMENT else int(grain.split(":")[1])


def block_pattern(weight: np.ndarray, block: int) -> np.ndarray:
    """bool [ceil(O / block), K]: whether any weight of the block is non-zero; K = I/groups * R * S in the weight's order."""
    pattern = Grain((block, 1, 1, 1)).pattern(weight)
    return pattern.reshape(len(pattern), -1)


def stored_pattern(weight: np.ndarray, block: int, run: int = 1) -> np.ndarray:
    """As `block_pattern`: whether a weight of the block is stored, which it is with all of its run of `run` taps."""
    pattern = block_pattern(weight, block)
    if run == 1:
        return pattern
    together = pattern.reshape(len(pattern), -1, run).any(axis=2)
    return np.repeat(together, run, axis=1)


def run_of(weight: np.ndarray) -> int:
    """How many taps of a kernel the zeros let be stored together, at most 5 % fill: all, those of a row, or one."""
    kernel = weight.shape[2:]
    most = np.count_nonzero(weight) * _TOLERATED_FILL
    runs = [run for run in (math.prod(kernel), *kernel[1:]) if run > 1]
    return next((run for run in runs if stored_pattern(weight, 1, run).sum() <= most), 1)


def grain_densities(weight: np.ndarray) -> dict[str, float]:
    """Share of the weight that each grain must store, fill included."""
    return {grain: float(block_pattern(weight, block_of(grain)).mean()) for grain in GRAINS}


# A coarser grain is what the zeros support while it stores at most this many times the non-zeros.
_TOLERATED_FILL = 1.05


def best_grain(weight: np.ndarray) -> str:
    """The coarsest grain that the zeros support (at most 5 % fill); `element` if none does."""
    densities = grain_densities(weight)
    limit = densities[ELEMENT] * _TOLERATED_FILL
    return next((g for g in reversed(GRAINS) if densities[g] <= limit), ELEMENT)


@dataclass(frozen=True)
class SparseFormat:
    """A weight packed for the kernel of `schedules/sparse_planes.py`; see there for what each array holds.

    pointer  int32 [chunks * blocks + 1]
    index    uint8 or uint16 or uint32 [stored], panel row tap * C + c relative to its chunk
    values   [stored, block], of the weight's type
    order    uint16 or uint32 [chunks * blocks], the block of its part at each position
    slot     uint16 or uint32 [chunks * outputs], position * block + lane of each output channel
    """

    shape: tuple[int, ...]
    groups: int
    grain: str
    chunk: int
    part: int
    pointer: np.ndarray
    index: np.ndarray
    values: np.ndarray
    order: np.ndarray
    slot: np.ndarray
    fill: int

    @property
    def block(self) -> int:
        return block_of(self.grain)

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] // self.block)

    @property
    def chunks(self) -> int:
        return (len(self.pointer) - 1) // self.blocks

    @property
    def density(self) -> float:
        """Stored weights, fill included, over all weights."""
        return self.values.size / math.prod(self.shape)

    def arrays(self) -> tuple[np.ndarray, ...]:
        """pointer, index, values, order and slot as kernels read them: which fetch what later non-zeros will read, behind the
        last ones, too."""
        behind = np.zeros(INDICES_BEHIND, self.index.dtype)
        index = np.concatenate([self.index, behind])
        return self.pointer, index, self.values, self.order, self.slot


def index_dtype(chunk: int) -> str:
    """The narrowest unsigned type that counts `chunk` panel rows."""
    return "uint8" if chunk <= 1 << 8 else "uint16" if chunk <= 1 << 16 else "uint32"


def stored_bytes(packed: SparseFormat) -> int:
    """Bytes of all arrays of a packed weight: values, indices, pointers and channel order."""
    arrays = (packed.values, packed.index, packed.pointer, packed.order, packed.slot)
    return sum(a.nbytes for a in arrays)


def panel_columns(shape: tuple[int, ...], groups: int) -> np.ndarray:
    """int64 [O, I/groups * R * S]: the panel row tap * C + c that each weight multiplies, C = all input channels."""
    outputs, per_group, *kernel = shape
    taps = math.prod(kernel)
    channels = per_group * groups
    first = np.arange(outputs) // (outputs // groups) * per_group
    within = np.arange(per_group)[:, None] + np.arange(taps)[None, :] * channels
    return first[:, None] + within.reshape(1, -1)


def pack(
    weight: np.ndarray,
    grain: str,
    *,
    groups: int = 1,
    chunk: int | None = None,
    part: int | None = None,
    columns: np.ndarray | None = None,
    by_fill: bool = True,
    run: int = 1,
) -> SparseFormat:
    """Pack a dense weight [O, I/groups, R, S] or [O, K], of any type, with its zeros. Blocks must not straddle groups.

    `chunk` is the number of panel rows per pass (default: all), `part` the output channels ordered by fill together,
    `columns` what to store of a weight's place instead of its panel row (`panel_columns`'s shape); without `by_fill` blocks
    stay in the order of the channels. `run` taps are stored together, in their order.
    Raises ValueError if a block of output channels would straddle two groups.
    """
    outputs = weight.shape[0]
    block = block_of(grain)
    if groups > 1 and outputs // groups % block:
        raise ValueError(
            f"blocks of {block} output channels straddle groups of {outputs // groups}"
        )
    if columns is None:
        columns = panel_columns(weight.shape, groups)
        rows = weight.shape[1] * groups * math.prod(weight.shape[2:])
    else:
        rows = int(columns.max()) + 1
    chunk = rows if chunk is None else chunk
    part = outputs if part is None else part
    chunks = -(-rows // chunk)
    pattern = stored_pattern(weight, block, run)
    count = len(pattern)
    owner, column = np.nonzero(pattern)
    of = np.minimum(owner * block, outputs - 1)
    row, first = columns[of, column], columns[of, column // run * run]
    which = row // chunk
    fill = np.bincount(which * count + owner, minlength=chunks * count).reshape(chunks, count)
    position, order, slot = _order_of_blocks(fill, outputs, block, part, by_fill)
    place = position[which, owner]
    sorting = np.lexsort((column, first, place, which))
    owner, column, row, which, place = (a[sorting] for a in (owner, column, row, which, place))
    counts = np.bincount(which * count + place, minlength=chunks * count)
    padded = np.zeros((count * block, pattern.shape[1]), dtype=weight.dtype)
    padded[:outputs] = weight.reshape(outputs, -1)
    values = padded[owner[:, None] * block + np.arange(block)[None, :], column[:, None]]
    return SparseFormat(
        shape=tuple(weight.shape), groups=groups, grain=grain, chunk=chunk, part=part,
        pointer=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        index=(row - which * chunk).astype(index_dtype(chunk)), values=values, order=order, slot=slot,
        fill=int(values.size - np.count_nonzero(weight)),
    )  # fmt: skip


def _order_of_blocks(
    fill: np.ndarray, outputs: int, block: int, part: int, by_fill: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position of each block [chunks, blocks], `order`, `slot`): by fill within a part, so that neighbouring loops are equally
    long, or as they are."""
    chunks, count = fill.shape
    position = np.empty((chunks, count), dtype=np.int64)
    order = np.empty((chunks, count), dtype=np.int64)
    first_block = np.empty(count, dtype=np.int64)
    for first, channels in parts_of(outputs, part):
        begin, end = first // block, first // block + -(-channels // block)
        keys = fill[:, begin:end] if by_fill else np.zeros_like(fill[:, begin:end])
        here = np.argsort(keys, axis=1, kind="stable")
        order[:, begin:end] = here
        np.put_along_axis(position[:, begin:end], here, np.arange(end - begin)[None, :], axis=1)
        position[:, begin:end] += begin
        first_block[begin:end] = begin
    channel = np.arange(outputs)
    within = position[:, channel // block] - first_block[channel // block]
    slot = within * block + channel % block
    dtype = "uint16" if outputs + block <= 1 << 16 else "uint32"
    return position, order.astype(dtype).ravel(), slot.astype(dtype).ravel()


def unpack(packed: SparseFormat, columns: np.ndarray | None = None) -> np.ndarray:
    """The dense weight again, bit for bit except that -0 becomes 0 outside the stored blocks."""
    outputs = packed.shape[0]
    dense = np.zeros((outputs, math.prod(packed.shape[1:])), dtype=np.float32)
    columns = panel_columns(packed.shape, packed.groups) if columns is None else columns
    part_first = np.empty(outputs, dtype=np.int64)
    for first, channels in parts_of(outputs, packed.part):
        part_first[first : first + channels] = first
    for o in range(outputs):
        column_of = {int(row): column for column, row in enumerate(columns[o])}
        for q in range(packed.chunks):
            slot = int(packed.slot[q * outputs + o])
            position = part_first[o] // packed.block + slot // packed.block
            begin, end = packed.pointer[
                q * packed.blocks + position : q * packed.blocks + position + 2
            ]
            for n in range(begin, end):
                column = column_of[int(packed.index[n]) + q * packed.chunk]
                dense[o, column] = packed.values[n, slot % packed.block]
    return dense.reshape(packed.shape)
