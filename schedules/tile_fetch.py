# SPDX-License-Identifier: Apache-2.0
"""Where a register tile of a contraction is, and what it asks for ahead of its time."""

from __future__ import annotations

from dataclasses import dataclass

import tvm

from schedules.contraction_point import OUTPUT, Point, panels_per_group
from schedules.fused import Emission
from schedules.windows import LINE_BYTES, LINE_WORDS, Problem, prefetch, unravel


@dataclass(frozen=True)
class Panel:
    """A panel being computed: its number in the packed weights and in its group, first channels, its vectors."""

    index: object
    number: object
    first_input: object
    first_output: object
    widths: tuple


@dataclass(frozen=True)
class Pixels:
    """A tile's place: its running number, image and output row (None if flat), first pixel, `edge` as in RowTiles.

    `fresh` is the first pixel that no tile before has computed.
    """

    tile: object
    image: object
    oh: object
    base: object
    edge: int | None
    fresh: object


@dataclass(frozen=True)
class Chunk:
    """Input channels [start, start + steps) of the group. `first` is a condition, or a bool where it is known."""

    start: object
    steps: int
    first: object
    last: bool


class FetchesAhead:
    """The prefetching of `register_tile.Contraction`, which has these fields and more."""

    kernel: Emission
    shape: tuple[int, ...]
    problem: Problem
    point: Point
    terms: object
    x_lead: tuple[int, ...]  # of x, without its last axis
    tiles: int
    panel_weights: int  # of one step of the sum

    def _prefetch_weights(
        self, panel: Panel, pixels: Pixels, chunk: Chunk, steps: int, k, w_index
    ) -> None:
        """This iteration's share of the weights needed next, for the same tap: each tile asks for a part of them."""
        if chunk.last or self.point.order == "chunks":
            first = -chunk.start if self.point.order == "panels" else 0
            at = (panel.index + 1, *w_index(first))
        else:
            at = (panel.index, *w_index(steps))
        share = -(-steps * self.panel_weights // self.tiles)
        per_step = -(-self.panel_weights // self.tiles)
        for line in range(-(-per_step * min(self.point.unroll, steps) // LINE_WORDS)):
            offset = pixels.tile * share + k * per_step + line * LINE_WORDS
            prefetch(self.terms.weight_byte((*at, offset)))

    def _prefetch_pixels(self, panel: Panel, pixels: Pixels, steps: int, k) -> None:
        """This iteration's share of the next tile's pixels, which lie one after the other."""
        panels = panels_per_group(self.problem, self.point)
        per_step = -(-self.point.mr * self.problem.c // (panels * steps))
        for line in range(-(-per_step * min(self.point.unroll, steps) // LINE_WORDS)):
            offset = (panel.number * steps + k) * per_step + line * LINE_WORDS
            ahead = unravel(pixels.base + self.point.mr, self.x_lead)
            prefetch(self.terms.pixel_byte((*ahead, offset)))

    def _spreads_output(self, chunk: Chunk) -> bool:
        """Whether the lines of a tile's outputs are asked for a pixel at a time during the first half of its sum, which
        is one run of terms. All at once they would occupy what fetches the operands from the second-level cache."""
        one_run = self.problem.r * self.problem.s == 1 and chunk.last
        iterations = chunk.steps // min(self.point.unroll, chunk.steps)
        return bool(one_run and self.point.prefetch & OUTPUT and iterations >= 2 * self.point.mr)

    def _prefetch_output(self, pixels: Pixels, panel: Panel, p) -> None:
        """The lines that this tile will write for its pixel p, and those that its epilogue will read there."""
        at = (
            unravel(pixels.base + p, self.shape[:-1])
            if self.problem.flat
            else [pixels.image, pixels.oh, pixels.base + p]
        )
        output = [] if self.kernel.in_place else [self.kernel.output]
        for buffer in (*output, *self.kernel.residuals):
            line = 8 * LINE_BYTES // tvm.DataType(buffer.dtype).bits
            for v in range(0, len(panel.widths), max(1, line // self.point.lanes)):
                # A residual too with intent to write: close by, for its time comes with the output's.
                prefetch(buffer[(*at, panel.first_output + v * self.point.lanes)], write=True)
