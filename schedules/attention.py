# SPDX-License-Identifier: Apache-2.0
"""Attention of rows (`attention_problem`), for few queries and for biases of each query: the lanes of a vector are keys.

For each head the keys are transposed into panels once; then a block of query rows computes its scores panel by panel, the
greatest of each row with them, then exponentials and their sums, then the weighted values, which are read where they lie.
The scores of a block stay in the first-level cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules import vector_math
from schedules.annotated import Annotated
from schedules.attention_problem import Problem, emitted
from schedules.emission import (
    Row,
    Tile,
    covering,
    loop,
    pieces,
    ramp,
    reduce_lanes,
    runs_parallel,
    splat,
    transpose,
    workspace,
)
from schedules.fused import Fused
from schedules.lanes import broadcast
from schedules.target import CpuTarget

LOOPS = "attention"
# Cycles besides the sums: to fill, empty and store a tile; per block of rows.
_TILE_CYCLES, _BLOCK_CYCLES = 30, 200


@dataclass(frozen=True)
class Point(Annotated):
    """Query rows of a block; the register tile of its scores (rows x vectors of keys), a whole number of which are a
    block, and that of its values (rows x vectors of value elements), likewise."""

    block: int
    rows: int
    vectors: int
    value_rows: int
    value_vectors: int


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """The least estimated cycles, padding of the last block and of narrow tiles included; scores of a block in half of
    the first-level cache."""
    keys, columns = (
        -(-problem.k_len // target.lanes),
        len(covering(problem.value_depth, target.lanes)),
    )
    fitting = target.l1_bytes // 2 // (4 * target.lanes * keys)
    blocks = range(1, min(problem.q_len, max(16, fitting), 64) + 1)
    best = None
    for block in blocks:
        score, rows, vectors = _tile_of(block, keys, problem.depth, target)
        value, value_rows, value_vectors = _tile_of(block, columns, problem.k_len, target)
        cycles = -(-problem.q_len // block) * (score + value + _BLOCK_CYCLES)
        if best is None or cycles < best[0]:
            best = cycles, Point(block, rows, vectors, value_rows, value_vectors)
    return best[1]


def _tile_of(block: int, columns: int, steps: int, target: CpuTarget) -> tuple[float, int, int]:
    """(cycles, rows, vectors) of the tile of least cycles for `block` rows by `columns` vectors, sums of `steps` terms."""

    def cycles(rows: int, vectors: int) -> float:
        panels = [vectors] * (columns // vectors) + [columns % vectors] * (columns % vectors > 0)
        # Two products or two loads a cycle, a product takes four; vectors come from the second-level cache.
        each = sum(
            steps * (max(rows * v / 2, (rows + v) / 2, 4) + v / 4) + _TILE_CYCLES for v in panels
        )
        return block // rows * each

    return min(
        (cycles(rows, vectors), rows, vectors)
        for rows in range(1, block + 1)
        if block % rows == 0
        for vectors in range(1, columns + 1)
        if (rows + 1) * vectors < target.registers
    )


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel for a fused attention."""
    return emitted(fused, target, Point, _Emitter)


@dataclass(frozen=True)
class _Block:
    """Query rows [base, base + block) of head h in batch b."""

    b: object
    h: object
    base: object


