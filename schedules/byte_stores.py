# SPDX-License-Identifier: Apache-2.0
"""Storing vectors of int32 that an epilogue narrows to bytes: several of them packed into one register first.

    uint8(max(min(a, 255), 0)), uint8(max(min(b, 255), 0)), ...
        ->  one permutation of packuswb(packssdw(a, b), packssdw(c, d))

Narrowing each alone costs AVX-512 two shuffles and a store of a quarter of a register. Packing saturates, so neither
bound is computed. In planes of quads [N, C / 4, pixels, 4] four channels of a vector of pixels become one vector whose
lanes are quads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.fused import Emission
from schedules.target import CpuTarget
from schedules.windows import span, splat

_SIGNED = {8: "llvm.x86.avx2.packssdw", 16: "llvm.x86.avx512.packssdw.512"}
_UNSIGNED = {8: "llvm.x86.avx2.packuswb", 16: "llvm.x86.avx512.packuswb.512"}
_TOGETHER = 4


@dataclass(frozen=True)
class Cell:
    """A vector of `lanes` results: its value before the epilogue, and where it goes (`lead` indices, then channel)."""

    value: object
    lead: tuple
    channel: object
    lanes: int


def store_cells(kernel: Emission, target: CpuTarget, rows: list[list[Cell]]) -> None:
    """Store every cell through the epilogue; a row's cells lie side by side."""
    packed = [lanes for lanes in _SIGNED if lanes <= target.lanes]
    if str(kernel.output.dtype) != "uint8" or target.arch != "x86_64" or not packed:
        for cell in (cell for row in rows for cell in row):
            kernel.store(cell.value, [*cell.lead, span(cell.channel, cell.lanes)])
        return
    waiting: list[list] = []  # [row number, cell, int32 vector] of the packs not yet stored
    for number, row in enumerate(rows):
        for cell in row:
            at = [*cell.lead, span(cell.channel, cell.lanes)]
            value = kernel.epilogue(cell.value, at)
            wide = _before_saturation(value)
            if wide is None or cell.lanes not in packed:
                T.buffer_store(kernel.output, value, at)
                continue
            if waiting and waiting[0][1].lanes != cell.lanes:
                _store_packed(kernel, waiting)
                waiting = []
            waiting.append([number, cell, wide])
            if len(waiting) == _TOGETHER:
                _store_packed(kernel, waiting)
                waiting = []
    if waiting:
        _store_packed(kernel, waiting)


def _before_saturation(value):
    """v, int32, where `value` is uint8(max(min(v, 255), 0)), or uint8(max(v, 0)) of a v that is at most 255; else None."""
    cast, most, least = tvm.ir.prim.expr.Cast, tvm.ir.prim.expr.Min, tvm.ir.prim.expr.Max
    inner = value.value if isinstance(value, cast) else None
    if not (isinstance(inner, least) and _is_number(inner.b, 0)):
        return None
    if "int32" not in str(inner.a.ty.dtype):
        return None
    bounded = isinstance(inner.a, most) and _is_number(inner.a.b, 255)
    return inner.a.a if bounded else inner.a


def _is_number(expr, number: int) -> bool:
    """Whether `expr` is this number, or a vector of it."""
    expr = expr.value if isinstance(expr, tvm.ir.prim.expr.Broadcast) else expr
    return isinstance(expr, tvm.ir.prim.expr.IntImm) and int(expr.value) == number


def _pack_in_parts(vectors: list, lanes: int):
    """int8 x 4 lanes of the bytes of four vectors: within each 128 bits, four of the first, then four of the next."""
    a, b, c, d = vectors
    words = [
        tirx.call_llvm_pure_intrin(f"int16x{2 * lanes}", _SIGNED[lanes], *pair)
        for pair in ((a, b), (c, d))
    ]
    return tirx.call_llvm_pure_intrin(f"int8x{4 * lanes}", _UNSIGNED[lanes], *words)


