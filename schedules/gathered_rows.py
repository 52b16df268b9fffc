# SPDX-License-Identifier: Apache-2.0
"""Sums of rows chosen at run time: the product of a matrix whose zeros are known only then with constant weights.

    Y[m, o] = sum over the k with X[m, k] != 0 of X[m, k] * W[k, o]

The non-zeros of X are compacted into lists of (row of W, factor), and the rows listed are gathered. Two forms:

rows    one row of X. W lies as [K, O]; several rows are read side by side and added to sums in cache, so that memory
        sees long runs. Reading every row this way costs no more than the dense kernel, so no density is too high for it.
tiles   several rows of X. W lies in the panels of a contraction, `[panels][K][panel]`. A block of one panel stays in the
        second-level cache while all rows walk their entries for it, sums in registers, and the next block is fetched.
        Above `Point.limit` non-zeros that contraction runs instead, in the same function on the same weights: a density
        far from the one expected costs time, but not more than dense.

Weights are float32, or integers that are converted as they are loaded. NaN and infinities in X count as non-zeros; the
weights must be finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

from schedules import contraction
from schedules.annotated import Annotated
from schedules.emission import reduce_lanes
from schedules.fused import Emission, Fused, annotations
from schedules.register_tile import Contraction
from schedules.row_lists import (
    SLACK,
    Lists,
    RowSum,
    Taken,
    close_list,
    compact,
    is_nonzero,
    start_lists,
    store_row_sums,
)
from schedules.target import CpuTarget
from schedules.vector_math import as_float32
from schedules.windows import LINE_BYTES, Problem, loop, prefetch, span, splat, unravel, vectors

# Share of the second-level cache for the weights of one block; the next one is fetched beside it.
_BLOCK = 0.1
# Rows of x, and values in them, that are counted to know on which side of the limit it probably lies.
_SAMPLED_ROWS = 16
_SAMPLED_VALUES = 4096
# Rows listed may pass the limit by this much, and be ahead of their share of it by this part, when the sample was wrong.
_SPARE = 1.25
_AHEAD = 8
_TOO_MANY = 1 << 30


@dataclass(frozen=True)
class Point(Annotated):
    """Parameters of one kernel.

    form    "rows" or "tiles"
    sums    entries taken at once: rows added together, or independent partial sums of a tile
    limit   tiles: non-zeros of X above which `dense` runs
    chunk   tiles: rows of W in a block
    fetch   tiles: cache lines of the next block fetched with every `sums` entries; rows: 1 to fetch the rows added next
    dense   tiles: the contraction that runs above the limit, whose panels rows are gathered from
    """

    form: str
    sums: int
    limit: int = 0
    chunk: int = 0
    fetch: int = 0
    dense: contraction.Point | None = None

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
    itemsize: int = 4,
) -> Point:
    """Blocks by cache size. `density` is the one expected, `crossover` that above which `dense` is to run; weights of
    `itemsize` bytes."""
    if problem.row == 1:
        taken = Taken.of(itemsize)
        return Point("rows", taken.rows, fetch=int(taken.ahead))
    blocks = -(-itemsize * problem.c * dense.panel // int(_BLOCK * target.l2_bytes))
    chunk = -(-problem.c // blocks // 16) * 16
    sums = 2 if 2 * dense.nv <= target.registers * 3 // 4 else 1
    steps = max(1.0, density * chunk / sums)
    lines = itemsize * chunk * dense.panel / LINE_BYTES / problem.row
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
            lambda *i: te.sum(x[(*i[:-1], k)] * weight(i[-1]).astype("float32"), axis=[k]),
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
        kernel.require_packed(packed_shape(problem, point, target.lanes))
        if point.form == "rows":
            _emit_rows(kernel, fused.shape, problem, point, target)
        else:
            _Tiles(kernel, fused.shape, problem, point, target).emit()
    return kernel.func


def _emit_rows(kernel: Emission, shape, problem: Problem, point: Point, target: CpuTarget) -> None:
    """One row of x."""
    x, w = kernel.inputs
    flat = T.decl_buffer((problem.c,), "float32", data=x.data)
    lists = Lists.allocate(1, problem.c + SLACK)
    count = T.alloc_buffer((1,), "int32")
    start_lists(lists, count)
    compact(flat, 0, 0, problem.c, lists, count, target)
    close_list(lists, 0, count, point.sums)
    taken = Taken(point.sums, bool(point.fetch))
    store_row_sums(kernel, shape, lists, T.Bind(count[0]), problem.o, taken, w, target)


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
        dtype = str(w.dtype)
        self.w = T.decl_buffer((self.panels * problem.c * self.panel,), dtype, data=w.data)
        self.line = LINE_BYTES // np.dtype(dtype).itemsize
        self.chunks = -(-problem.c // point.chunk)
        self.last = problem.c - (self.chunks - 1) * point.chunk

    def emit(self) -> None:
        problem, point = self.problem, self.point
        whole = self.rows * problem.c
        padding = self.rows * self.chunks * (point.sums - 1)
        self.limit = min(int(_SPARE * point.limit), whole) + padding
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
        if self.point.limit < self.rows * self.problem.c:
            self._sample(count)

        def one(m, c, extent: int) -> None:
            first = c * chunk
            at = m * self.problem.c + first
            compact(self.x, at, first, extent, self.lists, count, self.target)
            close_list(self.lists, m * self.chunks + c, count, self.point.sums)

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

    def _sample(self, count) -> None:
        """Count in some vectors of some rows of x; where they hold too much, nothing is to be listed: writing lists in
        vain would cost."""
        columns = self.problem.c
        lanes = min(self.target.lanes, 1 << (columns.bit_length() - 1))
        stride = max(1, self.rows // _SAMPLED_ROWS)
        sampled, per_row = -(-self.rows // stride), columns // lanes
        step = max(1, sampled * per_row * lanes // _SAMPLED_VALUES)
        found = T.alloc_buffer((lanes,), "int32")
        whole = span(0, lanes)
        T.buffer_store(found, splat(T.int32(0), lanes), [whole])
        with T.serial(0, sampled) as row:
            # Other columns in every row: zeros may come in columns.
            base = T.Bind(row * (stride * columns) + row % step * lanes)
            with T.serial(0, per_row // step) as i:
                more = is_nonzero(T.bind(self.x[span(base + i * (step * lanes), lanes)]))
                one, none = splat(T.int32(1), lanes), splat(T.int32(0), lanes)
                T.buffer_store(found, found[whole] + tirx.Select(more, one, none), [whole])
        total = reduce_lanes(T.bind(found[whole]), lambda a, b: a + b)
        share = sampled * (per_row // step) * lanes / (self.rows * columns)
        with T.If(total > int(self.point.limit * share)):
            with T.Then():
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
        share = -(-point.chunk * self.panel // self.line // self.rows)
        with T.serial(0, self.rows) as m:
            start = T.Bind(self.lists.start[m * self.chunks + c])
            count = T.Bind(self.lists.start[m * self.chunks + c + 1] - start)
            acc = RowSum([width for width, _ in widths], point.sums)

            def kept(v: int, width: int):
                return span(m * self.panel + v * lanes, width)

            acc.begin(None if partial is None else lambda v: partial[kept(v, widths[v][0])])

            def fetch(step) -> None:
                line = following + (m * share + step * point.fetch) * self.line
                for i in range(point.fetch):
                    prefetch(self.w[line + i * self.line])

            acc.add(
                count,
                lambda n: (self.lists.index[start + n] * self.panel, self.lists.value[start + n]),
                lambda row, v: as_float32(self.w[span(base + row + v * lanes, widths[v][0])]),
                fetch if point.fetch else None,
            )
            for v, (width, stored) in enumerate(widths):
                if not last:
                    T.buffer_store(partial, acc.total(v, width), [kept(v, width)])
                    continue
                at = unravel(m, self.shape[:-1])
                channel = q * self.panel + v * lanes
                self.kernel.store(acc.total(v, stored), [*at, span(channel, stored)])
