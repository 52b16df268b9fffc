# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention in one kernel: definition and kernel.

    o[b, i, h, :] = sum over j of softmax_j(scale q[b, i, h, :] . k[b, j, h, :] + bias[b, h, i, j]) v[b, j, h, :]

q [B, Sq, H, D], k [B, Sk, H, D], v [B, Sk, H, Dv], float32. For each head the keys are transposed into panels once; then
a tile of query rows computes its scores, their softmax (polynomial exponential) and the weighted values, all in cache.
A row whose scores are all -inf (fully masked) gives zeros, as `torch.nn.functional.scaled_dot_product_attention` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

from schedules import vector_math
from schedules.annotated import Annotated
from schedules.emission import (
    Row,
    Tile,
    covering,
    emitting,
    local_buffer,
    loop,
    pieces,
    ramp,
    reduce_lanes,
    runs_parallel,
    splat,
    tile_rows,
    transpose,
    workspace,
)
from schedules.fused import Fused, annotations, broadcast
from schedules.target import CpuTarget

LOOPS = "attention"
_STAGES = 7  # blocks of the definition


@dataclass(frozen=True)
class Problem(Annotated):
    """Shapes and options. `causal` is "", "top_left" (j <= i) or "bottom_right" (j <= i + |k_len - q_len|);
    `bias` the shape of the bias, [B or 1, H or 1, Sq or 1, Sk], or () for none."""

    batch: int
    q_len: int
    k_len: int
    heads: int
    depth: int
    value_depth: int
    scale: float
    causal: str = ""
    bias: tuple[int, ...] = ()

    @property
    def reach(self) -> int | None:
        """Query row i sees the keys up to i + reach; None where it sees all."""
        return {"": None, "top_left": 0, "bottom_right": abs(self.k_len - self.q_len)}[self.causal]


