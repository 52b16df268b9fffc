# SPDX-License-Identifier: Apache-2.0
"""Binary contractions: convolution of any kernel, stride, dilation and groups, and dense layers, on bits packed in words.

    D[n, oh, ow, o] = E[border(oh, ow), o] - 2 sum over r, s, q of popcount(X[n, ih, iw, q] xor W[o, r, s, q])

X holds words of 32 channels, 1 for +1; the bits behind the last channel of a group are 0, as in W. Where there is padding
the kernel works on a padded copy, 1/32 the size of the floats. E is the number of terms; where padding counts 0 the copy
has bits 0 there, and E, by the place of the window on the border, takes back what these add. Weights are packed
`[panels][R][S][words][panel]`. Per tile of `mr` pixels and one vector of output channels words are added bit by bit before
they are counted (`bit_words`). Image and panel stay in the first-level cache.

Written out are the sums D (int32), through the epilogue, or with thresholds T and flips F the packed bits
(D >= T[o]) xor F[o] for the next binary layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules import windows
from schedules.annotated import Annotated
from schedules.bit_words import WORD_BITS, BitCounter, lane_mask
from schedules.fused import Emission, Fused
from schedules.target import CpuTarget
from schedules.windows import RowTiles, loop, span, tile_rows, unravel, vectors

_TILE = 2
_WHOLE_SUM, _WHOLE_ROW, _BLOCK = 40, 24, 16  # words of a pixel in straight-line code


@dataclass(frozen=True)
class Problem(windows.Problem):
    """A window problem whose channels are words: `c` of all groups together; each group has `bits` channels.

    `pad_value` is what padding counts as: 0, +1 or -1.
    """

    bits: int = 0
    pad_value: int = 0

    @property
    def bordered(self) -> bool:
        """Whether windows over the border have sums of fewer terms."""
        return any(self.padding) and self.pad_value == 0

    @property
    def image(self) -> Problem:
        """The problem on the padded image."""
        top, left, bottom, right = self.padding
        size = {"h": self.h + top + bottom, "w": self.w + left + right}
        return replace(self, **size, padding=(0, 0, 0, 0))

    def border_rows(self) -> tuple[int, int]:
        """Output rows whose windows reach above the image, and below it; all and 0 if none lies between."""
        return self._borders(self.oh, self.h, self.r, 0)

    def border_columns(self) -> tuple[int, int]:
        """Output columns whose windows reach left of the image, and right of it, as `border_rows`."""
        return self._borders(self.ow, self.w, self.s, 1)

    def _borders(self, outputs: int, size: int, taps: int, axis: int) -> tuple[int, int]:
        step, reach, before = (
            self.stride[axis],
            self.dilation[axis] * (taps - 1),
            self.padding[axis],
        )
        low = sum(i * step < before for i in range(outputs))
        high = sum(i * step - before + reach >= size for i in range(outputs))
        return (outputs, 0) if low + high >= outputs else (low, high)

    @property
    def places(self) -> tuple[int, int]:
        """Places a window may have on the border: rows, columns."""
        if not self.bordered:
            return (1, 1)
        return (
            min(sum(self.border_rows()) + 1, self.oh),
            min(sum(self.border_columns()) + 1, self.ow),
        )


@dataclass(frozen=True)
class Point(Annotated):
    """Parameters of one kernel.

    `lanes` of a vector, `mr` pixels of a tile, `levels` of bitwise addition before words are counted, and the most words of
    each pixel that are added in straight-line code, `block`.
    """

    lanes: int
    mr: int
    levels: int
    block: int


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """Two pixels share a panel's words; straight-line code of whole sums or whole rows of the kernel while it is short.

    Larger tiles and longer code leave the micro-operation cache, which costs more than they save (Cascade Lake, 14x14 to
    56x56 pixels of 64 to 512 channels: two pixels within 5 % of the best of 2 to 5 everywhere).
    """
    levels = BitCounter.of(target).levels
    while levels and problem.steps < 2 << levels:
        levels -= 1
    row = problem.s * problem.group_inputs
    whole = problem.steps if problem.steps <= _WHOLE_SUM else row if row <= _WHOLE_ROW else _BLOCK
    return Point(target.lanes, tile_rows(problem.row, _TILE), levels, whole)


def panel_width(point: Point, packs: bool) -> int:
    """Output channels of a panel of weights: one vector, or the channels of one word of output."""
    return WORD_BITS if packs else point.lanes


def packed_shape(problem: Problem, point: Point, packs: bool) -> tuple[int, int, int, int, int]:
    """[panels of all groups, R, S, words of a group, channels of a panel]."""
    panel = panel_width(point, packs)
    panels = problem.groups * -(-problem.group_outputs // panel)
    return (panels, problem.r, problem.s, problem.group_inputs, panel)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused binary contraction. Raises ScheduleError if the packed weights do not fit its parameters."""
    problem = Problem.from_dict(fused.point["problem"])
    point, packs = Point.from_dict(fused.point["point"]), bool(fused.point["packs"])
    with fused.emit() as kernel:
        kernel.require_packed(packed_shape(problem, point, packs))
        BinaryContraction(kernel, fused.shape, problem, point, packs, target).emit()
    return kernel.func