def _pack(vectors: list, lanes: int):
    """int32 x lanes holding the bytes of up to four vectors, in order: lanes / 4 numbers of each."""
    four = (vectors * _TOGETHER)[:_TOGETHER] if len(vectors) != 3 else [*vectors, vectors[0]]
    numbers = T.bind(tirx.reinterpret(f"int32x{lanes}", _pack_in_parts(four, lanes)))
    # Packs work within 128 bits: number v of part p is what vector v has in its part p.
    order = [part * _TOGETHER + v for v in range(_TOGETHER) for part in range(lanes // 4)]
    return T.bind(tirx.Shuffle([numbers], order))


def quads_of(kernel: Emission, target: CpuTarget, values: list, at: tuple):
    """int32 x lanes of the bytes that the epilogue makes of four channels' vectors of pixels: the quads of each pixel.

    `at` is (image, plane, first pixel, lanes). Only where the kernel's output is uint8.
    """
    lanes = at[-1]
    bytes_of = _quad_results(kernel, values, at)
    wide = [_before_saturation(b) for b in bytes_of]
    packed = lanes in _SIGNED and lanes <= target.lanes and target.arch == "x86_64"
    if packed and all(w is not None for w in wide):
        packed = _pack_in_parts(wide, lanes)
        # Within 128 bits, four pixels of a channel lie before those of the next.
        order = [16 * part + 4 * c + i for part in range(lanes // 4) for i in range(4) for c in range(4)]  # fmt: skip
        return T.bind(tirx.reinterpret(f"int32x{lanes}", tirx.Shuffle([packed], order)))
    word = None
    for byte, value in enumerate(bytes_of):
        wide_byte = value.astype("int32" if lanes == 1 else f"int32x{lanes}")
        part = (
            wide_byte if byte == 0 else tirx.shift_left(wide_byte, splat(T.int32(8 * byte), lanes))
        )
        word = part if word is None else word | part
    return T.bind(word)


def store_quads(kernel: Emission, target: CpuTarget, values: list, at: tuple) -> None:
    """Store four channels' vectors of pixels through the epilogue; `at` as in `quads_of`."""
    image, plane, pixel, lanes = at
    if str(kernel.output.dtype) == "uint8":
        stored = tirx.reinterpret(f"uint8x{4 * lanes}", quads_of(kernel, target, values, at))
        T.buffer_store(kernel.output, stored, [image, plane, pixel, T.ramp(0, 1, 4 * lanes)])
        return
    for byte, value in enumerate(_quad_results(kernel, values, at)):
        flat, where = _flat(kernel.output, [image, plane, pixel, byte], lanes)
        T.buffer_store(flat, value, [where])


def _flat(buffer, indices: list, lanes: int):
    """A buffer whose last axis holds quads as a flat one, and the index of one byte of each of `lanes` neighbouring quads."""
    shape = [int(d) for d in buffer.shape]
    at = indices[0]
    for extent, i in zip(shape[1:], indices[1:]):
        at = at * extent + i
    flat = T.decl_buffer((math.prod(shape),), str(buffer.dtype), data=buffer.data)
    return flat, at if lanes == 1 else T.ramp(at, shape[-1], lanes)


def _quad_results(kernel: Emission, values: list, at: tuple) -> list:
    """What the epilogue makes of each of the four channels."""
    image, plane, pixel, lanes = at

    def read(buffer, indices):
        """A byte of the quads that all four channels read at once, or a load like any other."""
        if not any(isinstance(i, tvm.ir.prim.expr.Ramp) for i in indices):
            return buffer[tuple(indices)]
        *outer, pixels, byte = indices
        if str(buffer.dtype) != "uint8":
            flat, where = _flat(buffer, [*outer, pixels.base, byte], lanes)
            return flat[where]
        whole = buffer[(*outer, pixels.base, T.ramp(0, 1, 4 * lanes))]
        quads = tirx.reinterpret(f"int32x{lanes}", whole)
        shifted = tirx.shift_right(quads, splat(T.int32(8 * int(byte)), lanes))
        return shifted.astype(f"uint8x{lanes}")

    pixels = span(pixel, lanes)
    return [
        kernel.epilogue(value, [image, plane, pixels, T.int32(byte)], read)
        for byte, value in enumerate(values)
    ]


def _store_packed(kernel: Emission, waiting: list) -> None:
    lanes = waiting[0][1].lanes
    packed = _pack([wide for _, _, wide in waiting], lanes)
    first = 0
    while first < len(waiting):  # runs of neighbours, one store each
        row, cell, _ = waiting[first]
        count = sum(1 for number, _, _ in waiting[first:] if number == row)
        numbers = list(range(first * lanes // 4, (first + count) * lanes // 4))
        part = packed if len(numbers) == lanes else tirx.Shuffle([packed], numbers)
        stored = tirx.reinterpret(f"uint8x{count * lanes}", part)
        T.buffer_store(kernel.output, stored, [*cell.lead, T.ramp(cell.channel, 1, count * lanes)])
        first += count
