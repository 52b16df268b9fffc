# SPDX-License-Identifier: Apache-2.0
"""Lists of (row, factor) made at run time, and sums of the rows they name: pieces of kernels that gather.

`compact` writes the non-zeros of a vector one after the other; `RowSum` adds listed rows in registers, for a few vectors
of columns; `store_row_sums` adds whole rows in cache, several side by side, for a kernel with one row of results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.fused import Emission
from schedules.lanes import lanes_of
from schedules.target import CpuTarget
from schedules.vector_math import as_float32
from schedules.windows import LINE_BYTES, loop, prefetch, span, splat

# Room behind a list: the zeros that close it.
SLACK = 32


@dataclass(frozen=True)
class Taken:
    """How `store_row_sums` takes the rows listed: so many together, the next ones fetched `ahead` or not."""

    rows: int
    ahead: bool

    @staticmethod
    def of(itemsize: int) -> Taken:
        """Many long runs at once keep the memory busy; rows of bytes are too short for that, but are fetched ahead
        at a line per several vectors."""
        return Taken(8, False) if itemsize > 1 else Taken(4, True)


@dataclass(frozen=True)
class Lists:
    """Lists of non-zeros: entries [start[i], start[i + 1]) of `index` and `value` are list i, closed with zeros."""

    start: object
    index: object
    value: object

    @staticmethod
    def allocate(lists: int, entries: int) -> Lists:
        """Room for so many lists with so many entries together, in the runtime's workspace."""
        return Lists(
            T.alloc_buffer((lists + 1,), "int32"),
            T.alloc_buffer((entries,), "int32"),
            T.alloc_buffer((entries,), "float32"),
        )


def is_nonzero(x):
    """Whether float32 lanes are not +-0; NaN is not, which `x != 0` does not say."""
    lanes = lanes_of(x)
    bits = tirx.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", x)
    magnitude = tirx.bitwise_and(bits, splat(T.int32(0x7FFFFFFF), lanes))
    return magnitude != splat(T.int32(0), lanes)


def compact(x, base, first, extent: int, lists: Lists, count, target: CpuTarget) -> None:
    """Append the non-zeros of x[base : base + extent] (flat, float32), numbered from `first`; `count` [1] entries are
    there."""
    done = extent // 16 * 16 if target.tier == "avx512" else 0
    if done:
        with T.serial(0, done // 16) as i:
            _compress(x, base + i * 16, T.Bind(first + i * 16), lists, count)
    if done < extent:
        with T.serial(0, extent - done) as i:
            value = T.bind(x[base + done + i])
            T.buffer_store(lists.index, first + done + i, [count[0]])
            T.buffer_store(lists.value, value, [count[0]])
            T.buffer_store(count, count[0] + is_nonzero(value).astype("int32"), [0])


def _compress(x, at, first, lists: Lists, count) -> None:
    """One AVX-512 vector: its non-zeros and their positions stored side by side, whole vectors, the rest 0."""
    value = T.bind(x[T.ramp(at, 1, 16)])
    mask = is_nonzero(value)
    for buffer, lane, dtype in (
        (lists.value, value, "float32"),
        (lists.index, T.ramp(first, 1, 16), "int32"),
    ):
        zero = T.broadcast(tirx.const(0, dtype), 16)
        packed = tirx.call_llvm_pure_intrin(
            f"{dtype}x16", "llvm.x86.avx512.mask.compress", lane, zero, mask
        )
        T.buffer_store(buffer, packed, [T.ramp(count[0], 1, 16)])
    one, zero = T.broadcast(T.int32(1), 16), T.broadcast(T.int32(0), 16)
    more = tirx.call_llvm_pure_intrin(
        "int32", "llvm.vector.reduce.add", tirx.Select(mask, one, zero)
    )
    T.buffer_store(count, count[0] + more, [0])


def close_list(lists: Lists, number, count, take: int) -> None:
    """End list `number`, padded with zeros to a multiple of `take` <= 16 entries."""
    T.buffer_store(lists.value, T.broadcast(T.float32(0), 16), [T.ramp(count[0], 1, 16)])
    T.buffer_store(lists.index, T.broadcast(T.int32(0), 16), [T.ramp(count[0], 1, 16)])
    if take > 1:
        T.buffer_store(count, tirx.floordiv(count[0] + (take - 1), take) * take, [0])
    T.buffer_store(lists.start, count[0], [number + 1])


def start_lists(lists: Lists, count) -> None:
    """No entries yet."""
    T.buffer_store(count, T.int32(0), [0])
    T.buffer_store(lists.start, T.int32(0), [0])


class RowSum:
    """sum over n < count of factor(n) * row(n), for vectors of `widths` lanes, in registers.

    `sums` entries are taken at once into partial sums of their own; `count` must be a multiple of it.
    """

    def __init__(self, widths: Sequence[int], sums: int):
        self.widths, self.sums = widths, sums
        self.banks = [[T.alloc_buffer((w,), "float32") for w in widths] for _ in range(sums)]

    def begin(self, value: Callable | None = None) -> None:
        """Zero, or `value(vector)` to go on from."""
        for number, bank in enumerate(self.banks):
            for v, (register, width) in enumerate(zip(bank, self.widths)):
                given = value is not None and number == 0
                start = value(v) if given else splat(T.float32(0), width)
                T.buffer_store(register, start, [span(0, width)])

    def add(self, count, entry: Callable, load: Callable, fetch: Callable | None = None) -> None:
        """`entry(n)` is (row, factor), `load(row, vector)` the row's values; `fetch(step)` asks for what comes later."""
        with T.serial(0, tirx.floordiv(count, self.sums) if self.sums > 1 else count) as step:
            if fetch is not None:
                fetch(step)
            for s, bank in enumerate(self.banks):
                row, factor = (T.Bind(part) for part in entry(step * self.sums + s))
                for v, (register, width) in enumerate(zip(bank, self.widths)):
                    at = span(0, width)
                    term = splat(factor, width) * load(row, v)
                    T.buffer_store(register, register[at] + term, [at])

    def total(self, vector: int, lanes: int):
        """The first lanes of one vector of the sum."""
        parts = [bank[vector][span(0, lanes)] for bank in self.banks]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2])]
        return parts[0]


