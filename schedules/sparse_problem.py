# SPDX-License-Identifier: Apache-2.0
"""The problem that the sparse kernels solve, and how its outputs and pixels are divided."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.annotated import Annotated
from schedules.windows import LINE_WORDS

# Indices behind those of the last non-zero: the most non-zeros that a kernel fetches ahead.
INDICES_BEHIND = 8


@dataclass(frozen=True)
class Problem(Annotated):
    """A weight-sparse convolution; a matrix product is a 1x1 one whose rows are pixels of one image row.

    `padding` is (top, left, bottom, right); `block` output channels share one pattern; `stored` counts the blocks stored.
    Activations lie channels last, or as planes [N, C, H * W] where `planes_in` or `planes_out` say so. An input channel is
    an element of 4 bytes. `together` output channels lie side by side in planes: 4 of a byte each become such an element.
    The last `beside` channels are those of a second input, in planes like the first one's, which has no fewer of them.
    `input_plane` and `output_plane` are the elements from one plane to the next; 0 means as many as there are pixels. Behind
    the pixels a plane repeats the last one. `run` taps of a kernel, those of a row or all, are zero or stored together, and
    follow one another.
    """

    batch: int
    height: int
    width: int
    channels: int
    outputs: int
    out_height: int
    out_width: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    block: int = 1
    stored: int = 0
    planes_in: bool = False
    planes_out: bool = False
    together: int = 1
    input_plane: int = 0
    output_plane: int = 0
    run: int = 1
    beside: int = 0

    @property
    def inputs(self) -> tuple[int, ...]:
        """Channels of each input."""
        return (self.channels - self.beside, self.beside) if self.beside else (self.channels,)

    @property
    def pixels(self) -> int:
        return self.batch * self.out_height * self.out_width

    @property
    def image_pixels(self) -> int:
        """Output pixels of one image."""
        return self.out_height * self.out_width

    @property
    def plane_in(self) -> int:
        """Elements from one plane of x to the next."""
        return self.input_plane or self.height * self.width

    @property
    def plane_out(self) -> int:
        """Elements from one plane of y to the next."""
        return self.output_plane or self.image_pixels

    @property
    def computed(self) -> int:
        """Elements of a plane of y that are computed, to the end of a line if it goes on: what follows repeats the last."""
        return min(self.plane_out, -(-self.image_pixels // LINE_WORDS) * LINE_WORDS)

    @property
    def between_alike(self) -> bool:
        """Whether it takes planes to planes as long, element i of which depends on elements i only."""
        between = self.planes_in and self.planes_out and self.pointwise
        return between and self.plane_in == self.plane_out

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def panel_rows(self) -> int:
        return self.taps * self.channels

    @property
    def blocks(self) -> int:
        return -(-self.outputs // self.block)

    @property
    def pointwise(self) -> bool:
        """Whether output pixel m needs input pixel m only."""
        return self.taps == 1 and self.strides == (1, 1) and not any(self.padding)


def parts_of(outputs: int, part: int) -> list[tuple[int, int]]:
    """(first channel, channels) of each part; the last one takes the remainder."""
    count = max(1, outputs // part)
    return [(i * part, part if i < count - 1 else outputs - i * part) for i in range(count)]


def tiles_of(pixels: int, lanes: int, vectors: int) -> tuple[int, int, int]:
    """(tiles, vectors of a large tile, large tiles): the other tiles have one vector less, and no vector is wasted."""
    total = -(-pixels // lanes)
    tiles = -(-total // vectors)
    large = -(-total // tiles)
    return tiles, large, total - tiles * (large - 1)
