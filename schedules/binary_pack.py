# SPDX-License-Identifier: Apache-2.0
"""Pack signs: 32 comparisons of neighbouring channels become one word.

Y[..., q] = (bit b: X[..., 32 q + b] >= T[32 q + b]) xor F[q], X and T floats or bytes
"""

from __future__ import annotations

import math

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.bit_words import WORD_BITS, lane_mask, words_for
from schedules.emission import pieces
from schedules.fused import Fused
from schedules.target import CpuTarget
from schedules.windows import loop, span, unravel

_FLOAT_BITS = 32
_PARALLEL_VALUES = 32 * 1024


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused packing of the last axis."""
    with fused.emit() as kernel:
        thresholds, x, flips = kernel.inputs  # in the order in which `T <= X` reads them
        *lead, channels = (int(d) for d in x.shape)
        groups = fused.point["groups"]
        per_group = channels // groups
        lanes = min(target.lanes * _FLOAT_BITS // tvm.DataType(x.dtype).bits, WORD_BITS)
        words = words_for(per_group)
        pixels = math.prod(lead)
        parallel = target.threads > 1 and pixels * channels >= _PARALLEL_VALUES

        def word(at: list, q, first, bits: int) -> None:
            """Word q from `bits` channels beginning with `first`."""
            found = None
            for offset, width in pieces(bits, lanes):
                channel = span(first + offset, width)
                mask = lane_mask(thresholds[channel] <= x[(*at, channel)], width)
                mask = mask << T.uint32(offset) if offset else mask
                found = mask if found is None else found | mask
            kernel.store(found ^ flips[q], [*at, q])

        with loop(pixels, parallel) as pixel:
            at = unravel(pixel, tuple(lead))
            for g in range(groups):
                whole = per_group // WORD_BITS
                if whole:
                    with T.serial(0, whole) as k:
                        word(at, g * words + k, g * per_group + k * WORD_BITS, WORD_BITS)
                if rest := per_group % WORD_BITS:
                    start = g * per_group + whole * WORD_BITS
                    word(at, g * words + whole, start, rest)
    return kernel.func
