# SPDX-License-Identifier: Apache-2.0
"""Counting bits in vectors of 32-bit words: what XOR-popcount kernels need of a processor.

Counting one vector of words costs 7 instructions where there is no instruction for it, so words are first added bit by bit,
32 columns per word (Harley and Seal): three words of weight 1 become a sum word of weight 1 and a carry word of weight 2.
After `levels` such stages one word in 2^levels is counted, with that weight. With three-input logic (AVX-512) a full adder
is two instructions. Of words that are each the xor of one of X and one of W, the sum column by column is the xor of two
parities, one of X alone and one of W alone, which are there already: two words then cost two xors and a carry (`pair_carry`).
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.emission import reduce_lanes
from schedules.target import CpuTarget

WORD_BITS = 32
# Bits set in a nibble, one byte each: a table for a byte shuffle, as little-endian words.
_NIBBLE_COUNTS = (0x02010100, 0x03020201, 0x03020201, 0x04030302)
# Truth tables of three-input logic: a ^ b ^ c; the carry of a + b + c from a, b and their sum; from c, the sum and a.
_SUM, _CARRY_OF_SUM, _CARRY_OF_PAIR = 0x96, 0xD4, 0xB2


def words_for(bits: int) -> int:
    """Words that hold so many bits."""
    return -(-bits // WORD_BITS)


@dataclass(frozen=True)
class BitCounter:
    """How a target counts bits.

    `method`: "vpopcntd" (AVX-512 VPOPCNTDQ), "vnni" and "avx512" (byte shuffle, with and without a dot product to sum
    the bytes), "avx2" (the same on half the width), "ctpop" (LLVM's own: `cnt` on aarch64).
    """

    method: str
    lanes: int

    @staticmethod
    def of(target: CpuTarget) -> BitCounter:
        if target.tier == "avx512":
            method = (
                "vpopcntd"
                if target.has("avx512vpopcntdq")
                else "vnni"
                if target.has("avx512vnni")
                else "avx512"
            )
        else:
            method = "avx2" if target.tier == "avx2" else "ctpop"
        return BitCounter(method, target.lanes)

    @property
    def levels(self) -> int:
        """Stages of carry-save addition before bits are counted, where sums are long."""
        return {"vpopcntd": 0, "vnni": 5, "avx512": 5, "avx2": 2, "ctpop": 2}[self.method]

    @property
    def three_inputs(self) -> bool:
        """Whether one instruction computes any function of three bits."""
        return self.method in ("vnni", "avx512", "vpopcntd")

    def _of_three(self, table: int, a, b, c):
        args = [v.astype(f"int32x{self.lanes}") for v in (a, b, c)]
        return tirx.call_llvm_pure_intrin(
            f"int32x{self.lanes}", "llvm.x86.avx512.pternlog.d.512", *args, T.int32(table)
        ).astype(f"uint32x{self.lanes}")

    def full_add(self, a, b, c) -> tuple:
        """(sum, carry) of three uint32 vectors, column by column."""
        if self.three_inputs:
            total = T.bind(self._of_three(_SUM, a, b, c))
            return total, self._of_three(
                _CARRY_OF_SUM, b, c, total
            )  # of the sum: `a` dies, no copy
        half = T.bind(a ^ b)
        return half ^ c, (a & b) | (half & c)

    def pair_carry(self, before, total, word):
        """The carry of before + word + another word, where `total` is the three's sum; `before` None for 0."""
        if before is None:
            return word & ~total
        return self._of_three(_CARRY_OF_PAIR, before, total, word)

    def half_add(self, a, b) -> tuple:
        """(sum, carry) of two uint32 vectors, column by column."""
        return a ^ b, a & b

    def count(self, total, word, weight: int):
        """total + weight * (bits set in each lane of `word`); `total` int32, |weight| <= 64."""
        if self.method in ("vpopcntd", "ctpop"):
            counted = tirx.call_llvm_pure_intrin(
                f"uint32x{self.lanes}", f"llvm.ctpop.v{self.lanes}i32", word
            )
            return total + counted.astype(f"int32x{self.lanes}") * self._splat(weight)
        return self._sum_bytes(total, self._byte_counts(word), weight)

    def _splat(self, value: int):
        return T.broadcast(T.int32(value), self.lanes)

    def _bytes(self, value):
        return tirx.reinterpret(f"int8x{4 * self.lanes}", value)

    def _byte_counts(self, word):
        """Bits set in every byte of a vector of words, as bytes."""
        intrinsic = (
            "llvm.x86.avx2.pshuf.b" if self.method == "avx2" else "llvm.x86.avx512.pshuf.b.512"
        )
        lanes = range(self.lanes)
        table = tirx.Shuffle([T.int32(_NIBBLE_COUNTS[i % 4]) for i in lanes], list(lanes))
        mask = T.broadcast(T.uint32(0x0F0F0F0F), self.lanes)
        low = word & mask
        high = (word >> T.broadcast(T.uint32(4), self.lanes)) & mask
        counts = [
            tirx.call_llvm_pure_intrin(
                f"int8x{4 * self.lanes}", intrinsic, self._bytes(table), self._bytes(nibbles)
            )
            for nibbles in (low, high)
        ]
        return counts[0] + counts[1]

    def _sum_bytes(self, total, counts, weight: int):
        """total + weight * (the sum of the four bytes of each lane)."""
        lanes = self.lanes
        if self.method == "vnni":
            factors = T.broadcast(T.int8(weight), 4 * lanes)
            return tirx.call_llvm_pure_intrin(
                f"int32x{lanes}", "llvm.x86.avx512.vpdpbusd.512", total, counts, factors
            )
        pairs, sums = (
            ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd")
            if self.method == "avx2"
            else ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512")
        )
        paired = tirx.call_llvm_pure_intrin(
            f"int16x{2 * lanes}", pairs, counts, T.broadcast(T.int8(1), 4 * lanes)
        )
        factors = T.broadcast(T.int16(weight), 2 * lanes)
        return total + tirx.call_llvm_pure_intrin(f"int32x{lanes}", sums, paired, factors)


def lane_mask(condition, lanes: int):
    """A vector of truth values as the low bits of a uint32, lane 0 first."""
    if lanes == 1:
        return tirx.Select(condition, T.uint32(1), T.uint32(0))
    if lanes >= 8:
        # By intrinsic: `tirx.reinterpret` counts a truth value as 8 bits, LLVM as one.
        bits = tirx.call_intrin(f"uint{lanes}", "tirx.reinterpret", condition)
        return bits.astype("uint32")
    places = tirx.Shuffle([T.uint32(1 << i) for i in range(lanes)], list(range(lanes)))
    zeros = T.broadcast(T.uint32(0), lanes)
    return reduce_lanes(T.bind(tirx.Select(condition, places, zeros)), lambda a, b: a | b)
