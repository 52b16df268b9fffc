# SPDX-License-Identifier: Apache-2.0
"""Sample problems of the integer layers: shapes that every test of their kernels runs over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleProblem:
    """One layer: `x` channels last, `w` in the framework's order; `attrs` None for a matrix product."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    zero_point: int
    attrs: tuple[tuple[str, object], ...] | None = None
    grain: str | None = None
    density: float = 1.0


def _conv(
    x, w, zero_point, strides=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1, **more
) -> SampleProblem:
    attrs = (("strides", strides), ("padding", padding), ("dilation", dilation), ("groups", groups))
    return SampleProblem(x, w, zero_point, attrs, **more)


def dense_problems() -> list[SampleProblem]:
    """Awkward ones first: single pixels, primes, remainders of every tile, zero points at both ends."""
    around = (1, 1, 1, 1)
    return [
        _conv((1, 1, 1, 1), (1, 1, 1, 1), 9),
        _conv((1, 7, 7, 16), (32, 16, 3, 3), 0, padding=around),
        _conv((2, 5, 9, 17), (33, 17, 3, 3), 3, (2, 2), (1, 0, 2, 1)),
        _conv((1, 13, 6, 12), (20, 12, 5, 5), 255, padding=(2, 2, 2, 2), dilation=(2, 1)),
        _conv((1, 17, 17, 3), (40, 3, 7, 7), 124, (2, 2), (3, 3, 3, 3)),
        _conv((1, 9, 9, 24), (40, 6, 3, 3), 9, padding=around, groups=4),
        _conv((1, 9, 9, 64), (50, 64, 1, 1), 9),
        _conv((1, 9, 9, 8), (5, 8, 1, 3), 9, padding=(1, 1, 0, 1)),
        _conv((1, 9, 9, 8), (5, 8, 3, 1), 9, padding=(1, 1, 0, 1)),
        _conv((1, 9, 9, 33), (130, 33, 1, 1), 0, (2, 2)),
        SampleProblem((33, 64), (70, 64), 7),
        SampleProblem((1, 130), (17, 130), 255),
        SampleProblem((2, 3, 5, 20), (16, 20), 0),
        # Few channels: a border of its own. Stride beyond the kernel, one channel, dilated rows, two images, a border of 0.
        _conv((2, 9, 21, 3), (20, 3, 3, 3), 200, (2, 2), (1, 1, 1, 1)),
        _conv((1, 11, 18, 1), (17, 1, 5, 4), 7, (1, 5), (2, 0, 1, 3), (2, 1)),
        _conv((1, 8, 33, 2), (16, 2, 1, 7), 0, padding=(0, 3, 0, 3)),
        _conv((1, 6, 6, 3), (16, 3, 3, 3), 255, (1, 1), (3, 0, 0, 4), (1, 2)),
    ]


def depthwise_problems() -> list[SampleProblem]:
    """Every stride and dilation at which taps share their interleaved pixels differently; widths of one to four registers."""
    around = (1, 1, 1, 1)
    return [
        _conv((1, 7, 7, 16), (16, 1, 3, 3), 0, padding=around, groups=16),
        _conv((1, 8, 9, 96), (96, 1, 3, 3), 117, padding=around, groups=96),
        _conv((2, 9, 8, 150), (150, 1, 3, 3), 3, (2, 2), (1, 0, 2, 1), groups=150),
        _conv((1, 13, 16, 64), (64, 1, 5, 5), 255, padding=(2, 2, 2, 2), groups=64),
        _conv((1, 13, 12, 24), (24, 1, 5, 5), 9, (1, 1), (4, 4, 4, 4), (2, 2), groups=24),
        _conv((1, 9, 9, 33), (33, 1, 7, 7), 9, groups=33),
        _conv((1, 9, 9, 32), (32, 1, 3, 1), 9, (1, 3), (1, 1, 0, 1), groups=32),
        _conv((1, 1, 1, 17), (17, 1, 3, 3), 9, padding=around, groups=17),
        _conv((1, 5, 5, 5), (5, 1, 3, 3), 9, padding=around, groups=5),  # too few channels
        _conv((1, 5, 5, 16), (32, 1, 3, 3), 9, padding=around, groups=16),  # two outputs each
    ]


def sparse_problems() -> list[SampleProblem]:
    """Both kernels for convolutions (panel rows and padded planes), products of many and of few rows, groups, channels that are
    no multiple of 4."""
    around = (1, 1, 1, 1)
    return [
        _conv((1, 7, 7, 32), (32, 32, 3, 3), 7, padding=around, grain="in:4", density=0.3),
        _conv((1, 7, 7, 32), (64, 32, 3, 3), 7, padding=around, grain="block:4x4", density=0.3),
        _conv(
            (2, 9, 5, 20), (24, 20, 3, 3), 131, (2, 2), (1, 0, 2, 1), grain="block:8x4", density=0.2
        ),
        _conv((1, 7, 7, 17), (20, 17, 1, 1), 0, grain="in:4", density=0.2),
        _conv((1, 8, 8, 64), (48, 64, 1, 1), 3, grain="block:4x4", density=0.1),
        _conv(
            (1, 9, 9, 32),
            (32, 8, 3, 3),
            5,
            padding=around,
            groups=4,
            grain="block:8x4",
            density=0.3,
        ),
        SampleProblem((33, 40), (19, 40), 9, grain="in:4", density=0.2),
        SampleProblem((1, 17, 64), (24, 64), 0, grain="block:8x4", density=0.1),
        SampleProblem((1, 130), (18, 130), 255, grain="block:4x4", density=0.4),
        SampleProblem((1, 3, 64), (40, 64), 9, grain="block:4x4", density=0.1),
        SampleProblem((1, 330), (19, 330), 255, grain="in:4", density=0.6),
        SampleProblem((3, 64), (21, 64), 7, grain="in:4", density=0.2),
    ]