def add_rows(
    lists: Lists, count, sums, columns: int, taken: Taken, w, first, lanes: int
) -> None:  # fmt: skip
    """sums[:columns] = sum of the first `count` entries over the columns of w [K, O] from `first`."""
    with T.serial(0, columns // lanes) as i:
        T.buffer_store(sums, splat(T.float32(0), lanes), [span(i * lanes, lanes)])
    take = taken.rows
    step = LINE_BYTES // np.dtype(str(w.dtype)).itemsize if taken.ahead else lanes
    with T.serial(0, tirx.floordiv(count, take)) as group:
        rows = [T.Bind(lists.index[group * take + r]) for r in range(take)]
        factors = [T.bind(splat(lists.value[group * take + r], lanes)) for r in range(take)]
        # Behind the last group there are zeros: the first row of w.
        later = [
            T.Bind(lists.index[(group + 1) * take + r]) for r in range(take if taken.ahead else 0)
        ]

        def add(c, extent: int) -> None:
            for row in later:
                prefetch(w[row, first + c])
            for v in range(0, extent, lanes):
                total = sums[span(c + v, lanes)]
                for row, factor in zip(rows, factors):
                    total = total + factor * as_float32(w[row, span(first + c + v, lanes)])
                T.buffer_store(sums, total, [span(c + v, lanes)])

        with T.serial(0, columns // step) as i:
            add(i * step, step)
        if rest := columns % step:
            add(columns - rest, rest)


def store_row_sums(
    kernel: Emission, shape, lists: Lists, entries, outputs: int, taken: Taken, w, target: CpuTarget
) -> None:
    """Store the sum of the listed rows of w [K, O] as the kernel's one row of results. Threads take parts of its columns."""
    lanes = target.lanes
    every = -(-outputs // lanes)
    parts = min(target.threads, every)
    per_part = every // parts * lanes
    lead = [0] * (len(shape) - 1)

    def part(first, columns: int) -> None:
        padded = -(-columns // lanes) * lanes
        sums = T.alloc_buffer((padded,), "float32")
        add_rows(lists, entries, sums, padded, taken, w, first, lanes)
        if columns // lanes:
            with T.serial(0, columns // lanes) as i:
                at = span(i * lanes, lanes)
                kernel.store(sums[at], [*lead, span(first + i * lanes, lanes)])
        if rest := columns % lanes:
            begin = columns - rest
            kernel.store(sums[span(begin, rest)], [*lead, span(first + begin, rest)])

    last = (parts - 1) * per_part
    if parts == 1:
        part(0, outputs)
        return
    with loop(parts, True) as p:
        with T.If(p < parts - 1):
            with T.Then():
                part(p * per_part, per_part)
            with T.Else():
                part(last, outputs - last)
