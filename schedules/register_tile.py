# SPDX-License-Identifier: Apache-2.0
"""Emission of a contraction: the loops over panels, chunks and tiles, and the register tile inside."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.byte_stores import Cell
from schedules.contraction_point import (
    OUTPUT,
    PARTIAL,
    WEIGHTS_OR_PIXELS,
    Point,
    packed_shape,
    panels_per_group,
)
from schedules.fused import Emission
from schedules.terms import FloatTerms, QuadTerms
from schedules.tile_fetch import Chunk, FetchesAhead, Panel, Pixels
from schedules.windows import (
    Problem,
    RowTiles,
    kernel_rows,
    loop,
    prefetch,
    span,
    splat,
    unravel,
    vectors,
)


class Contraction(FetchesAhead):
    """One kernel being emitted. `shape` is the output's: [N, OH, OW, O] or, flat, any [..., O]. The problem counts its
    inputs in the elements of `terms`."""

    def __init__(
        self,
        kernel: Emission,
        shape: tuple[int, ...],
        problem: Problem,
        point: Point,
        threads: int,
        terms: FloatTerms | QuadTerms | None = None,
    ):
        self.kernel, self.shape, self.problem, self.point = kernel, shape, problem, point
        self.terms = terms = FloatTerms(kernel) if terms is None else terms
        self.x_lead = tuple(int(d) for d in terms.x.shape)[:-1]
        self.parallel = threads > 1
        self.row = RowTiles(problem, point.mr, problem.row)
        self.tiles = self.row.count * problem.rows
        self.chunk = point.chunk if 0 < point.chunk < problem.group_inputs else problem.group_inputs
        self.panel_weights = point.panel * terms.branches  # of one step of the sum
        kernel.write_over_residual()
        self.repeated = self.row.count * point.mr - self.row.length  # pixels of a row's last tile

    # ---- loops

    def emit(self) -> None:
        problem, point = self.problem, self.point
        units = self.row.count if problem.flat else problem.rows
        if point.order == "chunks":
            self._over_chunks(
                lambda chunk: self._over_panels(
                    lambda panel: self._over_units(0, units, panel, chunk), self.parallel
                )
            )
            return
        if point.order == "panels":
            self._over_panels(
                lambda panel: self._over_chunks(
                    lambda chunk: self._over_units(0, units, panel, chunk)
                ),
                self.parallel,
            )
            return
        block = min(point.block, units)
        everything = Chunk(0, problem.group_inputs, True, True)
        with loop(-(-units // block), self.parallel) as b:
            if block == 1:
                self._over_panels(lambda panel: self._unit(b, panel, everything), False)
                return
            stop = (b + 1) * block if units % block == 0 else tirx.min((b + 1) * block, units)
            self._over_panels(
                lambda panel: self._over_units(b * block, stop, panel, everything), False
            )

    def _over_chunks(self, body: Callable[[Chunk], None]) -> None:
        """All but the last chunk in one loop; the last one writes the result."""
        inputs, chunk = self.problem.group_inputs, self.chunk
        count = -(-inputs // chunk)
        if count > 1:
            panels = (
                packed_shape(self.problem, self.point)[0] if self.point.order == "chunks" else 1
            )
            self.partial = T.alloc_buffer(
                (panels, self.tiles, self.point.mr, self.panel_weights), self.terms.dtype
            )
            if count == 2:
                body(Chunk(0, chunk, True, False))
            else:
                with T.serial(0, count - 1) as j:
                    body(Chunk(j * chunk, chunk, j == 0, False))
        start = (count - 1) * chunk
        body(Chunk(start, inputs - start, count == 1, True))

    def _over_panels(self, body: Callable[[Panel], None], parallel: bool) -> None:
        problem, point = self.problem, self.point
        count = panels_per_group(problem, point)
        full = problem.group_outputs // point.panel
        whole = vectors(point.panel, point.lanes)
        rest = vectors(problem.group_outputs - full * point.panel, point.lanes)

        def group(g) -> None:
            def panel(q, widths):
                first = g * problem.group_inputs
                body(
                    Panel(
                        g * count + q, q, first, g * problem.group_outputs + q * point.panel, widths
                    )
                )

            if full == 1:
                panel(0, whole)
            elif full:
                with loop(full, parallel and problem.groups == 1) as q:
                    panel(q, whole)
            if rest:
                panel(full, rest)

        if problem.groups == 1:
            group(0)
        else:
            with loop(problem.groups, parallel) as g:
                group(g)

    def _over_units(self, start, stop, panel: Panel, chunk: Chunk) -> None:
        # From 0: TVM 0.27 compiles a loop whose lower bound is computed from the variable of another loop that does not
        # start at 0 (here: kernel rows from output rows) wrongly.
        with T.serial(0, stop - start) as i:
            self._unit(start + i, panel, chunk)

    def _unit(self, u, panel: Panel, chunk: Chunk) -> None:
        """One flat tile, or one row of an image in tiles."""
        problem = self.problem
        if problem.flat:
            at = Pixels(u, None, None, self.row.base(u), None, u * self.point.mr)
            self._tile(at, panel, chunk)
            return
        image, oh = (
            (0, u)
            if problem.n == 1
            else (tirx.floordiv(u, problem.oh), tirx.floormod(u, problem.oh))
        )
        self.row.each(
            lambda t, base, edge: self._tile(
                Pixels(u * self.row.count + t, image, oh, base, edge, t * self.point.mr),
                panel,
                chunk,
            )
        )

    # ---- one tile

    def _tile(self, pixels: Pixels, panel: Panel, chunk: Chunk) -> None:
        mr, lanes = self.point.mr, self.point.lanes
        # Scratch on the stack, which LLVM keeps in registers, has to be small arrays of scope "global".
        sums = self._sums(panel)
        banks = [
            [[self._register(width) for width in sums] for _ in range(mr)]
            for _ in range(self.point.sums)
        ]
        self._start(banks, pixels, panel, chunk)
        if self.point.prefetch & OUTPUT and chunk.last and not self._spreads_output(chunk):
            for p in range(mr):
                self._prefetch_output(pixels, panel, p)
        if self.point.prefetch & PARTIAL and self.point.order == "chunks":
            for p in range(mr):
                for v in range(len(sums)):
                    prefetch(self.partial[panel.index, pixels.tile + 1, p, v * lanes])
        self._sum(banks, pixels, panel, chunk)
        rows: list[list[Cell]] = [[] for _ in range(mr)]
        for p in range(mr):
            lead = [pixels.image, pixels.oh, pixels.base + p]
            at = unravel(pixels.base + p, self.shape[:-1]) if self.problem.flat else lead
            if not chunk.last:
                for v, width in enumerate(sums):
                    where = [*self._slot(panel, pixels), p, span(v * lanes, width)]
                    T.buffer_store(self.partial, _total(banks, p, v, width), where)
                continue
            each = self.terms.branches
            for v, (_, stored) in enumerate(panel.widths):
                first = panel.first_output + v * lanes
                parts = [_total(banks, p, v * each + b, stored) for b in range(each)]
                value = self.terms.combine(parts, first, stored)
                rows[p].append(Cell(value, tuple(at), first, stored))
        if chunk.last:
            self._store(pixels, rows)

    def _store(self, pixels: Pixels, rows: list[list[Cell]]) -> None:
        """Store a tile's outputs; over a residual each only once, for there the second epilogue would read the first's."""
        repeated = self.repeated if self.kernel.in_place else 0
        if repeated:
            first, fresh = (
                tirx.const(a, "int32") if isinstance(a, int) else a
                for a in (pixels.base, pixels.fresh)
            )
            with T.If(tirx.EQ(first, fresh)):
                with T.Then():
                    self.terms.store(self.kernel, rows[:repeated])
        self.terms.store(self.kernel, rows[repeated:])

    def _sums(self, panel: Panel) -> list[int]:
        """Lanes of the vectors of sums that a tile keeps of each pixel: the branches of an output next to one another."""
        return [width for width, _ in panel.widths for _ in range(self.terms.branches)]

    def _register(self, width: int):
        return T.alloc_buffer((width,), self.terms.dtype)

    def _slot(self, panel: Panel, pixels: Pixels) -> tuple:
        """Where a tile's partial sums are kept between chunks."""
        return (panel.index if self.point.order == "chunks" else 0, pixels.tile)

    def _start(self, banks: list, pixels: Pixels, panel: Panel, chunk: Chunk) -> None:
        """Zero the sums, or load what the chunks before have left in the first bank."""

        slot = self._slot(panel, pixels)
        biased = self.terms.bias is not None

        def fill(resume: bool) -> None:
            for b, bank in enumerate(banks):
                for p, registers in enumerate(bank):
                    for v, (width, register) in enumerate(zip(self._sums(panel), registers)):
                        value = splat(tirx.const(0, self.terms.dtype), width)
                        if resume and b == 0:
                            value = self.partial[(*slot, p, span(v * self.point.lanes, width))]
                        elif biased and b == 0:
                            value = self._bias(panel, v, width)
                        T.buffer_store(register, value, [span(0, width)])
            if self.terms.starts is not None and not resume:
                self._add_starts(banks[0], pixels, panel)

        if isinstance(chunk.first, bool):
            fill(not chunk.first)
            return
        with T.If(chunk.first):
            with T.Then():
                fill(False)
            with T.Else():
                fill(True)

    def _bias(self, panel: Panel, v: int, width: int):
        """What vector v of the panel's sums starts with at every pixel."""
        if self.terms.bias is None:
            return splat(tirx.const(0, self.terms.dtype), width)
        lead = [0] * (len(self.terms.bias.shape) - 1)
        return self.terms.bias[(*lead, span(panel.first_output + v * self.point.lanes, width))]

    def _add_starts(self, bank: list, pixels: Pixels, panel: Panel) -> None:
        """Add to every sum what the taps inside the image start it with."""
        starts, lanes = self.terms.starts, self.point.lanes

        def add(register, held, r, s, v: int, width: int) -> None:
            value = starts[panel.index, r, s, span(v * lanes, width)]
            T.buffer_store(register, held + value, [span(0, width)])

        whole = not any(self.problem.padding)  # every tap is inside: their sum is stored
        if pixels.edge is not None:
            with T.serial(*kernel_rows(self.problem, pixels.oh)) as r:
                for s in range(self.problem.s):
                    for p in self.row.taps_inside(pixels.edge, s):
                        for v, (width, _) in enumerate(panel.widths):
                            add(bank[p][v], bank[p][v][span(0, width)], r, s, v, width)
            return
        for v, (width, _) in enumerate(panel.widths):  # the same for all pixels of the tile
            total = self._register(width)
            T.buffer_store(total, self._bias(panel, v, width), [span(0, width)])
            if whole:
                add(total, total[span(0, width)], 0, 0, v, width)
            else:
                with T.serial(*kernel_rows(self.problem, pixels.oh)) as r:
                    add(total, total[span(0, width)], r, self.problem.s, v, width)
            for p in range(self.point.mr):
                T.buffer_store(bank[p][v], total[span(0, width)], [span(0, width)])

    def _sum(self, banks: list, pixels: Pixels, panel: Panel, chunk: Chunk) -> None:
        """Add the terms of `chunk`, kernel rows inside the image only."""
        problem, everyone = self.problem, list(range(self.point.mr))
        first = panel.first_input + chunk.start
        if problem.flat:
            self._run(
                banks, everyone, chunk.steps, panel, pixels, chunk,
                lambda p, k: (*unravel(pixels.base + p, self.x_lead), first + k), lambda k: (0, 0, chunk.start + k),
            )  # fmt: skip
            return
        (sh, sw), (dh, dw), (top, left, _, _) = problem.stride, problem.dilation, problem.padding
        with T.serial(*kernel_rows(problem, pixels.oh)) as r:
            ih = pixels.oh * sh + r * dh - top

            def tap(s, valid: list[int]) -> None:
                def x_index(p, k):
                    return (pixels.image, ih, (pixels.base + p) * sw + s * dw - left, first + k)

                self._run(
                    banks,
                    valid,
                    chunk.steps,
                    panel,
                    pixels,
                    chunk,
                    x_index,
                    lambda k: (r, s, chunk.start + k),
                )

            if pixels.edge is not None:
                for s in range(problem.s):
                    if valid := self.row.taps_inside(pixels.edge, s):
                        # Keeps LLVM from sharing pixels between unrolled taps, which would spill the sums.
                        prefetch(
                            self.terms.pixel_byte(
                                (
                                    pixels.image,
                                    ih,
                                    (pixels.base + valid[0]) * sw + s * dw - left,
                                    first,
                                )
                            )
                        )
                        tap(s, valid)
            elif self.terms.planar:
                self._planes(banks, pixels, panel, chunk, r, ih)
            elif dw == 1 and problem.groups == 1 and chunk.steps == problem.c:
                self._whole_row(banks, pixels, panel, chunk, r, ih)
            else:
                with T.serial(0, problem.s) as s:
                    tap(s, everyone)

    def _planes(self, banks: list, pixels: Pixels, panel: Panel, chunk: Chunk, r, ih) -> None:
        """All taps of kernel row `r` of a planar image: for each pixel S values, channel by channel."""
        (_, sw), (_, dw), left = self.problem.stride, self.problem.dilation, self.problem.padding[1]
        with T.serial(0, self.problem.c) as c:

            def x_index(p, s):
                return (pixels.image, ih, (pixels.base + p) * sw + s * dw - left, c)

            everyone = list(range(self.point.mr))
            self._run(
                banks, everyone, self.problem.s, panel, pixels, chunk, x_index, lambda s: (r, s, c)
            )

    def _whole_row(self, banks: list, pixels: Pixels, panel: Panel, chunk: Chunk, r, ih) -> None:
        """All taps of kernel row `r`: for each pixel, S * C values that lie one after the other."""
        c, sw, left = self.problem.c, self.problem.stride[1], self.problem.padding[1]

        def x_index(p, k):
            iw = (pixels.base + p) * sw - left
            return (pixels.image, ih, iw + tirx.floordiv(k, c), tirx.floormod(k, c))

        self._run(
            banks, list(range(self.point.mr)), self.problem.s * c, panel, pixels, chunk, x_index,
            lambda k: (r, tirx.floordiv(k, c), tirx.floormod(k, c)),
        )  # fmt: skip

    def _run(
        self,
        banks: list,
        valid: list[int],
        steps: int,
        panel: Panel,
        pixels: Pixels,
        chunk: Chunk,
        x_index,
        w_index,
    ) -> None:
        """`steps` terms of the sum for the pixels in `valid`; `x_index(pixel, k)`, `w_index(k)` say where term k is."""
        point = self.point

        def term(k, bank: list) -> None:
            for p in valid:
                pixel = self.terms.pixel(tuple(x_index(p, k)))
                for v, width in enumerate(self._sums(panel)):
                    register, lane = bank[p][v], span(0, width)
                    at = (panel.index, *w_index(k), v * point.lanes)
                    T.buffer_store(
                        register, self.terms.add(register[lane], pixel, at, width), [lane]
                    )

        unroll = min(point.unroll, steps)

        def iteration(i) -> None:
            if point.prefetch & WEIGHTS_OR_PIXELS and point.order != "blocks":
                self._prefetch_weights(panel, pixels, chunk, steps, i * unroll, w_index)
            elif point.prefetch & WEIGHTS_OR_PIXELS and self.problem.flat:
                self._prefetch_pixels(panel, pixels, steps, i * unroll)
            for j in range(unroll):
                if j and self.terms.overlapping:
                    # As below for edges: pixels that steps share would be kept, and the sums spilled.
                    prefetch(self.terms.pixel_byte(tuple(x_index(valid[0], i * unroll + j))))
                term(i * unroll + j, banks[j % point.sums])

        count, done = steps // unroll, 0
        if self._spreads_output(chunk):
            each = count // (2 * point.mr)
            done = each * point.mr
            with T.serial(0, point.mr) as p:
                self._prefetch_output(pixels, panel, p)
                with T.serial(0, each) as i:
                    iteration(p * each + i)
        with T.serial(0, count - done) as i:
            iteration(done + i)
        for j in range(steps % unroll):
            term(steps - steps % unroll + j, banks[j % point.sums])


def _total(banks: list, pixel: int, vector: int, width: int):
    """The sum of a pixel's vector over the banks, its first `width` lanes."""
    parts = [bank[pixel][vector][span(0, width)] for bank in banks]
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]
