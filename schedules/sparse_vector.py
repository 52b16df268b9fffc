# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse product for a few rows of activations: the weights are streamed once, the activations looked up.

    y[m, o] = sum over n in the non-zeros of o's block of x[m, index[n]] * values[n, lane of o]

With few rows there is nothing to transpose and no panel to reuse: a non-zero is one vector of its block's weights times
one broadcast activation per row, floats or quads of bytes. Independent partial sums hide the latency of the additions.
Quads of one output channel alone are multiplied several non-zeros at a time, the activations collected in a vector.
Arrays as in `sparse_planes`, with every part one block, so that they are read from beginning to end.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated
from schedules.emission import ramp, reduce_lanes
from schedules.fused import Fused
from schedules.lanes import broadcast
from schedules.sparse_elements import FloatElements, QuadElements, elements_of
from schedules.sparse_panel import small
from schedules.sparse_planes import arguments
from schedules.sparse_problem import Problem, parts_of
from schedules.target import CpuTarget

# More rows are better served by panels of pixels, even if these are not full.
MOST_ROWS = 4
# Lanes of the dot products of quads, which every target has: the channels of a block, or non-zeros of a channel alone.
_QUAD_LANES = 4


@dataclass(frozen=True)
class Point(Annotated):
    """Frozen parameters of one kernel: `sums` independent partial sums per output."""

    sums: int


