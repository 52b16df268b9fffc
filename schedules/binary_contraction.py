# SPDX-License-Identifier: Apache-2.0
"""Binary contractions: convolution of any kernel, stride, dilation and groups, and dense layers, on bits packed in words.

    D[n, oh, ow, o] = E[border(oh, ow), o] - 2 sum over r, s, q of popcount(X[n, ih, iw, q] xor W[o, r, s, q])

X holds words of 32 channels, 1 for +1; the bits behind the last channel of a group are 0, as in W. Where there is padding
the kernel works on a padded copy, 1/32 the size of the floats. E is the number of terms; where padding counts 0 the copy
has bits 0 there, and E, by the place of the window on the border, takes back what these add. Weights are packed
`[panels][R][S][words][panel]`. Per tile of `mr` pixels and one vector of output channels words are added bit by bit before
they are counted (`bit_words`). Image and panel stay in the first-level cache.

The words of a window that lie side by side in a row of the image make a line, a line in straight-line code is one or more
runs (`run_words`). If the point is `paired`, every second word of a run of W is replaced by the parity of the run up to it
(column by column), and the same parities of X are computed once, for all output channels.

Written out are the sums D (int32), through the epilogue, or with thresholds T and flips F the packed bits
(D >= T[o]) xor F[o] for the next binary layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.binary_adder import Adder
from schedules.binary_problem import (
    Point,
    Problem,
    default_point,
    line_words,
    packed_shape,
    panel_width,
    place_on_border,
    row_units,
    run_words,
    whole_lines,
)
from schedules.bit_words import WORD_BITS, BitCounter, lane_mask
from schedules.emission import pieces
from schedules.fused import Emission, Fused
from schedules.target import CpuTarget
from schedules.windows import LINE_WORDS, RowTiles, loop, span, splat, unravel, vectors

__all__ = [
    "Point",
    "Problem",
    "default_point",
    "schedule",
]  # what `spaces.point_for` takes from a loop structure


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused binary contraction. Raises ScheduleError if the packed weights do not fit its parameters."""
    problem = Problem.from_dict(fused.point["problem"])
    point, packs = Point.from_dict(fused.point["point"]), bool(fused.point["packs"])
    with fused.emit() as kernel:
        kernel.require_packed(packed_shape(problem, point, packs))
        BinaryContraction(kernel, fused.shape, problem, point, packs, target).emit()
    return kernel.func


@dataclass(frozen=True)
class _Panel:
    """A panel being computed: its number, its group, its first channel, channels it has."""

    index: object
    group: object
    first_output: object
    channels: int


@dataclass(frozen=True)
class _Pixels:
    """A tile's place: image and output row (None if flat), first pixel."""

    image: object
    oh: object
    base: object


def _parities(words, count: int):
    """The parities, column by column, of 2, 4, ... `count` of these uint32 words: a vector of half the length."""
    half = count // 2
    even, odd = (T.bind(tirx.Shuffle([words], list(range(start, count, 2)))) for start in (0, 1))
    found, distance = T.bind(even ^ odd), 1
    while distance < half:
        zeros = T.broadcast(T.uint32(0), half)
        behind = [*[half] * distance, *range(half - distance)]
        found = T.bind(found ^ tirx.Shuffle([found, zeros], behind))
        distance *= 2
    return found


