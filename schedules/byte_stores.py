# SPDX-License-Identifier: Apache-2.0
"""Storing vectors of int32 that an epilogue narrows to bytes: several of them packed into one register first.

    uint8(max(min(a, 255), 0)), uint8(max(min(b, 255), 0)), ...
        ->  one permutation of packuswb(packssdw(a, b), packssdw(c, d))

Narrowing each alone costs AVX-512 two shuffles and a store of a quarter of a register. Packing saturates, so neither
bound is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.fused import Emission
from schedules.target import CpuTarget
from schedules.windows import span

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


def _pack(vectors: list, lanes: int):
    """int32 x lanes holding the bytes of up to four vectors, in order: lanes / 4 numbers of each."""
    a, b, c, d = (vectors * _TOGETHER)[:_TOGETHER] if len(vectors) != 3 else [*vectors, vectors[0]]
    words = [
        tirx.call_llvm_pure_intrin(f"int16x{2 * lanes}", _SIGNED[lanes], *pair)
        for pair in ((a, b), (c, d))
    ]
    packed = tirx.call_llvm_pure_intrin(f"int8x{4 * lanes}", _UNSIGNED[lanes], *words)
    numbers = T.bind(tirx.reinterpret(f"int32x{lanes}", packed))
    # Packs work within 128 bits: number v of part p is what vector v has in its part p.
    order = [part * _TOGETHER + v for v in range(_TOGETHER) for part in range(lanes // 4)]
    return T.bind(tirx.Shuffle([numbers], order))


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
