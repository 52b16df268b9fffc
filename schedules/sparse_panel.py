# SPDX-License-Identifier: Apache-2.0
"""Panels of the sparse kernels: pixels of a channels-last image transposed into rows of one channel each."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.emission import covering, ramp, widest_lanes
from schedules.sparse_elements import FloatElements, QuadElements
from schedules.sparse_problem import Problem
from schedules.target import CpuTarget
from schedules.windows import LINE_WORDS, prefetch

# Share of the second-level cache up to which planes are still there when they are read or written again.
NEAR = 0.5
# Pixel vectors between packing and prefetching: large images come from beyond the second-level cache.
_VECTORS_AHEAD = 2


class Panel:
    """Fills panels of a problem from `x`, the flat channels-last input, `lanes` pixels at a time."""

    def __init__(
        self, problem: Problem, target: CpuTarget, x, elements: FloatElements | QuadElements
    ):
        self.problem, self.lanes, self.x, self.elements = problem, target.lanes, x, elements
        self.room = NEAR * target.l2_bytes
        outside = elements.outside_planes if problem.planes_in else elements.outside
        self.outside = tirx.const(outside, elements.dtype)

    def copy(self, panel, image, starts: list, width) -> None:
        """`panel[c][pixel]` from planes, a vector from each pixel of `starts`."""
        p, lanes = self.problem, self.lanes
        with T.serial(0, p.channels) as c:
            row = T.Bind((image * p.channels + c) * p.plane_in)
            for j, start in enumerate(starts):
                pixels = self.x[T.ramp(row + start, 1, lanes)]
                T.buffer_store(panel, pixels, [T.ramp(c * width + j * lanes, 1, lanes)])

    def every(self, row, x: int, lanes: int):
        """`lanes` pixels of the line of planes that begins at `row`, a stride apart, from pixel `x` on."""
        if self.problem.strides[1] == 1 or lanes == 1:
            return self.x[ramp(row + x, lanes)]
        # Whole strides, so that both phases of a line load the same; not beyond the line.
        first = min(x // 2 * 2, self.problem.width - 2 * lanes)
        both = [self.x[ramp(row + (first + i * lanes), lanes)] for i in range(2)]
        return tirx.Shuffle(both, [x - first + 2 * i for i in range(lanes)])

    def fetch_line(self, row) -> None:
        """Ask for the line of planes that begins at `row`, if all of them take more than the second-level cache keeps: what is
        read of one plane is too short for a hardware prefetcher."""
        p = self.problem
        if 4 * p.batch * p.channels * p.plane_in > self.room:
            for column in range(0, p.width, LINE_WORDS):
                prefetch(self.x[row + column], near=True)

    def pack(self, panel, start_of, vectors, width, end=None) -> None:
        """`panel[tap * C + c][pixel]` for `vectors` vectors, number g from output pixel `start_of(g)`; zero where a tap
        falls on padding. Behind the last pixel before `end` (of all) it is repeated."""
        p, lanes = self.problem, self.lanes
        last = _i(p.pixels - 1) if end is None else end - 1
        with T.serial(0, vectors) as g:
            pixel = T.Bind(tirx.min(T.ramp(start_of(g), 1, lanes), T.broadcast(last, lanes)))
            offset = small((lanes,), "int32")
            every = T.ramp(0, 1, lanes)
            if p.pointwise:
                T.buffer_store(offset, pixel * p.channels, [every])
                ahead = _VECTORS_AHEAD * lanes * p.channels
                self.pack_vector(panel, g * lanes, width, offset, None, ahead)
                return
            row = T.Bind(pixel // p.out_width)
            top = T.Bind(row % p.out_height * p.strides[0] - p.padding[0])
            left = T.Bind(pixel % p.out_width * p.strides[1] - p.padding[1])
            image = T.Bind(row // p.out_height)
            with T.serial(0, p.kernel[0]) as r:
                with T.serial(0, p.kernel[1]) as s:
                    h = T.Bind(top + r * p.dilation[0])
                    w = T.Bind(left + s * p.dilation[1])
                    inside = None
                    if any(p.padding):
                        inside = small((lanes,), "int32")
                        bounds = tirx.all(h >= 0, h < p.height, w >= 0, w < p.width)
                        one, zero = T.broadcast(_i(1), lanes), T.broadcast(_i(0), lanes)
                        T.buffer_store(inside, tirx.Select(bounds, one, zero), [every])
                        h = T.Bind(tirx.max(tirx.min(h, p.height - 1), 0))
                        w = T.Bind(tirx.max(tirx.min(w, p.width - 1), 0))
                    T.buffer_store(
                        offset, ((image * p.height + h) * p.width + w) * p.channels, [every]
                    )
                    start = T.Bind((r * p.kernel[1] + s) * p.channels * width + g * lanes)
                    self.pack_vector(panel, start, width, offset, inside)

    def pack_vector(self, panel, start, step, offset, inside, ahead: int = 0) -> None:
        """Transpose one vector of pixels: channel c of x[offset[lane] + c] to panel[start + c * step + lane].

        `inside` holds 0 for the lanes that get zeros; `ahead` elements on, x is fetched into the second-level cache.
        """
        p, lanes = self.problem, self.lanes
        if p.channels < 4:
            for c in range(p.channels):
                for lane in range(lanes):
                    value = self.elements.pixels(self.x[offset[lane] + c])
                    if inside is not None:
                        value = tirx.Select(inside[lane] != 0, value, self.outside)
                    T.buffer_store(panel, value, [start + c * step + lane])
            return
        span = lanes if p.channels >= lanes else 4
        with T.serial(0, -(-p.channels // span)) as b:
            # The last block overlaps the one before where channels are no multiple of it: same values, written twice.
            c = T.Bind(
                b * span if p.channels % span == 0 else tirx.min(b * span, p.channels - span)
            )
            at = [T.Bind(offset[lane] + c) for lane in range(lanes)]
            for lane in range(lanes if ahead else 0):
                prefetch(self.x[at[lane] + ahead])
            columns = transpose(
                lambda lane, quad: self.x[T.ramp(at[lane] + 4 * quad, 1, 4)], span // 4, lanes
            )
            for k, column in enumerate(columns):
                value = self.elements.pixels(column)
                if inside is not None:
                    within = inside[T.ramp(0, 1, lanes)] != T.broadcast(_i(0), lanes)
                    value = tirx.Select(within, value, T.broadcast(self.outside, lanes))
                T.buffer_store(panel, value, [T.ramp(start + (c + k) * step, 1, lanes)])


def columns_of(
    problem: Problem, line: int, aside: int, most: int
) -> tuple[list[tuple[int, int, int]], list[int]]:
    """How a line of `line` columns of a panel is copied from one of planes: (column, first pixel, lanes) of each vector, and
    the columns that lie on padding. Pixels are a stride apart, `aside` the phase."""
    stride, left = problem.strides[1], problem.padding[1]
    pixels = [column * stride + aside - left for column in range(line)]
    inside = [column for column, x in enumerate(pixels) if 0 <= x < problem.width]
    outside = [column for column in range(line) if column not in inside]
    if not inside:
        return [], outside
    lanes = widest_lanes(len(inside), most)
    while stride > 1 and lanes > 1 and 2 * lanes > problem.width:
        lanes //= 2
    pieces = [(inside[at], pixels[inside[at]], width) for at, width in covering(len(inside), lanes)]
    return pieces, outside


def small(shape: tuple[int, ...], dtype: str = "float32"):
    """A buffer on the stack inside the current loop, under 1 KiB: LLVM keeps it in registers where indices are constant."""
    return T.alloc_buffer(shape, dtype)


def scratch(size: int, dtype: str = "float32"):
    """A buffer inside the current loop, from the runtime's workspace of the thread."""
    return T.alloc_buffer((size,), dtype)


