# SPDX-License-Identifier: Apache-2.0
"""Binary contractions: their problem, the parameters of a kernel, the layout of its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx

from schedules import windows
from schedules.annotated import Annotated
from schedules.bit_words import WORD_BITS, BitCounter
from schedules.target import CpuTarget

# Words of a tile, or of one pixel alone, in straight-line code: longer code spills or leaves the micro-operation cache.
_STRAIGHT, _STRAIGHT_ALONE, _LOOPED, _BLOCK = 80, 160, 48, 32
# Longer sums, for so many vectors of output channels, pay for the parities of X.
_PAIRED_STEPS, _PAIRED_VECTORS = 16, 4


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

    `lanes` of a vector, `mr` pixels of a tile, `levels` of bitwise addition before words are counted, the most words of
    each pixel that are added in straight-line code, `block`, and whether sums of pairs are taken from parities, `paired`.
    All panels of weights pass over `rows` rows of output (tiles, if flat) before the next ones; 0 stands for all rows.
    """

    lanes: int
    mr: int
    levels: int
    block: int
    paired: bool = False
    rows: int = 0


def line_words(problem: Problem) -> int:
    """Words of a window that lie side by side: of a whole row of the kernel, or of one tap."""
    return problem.group_inputs * (problem.s if whole_lines(problem) else 1)


def whole_lines(problem: Problem) -> bool:
    """Whether the taps of a kernel row lie side by side."""
    return problem.dilation[1] == 1 and problem.groups == 1


def run_words(problem: Problem, point: Point) -> int:
    """Words after which parities begin anew."""
    line = line_words(problem)
    return line if line <= point.block else max(2, point.block - point.block % 2)


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """Two pixels share the words of W, if whole sums or lines are short enough for straight-line code; else one."""
    counter, line, steps = BitCounter.of(target), line_words(problem), problem.steps
    mr, block = min(2, problem.row), line if line <= _LOOPED else _BLOCK
    if mr * steps <= _STRAIGHT:
        block = steps
    elif steps <= _STRAIGHT_ALONE and (
        line > _LOOPED // 2 or (problem.row % 2 and problem.row < 16)
    ):
        mr, block = 1, steps
    levels = counter.levels
    while levels and steps < 2 << levels:
        levels -= 1
    shared = -(-problem.group_outputs // target.lanes)
    paired = counter.three_inputs and levels > 0 and line > 1
    paired &= steps > _PAIRED_STEPS and shared >= _PAIRED_VECTORS
    return Point(target.lanes, mr, levels, block, paired, _rows(problem, mr, target))


def _rows(problem: Problem, mr: int, target: CpuTarget) -> int:
    """Rows whose outputs, and as many numbers to add to them, stay in the second-level cache until their lines are whole."""
    if 8 * problem.n * problem.oh * problem.ow * problem.o <= target.l2_bytes // 2:
        return 0
    units, pixels = row_units(problem, mr)
    fitting = target.l2_bytes // 4 // (8 * pixels * problem.o)
    return max((d for d in range(1, units) if units % d == 0 and d <= fitting), default=0)


def row_units(problem: Problem, mr: int) -> tuple[int, int]:
    """What `Point.rows` counts: how many rows of output, or tiles of a flat problem, and the pixels of one."""
    if problem.flat:
        return -(-problem.row // mr), mr
    return problem.rows, problem.ow


def panel_width(point: Point, packs: bool) -> int:
    """Output channels of a panel of weights: one vector, or the channels of one word of output."""
    return WORD_BITS if packs else point.lanes


def packed_shape(problem: Problem, point: Point, packs: bool) -> tuple[int, int, int, int, int]:
    """[panels of all groups, R, S, words of a group, channels of a panel]."""
    panel = panel_width(point, packs)
    panels = problem.groups * -(-problem.group_outputs // panel)
    return (panels, problem.r, problem.s, problem.group_inputs, panel)


def place_on_border(index, low: int, high: int, outputs: int):
    """The place of output row or column `index`: 0 .. low - 1 at the low border, low inside, then the high border."""
    if low + high == 0:
        return 0
    if low == outputs:
        return index
    return tirx.min(index, low) + tirx.max(0, index - (outputs - 1 - high))
