# SPDX-License-Identifier: Apache-2.0
"""What one term of a contraction's sum is: a float32 product, or the dot product of four uint8 and four int8.

A contraction counts its inputs in elements of 4 bytes. An element is a float32 channel, or a quad of four neighbouring
channels whose int8 weights lie side by side for every output channel. `Terms` is all that a register tile knows of them,
and of what becomes of the sums: an output may need several (`branches`), whose weights lie vector beside vector.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules import wrapping
from schedules.byte_stores import Cell, store_cells
from schedules.fused import Emission
from schedules.target import CpuTarget
from schedules.vector_math import as_float32
from schedules.windows import span, splat


class FloatTerms:
    """float32 pixels times weights, float32 or integers converted as they are loaded, summed in float32."""

    dtype = "float32"
    starts = bias = None  # sums begin at zero
    branches = 1  # sums per output
    planar = False  # x is [N, H, W, C]
    overlapping = False  # pixels do not begin within others

    def __init__(self, kernel: Emission):
        self.x, self.w = kernel.inputs

    def pixel(self, at: tuple):
        """The element of x at these indices, loaded once for all vectors of weights."""
        return self.x[at]

    def add(self, held, pixel, at: tuple, width: int):
        """`held` and the term of `pixel` with the `width` weights from `at`."""
        weights = as_float32(self.w[(*at[:-1], span(at[-1], width))])
        return held + splat(pixel, width) * weights

    def pixel_byte(self, at: tuple):
        """A load from element `at` of x, whose address is prefetched."""
        return self.x[at]

    def weight_byte(self, at: tuple):
        """As `pixel_byte`, of the weights."""
        return self.w[at]

    def combine(self, sums: list, first, width: int):
        """The outputs of channels [first, first + width) from the vectors of their sums, one per branch."""
        return sums[0]

    def store(self, kernel: Emission, rows: list[list[Cell]]) -> None:
        """Store a tile's outputs, a list per pixel, through the epilogue."""
        for cell in (cell for row in rows for cell in row):
            kernel.store(cell.value, [*cell.lead, span(cell.channel, cell.lanes)])


class PlanarTerms(FloatTerms):
    """As FloatTerms, of an image x [N, C, H, W]; indices are those of [N, H, W, C] all the same."""

    planar = True

    def pixel(self, at: tuple):
        image, row, column, channel = at
        return self.x[image, channel, row, column]

    pixel_byte = pixel


class QuadTerms:
    """uint8 times int8, summed in int32: the last index of x and of the weights counts quads of bytes.

    `starts` is None, or int32 [panels, R, S + 1, channels of a panel]: what each tap inside the image adds to a sum, so
    that pixels may have an offset, and what all taps of a kernel row add. [panels, 1, 1, ...] where all are always inside.
    `bias` is None, or int32 [..., O]: what the sum of an output channel starts with everywhere. It is taken from the
    epilogue only if `whole`: no vector of sums is wider than the channels there are, or loads would pass its end.
    """

    dtype = "int32"
    branches = 1
    planar = False
    overlapping = False

    def __init__(self, kernel: Emission, target: CpuTarget, whole: bool):
        self.x, self.w, *rest = kernel.inputs
        self.starts = rest[0] if rest else None
        self.bias = kernel.bias_of_sums() if whole else None
        self.target = target
        self.dot = dot_product(target)
        self.signed = reads_signed_pixels(target)

    def pixel(self, at: tuple):
        quad = tirx.reinterpret("int32", self.x[(*at[:-1], T.ramp(at[-1] * 4, 1, 4))])
        return quad ^ T.int32(-0x7F7F7F80) if self.signed else quad

    def add(self, held, pixel, at: tuple, width: int):
        weights = self.w[(*at[:-1], T.ramp(at[-1] * 4, 1, 4 * width))]
        return self.dot(held, splat(pixel, width), weights, width)

    def pixel_byte(self, at: tuple):
        return self.x[(*at[:-1], at[-1] * 4)]

    def weight_byte(self, at: tuple):
        return self.w[(*at[:-1], at[-1] * 4)]

    def combine(self, sums: list, first, width: int):
        return sums[0]

    def store(self, kernel: Emission, rows: list[list[Cell]]) -> None:
        store_cells(kernel, self.target, rows)


