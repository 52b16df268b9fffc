# SPDX-License-Identifier: Apache-2.0
"""Attention between planes: as `schedules.attention`, of activations that lie one channel after another.

q [1, H * D, B * Sq], k [1, H * D, B * Sk], v [1, H * Dv, B * Sk] -> [1, H * Dv, B * Sq], float32; planes may be longer, and
behind the last query repeat it. The lanes of a vector are queries: scores are computed key by key, `scores[key][query]`, so that the greatest of a query, its exponentials and their sum
are ordinary vector operations, nothing is packed, and the weighted values are stored where they belong. The scores of a tile
of queries stay in the caches. Sq is at least the number of lanes: the last vectors of a sequence overlap those before.
A query whose scores are all -inf gives zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

from schedules import vector_math
from schedules.annotated import Annotated
from schedules.attention import STAGES, Problem, attend
from schedules.emission import (
    Tile,
    emitting,
    local_buffer,
    loop,
    pieces,
    ramp,
    runs_parallel,
    splat,
    workspace,
)
from schedules.fused import Fused, annotations
from schedules.lanes import broadcast
from schedules.sparse_problem import tiles_of
from schedules.target import CpuTarget
from schedules.windows import LINE_WORDS

LOOPS = "attention_planes"


@dataclass(frozen=True)
class Point(Annotated):
    """Vectors of queries of a tile; keys, and channels of the values, of its register tiles."""

    vectors: int
    keys: int
    values: int


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """A register tile whose products outnumber its loads, with scores of a tile about the size of the first-level cache."""
    vectors, rows = (3, 8) if target.registers == 32 else (2, 5)
    vectors = min(vectors, problem.q_len // target.lanes)
    return Point(vectors, min(rows, problem.k_len), min(rows, problem.value_depth))


def serves(problem: Problem, lanes: int) -> bool:
    """Whether the kernel computes a problem: biases are one number per key."""
    return problem.q_len >= lanes and (not problem.bias or problem.bias[2] == 1)


def define_attention_planes(q, k, v, bias, problem: Problem, point: Point):
    """te: the output [1, H * Dv, a plane of q]; `bias` is a tensor of shape `problem.bias`, or None."""
    p = problem

    def planes(x, depth: int, length: int):
        return lambda b, i, h, d: x(0, h * depth + d, b * length + i)

    at = attend(
        planes(q, p.depth, p.q_len),
        planes(k, p.depth, p.k_len),
        planes(v, p.value_depth, p.k_len),
        bias,
        p,
    )
    notes = annotations(LOOPS, problem=p.to_dict(), point=point.to_dict(), flops=p.flops)

    def element(_, c, m):
        query = te.min(m, p.batch * p.q_len - 1)
        return at(query // p.q_len, query % p.q_len, c // p.value_depth, c % p.value_depth)

    shape = (1, p.heads * p.value_depth, q.shape[2])
    return te.compute(shape, element, name="attention_planes", attrs=notes)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel for a fused attention between planes."""
    problem = Problem.from_dict(fused.point["problem"])
    point = Point.from_dict(fused.point["point"])
    with emitting(fused, STAGES) as (kernel, (q, k, *bias, v)):
        _Emitter(kernel, problem, point, target, q, k, v, bias[0] if bias else None).emit()
    return kernel.func