@dataclass
class _Emitter:
    """State of one emission: buffers of the function and, inside the loop over heads, of one head and block."""

    kernel: object
    problem: Problem
    point: Point
    target: CpuTarget
    q: object
    k: object
    v: object
    bias: object

    @property
    def lanes(self) -> int:
        return self.target.lanes

    @property
    def width(self) -> int:
        """Keys of one panel."""
        return self.lanes * self.point.vectors

    @property
    def key_vectors(self) -> int:
        return -(-self.problem.k_len // self.lanes)

    def emit(self) -> None:
        p, rows = self.problem, self.point.block
        blocks = -(-p.q_len // rows)
        heads = p.batch * p.heads
        work = 2 * heads * p.q_len * p.k_len * (p.depth + p.value_depth + 20)
        parallel = runs_parallel(self.target, heads * blocks, work)
        # Few heads: several threads share one, each packing the keys anew.
        shares = min(blocks, -(-self.target.threads // heads)) if parallel else 1
        blocks_per_share = -(-blocks // shares)
        with loop(heads * shares, parallel=parallel) as item:
            self._allocate()
            head = item if shares == 1 else tirx.floordiv(item, shares)
            first = 0 if shares == 1 else tirx.floormod(item, shares) * blocks_per_share
            b, h = tirx.floordiv(head, p.heads), tirx.floormod(head, p.heads)
            self._pack_keys(b, h)
            count = (
                blocks if shares == 1 else tirx.max(0, tirx.min(blocks_per_share, blocks - first))
            )
            with T.serial(0, count) as i:
                self._emit_block(_Block(b, h, tirx.min((first + i) * rows, p.q_len - rows)))

    def _allocate(self) -> None:
        p, rows, lanes = self.problem, self.point.block, self.lanes
        panels = -(-self.key_vectors // self.point.vectors)
        self.keys = workspace(panels, p.depth, self.width)
        self.queries = workspace(rows, p.depth)
        self.scores = workspace(rows, self.key_vectors * lanes)
        self.tops = workspace(rows, lanes)  # of each row, and its sums, by lane
        self.totals = workspace(rows, lanes)
        self.top = workspace(rows)
        self.inverse = workspace(rows)

    def _pack_keys(self, b, h) -> None:
        """keys[panel, d, key in panel] = k, repeating the last key where there is none (those scores are masked)."""
        p, lanes = self.problem, self.lanes
        # Depth below a register: transpose smaller blocks.
        row = Row(p.depth, lanes)
        block = row.lanes
        with T.serial(0, self.key_vectors * lanes // block) as group:
            key = group * block
            panel, offset = tirx.floordiv(key, self.width), tirx.floormod(key, self.width)

            def pack(base, _slot, _fresh):
                transpose(
                    block,
                    lambda i: self.k[b, tirx.min(key + i, p.k_len - 1), h, ramp(base, block)],
                    lambda i, column: T.buffer_store(
                        self.keys, column, [panel, base + i, ramp(offset, block)]
                    ),
                )

            row.each(pack, 1)

    def _emit_block(self, at: _Block) -> None:
        p, rows, lanes = self.problem, self.point.block, self.lanes
        depth_row = Row(p.depth, lanes)
        with T.serial(0, rows) as r:

            def copy(d, _slot, _fresh):
                lane = ramp(d, depth_row.lanes)
                value = self.q[at.b, at.base + r, at.h, lane] * splat(p.scale, depth_row.lanes)
                T.buffer_store(self.queries, value, [r, lane])

            depth_row.each(copy)
            T.buffer_store(self.tops, splat(-math.inf, lanes), [r, ramp(0, lanes)])
        # Keys that some row of this block sees, and vectors of them.
        seen, vectors = p.k_len, self.key_vectors
        if p.reach is not None:
            seen = tirx.max(0, tirx.min(p.k_len, at.base + rows + p.reach))
            vectors = tirx.floordiv(seen + lanes - 1, lanes)
        self._score(at, seen)
        self._exponentials(vectors)
        self._values(at, seen)

    # ---- scores

    def _score(self, at: _Block, seen) -> None:
        """scores[r, :] and, by lane, tops[r, :]; where causal only panels that some row sees."""
        p, vectors = self.problem, self.point.vectors
        whole = p.k_len // self.width
        rest = self.key_vectors - whole * vectors
        if p.reach is None:
            plain, last = whole, True
        else:
            plain = tirx.min(whole, tirx.floordiv(at.base + p.reach + 1, self.width))
            last = whole * self.width < seen
        with T.serial(0, plain) as panel:
            self._panel(at, panel, vectors)
        if p.reach is not None:
            reached = tirx.min(whole, tirx.floordiv(seen + self.width - 1, self.width))
            with T.serial(0, reached - plain) as i:
                self._panel(at, plain + i, vectors, causal=True)
        if not rest:
            return
        keys = p.k_len - whole * self.width
        if last is True:
            self._panel(at, whole, rest, keys)
            return
        with T.If(last), T.Then():
            self._panel(at, whole, rest, keys, causal=True)

    def _panel(
        self, at: _Block, panel, vectors: int, keys: int | None = None, causal: bool = False
    ) -> None:
        """Scores of `vectors` vectors of keys, the first `keys` of them real (None: all)."""
        lanes, zero = self.lanes, ramp(0, self.lanes)
        tile = Tile(self.point.rows, vectors, lanes)
        with T.serial(0, self.point.block // tile.rows) as t:
            acc = tile.allocate()
            first = t * tile.rows
            tile.multiply(
                acc, self.problem.depth, lambda r, d: self.queries[first + r, d],
                lambda d, v: self.keys[panel, d, ramp(v * lanes, lanes)],
            )  # fmt: skip
            for r in range(tile.rows):
                top = self.tops[first + r, zero]
                for v in range(vectors):
                    column, here = panel * self.width + v * lanes, tile.at(v)
                    valid = lanes if keys is None else min(lanes, keys - v * lanes)
                    self._add_bias(at, first + r, column, acc[r], v * lanes, valid)
                    limits = [self.problem.k_len] if valid < lanes else []
                    limits += [at.base + first + r + self.problem.reach + 1] if causal else []
                    for limit in limits:
                        bound = T.broadcast(tirx.convert(limit).astype("int32"), lanes)
                        seen = T.ramp(column, 1, lanes) < bound
                        value = tirx.Select(seen, acc[r][here], splat(-math.inf, lanes))
                        T.buffer_store(acc[r], value, [here])
                    T.buffer_store(self.scores, acc[r][here], [first + r, ramp(column, lanes)])
                    top = tirx.max(top, acc[r][here])
                T.buffer_store(self.tops, top, [first + r, zero])

    def _add_bias(self, at: _Block, row, column, acc, offset: int, valid: int) -> None:
        """Add the bias of the first `valid` keys from `column` on to the scores at `offset` of `acc`."""
        if self.bias is None:
            return
        shape = self.problem.bias
        index = [0 if n == 1 else x for n, x in zip(shape[:3], (at.b, at.h, at.base + row))]
        for start, lanes in pieces(valid, self.lanes):
            place = ramp(offset + start, lanes)
            added = self.bias[(*index, ramp(column + start, lanes))]
            T.buffer_store(acc, acc[place] + added, [place])

    # ---- softmax

    def _exponentials(self, vectors) -> None:
        """scores[r, :] become exponentials; inverse[r] the reciprocal of their sum."""
        lanes, rows = self.lanes, self.point.block
        zero = ramp(0, lanes)
        infinity, nothing = tirx.const(-math.inf, "float32"), tirx.const(0.0, "float32")
        with T.serial(0, rows) as r:
            T.buffer_store(self.top, reduce_lanes(self.tops[r, zero], tirx.max), [r])
            # A fully masked row: e^(-inf - 0) = 0 for every key, and 0 instead of 1 / 0.
            T.buffer_store(
                self.top, tirx.Select(self.top[r] == infinity, nothing, self.top[r]), [r]
            )
        with T.serial(0, rows) as r:
            T.buffer_store(self.totals, splat(0.0, lanes), [r, zero])
            with T.serial(0, vectors) as j:
                lane = ramp(j * lanes, lanes)
                x = T.bind(self.scores[r, lane] - T.broadcast(self.top[r], lanes))
                weight = T.bind(vector_math.softmax_weight(x))
                T.buffer_store(self.scores, weight, [r, lane])
                T.buffer_store(self.totals, self.totals[r, zero] + weight, [r, zero])
        with T.serial(0, rows) as r:
            T.buffer_store(
                self.inverse, reduce_lanes(self.totals[r, zero], lambda a, c: a + c), [r]
            )
            T.buffer_store(
                self.inverse,
                tirx.Select(self.inverse[r] == nothing, nothing, splat(1.0, 1) / self.inverse[r]),
                [r],
            )

    # ---- values

    def _values(self, at: _Block, seen) -> None:
        columns, most = covering(self.problem.value_depth, self.lanes), self.point.value_vectors
        for start in range(0, len(columns), most):
            self._columns(at, seen, columns[start : start + most])

    def _columns(self, at: _Block, seen, columns: list[tuple[int, int]]) -> None:
        """The weighted values of some (offset, lanes) of the value elements, all of the same lanes."""
        lanes = columns[0][1]
        tile = Tile(self.point.value_rows, len(columns), lanes)
        with T.serial(0, self.point.block // tile.rows) as t:
            acc = tile.allocate()
            first = t * tile.rows
            tile.multiply(
                acc, seen, lambda r, s: self.scores[first + r, s],
                lambda s, v: self.v[at.b, s, at.h, ramp(columns[v][0], lanes)],
            )  # fmt: skip
            for r, v in tile.cells():
                value = T.bind(acc[r][tile.at(v)] * broadcast(self.inverse[first + r], lanes))
                place = [at.b, at.base + first + r, at.h, ramp(columns[v][0], lanes)]
                self.kernel.store(value, place)