class BinaryContraction:
    """One kernel being emitted. `shape` is the output's: [N, OH, OW, O or words] or, flat, any [..., O or words]."""

    def __init__(
        self,
        kernel: Emission,
        shape: tuple[int, ...],
        problem: Problem,
        point: Point,
        packs: bool,
        target: CpuTarget,
    ):
        self.kernel, self.shape, self.point, self.packs = kernel, shape, point, packs
        self.whole, self.problem = problem, problem.image
        self.counter = BitCounter.of(target)
        self.x, self.w, *rest = kernel.inputs
        self.terms = rest.pop(0) if problem.bordered else None
        self.thresholds, self.flips = rest if packs else (None, None)
        self.x_lead = tuple(int(d) for d in self.x.shape)[:-1]
        self.parallel = target.threads > 1
        self.row = RowTiles(self.problem, point.mr, self.problem.row)
        self.panel = panel_width(point, packs)

    # ---- loops

    def emit(self) -> None:
        """All pixels of some rows for one panel of weights before the next."""
        if not self.problem.flat:
            self._pad()
        if self.point.paired:
            self._add_up_parities()
        if not self.parallel:
            size = math.prod(int(d) for d in self.w.shape[1:])
            self.kept = T.sblock_alloc_buffer((size + LINE_WORDS,), "uint32")
            T.buffer_store(self.kept, T.uint32(0), [size])  # out here, so that it is allocated once
        units, _ = row_units(self.problem, self.point.mr)
        rows = self.point.rows or units
        with loop(units // rows, self.parallel and rows < units) as block:
            self._over_panels(block * rows, rows, self.parallel and rows == units)

    def _over_panels(self, first, rows: int, parallel: bool) -> None:
        """All panels over `rows` rows (tiles, if flat) beginning with number `first`."""
        problem = self.problem
        count = -(-problem.group_outputs // self.panel)
        full, rest = divmod(problem.group_outputs, self.panel)

        def group(g) -> None:
            def panel(q, channels: int) -> None:
                output = g * problem.group_outputs + q * self.panel
                self._over_tiles(_Panel(g * count + q, g, output, channels), first, rows)

            if full:
                with loop(full, parallel and problem.groups == 1) as q:
                    panel(q, self.panel)
            if rest:
                panel(full, rest)

        if problem.groups == 1:
            group(0)
        else:
            with loop(problem.groups, parallel) as g:
                group(g)

    def _pad(self) -> None:
        """Work on a padded copy from here on, its rows laid flat: [N, H, W * C]."""
        p, (top, left, _, _) = self.problem, self.whole.padding
        x, copy = self.x, T.sblock_alloc_buffer((p.n, p.h, p.w * p.c), "uint32")
        tail = self.whole.bits % WORD_BITS
        if any(self.whole.padding):
            with T.serial(0, p.n * p.h) as row, T.serial(0, p.w * p.c) as at:
                word = tirx.const(0, "uint32")
                if self.whole.pad_value == 1:
                    word = T.uint32((1 << WORD_BITS) - 1)
                    if tail:
                        last = tirx.floormod(at, p.group_inputs) == p.group_inputs - 1
                        word = tirx.Select(last, T.uint32((1 << tail) - 1), word)
                T.buffer_store(copy, word, [*unravel(row, (p.n, p.h)), at])
        width = self.whole.w * p.c
        with T.serial(0, p.n * self.whole.h) as row, T.serial(0, width) as at:
            n, h = tirx.floordiv(row, self.whole.h), tirx.floormod(row, self.whole.h)
            w, c = tirx.floordiv(at, p.c), tirx.floormod(at, p.c)
            T.buffer_store(copy, x[n, h, w, c], [n, h + top, left * p.c + at])
        self.x = copy

    def _add_up_parities(self) -> None:
        """Compute `parities` [..., pairs]: of the words of each run of X up to each pair's second, from each first column."""
        p, run = self.problem, run_words(self.problem, self.point)
        line, pairs = line_words(p), line_words(p) // 2
        whole = whole_lines(p)
        step, starts = (p.stride[1], p.ow) if whole else (1, p.w)
        columns = (math.prod(self.x_lead),) if p.flat else (p.n, p.h, starts)
        copy = T.sblock_alloc_buffer((*columns, p.groups * pairs), "uint32")

        def words(at: list, group, place, count: int):
            if p.flat:
                return self.x[(*unravel(at[0], self.x_lead), span(place, count))]
            first = at[2] * (step * p.c) + group * p.group_inputs + place
            return self.x[at[0], at[1], span(first, count)]

        def add_up(at: list, group, first, count: int) -> None:
            before = None
            for offset, width in pieces(count - count % 2, LINE_WORDS):
                parities = _parities(T.bind(words(at, group, first + offset, width)), width)
                if before is not None:
                    parities = T.bind(parities ^ splat(before, width // 2))
                place = group * pairs + tirx.floordiv(first, 2) + offset // 2
                T.buffer_store(copy, parities, [*at, span(place, width // 2)])
                last = width // 2 - 1
                before = T.bind(tirx.Shuffle([parities], [last])) if last else parities

        with T.serial(0, math.prod(columns)) as index, T.serial(0, p.groups) as group:
            at = unravel(index, columns)
            if line >= run:
                with T.serial(0, line // run) as part:
                    add_up(at, group, part * run, run)
            if line % run > 1:
                add_up(at, group, T.int32(line - line % run), line % run)
        self.parities = copy

    def _keep_panel(self, panel: _Panel) -> None:
        """Work on a copy of the panel that the loop over tiles also writes behind (`_tile`).

        LLVM would else load a whole panel before that loop and spill it, one cache line over another.
        """
        shape, lanes = tuple(int(d) for d in self.w.shape)[1:], self.point.lanes
        size = math.prod(shape)
        if self.parallel:
            self.kept = T.alloc_buffer((size + LINE_WORDS,), "uint32")
        with T.serial(0, size // lanes) as i:
            at = [panel.index, *unravel(i * lanes, shape)]
            at[-1] = span(at[-1], lanes)
            T.buffer_store(self.kept, self.w[tuple(at)], [span(i * lanes, lanes)])

    def _over_tiles(self, panel: _Panel, first, rows: int) -> None:
        problem = self.problem
        self._keep_panel(panel)
        if problem.flat:
            with loop(rows) as t:
                self._tile(_Pixels(None, None, self.row.base(first + t)), panel)
            return
        with loop(rows) as u:
            image, oh = unravel(first + u, (problem.n, problem.oh))
            with loop(self.row.count) as t:
                self._tile(_Pixels(image, oh, self.row.base(t)), panel)

    # ---- one tile

    def _tile(self, pixels: _Pixels, panel: _Panel) -> None:
        lanes, mr = self.point.lanes, self.point.mr
        behind = int(self.kept.shape[0]) - LINE_WORDS + tirx.floormod(pixels.base, LINE_WORDS)
        T.buffer_store(self.kept, T.uint32(0), [behind])
        if not self.packs:
            for v, (_, stored) in enumerate(vectors(panel.channels, lanes)):
                for p, sums in enumerate(self._sums(pixels, panel, v)):
                    at = [*self._place(pixels, p), span(panel.first_output + v * lanes, stored)]
                    self.kernel.store(sums[span(0, stored)], at)
            return
        words = T.alloc_buffer((mr,), "uint32")
        for p in range(mr):
            T.buffer_store(words, T.uint32(0), [p])
        with T.serial(0, -(-panel.channels // lanes)) as v:
            for p, sums in enumerate(self._sums(pixels, panel, v)):
                channel = span(panel.first_output + v * lanes, lanes)
                reached = sums[span(0, lanes)] >= self.thresholds[channel]
                bits = lane_mask(reached, lanes) << (v * lanes).astype("uint32")
                T.buffer_store(words, words[p] | bits, [p])
        word = tirx.floordiv(panel.first_output, WORD_BITS)
        for p in range(mr):
            self.kernel.store(words[p] ^ self.flips[word], [*self._place(pixels, p), word])

    def _sums(self, pixels: _Pixels, panel: _Panel, v) -> list:
        """Buffers with the sums of vector `v` of the panel, one per pixel."""
        looped = self.problem.steps > self.point.block
        adders = [Adder(self.counter, self.point.levels, looped) for _ in range(self.point.mr)]
        for p, adder in enumerate(adders):
            adder.start(self._terms(pixels, p, panel, v))
        self._add(adders, pixels, panel, v)
        for adder in adders:
            adder.finish()
        return [adder.total for adder in adders]

    def _place(self, pixels: _Pixels, p: int) -> list:
        if self.problem.flat:
            return list(unravel(pixels.base + p, self.shape[:-1]))
        return [pixels.image, pixels.oh, pixels.base + p]

    def _terms(self, pixels: _Pixels, p: int, panel: _Panel, v: int):
        """What the sums of pixel `p` start from."""
        lanes, whole = self.point.lanes, self.whole
        if self.terms is None:
            return T.broadcast(T.int32(whole.r * whole.s * whole.bits), lanes)
        row = place_on_border(pixels.oh, *whole.border_rows(), whole.oh)
        column = place_on_border(pixels.base + p, *whole.border_columns(), whole.ow)
        place = row * whole.places[1] + column
        return self.terms[panel.index, place, span(v * lanes, lanes)]

    def _add(self, adders: list[Adder], pixels: _Pixels, panel: _Panel, v) -> None:
        """Add the words of all taps, in straight-line code as far as it stays short."""
        problem, limit = self.problem, self.point.block
        line, run = line_words(problem), run_words(problem, self.point)
        taps = 1 if whole_lines(problem) else problem.s

        def add(r, s, first, count: int) -> None:
            self._run(adders, pixels, panel, v, r, s, first, count)

        def settle() -> None:
            for adder in adders:
                adder.settle()

        if problem.steps <= limit:
            for r in range(problem.r):
                for s in range(taps):
                    add(r, s, 0, line)
            return
        with T.serial(0, problem.r) as r:
            if taps * line <= limit:
                for s in range(taps):
                    add(r, s, 0, line)
                settle()
                return
            with T.serial(0, taps) as s:
                if line >= run:
                    with T.serial(0, line // run) as part:
                        add(r, s, part * run, run)
                        settle()
                if line % run:
                    add(r, s, line - line % run, line % run)
                    settle()

    def _run(self, adders, pixels: _Pixels, panel: _Panel, v, r, s, first, count: int) -> None:
        """Add `count` words of a line, beginning with number `first`."""
        before: list = [None] * len(adders)
        pairs = count // 2 if self.point.paired else 0
        for i in range(pairs):
            place = first + 2 * i
            w, w_parity = (T.bind(self._weight(panel, v, r, s, place + j)) for j in (0, 1))
            for p, adder in enumerate(adders):
                word = T.bind(self._word(pixels, p, panel, r, s, place) ^ w)
                parity = T.bind(self._parity(pixels, p, panel, r, s, place) ^ w_parity)
                adder.push(self.counter.pair_carry(before[p], parity, word), 1)
                before[p] = parity
        for p, adder in enumerate(adders if pairs else []):
            adder.push(before[p])
        for i in range(2 * pairs, count):
            w = T.bind(self._weight(panel, v, r, s, first + i))
            for p, adder in enumerate(adders):
                adder.push(self._word(pixels, p, panel, r, s, first + i) ^ w)

    def _tap(self, s, place) -> tuple:
        """The tap, and the word of it, that number `place` is of the line that begins at tap `s`."""
        words = self.problem.group_inputs
        if whole_lines(self.problem):
            return tirx.floordiv(place, words), tirx.floormod(place, words)
        return s, place

    def _weight(self, panel: _Panel, v, r, s, place):
        lanes = self.point.lanes
        tap, word = self._tap(s, place)
        p = self.problem
        at = ((r * p.s + tap) * p.group_inputs + word) * self.panel + v * lanes
        return self.kept[span(at, lanes)]

    def _word(self, pixels: _Pixels, p: int, panel: _Panel, r, s, place):
        """A word of X, on all lanes."""
        problem, pixel = self.problem, pixels.base + p
        tap, within = self._tap(s, place)
        word = panel.group * problem.group_inputs + within
        if problem.flat:
            at = (*unravel(pixel, self.x_lead), word)
        else:
            column = pixel * problem.stride[1] + tap * problem.dilation[1]
            at = (pixels.image, self._row(pixels, r), column * problem.c + word)
        return T.broadcast(self.x[at], self.point.lanes)

    def _parity(self, pixels: _Pixels, p: int, panel: _Panel, r, s, place):
        """The parity of the run of X up to the word behind number `place`, on all lanes."""
        problem, pixel = self.problem, pixels.base + p
        pair = panel.group * (line_words(problem) // 2) + tirx.floordiv(place, 2)
        if problem.flat:
            at = (pixel, pair)
        else:
            column = pixel
            if not whole_lines(problem):
                column = pixel * problem.stride[1] + s * problem.dilation[1]
            at = (pixels.image, self._row(pixels, r), column, pair)
        return T.broadcast(self.parities[at], self.point.lanes)

    def _row(self, pixels: _Pixels, r):
        return pixels.oh * self.problem.stride[0] + r * self.problem.dilation[0]
