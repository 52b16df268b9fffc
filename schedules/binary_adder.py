# SPDX-License-Identifier: Apache-2.0
"""The count of one pixel's differing bits for one vector of output channels, as it is emitted: carry-save sums, then counts."""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from schedules.bit_words import BitCounter
from schedules.windows import span


class Adder:
    """total - 2 * (bits set in all words pushed), in buffers that become registers.

    Level l holds one sum word of weight 2^l; a third word of a level makes the sum anew and a carry of the next. What
    reaches `levels` is counted. `looped`: pushes lie in loops, so that sums begin with 0 and no word may wait from one
    iteration to the next (`settle`); straight-line code begins with the first words instead.
    """

    def __init__(self, counter: BitCounter, levels: int, looped: bool):
        self.counter, self.levels, self.lanes = counter, levels, counter.lanes
        self.at = span(0, self.lanes)
        self.sums = [T.alloc_buffer((self.lanes,), "uint32") for _ in range(levels)]
        self.total = T.alloc_buffer((self.lanes,), "int32")
        self.started = [looped] * levels
        self.waiting: list[list] = [[] for _ in range(levels + 1)]

    def start(self, value) -> None:
        """Begin with the int32 vector `value`."""
        T.buffer_store(self.total, value, [self.at])
        for each, started in zip(self.sums, self.started):
            if started:
                T.buffer_store(each, T.broadcast(T.uint32(0), self.lanes), [self.at])

    def push(self, word, level: int = 0) -> None:
        """Add a word of weight 2^level."""
        if level == self.levels:
            self._count(word, level)
            return
        if not self.started[level]:
            T.buffer_store(self.sums[level], word, [self.at])
            self.started[level] = True
            return
        self.waiting[level].append(T.bind(word))
        if len(self.waiting[level]) == 2:
            total, carry = self.counter.full_add(self.sums[level][self.at], *self.waiting[level])
            self._carry(total, carry, level)

    def settle(self) -> None:
        """Leave no word waiting: what lives on are the sums."""
        for level in range(self.levels):
            if self.waiting[level]:
                self._half_add(level)

    def _half_add(self, level: int) -> None:
        self._carry(*self.counter.half_add(self.sums[level][self.at], *self.waiting[level]), level)

    def _carry(self, total, carry, level: int) -> None:
        carry = T.bind(carry)  # before the sum it is computed from is overwritten
        T.buffer_store(self.sums[level], total, [self.at])
        self.waiting[level].clear()
        self.push(carry, level + 1)

    def _count(self, word, level: int) -> None:
        counted = self.counter.count(self.total[self.at], T.bind(word), -2 << level)
        T.buffer_store(self.total, counted, [self.at])

    def finish(self) -> None:
        """Leave the result in `total`. A waiting word goes up if another waits above it: counts cost more than additions."""
        for level in range(self.levels):
            if self.waiting[level]:
                if any(self.waiting[level + 1 :]):
                    self._half_add(level)
                else:
                    self._count(self.waiting[level].pop(), level)
        for level, each in enumerate(self.sums):
            if self.started[level]:
                self._count(each[self.at], level)
