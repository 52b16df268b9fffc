# SPDX-License-Identifier: Apache-2.0
"""What the sparse kernels multiply: elements of 4 bytes, float32 or a quad of int8 weights against a quad of pixels."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.target import CpuTarget
from schedules.terms import dot_product, reads_signed_pixels


class FloatElements:
    """float32 weights and pixels."""

    dtype = "float32"
    # A pixel of the padding, as it is multiplied and as planes hold it.
    outside = outside_planes = 0.0

    def pixels(self, value):
        """Loaded pixels as they are multiplied."""
        return value

    def add(self, held, weights, x, lanes: int):
        """`held` and the products of a weight, the same in all lanes, with a vector of pixels."""
        return held + weights * x


class QuadElements:
    """Four neighbouring channels as one int32: int8 weights, uint8 pixels whose zero point lies around the image."""

    dtype = "int32"

    def __init__(self, target: CpuTarget, zero_point: int):
        self.dot = dot_product(target)
        # Where the dot product takes signed bytes, 128 is subtracted from every pixel.
        self.flip = _quad(0x80) if reads_signed_pixels(target) else 0
        self.outside_planes = _quad(zero_point)
        self.outside = self.outside_planes ^ self.flip

    def pixels(self, value):
        if not self.flip:
            return value
        lanes = str(value.ty.dtype).removeprefix(self.dtype)
        flip = tirx.const(self.flip, self.dtype)
        return value ^ (T.broadcast(flip, int(lanes[1:])) if lanes else flip)

    def add(self, held, weights, x, lanes: int):
        return self.dot(held, x, tirx.reinterpret(f"int8x{4 * lanes}", weights), lanes)


def _quad(byte: int) -> int:
    return int(np.full(4, byte, np.uint8).view(np.int32)[0])


def elements_of(point: dict, target: CpuTarget) -> FloatElements | QuadElements:
    """The elements of a fused kernel by its anchor's notes: quads where these have a zero point."""
    return QuadElements(target, point["zero_point"]) if "zero_point" in point else FloatElements()