def suits(problem: Problem) -> bool:
    """Whether a problem has so few rows that this kernel is the one to use."""
    few = problem.pointwise and problem.groups == 1 and problem.pixels <= MOST_ROWS
    return few and (problem.together == 1 or problem.block in (1, _QUAD_LANES))


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """As many partial sums as hide an addition's latency, less where several rows, or collecting quads, do that too."""
    alone = problem.together > 1 and problem.block == 1
    return Point(2 if alone else max(2, 8 // problem.pixels))


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused function whose anchor is annotated `sparse_vector`."""
    problem, point = (
        Problem.from_dict(fused.point["problem"]),
        Point.from_dict(fused.point["point"]),
    )
    with fused.emit() as kernel:
        _Vector(kernel, problem, point, target, elements_of(fused.point, target)).emit()
    return kernel.func


class _Vector:
    def __init__(
        self,
        kernel,
        problem: Problem,
        point: Point,
        target: CpuTarget,
        elements: FloatElements | QuadElements,
    ):
        self.kernel, self.problem, self.point, self.threads = kernel, problem, point, target.threads
        self.elements = elements
        buffers = arguments(kernel)
        size = (problem.pixels * problem.channels,)
        self.x = T.decl_buffer(size, elements.dtype, data=buffers["x"].data)
        self.pointer, self.index = buffers["pointer"], buffers["index"]
        self.values, self.order = buffers["values"], buffers["order"]

    def emit(self) -> None:
        p = self.problem
        loop = T.parallel if self.threads > 1 and p.blocks > 1 else T.serial
        last = len(parts_of(p.outputs, p.block)) - 1
        alone = p.together > 1 and p.block == 1
        with loop(0, p.blocks) as position:
            sums = self._sum_alone(position) if alone else self._sum(position)
            # The last part takes what is left of a block, so it may hold two.
            b = T.Bind(tirx.min(position, last) + self.order[position].astype("int32"))
            left = p.outputs % p.block
            if left == 0:
                self._store(sums, b)
            elif p.blocks == 1:
                self._store_lanes(sums, b, left)
            else:
                with T.If(b < p.blocks - 1):
                    with T.Then():
                        self._store(sums, b)
                    with T.Else():
                        self._store_lanes(sums, b, left)

    def _sum(self, b) -> list:
        """A buffer per row that holds the sums of the block at position b."""
        p, block, sums = self.problem, self.problem.block, self.point.sums
        dtype, whole = self.elements.dtype, ramp(0, block)
        partial = [[small((block,), dtype) for _ in range(sums)] for _ in range(p.pixels)]
        for row in partial:
            for buffer in row:
                T.buffer_store(buffer, broadcast(tirx.const(0, dtype), block), [whole])
        begin, end = T.Bind(self.pointer[b]), T.Bind(self.pointer[b + 1])

        def add(n, slot: int) -> None:
            column = T.Bind(self.index[n].astype("int32"))
            weight = T.Bind(self.values[n, whole])
            for m, row in enumerate(partial):
                value = self.elements.pixels(self.x[m * p.channels + column])
                held = self.elements.add(row[slot][whole], weight, broadcast(value, block), block)
                T.buffer_store(row[slot], held, [whole])

        steps = T.Bind((end - begin) // sums)
        with T.serial(0, steps) as step:
            for slot in range(sums):
                add(T.Bind(begin + step * sums + slot), slot)
        with T.serial(0, end - begin - steps * sums) as rest:
            add(T.Bind(begin + steps * sums + rest), 0)
        for row in partial:
            values = [buffer[whole] for buffer in row]
            while len(values) > 1:
                values = [a + c for a, c in zip(values[::2], values[1::2])] + (
                    values[-1:] if len(values) % 2 else []
                )
            T.buffer_store(row[0], values[0], [whole])
        return [row[0] for row in partial]

    def _sum_alone(self, b) -> list:
        """As `_sum`, of quads of one output channel: a lane per non-zero."""
        p, lanes, dtype = self.problem, _QUAD_LANES, self.elements.dtype
        every = ramp(0, lanes)
        values = T.decl_buffer((int(self.values.shape[0]),), dtype, data=self.values.data)
        zero = broadcast(tirx.const(0, dtype), lanes)
        partial = [
            [small((lanes,), dtype) for _ in range(self.point.sums)] for _ in range(p.pixels)
        ]
        for buffer in (buffer for row in partial for buffer in row):
            T.buffer_store(buffer, zero, [every])
        begin, end = T.Bind(self.pointer[b]), T.Bind(self.pointer[b + 1])

        def add(weights, columns: list, slot: int) -> None:
            for m, row in enumerate(partial):
                found = [self.elements.pixels(self.x[m * p.channels + c]) for c in columns]
                x = (
                    broadcast(found[0], lanes)
                    if len(found) == 1
                    else tirx.Shuffle(found, [*range(lanes)])
                )
                held = self.elements.add(row[slot][every], weights, T.Bind(x), lanes)
                T.buffer_store(row[slot], held, [every])

        def column(n):
            return T.Bind(self.index[n].astype("int32"))

        each = self.point.sums * lanes
        steps = T.Bind((end - begin) // each)
        with T.serial(0, steps) as step:
            for slot in range(self.point.sums):
                n = T.Bind(begin + step * each + slot * lanes)
                columns = [column(n + i) for i in range(lanes)]
                add(T.Bind(values[ramp(n, lanes)]), columns, slot)
        with T.serial(0, end - begin - steps * each) as rest:
            n = T.Bind(begin + steps * each + rest)
            first = every < broadcast(tirx.const(1, "int32"), lanes)
            add(T.Bind(tirx.Select(first, broadcast(values[n], lanes), zero)), [column(n)], 0)
        for row in partial:
            total = row[0][every]
            for buffer in row[1:]:
                total = total + buffer[every]
            total = reduce_lanes(T.Bind(total), lambda x, y: x + y)
            T.buffer_store(row[0], total, [0])
        return [row[0] for row in partial]

    def _store(self, sums: list, b) -> None:
        block = self.problem.block
        for m, buffer in enumerate(sums):
            at = ramp(T.Bind(b * block), block)
            self.kernel.store(buffer[ramp(0, block)], [*self._row(m), at])

    def _store_lanes(self, sums: list, b, lanes: int) -> None:
        for m, buffer in enumerate(sums):
            for lane in range(lanes):
                at = T.Bind(b * self.problem.block + lane)
                self.kernel.store(buffer[lane], [*self._row(m), at])

    def _row(self, m: int) -> list:
        """The indices of the output, without the channel, of row m."""
        indices: list = []
        for extent in reversed(self.kernel.fused.shape[:-1]):
            indices.insert(0, T.int32(m % extent))
            m //= extent
        return indices