def place_on_border(index, low: int, high: int, outputs: int):
    """The place of output row or column `index`: 0 .. low - 1 at the low border, low inside, then the high border."""
    if low + high == 0:
        return 0
    if low == outputs:
        return index
    return tirx.min(index, low) + tirx.max(0, index - (outputs - 1 - high))


@dataclass(frozen=True)
class _Panel:
    """A panel being computed: its number, the first word of its group's inputs, its first channel, channels it has."""

    index: object
    first_word: object
    first_output: object
    channels: int


@dataclass(frozen=True)
class _Pixels:
    """A tile's place: image and output row (None if flat), first pixel."""

    image: object
    oh: object
    base: object


class _Adder:
    """The carry-save sums of one pixel and one vector of channels, in buffers that become registers."""

    def __init__(self, counter: BitCounter, levels: int):
        self.counter, self.levels, self.lanes = counter, levels, counter.lanes
        self.at = span(0, self.lanes)
        self.sums = [T.alloc_buffer((self.lanes,), "uint32") for _ in range(levels)]
        self.total = T.alloc_buffer((self.lanes,), "int32")
        self.waiting: list[list] = [[] for _ in range(levels + 1)]

    def start(self, value) -> None:
        T.buffer_store(self.total, value, [self.at])
        for each in self.sums:
            T.buffer_store(each, T.broadcast(T.uint32(0), self.lanes), [self.at])

    def push(self, word, level: int = 0) -> None:
        """Add a word of weight 2^level. Two of a level wait for each other, or for `settle`."""
        if level == self.levels:
            self._count(word, level)
            return
        self.waiting[level].append(T.bind(word))
        if len(self.waiting[level]) == 2:
            total, carry = self.counter.full_add(self.sums[level][self.at], *self.waiting[level])
            self._carry(total, carry, level)

    def settle(self) -> None:
        """Leave no word waiting: what lives on are the sums."""
        for level in range(self.levels):
            if self.waiting[level]:
                word = self.waiting[level][0]
                self._carry(*self.counter.half_add(self.sums[level][self.at], word), level)

    def _carry(self, total, carry, level: int) -> None:
        carry = T.bind(carry)  # before the sum it is computed from is overwritten
        T.buffer_store(self.sums[level], total, [self.at])
        self.waiting[level].clear()
        self.push(carry, level + 1)

    def _count(self, word, level: int) -> None:
        counted = self.counter.count(self.total[self.at], T.bind(word), -2 << level)
        T.buffer_store(self.total, counted, [self.at])

    def finish(self) -> None:
        """Leave the result in `total`."""
        for level, each in enumerate(self.sums):
            self._count(each[self.at], level)


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
        """All pixels for one panel of weights before the next."""
        problem = self.problem
        if any(self.whole.padding):
            self._pad()
        count = -(-problem.group_outputs // self.panel)
        full, rest = divmod(problem.group_outputs, self.panel)

        def group(g) -> None:
            def panel(q, channels: int) -> None:
                first = g * problem.group_outputs + q * self.panel
                self._over_tiles(_Panel(g * count + q, g * problem.group_inputs, first, channels))

            if full:
                with loop(full, self.parallel and problem.groups == 1) as q:
                    panel(q, self.panel)
            if rest:
                panel(full, rest)

        if problem.groups == 1:
            group(0)
        else:
            with loop(problem.groups, self.parallel) as g:
                group(g)

    def _pad(self) -> None:
        """Work on a padded copy from here on."""
        p, (top, left, _, _) = self.problem, self.whole.padding
        x, copy = self.x, T.sblock_alloc_buffer((p.n, p.h, p.w, p.c), "uint32")
        tail = self.whole.bits % WORD_BITS
        with T.serial(0, p.n * p.h) as row, T.serial(0, p.w * p.c) as at:
            n, h = tirx.floordiv(row, p.h), tirx.floormod(row, p.h)
            word = tirx.const(0, "uint32")
            if self.whole.pad_value == 1:
                word = T.uint32((1 << WORD_BITS) - 1)
                if tail:
                    last = tirx.floormod(at, p.group_inputs) == p.group_inputs - 1
                    word = tirx.Select(last, T.uint32((1 << tail) - 1), word)
            T.buffer_store(copy, word, [n, h, tirx.floordiv(at, p.c), tirx.floormod(at, p.c)])
        width = self.whole.w * p.c
        with T.serial(0, p.n * self.whole.h) as row, T.serial(0, width) as at:
            n, h = tirx.floordiv(row, self.whole.h), tirx.floormod(row, self.whole.h)
            w, c = tirx.floordiv(at, p.c), tirx.floormod(at, p.c)
            T.buffer_store(copy, x[n, h, w, c], [n, h + top, w + left, c])
        self.x = copy

    def _over_tiles(self, panel: _Panel) -> None:
        problem = self.problem
        if problem.flat:
            with loop(self.row.count) as t:
                self._tile(_Pixels(None, None, self.row.base(t)), panel)
            return
        with loop(problem.rows) as u:
            image, oh = (
                (0, u)
                if problem.n == 1
                else (tirx.floordiv(u, problem.oh), tirx.floormod(u, problem.oh))
            )
            with loop(self.row.count) as t:
                self._tile(_Pixels(image, oh, self.row.base(t)), panel)

    # ---- one tile

    def _tile(self, pixels: _Pixels, panel: _Panel) -> None:
        lanes, mr = self.point.lanes, self.point.mr
        words: list = [None] * mr
        for v, (_, stored) in enumerate(vectors(panel.channels, lanes)):
            adders = [_Adder(self.counter, self.point.levels) for _ in range(mr)]
            for p, adder in enumerate(adders):
                adder.start(self._terms(pixels, p, panel, v))
            self._sum(adders, pixels, panel, v)
            for p, adder in enumerate(adders):
                adder.finish()
                if self.packs:
                    words[p] = self._append(words[p], adder.total[adder.at], panel, v)
                    continue
                at = [*self._place(pixels, p), span(panel.first_output + v * lanes, stored)]
                self.kernel.store(adder.total[span(0, stored)], at)
        if self.packs:
            word = tirx.floordiv(panel.first_output, WORD_BITS)
            flip = self.flips[word]
            for p, bits in enumerate(words):
                self.kernel.store(bits ^ flip, [*self._place(pixels, p), word])

    def _append(self, word, sums, panel: _Panel, v: int):
        """`word` with the bits of vector `v`: whether its sums reach their thresholds."""
        lanes = self.point.lanes
        reached = sums >= self.thresholds[span(panel.first_output + v * lanes, lanes)]
        bits = lane_mask(reached, lanes)
        bits = bits if v == 0 else bits << T.uint32(v * lanes)
        return T.bind(bits if word is None else word | bits)

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

    def _sum(self, adders: list[_Adder], pixels: _Pixels, panel: _Panel, v: int) -> None:
        """Add the words of all taps, in straight-line code as far as it stays short."""
        problem = self.problem
        (sh, sw), (dh, dw) = problem.stride, problem.dilation
        words, lanes = problem.group_inputs, self.point.lanes
        whole_rows = dw == 1 and problem.groups == 1
        runs, length = (1, problem.s * words) if whole_rows else (problem.s, words)

        def add(r, s, k) -> None:
            """One word for all pixels: number k of tap s of row r, counted on into the next taps where they follow."""
            c = problem.group_inputs if whole_rows else length
            tap, within = (s + tirx.floordiv(k, c), tirx.floormod(k, c)) if whole_rows else (s, k)
            w = T.bind(self.w[panel.index, r, tap, within, span(v * lanes, lanes)])
            for p, adder in enumerate(adders):
                pixel = pixels.base + p
                if problem.flat:
                    at = (*unravel(pixel, self.x_lead), panel.first_word + within)
                else:
                    row, column = pixels.oh * sh + r * dh, pixel * sw + tap * dw
                    at = (pixels.image, row, column, panel.first_word + within)
                adder.push(T.broadcast(self.x[at], lanes) ^ w)

        def settle() -> None:
            for adder in adders:
                adder.settle()

        limit = self.point.block
        if problem.r * runs * length <= limit:
            for r in range(problem.r):
                for s in range(runs):
                    for k in range(length):
                        add(r, s, k)
            settle()
            return
        with T.serial(0, problem.r) as r:
            if runs * length <= limit:
                for s in range(runs):
                    for k in range(length):
                        add(r, s, k)
                settle()
                return
            with T.serial(0, runs) as s:
                block = min(limit, length)
                if length >= block:
                    with T.serial(0, length // block) as i:
                        for k in range(block):
                            add(r, s, i * block + k)
                        settle()
                for k in range(length - length % block, length):
                    add(r, s, k)
                settle()
