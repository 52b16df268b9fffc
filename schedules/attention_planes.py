# SPDX-License-Identifier: Apache-2.0
"""Attention between planes: as `attention_queries`, of activations that lie one channel after another.

q [1, H * D, B * Sq], k [1, H * D, B * Sk], v [1, H * Dv, B * Sk] -> [1, H * Dv, B * Sq], float32; planes may be longer, and
behind the last query repeat it. A vector of queries is read, and stored, as it lies.
"""

from __future__ import annotations

from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

from schedules.attention_problem import Problem, attend, emitted
from schedules.attention_queries import Point, QueryLanes
from schedules.emission import pieces, ramp, splat
from schedules.fused import Fused, annotations
from schedules.lanes import broadcast
from schedules.target import CpuTarget
from schedules.windows import LINE_WORDS

LOOPS = "attention_planes"


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
    return emitted(fused, target, Point, _Planes)


class _Planes(QueryLanes):
    """Of planes."""

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

    @property
    def longest(self) -> int:
        return self.problem.q_len + self.behind

    def last_vector(self, b):
        last = super().last_vector(b)
        if not self.behind:
            return last
        return last + tirx.Select(b == self.problem.batch - 1, T.int32(self.behind), T.int32(0))

    def copy_queries(self) -> None:
        p, lanes = self.problem, self.lanes
        with T.serial(0, p.depth) as d:
            for v, query in enumerate(self.queries):
                x = self.q[0, self.h * p.depth + d, ramp(self.b * p.q_len + query, lanes)]
                T.buffer_store(self.scaled, x * splat(p.scale, lanes), [d, self.at(v)])

    def key(self, j, d):
        return self.k[0, self.h * self.problem.depth + d, self.b * self.problem.k_len + j]

    def value(self, j, e):
        return self.v[0, self.h * self.problem.value_depth + e, self.b * self.problem.k_len + j]

    def store_values(self, acc: list, first, inverse) -> None:
        plane = T.bind(self.h * self.problem.value_depth + first)
        starts = [self.b * self.problem.q_len + query for query in self.queries]
        for r, row in enumerate(acc):
            for v, start in enumerate(starts):
                value = T.bind(row[self.at(v)] * inverse[self.at(v)])
                self.kernel.store(value, [0, plane + r, ramp(start, self.lanes)])
        if self.plane > self.computed:
            self._store_past(acc, plane, starts[-1], inverse)

    def _store_past(self, acc: list, plane, start, inverse) -> None:
        """Repeat the last computed element of the planes from `plane` on, if a tile's last vector begins with `start` so
        that it is the last of all."""
        last = len(self.queries) * self.lanes - 1
        with T.If(start == self.computed - self.lanes), T.Then():
            for r, row in enumerate(acc):
                value = T.bind(row[last] * inverse[last])
                for past, lanes in pieces(self.plane - self.computed, self.lanes):
                    place = [0, plane + r, ramp(self.computed + past, lanes)]
                    self.kernel.store(broadcast(value, lanes), place)
