# SPDX-License-Identifier: Apache-2.0
"""Sums of rows chosen at run time: the product of a matrix whose zeros are known only then with constant weights.

    Y[m, o] = sum over the k with X[m, k] != 0 of X[m, k] * W[k, o]

The non-zeros of X are compacted into lists of (row of W, factor), and the rows listed are gathered. Two forms:

rows    one row of X. W lies as [K, O]; eight rows are read side by side and added to sums in cache, so that memory sees
        long runs. Reading every row this way costs no more than the dense kernel, so no density is too high for it.
tiles   several rows of X. W lies in the panels of a contraction, `[panels][K][panel]`. A block of one panel stays in the
        second-level cache while all rows walk their entries for it, sums in registers, and the next block is fetched.
        Above `Point.limit` non-zeros that contraction runs instead, in the same function on the same weights: a density
        far from the one expected costs time, but not more than dense.

NaN and infinities in X count as non-zeros; the weights must be finite. `compact` and `RowSum` serve other kernels that
gather rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

from schedules import contraction
from schedules.errors import ScheduleError
from schedules.fused import Emission, Fused, annotations
from schedules.register_tile import Contraction
from schedules.target import CpuTarget
from schedules.vector_math import lanes_of
from schedules.windows import Problem, loop, span, splat, unravel, vectors

# Room behind a list: the zeros that close it.
SLACK = 32
# Share of the second-level cache for the weights of one block; the next one is fetched beside it.
_BLOCK = 0.1
_LINE = 16  # float32 values in a cache line
SIDE_BY_SIDE = 8
# Share (1 / this) of the limit by which the rows seen so far may be ahead of it.
_AHEAD = 8
_TOO_MANY = 1 << 30


@dataclass(frozen=True)
class Point:
    """Parameters of one kernel.

    form    "rows" or "tiles"
    sums    entries taken at once: rows added together, or independent partial sums of a tile
    limit   tiles: non-zeros of X above which `dense` runs
    chunk   tiles: rows of W in a block
    fetch   tiles: cache lines of the next block fetched with every `sums` entries
    dense   tiles: the contraction that runs above the limit, whose panels rows are gathered from
    """

    form: str
    sums: int
    limit: int = 0
    chunk: int = 0
    fetch: int = 0
    dense: contraction.Point | None = None

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(fields: dict) -> Point:
        dense = fields["dense"]
        return Point(**{**fields, "dense": dense and contraction.Point.from_dict(dense)})


def dense_problem(rows: int, inputs: int, outputs: int) -> Problem:
    """X [rows, inputs] times W [inputs, outputs]."""
    return Problem(1, 1, rows, inputs, outputs)


def default_point(
    problem: Problem,
    target: CpuTarget,
    density: float,
    crossover: float,
    dense: contraction.Point,
) -> Point:
    """Blocks by cache size. `density` is the one expected, `crossover` that above which `dense` is to run."""
    if problem.row == 1:
        return Point("rows", SIDE_BY_SIDE)
    blocks = -(-4 * problem.c * dense.panel // int(_BLOCK * target.l2_bytes))
    chunk = -(-problem.c // blocks // 16) * 16
    sums = 2 if 2 * dense.nv <= target.registers * 3 // 4 else 1
    steps = max(1.0, density * chunk / sums)
    lines = chunk * dense.panel / _LINE / problem.row
    fetch = min(8, -(-int(lines * 1.25 + 1) // int(steps)))
    return Point("tiles", sums, int(crossover * problem.row * problem.c), chunk, fetch, dense)


def packed_shape(problem: Problem, point: Point, lanes: int) -> tuple[int, ...]:
    """Shape of the packed weights: [K, O rounded up to whole vectors], or that of a contraction."""
    if point.form == "rows":
        return (problem.c, -(-problem.o // lanes) * lanes)
    return contraction.packed_shape(problem, point.dense)


def pack_weights(weight: np.ndarray, problem: Problem, point: Point, lanes: int) -> np.ndarray:
    """Weights [O, K] as the kernel reads them, padded with zeros."""
    shape = packed_shape(problem, point, lanes)
    width = shape[-1]
    padded = np.zeros((-(-problem.o // width) * width, problem.c), weight.dtype)
    padded[: problem.o] = weight
    panels = padded.reshape(-1, width, problem.c).transpose(0, 2, 1)
    return np.ascontiguousarray(panels).reshape(shape)


def define(shape: Sequence[int], problem: Problem, point: Point):
    """te function (x [..., K] of `shape`, packed w) -> [..., O]: the dense product."""
    notes = annotations("gathered_rows", problem=problem.to_dict(), point=point.to_dict())

    def gathered(x, w):
        k = te.reduce_axis((0, problem.c), "k")

        def weight(o):
            if point.form == "rows":
                return w[k, o]
            return w[o // point.dense.panel, 0, 0, k, o % point.dense.panel]

        return te.compute(
            (*shape[:-1], problem.o),
            lambda *i: te.sum(x[(*i[:-1], k)] * weight(i[-1]), axis=[k]),
            name="gathered_rows",
            attrs=notes,
        )

    return gathered


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused product. Raises ScheduleError if the packed weights do not fit its parameters."""
    problem, point = (
        Problem.from_dict(fused.point["problem"]),
        Point.from_dict(fused.point["point"]),
    )
    with fused.emit() as kernel:
        found = tuple(int(d) for d in kernel.inputs[1].shape)
        wanted = packed_shape(problem, point, target.lanes)
        if found != wanted:
            raise ScheduleError(
                "packed weights of another shape", found=str(found), wanted=str(wanted)
            )
        if point.form == "rows":
            _emit_rows(kernel, fused.shape, problem, point, target)
        else:
            _Tiles(kernel, fused.shape, problem, point, target).emit()
    return kernel.func


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


