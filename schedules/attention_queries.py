# SPDX-License-Identifier: Apache-2.0
"""Attention (`attention_problem`) whose vectors hold queries, of rows.

Scores are computed key by key, `scores[key][query]`, so that the greatest of a query, its exponentials and their sum are
ordinary vector operations, and keys and values are read one number at a time where they lie. Queries are transposed as they
are read, and the weighted values as they are written. Sq is at least the number of lanes: the last vectors of a sequence
overlap those before. `attention_planes` is the same between planes, which hold queries side by side already.
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
    local_buffer,
    loop,
    ramp,
    runs_parallel,
    splat,
    transpose,
    workspace,
)
from schedules.fused import Fused
from schedules.lanes import broadcast
from schedules.sparse_problem import tiles_of
from schedules.target import CpuTarget

LOOPS = "attention_queries"
# Share of the second-level cache that the scores of a tile may take; how much more than keys queries may leave lanes idle.
_SCORES_SHARE, _IDLE = 0.5, 1.1


@dataclass(frozen=True)
class Point(Annotated):
    """Vectors of queries of a tile; keys, and channels of the values, of its register tiles."""

    vectors: int
    keys: int
    values: int


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """A register tile whose products outnumber its loads, with scores of a tile that stay in the caches."""
    vectors, rows = (3, 8) if target.registers == 32 else (2, 5)
    room = int(_SCORES_SHARE * target.l2_bytes) // (4 * target.lanes * problem.k_len)
    vectors = max(1, min(vectors, problem.q_len // target.lanes, room))
    return Point(vectors, min(rows, problem.k_len), min(rows, problem.value_depth))


def serves(problem: Problem, lanes: int) -> bool:
    """Whether kernels with queries in lanes compute a problem: biases are one number per key."""
    return problem.q_len >= lanes and (not problem.bias or problem.bias[2] == 1)


def suits(problem: Problem, target: CpuTarget) -> bool:
    """Whether this is the kernel to use for rows."""
    lanes = target.lanes
    queries, keys = (-(-n // lanes) * lanes / n for n in (problem.q_len, problem.k_len))
    near = 4 * lanes * problem.k_len <= _SCORES_SHARE * target.l2_bytes
    return serves(problem, lanes) and near and queries <= _IDLE * keys


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel for a fused attention of rows."""
    return emitted(fused, target, Point, _Rows)