def reads_signed_pixels(target: CpuTarget) -> bool:
    """Whether the target's dot product takes signed bytes only, so that 128 is subtracted from every pixel."""
    return target.has("dotprod") and not target.has("i8mm")


def has_vnni(target: CpuTarget) -> bool:
    """Whether the target multiplies bytes, or pairs of 16 bits, and adds up the products of a lane in one instruction."""
    return target.has("avx512vnni", "avx512vl") or target.has("avxvnni")


def dot_product(target: CpuTarget):
    """`dot(held, quads, weights, width)`: held + four products per lane, exact and without saturation.

    `held` int32 x width, `quads` int32 x width of four uint8 each (int8 where `reads_signed_pixels`), `weights` int8 x 4
    width. By feature: VNNI's dot product of bytes, 16-bit products added in pairs, or plain 32-bit arithmetic.
    """
    if target.arch == "x86_64":
        return _vnni if has_vnni(target) else _words
    if target.has("i8mm"):
        return lambda *args: _neon("usdot", *args)
    return (lambda *args: _neon("sdot", *args)) if target.has("dotprod") else _plain


def pair_product(target: CpuTarget):
    """`add(held, pairs, weights)`: held, int32, + two products per lane of int16 pairs, modulo 2^32; all int32 x width. None
    for targets without an instruction for it."""
    if target.tier not in ("avx512", "avx2"):
        return None
    width = target.lanes
    words = lambda value: tirx.reinterpret(f"int16x{2 * width}", value)  # noqa: E731
    if has_vnni(target):
        name = f"llvm.x86.avx512.vpdpwssd.{32 * width}"
        return lambda held, pairs, weights: tirx.call_llvm_pure_intrin(
            f"int32x{width}", name, held, words(pairs), words(weights)
        )
    return lambda held, pairs, weights: wrapping.add(
        held,
        tirx.call_llvm_pure_intrin(f"int32x{width}", _MADD[width], words(pairs), words(weights)),
    )


def _bytes(value, width: int):
    return tirx.reinterpret(f"int8x{4 * width}", value)


def _vnni(held, quads, weights, width: int):
    name = f"llvm.x86.avx512.vpdpbusd.{32 * width}"
    return tirx.call_llvm_pure_intrin(f"int32x{width}", name, held, _bytes(quads, width), weights)


def _neon(name: str, held, quads, weights, width: int):
    name = f"llvm.aarch64.neon.{name}"
    return tirx.call_llvm_pure_intrin(f"int32x{width}", name, held, _bytes(quads, width), weights)


_MADD = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}  # fmt: skip


def _words(held, quads, weights, width: int):
    """Even and odd bytes widened to 16 bits, their products added in pairs: no sum of two exceeds 2 * 255 * 128.

    vpmaddubsw would save a step, but saturates its sums at 16 bits.
    """
    lanes = 2 * width
    words = tirx.reinterpret(f"uint16x{lanes}", quads)
    weights = tirx.reinterpret(f"int16x{lanes}", weights)
    eight, low = T.broadcast(T.int16(8), lanes), T.broadcast(T.uint16(255), lanes)
    even = (words & low, tirx.shift_right(tirx.shift_left(weights, eight), eight))
    odd = (
        tirx.shift_right(words, T.broadcast(T.uint16(8), lanes)),
        tirx.shift_right(weights, eight),
    )
    for x, w in (even, odd):
        x = tirx.reinterpret(f"int16x{lanes}", x)
        held = held + tirx.call_llvm_pure_intrin(f"int32x{width}", _MADD[width], x, w)
    return held


def _plain(held, quads, weights, width: int):
    weights = tirx.reinterpret(f"int32x{width}", weights)
    for byte in range(4):
        shift = T.broadcast(T.int32(8 * byte), width)
        x = tirx.shift_right(quads, shift) & T.broadcast(T.int32(255), width)
        up, down = T.broadcast(T.int32(24 - 8 * byte), width), T.broadcast(T.int32(24), width)
        held = held + x * tirx.shift_right(tirx.shift_left(weights, up), down)
    return held