def add_rows(lists: Lists, count, sums, columns: int, take: int, load: Callable, lanes: int):
    """sums[:columns] = sum of the first `count` entries, `take` rows read side by side; `load(row, column)` a vector."""
    whole = columns // lanes

    def each(body: Callable) -> None:
        with T.serial(0, whole) as i:
            body(i * lanes)

    each(lambda c: T.buffer_store(sums, splat(T.float32(0), lanes), [span(c, lanes)]))
    with T.serial(0, tirx.floordiv(count, take)) as group:
        rows = [T.Bind(lists.index[group * take + r]) for r in range(take)]
        factors = [T.bind(splat(lists.value[group * take + r], lanes)) for r in range(take)]

        def add(c) -> None:
            total = sums[span(c, lanes)]
            for row, factor in zip(rows, factors):
                total = total + factor * load(row, c)
            T.buffer_store(sums, total, [span(c, lanes)])

        each(add)


def _emit_rows(kernel: Emission, shape, problem: Problem, point: Point, target: CpuTarget) -> None:
    """One row of x."""
    x, w = kernel.inputs
    flat = T.decl_buffer((problem.c,), "float32", data=x.data)
    lists = Lists.allocate(1, problem.c + SLACK)
    count = T.alloc_buffer((1,), "int32")
    start_lists(lists, count)
    compact(flat, 0, 0, problem.c, lists, count, target)
    close_list(lists, 0, count, point.sums)
    store_row_sums(
        kernel, shape, lists, T.Bind(count[0]), problem.o, point.sums,
        lambda k, c: w[k, span(c, target.lanes)], target,
    )  # fmt: skip