@dataclass
class _Emitter:
    """State of one emission: buffers of the function and, inside its loop, of one tile of queries."""

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
    def plane(self) -> int:
        """Elements of a plane of queries."""
        return int(self.q.shape[2])

    @property
    def computed(self) -> int:
        """Those that are computed: to the end of a line if there are more."""
        queries = self.problem.batch * self.problem.q_len
        return min(self.plane, -(-queries // LINE_WORDS) * LINE_WORDS)

    @property
    def behind(self) -> int:
        """Computed elements of a plane behind the last query."""
        return self.computed - self.problem.batch * self.problem.q_len

    def emit(self) -> None:
        p = self.problem
        tiles, large, count = tiles_of(p.q_len + self.behind, self.lanes, self.point.vectors)
        heads = p.batch * p.heads
        work = 2 * heads * p.q_len * p.k_len * (p.depth + p.value_depth + 20)
        parallel = runs_parallel(self.target, heads * tiles, work)
        width = large * self.lanes
        for vectors, first, number in (
            (large, 0, count),
            (large - 1, count * width, tiles - count),
        ):
            if not vectors or not number:
                continue
            with loop(heads * number, parallel=parallel) as item:
                head, tile = tirx.floordiv(item, number), tirx.floormod(item, number)
                b, h = tirx.floordiv(head, p.heads), tirx.floormod(head, p.heads)
                self._emit_tile(b, h, first + tile * (vectors * self.lanes), vectors)

    def _emit_tile(self, b, h, base, vectors: int) -> None:
        """Queries [base, base + vectors * lanes) of head h in batch b."""
        p, lanes = self.problem, self.lanes
        last = p.q_len - lanes
        if self.behind:
            last = last + tirx.Select(b == p.batch - 1, T.int32(self.behind), T.int32(0))
        queries = [T.bind(tirx.min(base + v * lanes, last).astype("int32")) for v in range(vectors)]
        self.scaled = workspace(p.depth, vectors * lanes)
        self.scores = workspace(p.k_len, vectors * lanes)
        with T.serial(0, p.depth) as d:
            for v, query in enumerate(queries):
                x = self.q[0, h * p.depth + d, ramp(b * p.q_len + query, lanes)]
                T.buffer_store(self.scaled, x * splat(p.scale, lanes), [d, self._at(v)])
        # Tiles of keys that some query sees; the last of all overlaps the one before.
        count = -(-p.k_len // self.point.keys)
        if p.reach is not None:
            seen = tirx.max(0, tirx.min(queries[-1] + lanes, p.q_len) + p.reach)
            count = tirx.min(count, tirx.floordiv(seen + self.point.keys - 1, self.point.keys))
        tops = self._score(b, h, queries, count)
        keys = tirx.min(p.k_len, count * self.point.keys)
        inverse = self._exponentials(keys, tops, vectors)
        self._values(b, h, queries, keys, inverse)

    def _at(self, v: int):
        return ramp(v * self.lanes, self.lanes)

    def _vectors(self, vectors: int, value: float):
        """A register per vector."""
        found = local_buffer(vectors * self.lanes)
        for v in range(vectors):
            T.buffer_store(found, splat(value, self.lanes), [self._at(v)])
        return found

    def _score(self, b, h, queries: list, count):
        """scores[key, :] of the first `count` tiles of keys, and the greatest of each query."""
        p, lanes, rows = self.problem, self.lanes, self.point.keys
        tile = Tile(rows, len(queries), lanes)
        tops = self._vectors(len(queries), -math.inf)
        with T.serial(0, count) as t:
            first = T.bind(tirx.min(t * rows, p.k_len - rows).astype("int32"))
            acc = tile.allocate()
            tile.multiply(
                acc, p.depth, lambda r, d: self.k[0, h * p.depth + d, b * p.k_len + first + r],
                lambda d, v: self.scaled[d, self._at(v)],
            )  # fmt: skip
            for v, query in enumerate(queries):
                top = tops[self._at(v)]
                for r in range(rows):
                    value = acc[r][self._at(v)]
                    if self.bias is not None:
                        shape = p.bias
                        index = [0 if n == 1 else x for n, x in zip(shape[:2], (b, h))]
                        value = value + broadcast(self.bias[(*index, 0, first + r)], lanes)
                    if p.reach is not None:
                        earliest = first + r - p.reach  # query that sees this key
                        limit = tirx.Select(earliest < p.q_len, earliest, T.int32(2**30))
                        seen = T.broadcast(limit, lanes) <= T.ramp(query, 1, lanes)
                        value = tirx.Select(seen, value, splat(-math.inf, lanes))
                    value = T.bind(value)
                    T.buffer_store(self.scores, value, [first + r, self._at(v)])
                    top = tirx.max(top, value)
                T.buffer_store(tops, top, [self._at(v)])
        return tops

    def _exponentials(self, keys, tops, vectors: int):
        """The scores of the first `keys` keys become exponentials; gives the reciprocals of their sums."""
        lanes, nothing = self.lanes, splat(0.0, self.lanes)
        for v in range(vectors):  # where all are masked: e^(-inf - 0) = 0 for every key
            top = tops[self._at(v)]
            top = tirx.Select(top == splat(-math.inf, lanes), nothing, top)
            T.buffer_store(tops, top, [self._at(v)])
        totals = self._vectors(vectors, 0.0)
        with T.serial(0, keys) as j:
            for v in range(vectors):
                at = self._at(v)
                x = T.bind(self.scores[j, at] - tops[at])
                weight = T.bind(vector_math.softmax_weight(x))
                T.buffer_store(self.scores, weight, [j, at])
                T.buffer_store(totals, totals[at] + weight, [at])
        for v in range(vectors):
            total = totals[self._at(v)]
            inverse = tirx.Select(total == nothing, nothing, splat(1.0, lanes) / total)
            T.buffer_store(totals, inverse, [self._at(v)])
        return totals

    def _values(self, b, h, queries: list, keys, inverse) -> None:
        p, lanes, rows = self.problem, self.lanes, self.point.values
        tile = Tile(rows, len(queries), lanes)
        with T.serial(0, -(-p.value_depth // rows)) as t:
            first = T.bind(
                (h * p.value_depth + tirx.min(t * rows, p.value_depth - rows)).astype("int32")
            )
            acc = tile.allocate()
            tile.multiply(
                acc, keys, lambda r, j: self.v[0, first + r, b * p.k_len + j],
                lambda j, v: self.scores[j, self._at(v)],
            )  # fmt: skip
            for r, v in tile.cells():
                value = T.bind(acc[r][self._at(v)] * inverse[self._at(v)])
                self.kernel.store(value, [0, first + r, ramp(b * p.q_len + queries[v], lanes)])
            if self.plane > self.computed:
                self._store_past(acc, first, b * p.q_len + queries[-1], inverse, len(queries))

    def _store_past(self, acc: list, first, start, inverse, vectors: int) -> None:
        """Repeat the last computed element of the planes from `first` on, if a tile's last vector begins with `start` so
        that it is the last of all."""
        last = vectors * self.lanes - 1
        with T.If(start == self.computed - self.lanes), T.Then():
            for r, row in enumerate(acc):
                value = T.bind(row[last] * inverse[last])
                for past, lanes in pieces(self.plane - self.computed, self.lanes):
                    place = [0, first + r, ramp(self.computed + past, lanes)]
                    self.kernel.store(broadcast(value, lanes), place)
