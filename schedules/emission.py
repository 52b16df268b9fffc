# SPDX-License-Identifier: Apache-2.0
"""Pieces of hand-emitted kernels: loops over vectors of a row, sums across lanes, operands of a definition's stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.errors import ScheduleError
from schedules.fused import Fused
from schedules.lanes import broadcast, lanes_of

# Below this many float32 operations a parallel region costs more than it saves.
PARALLEL_WORK = 32 * 1024


def operands(fused: Fused) -> list:
    """The parameters that the anchor's definition loads, one entry per load, blocks and expressions in order.

    Unlike `fused.inputs` a parameter loaded twice comes twice, so roles stay apart when fusion has merged equal
    arguments.
    """
    found: list = []

    def visit(load) -> None:
        found.extend(param for param in fused.params if param.same_as(load.source))

    for block in fused.blocks[: fused.anchor_index + 1]:
        tvm_ffi.structural_walk(block.body.value, (tvm.ir.expr.TensorLoad, visit))
    return found


def ramp(base, lanes: int):
    """`lanes` consecutive indices from `base`; the index itself for one lane."""
    return base if lanes == 1 else T.ramp(base, 1, lanes)


def splat(value: float, lanes: int, dtype: str = "float32"):
    """A constant on every lane."""
    constant = tirx.const(int(value) if "int" in dtype else float(value), dtype)
    return constant if lanes == 1 else T.broadcast(constant, lanes)


def loop(extent, *, parallel: bool = False):
    """A serial loop from 0, or one whose iterations are divided among threads."""
    return T.parallel(0, extent) if parallel else T.serial(0, extent)


def runs_parallel(target, iterations: int, work: int) -> bool:
    """Whether a loop of so many iterations and float32 operations is worth dividing among the target's threads."""
    return target.threads > 1 and iterations > 1 and work >= PARALLEL_WORK


def local_buffer(size: int, dtype: str = "float32"):
    """A small buffer on the stack, made here, that LLVM turns into registers: index it with constants.

    Of scope "global" and under 1 KiB: TVM takes any other from the workspace pool inside a parallel loop.
    """
    return T.alloc_buffer((max(1, int(size)),), dtype)


def workspace(*shape: int, dtype: str = "float32"):
    """A buffer from the runtime's workspace pool, which is per thread and off the stack."""
    return T.sblock_alloc_buffer(tuple(int(s) for s in shape), dtype)


def unravel(index, shape: Sequence[int]) -> tuple:
    """The indices into `shape` of flat position `index`, without divisions where an extent is 1."""
    result = []
    for axis, extent in enumerate(shape):
        stride = math.prod(shape[axis + 1 :])
        rest = math.prod(shape[:axis])
        if extent == 1:
            result.append(tirx.const(0, "int32"))
            continue
        position = index if stride == 1 else tirx.floordiv(index, stride)
        result.append(position if rest == 1 else tirx.floormod(position, extent))
    return tuple(result)


def widest_lanes(extent: int, lanes: int) -> int:
    """The largest power of two that is at most `lanes` and `extent`."""
    return 1 << (min(extent, lanes).bit_length() - 1)


def pieces(extent: int, lanes: int) -> Iterator[tuple[int, int]]:
    """(offset, lanes) of vectors that cover `extent` exactly, without overlap: 31 by 16 is 16 + 8 + 4 + 2 + 1."""
    offset = 0
    while offset < extent:
        width = widest_lanes(extent - offset, lanes)
        yield offset, width
        offset += width


def covering(extent: int, lanes: int) -> list[tuple[int, int]]:
    """(offset, lanes) of equal vectors that cover `extent`, the last one overlapping: 31 by 16 is 0-15 and 15-30.

    For copies and stores that may happen twice.
    """
    width = widest_lanes(extent, lanes)
    return [(min(offset, extent - width), width) for offset in range(0, extent, width)]


def reduce_lanes(vector, combine: Callable):
    """All lanes of `vector` (a load) combined into a scalar, halves first: log2(lanes) steps."""
    lanes = lanes_of(vector)
    if lanes == 1:
        return vector
    half = lanes // 2
    if half == 1:
        low, high = tirx.Shuffle([vector], [0]), tirx.Shuffle([vector], [1])
        return combine(low, high)
    low = tirx.Shuffle([vector], list(range(half)))
    high = tirx.Shuffle([vector], list(range(half, lanes)))
    return reduce_lanes(combine(low, high), combine)


