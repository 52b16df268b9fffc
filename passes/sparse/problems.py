# SPDX-License-Identifier: Apache-2.0
"""Sample problems of the sparse operators: shapes that every kernel is tested on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleProblem:
    """One layer: `x` channels last, `w` in the framework's order; empty `attrs` for a matrix product."""

    operator: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    grain: str
    density: float
    attrs: tuple[tuple[str, object], ...] = ()


def _conv(
    x, w, grain, density, strides=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1
) -> SampleProblem:
    attrs = (("strides", strides), ("padding", padding), ("dilation", dilation), ("groups", groups))
    return SampleProblem("kerf.sparse_conv2d", x, w, grain, density, attrs)


def problems() -> list[SampleProblem]:
    """Awkward ones first: single pixels, primes, remainders of every tile."""
    return [
        _conv((1, 1, 1, 4), (1, 4, 1, 1), "element", 0.5),
        _conv((1, 7, 7, 17), (33, 17, 3, 3), "element", 0.1, padding=(1, 1, 1, 1)),
        _conv((2, 5, 9, 8), (20, 8, 3, 3), "out:4", 0.3, strides=(2, 2), padding=(1, 0, 2, 1)),
        _conv((1, 13, 6, 12), (16, 12, 5, 5), "out:8", 0.2, dilation=(2, 1), padding=(2, 2, 2, 2)),
        _conv((1, 9, 9, 32), (32, 8, 3, 3), "out:8", 0.3, groups=4, padding=(1, 1, 1, 1)),
        _conv((1, 8, 8, 3), (10, 3, 7, 7), "element", 0.2, strides=(2, 2), padding=(3, 3, 3, 3)),
        _conv((1, 6, 6, 64), (48, 64, 1, 1), "out:16", 0.1),
        SampleProblem("kerf.sparse_dense", (33, 40), (19, 40), "element", 0.2),
        SampleProblem("kerf.sparse_dense", (1, 17, 64), (24, 64), "out:8", 0.1),
        SampleProblem("kerf.sparse_dense", (2, 3, 5, 24), (36, 24), "out:4", 0.2),
    ]