@dataclass
class QueryLanes:
    """State of one emission: buffers of the function and, inside its loop, of one tile of queries of head `h` in batch `b`:
    the number, in its sequence, of the first query of each vector."""

    kernel: object
    problem: Problem
    point: Point
    target: CpuTarget
    q: object
    k: object
    v: object
    bias: object
    b: object = None
    h: object = None
    queries: tuple = ()

    @property
    def lanes(self) -> int:
        return self.target.lanes

    @property
    def longest(self) -> int:
        """Queries of a sequence that are computed, of the longest one."""
        return self.problem.q_len

    def last_vector(self, b):
        """The first query of the last vector of a sequence."""
        return self.problem.q_len - self.lanes

    def copy_queries(self) -> None:
        """Fill `self.scaled`, [D][query], with the tile's queries times the scale of the scores."""
        raise NotImplementedError

    def key(self, j, d):
        """Element d of key j."""
        raise NotImplementedError

    def value(self, j, e):
        """Element e of value j."""
        raise NotImplementedError

    def store_values(self, acc: list, first, inverse) -> None:
        """Store sums of the values' elements from `first` on, `acc[element][query]`, times `inverse`."""
        raise NotImplementedError

    def finish(self) -> None:
        """Behind the last values of a tile."""

    def emit(self) -> None:
        p = self.problem
        tiles, large, count = tiles_of(self.longest, self.lanes, self.point.vectors)
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
                self.b, self.h = tirx.floordiv(head, p.heads), tirx.floormod(head, p.heads)
                self._emit_tile(first + tile * (vectors * self.lanes), vectors)

    def _emit_tile(self, base, vectors: int) -> None:
        """Queries [base, base + vectors * lanes)."""
        p, lanes = self.problem, self.lanes
        last = self.last_vector(self.b)
        self.queries = tuple(
            T.bind(tirx.min(base + v * lanes, last).astype("int32")) for v in range(vectors)
        )
        self.scaled = workspace(p.depth, vectors * lanes)
        self.scores = workspace(p.k_len, vectors * lanes)
        self.copy_queries()
        # Tiles of keys that some query sees; the last of all overlaps the one before.
        count = -(-p.k_len // self.point.keys)
        if p.reach is not None:
            seen = tirx.max(0, tirx.min(self.queries[-1] + lanes, p.q_len) + p.reach)
            count = tirx.min(count, tirx.floordiv(seen + self.point.keys - 1, self.point.keys))
        tops = self._score(count)
        keys = tirx.min(p.k_len, count * self.point.keys)
        self._values(keys, self._exponentials(keys, tops))
        self.finish()

    def at(self, v: int):
        """Index of vector v of a row of the tile's queries."""
        return ramp(v * self.lanes, self.lanes)

    def _vectors(self, value: float):
        """A register per vector."""
        found = local_buffer(len(self.queries) * self.lanes)
        for v in range(len(self.queries)):
            T.buffer_store(found, splat(value, self.lanes), [self.at(v)])
        return found

    def _score(self, count):
        """scores[key, :] of the first `count` tiles of keys, and the greatest of each query."""
        p, rows = self.problem, self.point.keys
        tile = Tile(rows, len(self.queries), self.lanes)
        tops = self._vectors(-math.inf)
        with T.serial(0, count) as t:
            first = T.bind(tirx.min(t * rows, p.k_len - rows).astype("int32"))
            acc = tile.allocate()
            tile.multiply(
                acc, p.depth, lambda r, d: self.key(first + r, d),
                lambda d, v: self.scaled[d, self.at(v)],
            )  # fmt: skip
            for v, query in enumerate(self.queries):
                top = tops[self.at(v)]
                for r in range(rows):
                    value = T.bind(self._masked(acc[r][self.at(v)], first + r, query))
                    T.buffer_store(self.scores, value, [first + r, self.at(v)])
                    top = tirx.max(top, value)
                T.buffer_store(tops, top, [self.at(v)])
        return tops

    def _masked(self, score, key, query):
        """Scores of a vector of queries with the bias of a key, -inf where they do not see it."""
        p, lanes = self.problem, self.lanes
        if self.bias is not None:
            index = [0 if n == 1 else x for n, x in zip(p.bias[:2], (self.b, self.h))]
            score = score + broadcast(self.bias[(*index, 0, key)], lanes)
        if p.reach is None:
            return score
        earliest = key - p.reach  # query that sees this key
        limit = tirx.Select(earliest < p.q_len, earliest, T.int32(2**30))
        seen = T.broadcast(limit, lanes) <= T.ramp(query, 1, lanes)
        return tirx.Select(seen, score, splat(-math.inf, lanes))

    def _exponentials(self, keys, tops):
        """The scores of the first `keys` keys become exponentials; gives the reciprocals of their sums."""
        lanes, nothing = self.lanes, splat(0.0, self.lanes)
        places = [self.at(v) for v in range(len(self.queries))]
        for at in places:  # where all are masked: e^(-inf - 0) = 0 for every key
            top = tirx.Select(tops[at] == splat(-math.inf, lanes), nothing, tops[at])
            T.buffer_store(tops, top, [at])
        totals = self._vectors(0.0)
        with T.serial(0, keys) as j:
            for at in places:
                x = T.bind(self.scores[j, at] - tops[at])
                weight = T.bind(vector_math.softmax_weight(x))
                T.buffer_store(self.scores, weight, [j, at])
                T.buffer_store(totals, totals[at] + weight, [at])
        for at in places:
            inverse = tirx.Select(totals[at] == nothing, nothing, splat(1.0, lanes) / totals[at])
            T.buffer_store(totals, inverse, [at])
        return totals

    def _values(self, keys, inverse) -> None:
        p, rows = self.problem, self.point.values
        tile = Tile(rows, len(self.queries), self.lanes)
        with T.serial(0, -(-p.value_depth // rows)) as t:
            first = T.bind(tirx.min(t * rows, p.value_depth - rows).astype("int32"))
            acc = tile.allocate()
            tile.multiply(
                acc, keys, lambda r, j: self.value(j, first + r),
                lambda j, v: self.scores[j, self.at(v)],
            )  # fmt: skip
            self.store_values(acc, first, inverse)


class _Rows(QueryLanes):
    """Of q [B, Sq, H, D], k [B, Sk, H, D], v [B, Sk, H, Dv]."""

    def copy_queries(self) -> None:
        p = self.problem
        row = Row(p.depth, self.lanes)
        scale = splat(p.scale, row.lanes)

        def copy(base, _slot, _fresh):
            for v, part in self._parts(row.lanes):
                query = self.queries[v] + part
                transpose(
                    row.lanes,
                    lambda i, query=query: self.q[self.b, query + i, self.h, ramp(base, row.lanes)],
                    lambda i, column, v=v, part=part: T.buffer_store(
                        self.scaled,
                        column * scale,
                        [base + i, ramp(v * self.lanes + part, row.lanes)],
                    ),
                )

        row.each(copy, 1)
        self.sums = workspace(p.value_depth, len(self.queries) * self.lanes)

    def _parts(self, lanes: int):
        """(vector, first lane) of each `lanes` of the tile's queries."""
        vectors = range(len(self.queries))
        return [(v, part) for v in vectors for part in range(0, self.lanes, lanes)]

    def key(self, j, d):
        return self.k[self.b, j, self.h, d]

    def value(self, j, e):
        return self.v[self.b, j, self.h, e]

    def store_values(self, acc: list, first, inverse) -> None:
        for r, row in enumerate(acc):
            for v in range(len(self.queries)):
                T.buffer_store(
                    self.sums, row[self.at(v)] * inverse[self.at(v)], [first + r, self.at(v)]
                )

    def finish(self) -> None:
        row = Row(self.problem.value_depth, self.lanes)

        def store(base, _slot, _fresh):
            for v, part in self._parts(row.lanes):
                query = self.queries[v] + part
                transpose(
                    row.lanes,
                    lambda i, v=v, part=part: self.sums[
                        base + i, ramp(v * self.lanes + part, row.lanes)
                    ],
                    lambda i, column, query=query: self.kernel.store(
                        column, [self.b, query + i, self.h, ramp(base, row.lanes)]
                    ),
                )

        row.each(store, 1)