class Row:
    """A row of `extent` float32 values as vectors: as many whole ones as fit, and a last one that overlaps them.

    A reduction counts the overlapped lanes once (`neutral` stands in for those already seen); a store writes them twice
    with the same value. Rows shorter than a register use shorter vectors.
    """

    def __init__(self, extent: int, lanes: int):
        self.extent = extent
        self.lanes = widest_lanes(extent, lanes)
        self.whole = extent // self.lanes
        self.left = extent % self.lanes

    def each(self, body: Callable, unroll: int = 4) -> None:
        """`body(base, slot, fresh)` for every vector; `slot` < unroll tells accumulators apart, `fresh` is the mask of
        lanes no earlier vector covered, None for all."""
        unroll = min(unroll, self.whole)
        steps = self.whole // unroll
        if steps > 1:
            with T.serial(0, steps) as step:
                for slot in range(unroll):
                    body((step * unroll + slot) * self.lanes, slot, None)
        for index in range(steps * unroll if steps > 1 else 0, self.whole):
            body(tirx.const(index * self.lanes, "int32"), index % unroll, None)
        if self.left:
            index = T.ramp(tirx.const(0, "int32"), 1, self.lanes)
            fresh = index >= T.broadcast(tirx.const(self.lanes - self.left, "int32"), self.lanes)
            body(tirx.const(self.extent - self.lanes, "int32"), 0, fresh)

    def reduce(
        self, scratch, element: Callable, combine: Callable, neutral: float, unroll: int = 4
    ):
        """The scalar `combine` of `element(base)` over the row; `scratch` is a local buffer of unroll * lanes floats.

        `element(base)` gives the vector at index `base`; it may store what it computed, so the row can be rewritten
        in the same pass.
        """
        slots = min(unroll, self.whole)
        for slot in range(slots):
            T.buffer_store(
                scratch, splat(neutral, self.lanes), [ramp(slot * self.lanes, self.lanes)]
            )

        def accumulate(base, slot, fresh):
            value = element(base)
            if fresh is not None:
                value = tirx.Select(fresh, value, splat(neutral, self.lanes))
            at = ramp(slot * self.lanes, self.lanes)
            T.buffer_store(scratch, combine(scratch[at], value), [at])

        self.each(accumulate, unroll)
        total = scratch[ramp(0, self.lanes)]
        for slot in range(1, slots):
            total = combine(total, scratch[ramp(slot * self.lanes, self.lanes)])
        T.buffer_store(scratch, total, [ramp(0, self.lanes)])
        return reduce_lanes(scratch[ramp(0, self.lanes)], combine)


@contextmanager
def emitting(fused: Fused, blocks: int):
    """`fused.emit()` and the emitted buffers of `operands(fused)`; refused unless the definition has so many blocks."""
    if fused.anchor_index + 1 != blocks:
        raise ScheduleError(
            "the definition is not the one this kernel replaces",
            found=str([b.name_hint for b in fused.blocks[: fused.anchor_index + 1]]), wanted=f"{blocks} blocks",
        )  # fmt: skip
    kernel = fused.emit()
    with kernel:
        positions = [
            next(i for i, p in enumerate(fused.params) if p.same_as(o)) for o in operands(fused)
        ]
        yield kernel, [kernel.buffers[i] for i in positions]


def _add_product(held, left, right):
    return held + left * right


@dataclass(frozen=True)
class Tile:
    """A register tile: `rows` by `vectors` of `lanes`, accumulated in a local buffer."""

    rows: int
    vectors: int
    lanes: int
    dtype: str = "float32"

    def allocate(self) -> list:
        """A local buffer per row: one for the whole tile would be too large for the stack."""
        return [local_buffer(self.vectors * self.lanes, self.dtype) for _ in range(self.rows)]

    def at(self, vector: int):
        """Index of an accumulator in its row's buffer."""
        return ramp(vector * self.lanes, self.lanes)

    def multiply(
        self, acc: list, extent, left: Callable, right: Callable, each_step: Callable | None = None,
        add: Callable = _add_product,
    ) -> None:  # fmt: skip
        """acc[r][v] = sum over k < extent of left(r, k) (scalar) * right(k, v) (vector), or whatever `add(held, scalar on
        every lane, vector)` adds."""
        for row, vector in self.cells():
            T.buffer_store(acc[row], splat(0.0, self.lanes, self.dtype), [self.at(vector)])
        with T.serial(0, extent) as k:
            if each_step is not None:
                each_step(k)
            for row, vector in self.cells():
                at = self.at(vector)
                total = add(acc[row][at], broadcast(left(row, k), self.lanes), right(k, vector))
                T.buffer_store(acc[row], total, [at])

    def cells(self) -> Iterator[tuple[int, int]]:
        return ((row, vector) for row in range(self.rows) for vector in range(self.vectors))


def transpose(lanes: int, load: Callable, store: Callable) -> None:
    """`store(j, column j)` of the lanes x lanes block whose row i is `load(i)`: log2(lanes) rounds of interleaving.

    Interleaving rows i and i + lanes/2 into rows 2i and 2i + 1 rotates the bits of (row, column) by one place.
    """
    if lanes == 1:
        store(0, load(0))
        return
    half = lanes // 2
    rows = [T.bind(load(i)) for i in range(lanes)]
    low = [index for c in range(half) for index in (c, c + lanes)]
    high = [index + half for index in low]
    for _ in range(lanes.bit_length() - 1):
        pairs = list(zip(rows[:half], rows[half:]))
        rows = [T.bind(tirx.Shuffle(list(p), order)) for p in pairs for order in (low, high)]
    for j, row in enumerate(rows):
        store(j, row)