def transpose(load, quads: int, lanes: int) -> list:
    """`4 * quads` vectors, the k-th holding value k of each of `lanes` sources; `load(lane, quad)` reads 4 of a source.

    Groups of 4 are inserted where they end, so that two rounds of shuffles within groups of 4 finish the transposition.
    They are read source by source, because sources 4 KiB apart share one cache set.
    """
    pieces = lanes // 4

    def joined(k: int, quad: int):
        return joined_quads([load(4 * s + k, quad) for s in range(pieces)])

    sources = [[joined(k, quad) for quad in range(quads)] for k in range(4)]
    return [
        column
        for quad in range(quads)
        for column in transpose_quads([sources[k][quad] for k in range(4)], lanes)
    ]


def joined_quads(parts: list):
    """Vectors of 4 side by side in one."""
    if len(parts) == 1:
        return T.Bind(parts[0])
    return T.Bind(tirx.Shuffle(parts, list(range(4 * len(parts)))))


def transpose_quads(rows: list, lanes: int) -> list:
    """The 4 columns of 4 vectors within each group of 4 lanes: value i of group s of column q is value q of it in row i."""

    def pick(a, b, pattern):
        """The same selection of 4 from two vectors in every group of 4; 0..3 from a, 4..7 from b."""
        chosen = [
            4 * s + (q if q < 4 else lanes + q - 4) for s in range(lanes // 4) for q in pattern
        ]
        return T.Bind(tirx.Shuffle([a, b], chosen))

    low01, high01 = pick(rows[0], rows[1], (0, 4, 1, 5)), pick(rows[0], rows[1], (2, 6, 3, 7))
    low23, high23 = pick(rows[2], rows[3], (0, 4, 1, 5)), pick(rows[2], rows[3], (2, 6, 3, 7))
    return [
        pick(low01, low23, (0, 1, 4, 5)), pick(low01, low23, (2, 3, 6, 7)),
        pick(high01, high23, (0, 1, 4, 5)), pick(high01, high23, (2, 3, 6, 7)),
    ]  # fmt: skip


def _i(value: int):
    return T.int32(value)