def store_row_sums(
    kernel: Emission, shape, lists: Lists, entries, outputs: int, take: int, load: Callable,
    target: CpuTarget,
) -> None:  # fmt: skip
    """Store the sum of the listed rows as the kernel's one row of results. Threads take parts of its columns."""
    lanes = target.lanes
    every = -(-outputs // lanes)
    parts = min(target.threads, every)
    per_part = every // parts * lanes
    lead = [0] * (len(shape) - 1)

    def part(first, columns: int) -> None:
        padded = -(-columns // lanes) * lanes
        sums = T.alloc_buffer((padded,), "float32")
        add_rows(lists, entries, sums, padded, take, lambda k, c: load(k, first + c), lanes)
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


class _Tiles:
    """Emits the kernel for several rows of x: compaction, then either the gathered sums or the contraction."""

    def __init__(self, kernel: Emission, shape, problem: Problem, point: Point, target: CpuTarget):
        self.kernel, self.shape, self.problem, self.point = kernel, shape, problem, point
        self.target = target
        x, w = kernel.inputs
        self.rows = problem.row
        self.x = T.decl_buffer((self.rows * problem.c,), "float32", data=x.data)
        # In [panels][K][panel] a block of one panel is one run, and the next block follows.
        self.panel = point.dense.panel
        self.panels = contraction.panels_per_group(problem, point.dense)
        self.w = T.decl_buffer((self.panels * problem.c * self.panel,), "float32", data=w.data)
        self.chunks = -(-problem.c // point.chunk)
        self.last = problem.c - (self.chunks - 1) * point.chunk

    def emit(self) -> None:
        problem, point = self.problem, self.point
        whole = self.rows * problem.c
        padding = self.rows * self.chunks * (point.sums - 1)
        self.limit = min(point.limit, whole) + padding
        dense = Contraction(self.kernel, self.shape, problem, point.dense, self.target.threads)
        if point.limit <= 0:
            dense.emit()
            return
        # The row of x that passes the limit is still written.
        room = min(self.limit + problem.c, whole + padding) + self.chunks * point.sums + SLACK
        self.lists = Lists.allocate(self.rows * self.chunks, room)
        count = T.alloc_buffer((1,), "int32")
        self._compact(count)
        if point.limit >= whole:
            self._gather()
            return
        with T.If(count[0] > self.limit):
            with T.Then():
                dense.emit()
            with T.Else():
                self._gather()

    def _compact(self, count) -> None:
        """A list per row of x and chunk; nothing more once the limit will probably be passed."""
        chunk = self.point.chunk
        start_lists(self.lists, count)

        def one(m, c, extent: int) -> None:
            first = c * chunk
            at = m * self.problem.c + first
            compact(self.x, at, first, extent, self.lists, count, self.target)
            close_list(self.lists, m * self.chunks + c, count, self.point.sums)

        # Rows denser than the limit allows on average are noticed early: writing long lists in vain would cost.
        per_row, ahead = self.limit // self.rows, self.limit // _AHEAD
        with T.serial(0, self.rows) as m:
            allowed = (
                tirx.min(m * per_row + ahead, self.limit) if ahead < self.limit else self.limit
            )
            with T.If(count[0] <= allowed):
                with T.Then():
                    if self.chunks > 1:
                        with T.serial(0, self.chunks - 1) as c:
                            one(m, c, chunk)
                    one(m, self.chunks - 1, self.last)
                with T.Else():
                    T.buffer_store(count, T.int32(_TOO_MANY), [0])

    def _gather(self) -> None:
        full = self.problem.o // self.panel
        if full:
            with loop(full, self.target.threads > 1 and full > 1) as q:
                self._panel(q, self.panel)
        if rest := self.problem.o - full * self.panel:
            self._panel(full, rest)

    def _panel(self, q, outputs: int) -> None:
        """`outputs` channels of panel q, for every row of x, block after block."""
        widths = vectors(outputs, self.point.dense.lanes)
        if self.chunks == 1:
            self._block(q, 0, widths, None, last=True)
            return
        partial = T.alloc_buffer((self.rows * self.panel,), "float32")
        with T.serial(0, self.rows * self.panel // self.point.dense.lanes) as i:
            lanes = self.point.dense.lanes
            T.buffer_store(partial, splat(T.float32(0), lanes), [span(i * lanes, lanes)])
        with T.serial(0, self.chunks - 1) as c:
            self._block(q, c, widths, partial, last=False)
        self._block(q, self.chunks - 1, widths, partial, last=True)

    def _block(self, q, c, widths, partial, last: bool) -> None:
        point, lanes = self.point, self.point.dense.lanes
        base = T.Bind(q * (self.problem.c * self.panel))
        # What the rows of x fetch of the next block, each its share.
        following = T.Bind(
            base + (c * point.chunk + (self.last if last else point.chunk)) * self.panel
        )
        share = -(-point.chunk * self.panel // _LINE // self.rows)
        with T.serial(0, self.rows) as m:
            start = T.Bind(self.lists.start[m * self.chunks + c])
            count = T.Bind(self.lists.start[m * self.chunks + c + 1] - start)
            acc = RowSum([width for width, _ in widths], point.sums)

            def kept(v: int, width: int):
                return span(m * self.panel + v * lanes, width)

            acc.begin(None if partial is None else lambda v: partial[kept(v, widths[v][0])])

            def fetch(step) -> None:
                line = following + (m * share + step * point.fetch) * _LINE
                for i in range(point.fetch):
                    _prefetch(self.w[line + i * _LINE])

            acc.add(
                count,
                lambda n: (self.lists.index[start + n] * self.panel, self.lists.value[start + n]),
                lambda row, v: self.w[span(base + row + v * lanes, widths[v][0])],
                fetch if point.fetch else None,
            )
            for v, (width, stored) in enumerate(widths):
                if not last:
                    T.buffer_store(partial, acc.total(v, width), [kept(v, width)])
                    continue
                at = unravel(m, self.shape[:-1])
                channel = q * self.panel + v * lanes
                self.kernel.store(acc.total(v, stored), [*at, span(channel, stored)])


def _prefetch(value) -> None:
    """Fetch the cache line of a buffer element into the second-level cache; an address past the end does nothing."""
    read, near, data = T.int32(0), T.int32(2), T.int32(1)
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", tirx.address_of(value), read, near, data))
