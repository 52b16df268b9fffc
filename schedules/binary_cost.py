# SPDX-License-Identifier: Apache-2.0
"""Instructions that a binary contraction takes per vector of sums, by the same steps as `binary_adder` emits them.

What a figure of a processor without the instruction at hand would be follows from these counts: they are exact for
straight-line code, and tests compare them with the assembly of every tier.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedules.binary_problem import Point, Problem, line_words, run_words, whole_lines
from schedules.bit_words import BitCounter

# Vector instructions that count the bits of one vector of words and add them to a sum.
_COUNT = {"vpopcntd": 2, "vnni": 7, "avx512": 9, "avx2": 9, "ctpop": 3}


@dataclass(frozen=True)
class Instructions:
    """Vector instructions for one vector of sums of one pixel: `xors` that combine words, `adders` of bitwise addition,
    `counts` vectors whose bits are counted, `per_count` instructions each."""

    xors: int
    adders: int
    counts: int
    per_count: int

    @property
    def total(self) -> int:
        return self.xors + self.adders + self.counts * self.per_count

    def per_512(self, words: int, lanes: int) -> float:
        """For 512 products, which is one vector of 16 words, of sums of `words` words."""
        return self.total / words * 16 / lanes


class _Tally:
    """`binary_adder.Adder`, counting instead of emitting."""

    def __init__(self, three_inputs: bool, levels: int, looped: bool):
        self.full_add = 2 if three_inputs else 5
        self.levels = levels
        self.started = [looped] * levels
        self.waiting = [0] * (levels + 1)
        self.xors = self.adders = self.counts = 0

    def push(self, level: int = 0) -> None:
        if level == self.levels:
            self.counts += 1
        elif not self.started[level]:
            self.started[level] = True
        elif self.waiting[level]:
            self._carry(level, self.full_add)
        else:
            self.waiting[level] = 1

    def _carry(self, level: int, instructions: int) -> None:
        self.adders += instructions
        self.waiting[level] = 0
        self.push(level + 1)

    def settle(self) -> None:
        for level in range(self.levels):
            if self.waiting[level]:
                self._carry(level, 2)

    def finish(self) -> None:
        for level in range(self.levels):
            if self.waiting[level]:
                if any(self.waiting[level + 1 :]):
                    self._carry(level, 2)
                else:
                    self.waiting[level] = 0
                    self.counts += 1
        self.counts += sum(self.started)

    def run(self, words: int, paired: bool) -> None:
        """So many words of a line."""
        pairs = words // 2 if paired else 0
        for _ in range(pairs):
            self.xors += 2
            self.adders += 1
            self.push(1)
        if pairs:
            self.push()
        for _ in range(words - 2 * pairs):
            self.xors += 1
            self.push()


def instructions(problem: Problem, point: Point, counter: BitCounter) -> Instructions:
    """Of one vector of sums. Loads that no instruction takes along, and the parities of X, are left out."""
    line, run = line_words(problem), run_words(problem, point)
    looped = problem.steps > point.block
    tally = _Tally(counter.three_inputs, point.levels, looped)
    taps = problem.r * (1 if whole_lines(problem) else problem.s)
    kept_together = looped and line * taps // problem.r <= point.block
    for tap in range(taps):
        parts = [run] * (line // run) + [line % run] * (line % run > 0) if looped else [line]
        for words in parts:
            tally.run(words, point.paired)
            if looped and not kept_together:
                tally.settle()
        if kept_together and (tap + 1) % (taps // problem.r) == 0:
            tally.settle()
    tally.finish()
    return Instructions(tally.xors, tally.adders, tally.counts, _COUNT[counter.method])