@dataclass(frozen=True)
class Point(Annotated):
    """Tile parameters: query rows by vectors of keys (and of values) in registers."""

    rows: int
    vectors: int


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """Two vectors per row, rows to fill the registers with the least overlap."""
    vectors = 2 if problem.k_len > target.lanes else 1
    most = min(14, (target.registers - 2 - vectors) // vectors)
    return Point(tile_rows(problem.q_len, most), vectors)


def define_attention(q, k, v, bias, problem: Problem, point: Point):
    """te: the output [B, Sq, H, Dv]; `bias` is a tensor of shape `problem.bias`, or None."""
    p = problem
    scores_shape = (p.batch, p.heads, p.q_len, p.k_len)
    d, j, s, t = (
        te.reduce_axis((0, n), name=x)
        for n, x in ((p.depth, "d"), (p.k_len, "j"), (p.k_len, "s"), (p.k_len, "t"))
    )
    minus_infinity, zero, one = (tirx.const(c, "float32") for c in (-math.inf, 0.0, 1.0))

    def logit(b, h, i, c):
        value = scores(b, h, i, c) * tirx.const(p.scale, "float32")
        if bias is not None:
            value = value + bias(*(0 if n == 1 else x for n, x in zip(p.bias, (b, h, i, c))))
        return value if p.reach is None else tirx.Select(c <= i + p.reach, value, minus_infinity)

    def weight(b, h, i, c):
        top = greatest(b, h, i)
        return vector_math.exp_nonpositive(
            logits(b, h, i, c) - tirx.Select(top == minus_infinity, zero, top)
        )

    scores = te.compute(
        scores_shape,
        lambda b, h, i, c: te.sum(q(b, i, h, d) * k(b, c, h, d), axis=d),
        name="scores",
    )
    logits = te.compute(scores_shape, logit, name="logits")
    greatest = te.compute(
        scores_shape[:3], lambda b, h, i: te.max(logits(b, h, i, j), axis=j), name="greatest"
    )
    weights = te.compute(scores_shape, weight, name="weights")
    total = te.compute(
        scores_shape[:3], lambda b, h, i: te.sum(weights(b, h, i, s), axis=s), name="total"
    )
    shape = (p.batch, p.q_len, p.heads, p.value_depth)
    weighted = te.compute(
        shape,
        lambda b, i, h, e: te.sum(weights(b, h, i, t) * v(b, t, h, e), axis=t),
        name="weighted",
    )

    def normalized(b, i, h, e):
        divisor = total(b, h, i)
        return weighted(b, i, h, e) * tirx.Select(divisor == zero, zero, one / divisor)

    notes = annotations(LOOPS, problem=p.to_dict(), point=point.to_dict())
    return te.compute(shape, normalized, name="attention", attrs=notes)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel for a fused attention."""
    problem, point = (
        Problem.from_dict(fused.point["problem"]),
        Point.from_dict(fused.point["point"]),
    )
    with emitting(fused, _STAGES) as (kernel, (q, k, *bias, v)):
        _Emitter(kernel, problem, point, target, q, k, v, bias[0] if bias else None).emit()
    return kernel.func


@dataclass
class _Emitter:
    """State of one emission: buffers of the function and, inside the loop over heads, of one head and row tile."""

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
        """Keys (or value elements) of one panel."""
        return self.lanes * self.point.vectors

    @property
    def panels(self) -> int:
        return -(-self.problem.k_len // self.width)

    @property
    def value_panels(self) -> int:
        return -(-self.problem.value_depth // self.width)

    def emit(self) -> None:
        p, rows = self.problem, self.point.rows
        tiles = -(-p.q_len // rows)
        heads = p.batch * p.heads
        work = 2 * heads * p.q_len * p.k_len * (p.depth + p.value_depth + 20)
        parallel = runs_parallel(self.target, heads * tiles, work)
        # Few heads: several threads share one, each packing the keys anew.
        shares = min(tiles, -(-self.target.threads // heads)) if parallel else 1
        tiles_per_share = -(-tiles // shares)
        with loop(heads * shares, parallel=parallel) as item:
            self._allocate()
            head = item if shares == 1 else tirx.floordiv(item, shares)
            first = 0 if shares == 1 else tirx.floormod(item, shares) * tiles_per_share
            b, h = tirx.floordiv(head, p.heads), tirx.floormod(head, p.heads)
            self._pack_keys(b, h)
            self._pack_values(b, h)
            count = tiles if shares == 1 else tirx.max(0, tirx.min(tiles_per_share, tiles - first))
            with T.serial(0, count) as tile:
                base = tirx.min((first + tile) * rows, p.q_len - rows)
                self._emit_tile(b, h, base)

    def _allocate(self) -> None:
        p, lanes = self.problem, self.lanes
        self.keys = workspace(self.panels, p.depth, self.width)
        self.values = workspace(self.value_panels, p.k_len, self.width)
        self.queries = workspace(self.point.rows, p.depth)
        self.scores = workspace(self.point.rows, self.panels * self.width)
        self.inverse = local_buffer(self.point.rows)
        self.vector = local_buffer(2 * lanes)
        self.scalar = local_buffer(1)

    def _pack_keys(self, b, h) -> None:
        """keys[panel, d, key in panel] = k, repeating the last key where there is none (those scores are masked)."""
        p, lanes = self.problem, self.lanes
        # Depth below a register: transpose smaller blocks.
        row = Row(p.depth, lanes)
        block = row.lanes
        with T.serial(0, self.panels * self.width // block) as group:
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

    def _pack_values(self, b, h) -> None:
        """values[panel, key, element in panel] = v, zeros where there is no element."""
        p = self.problem
        with T.serial(0, p.k_len) as s:
            for panel in range(self.value_panels):
                first = panel * self.width
                held = min(self.width, p.value_depth - first)
                for offset, lanes in covering(held, self.lanes):
                    value = self.v[b, s, h, ramp(first + offset, lanes)]
                    T.buffer_store(self.values, value, [panel, s, ramp(offset, lanes)])
                for offset, lanes in (
                    covering(self.width - held, self.lanes) if held < self.width else ()
                ):
                    T.buffer_store(
                        self.values, splat(0.0, lanes), [panel, s, ramp(held + offset, lanes)]
                    )

    def _emit_tile(self, b, h, base) -> None:
        p, rows = self.problem, self.point.rows
        depth_row = Row(p.depth, self.lanes)
        with T.serial(0, rows) as r:

            def copy(at, _slot, _fresh):
                lane = ramp(at, depth_row.lanes)
                T.buffer_store(
                    self.queries,
                    self.q[b, base + r, h, lane] * splat(p.scale, depth_row.lanes),
                    [r, lane],
                )

            depth_row.each(copy)
        # Keys that some row of this tile sees.
        seen = p.k_len if p.reach is None else tirx.max(0, tirx.min(p.k_len, base + rows + p.reach))
        tile = Tile(rows, self.point.vectors, self.lanes)
        acc = tile.allocate()
        panels = (
            self.panels if p.reach is None else tirx.floordiv(seen + self.width - 1, self.width)
        )
        with T.serial(0, panels) as panel:
            tile.multiply(
                acc, p.depth, lambda r, d: self.queries[r, d],
                lambda d, v: self.keys[panel, d, ramp(v * self.lanes, self.lanes)],
            )  # fmt: skip
            for r, v in tile.cells():
                T.buffer_store(
                    self.scores,
                    acc[r][tile.at(v)],
                    [r, ramp(panel * self.width + v * self.lanes, self.lanes)],
                )
        with T.serial(0, rows) as r:
            self._softmax(b, h, base, r, panels * self.point.vectors)
        with T.serial(0, self.value_panels) as panel:
            tile.multiply(
                acc, seen, lambda r, s: self.scores[r, s],
                lambda s, v: self.values[panel, s, ramp(v * self.lanes, self.lanes)],
            )  # fmt: skip
            self._store(tile, acc, b, h, base, panel)

    def _softmax(self, b, h, base, r, vectors) -> None:
        """scores[r, :] become exponentials; inverse[r] the reciprocal of their sum."""
        p, lanes = self.problem, self.lanes
        zero, lane = ramp(0, lanes), ramp(lanes, lanes)
        whole, left = divmod(p.k_len, lanes)
        count = whole if p.reach is None else tirx.min(whole, vectors)

        def each(body) -> None:
            if whole:
                with T.serial(0, count) as j:
                    body(j * lanes, lanes)
            if left:
                body(tirx.const(whole * lanes, "int32"), left)

        def greatest(at, valid):
            self._add_bias(b, h, base + r, r, at, valid)
            value = self.scores[r, ramp(at, lanes)]
            column = T.ramp(at, 1, lanes)
            if p.reach is not None:
                value = tirx.Select(
                    column <= T.broadcast(base + r + p.reach, lanes), value, splat(-math.inf, lanes)
                )
            if valid < lanes:
                value = tirx.Select(
                    column < T.broadcast(p.k_len, lanes), value, splat(-math.inf, lanes)
                )
            if p.reach is not None or valid < lanes:
                T.buffer_store(self.scores, value, [r, ramp(at, lanes)])
            T.buffer_store(
                self.vector, tirx.max(self.vector[zero], self.scores[r, ramp(at, lanes)]), [zero]
            )

        def exponential(at, _valid):
            T.buffer_store(
                self.vector,
                self.scores[r, ramp(at, lanes)] - broadcast(self.scalar[0], lanes),
                [lane],
            )
            T.buffer_store(self.vector, vector_math.exp_nonpositive(self.vector[lane]), [lane])
            T.buffer_store(self.scores, self.vector[lane], [r, ramp(at, lanes)])
            T.buffer_store(self.vector, self.vector[zero] + self.vector[lane], [zero])

        infinity = tirx.const(-math.inf, "float32")
        nothing = tirx.const(0.0, "float32")
        T.buffer_store(self.vector, splat(-math.inf, lanes), [zero])
        each(greatest)
        T.buffer_store(self.scalar, reduce_lanes(self.vector[zero], tirx.max), [0])
        # A fully masked row: e^(-inf - 0) = 0 for every key, and 0 instead of 1 / 0.
        T.buffer_store(
            self.scalar, tirx.Select(self.scalar[0] == infinity, nothing, self.scalar[0]), [0]
        )
        T.buffer_store(self.vector, splat(0.0, lanes), [zero])
        each(exponential)
        T.buffer_store(self.scalar, reduce_lanes(self.vector[zero], lambda a, c: a + c), [0])
        T.buffer_store(
            self.inverse,
            tirx.Select(self.scalar[0] == nothing, nothing, splat(1.0, 1) / self.scalar[0]),
            [r],
        )

    def _add_bias(self, b, h, i, r, at, valid: int) -> None:
        if self.bias is None:
            return
        shape = self.problem.bias
        index = [0 if extent == 1 else x for extent, x in zip(shape[:3], (b, h, i))]
        for offset, lanes in pieces(valid, self.lanes):
            lane = ramp(at + offset, lanes)
            T.buffer_store(self.scores, self.scores[r, lane] + self.bias[(*index, lane)], [r, lane])

    def _store(self, tile: Tile, acc, b, h, base, panel) -> None:
        p = self.problem
        whole = p.value_depth // self.width

        def write(offset: int, lanes: int, r: int) -> None:
            value = T.bind(acc[r][ramp(offset, lanes)] * broadcast(self.inverse[r], lanes))
            self.kernel.store(value, [b, base + r, h, ramp(panel * self.width + offset, lanes)])

        def write_panel(extent: int) -> None:
            for r in range(tile.rows):
                for offset, lanes in covering(extent, self.lanes):
                    write(offset, lanes, r)

        if p.value_depth % self.width == 0:
            write_panel(self.width)
        elif whole == 0:
            write_panel(p.value_depth)
        else:
            with T.If(panel < whole):
                with T.Then():
                    write_panel(self.width)
                with T.Else():
                    write_panel(p.value_depth % self.width)
