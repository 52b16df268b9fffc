# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse convolution and matrix product: planes of pixels times broadcast non-zeros.

A tile of output pixels is transposed into a panel `[row][pixel]` that stays in cache, row `tap * C + c` holding what
input channel c contributes under one tap of the kernel. A block of output channels that shares one pattern then walks its
non-zeros, each one a broadcast weight times a panel row, all loads aligned. The sums go back through a transposition
to channels last, where the fused epilogue is applied. Where activations lie in planes already (`Problem.planes_in`,
`planes_out`) there is nothing to transpose: panels are copied, and sums are stored, through the epilogue, from
registers. So one loop serves every kernel size, stride, dilation, padding
and group count, and every grain whose blocks lie along output channels.

Arrays, packed for a `Point`: `pointer[chunk * blocks + block]` delimits a block's non-zeros within one chunk of panel rows,
`index` their rows relative to the chunk, `values[n, lane]` their weights. Blocks are ordered by fill within each chunk
of a part, so that loop counts stay predictable: `order[chunk * blocks + position]` is the block of the part at a
position, `slot[chunk * O + o]` (for the definition only) where channel o is: position * block + lane.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated
from schedules.emission import widest_lanes
from schedules.errors import ScheduleError
from schedules.fused import Emission, Fused
from schedules.sparse_elements import FloatElements, QuadElements, elements_of
from schedules.sparse_panel import Panel, scratch
from schedules.sparse_problem import Problem, parts_of, tiles_of
from schedules.sparse_products import Products
from schedules.sparse_stores import Stores
from schedules.target import CpuTarget
from schedules.windows import LINE_BYTES, prefetch

# Bytes between pixels of the output from which on their lines compete for few sets of the caches: a tile then stores
# fewer pixels and more channels of each (measured on Cascade Lake).
_FAR_APART = 2048
# The arguments of a kernel that are not its weight's, as many as it has.
INPUTS = ("x", "beside")


@dataclass(frozen=True)
class Point(Annotated):
    """Frozen parameters of one kernel.

    vectors  pixel vectors of a tile: accumulators per output channel
    rows     output channels computed at once, a divisor of the block
    chunk    panel rows walked in one pass over a part's output channels
    part     output channels whose sums are kept before they are stored (the last part takes the remainder)
    splits   tasks that share one pixel tile, each with its own parts; each packs the panel again
    """

    vectors: int
    rows: int
    chunk: int
    part: int
    splits: int = 1


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """Tile by register count, cache sizes and shape."""
    lanes, registers = target.lanes, target.registers
    if problem.block == 1:
        # Wider tiles share the loads of index and weight, but use each line that they bring into the first-level cache less.
        # Where sums are stored from registers, and of quads, a quarter as many, what counts more is how many loops start.
        stored_at_once = problem.planes_out or problem.together > 1
        rows, vectors = 1, 7 if stored_at_once else 4
    else:
        rows = min(problem.block, 8 if registers == 32 else 4)
        vectors = {4: 6, 8: 3}[rows] if registers == 32 else 2
    row_bytes = min(vectors, -(-problem.pixels // lanes)) * lanes * 4
    chunk = problem.panel_rows
    limit = target.l2_bytes * 6 // 10
    if chunk * row_bytes > limit:
        passes = -(-chunk * row_bytes // (target.l2_bytes // 3))
        chunk = -(-chunk // passes)
    part = 128 if chunk < problem.panel_rows else 64
    if problem.outputs * 4 >= _FAR_APART and not problem.planes_out:
        part = 256
        if problem.block == 4 and problem.pixels >= 8 * lanes:
            vectors = min(vectors, 3)
    part = max(part, lanes, problem.block)
    tiles = tiles_of(problem.pixels, lanes, vectors)[0]
    splits = 1
    if target.threads > 1 and tiles < 2 * target.threads:
        splits = min(target.threads, len(parts_of(problem.outputs, part)))
    return Point(vectors, rows, chunk, part, splits)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused function whose anchor is annotated `sparse_planes`."""
    return emitted(fused, target, Point, Planes)


def emitted(fused: Fused, target: CpuTarget, points: type, kernels: type) -> tirx.PrimFunc:
    """The kernel of a fused function, whose anchor holds one of `points`, by an emitter of the class `kernels`."""
    problem = Problem.from_dict(fused.point["problem"])
    point = points.from_dict(fused.point["point"])
    with fused.emit() as kernel:
        kernels(kernel, problem, point, target, elements_of(fused.point, target)).emit()
    return kernel.func


class Planes(Products, Stores):
    """Emits one kernel. Python loops unroll, `T.serial` loops.

    Sums are kept `[channel][pixel]` in the order of the channels, or, where a block is a multiple of 4 channels and one
    chunk holds all, `[4 channels][vector][pixel % 4][pixel // 4][channel]`: then half of the way back to channels last is
    done while they are in registers.
    """

    def __init__(
        self,
        kernel: Emission,
        problem: Problem,
        point: Point,
        target: CpuTarget,
        elements: FloatElements | QuadElements,
    ):
        self.kernel, self.problem, self.point, self.elements = kernel, problem, point, elements
        self.target = target
        self.lanes, self.threads = target.lanes, target.threads
        buffers = arguments(kernel, len(problem.inputs))
        image = problem.plane_in if problem.planes_in else problem.height * problem.width
        self.inputs = [
            T.decl_buffer(
                (problem.batch * image * channels,), elements.dtype, data=buffers[name].data
            )
            for name, channels in zip(INPUTS, problem.inputs)
        ]
        self.input = 0  # the one that is being walked
        self.x = self.inputs[0]
        self.pointer, self.index = buffers["pointer"], buffers["index"]
        self.values, self.order = buffers["values"], buffers["order"]
        self.panel = Panel(problem, target, self.x, elements)
        self.parts = parts_of(problem.outputs, point.part)
        self.chunks = -(-problem.panel_rows // point.chunk)
        # Tiles of planes end within an image, where the last vectors overlap.
        self.by_image = problem.planes_in or problem.planes_out
        self.in_place = False  # planes are copied into panels
        self.steps = (0,)  # from the first non-zero of a run to each of them, in the panel
        self.image = _i(0)
        self.bias = self._bias()
        self.by_quads = (
            self.chunks == 1
            and not problem.planes_out
            and point.rows % 4 == 0
            and all(n % 4 == 0 and n >= self.lanes for _, n in self.parts)
        )
        if self._stores_once():
            kernel.write_over_residual()

    def _stores_once(self) -> bool:
        """Whether no two vectors stored overlap: the second would read, of a residual written over, what the first stored."""
        p = self.problem
        if p.planes_out:  # line by line
            return p.out_width % widest_lanes(p.out_width, self.lanes) == 0
        whole = not self.by_image or p.image_pixels % self.lanes == 0
        return whole and self._stores_channels_once()

    def _stores_channels_once(self) -> bool:
        """The same of the channels of one pixel."""
        few = self.problem.outputs < self.lanes
        return few or all(n % self.lanes == 0 for _, n in self.parts)

    def _bias(self):
        """What integer sums begin with, a number per output channel, where the epilogue adds that first; else None."""
        if self.elements.dtype != "int32" or self.chunks > 1:
            return None
        of_planes = self.problem.planes_out and self.problem.together > 1
        found = self.kernel.bias_of_sums((-3, -1) if of_planes else (-1,))
        if found is None:
            return None
        return T.decl_buffer((self.problem.outputs,), "int32", data=found.data)

    def emit(self) -> None:
        p, splits, lanes = self.problem, self.point.splits, self.lanes
        images, pixels = (p.batch, p.image_pixels) if self.by_image else (1, p.pixels)
        division = tiles, most, _ = tiles_of(pixels, lanes, self.point.vectors)
        tasks = images * tiles * splits
        loop = T.parallel if self.threads > 1 and tasks > 1 else T.serial
        with loop(0, tasks) as task:
            tile, share = T.Bind(task // splits % tiles), task % splits
            self.image = T.Bind(task // splits // tiles)
            first, vectors = self._tile(tile, division)
            panel = scratch(p.panel_rows * most * lanes, self.elements.dtype)
            sums = scratch(self._sums_size(most), self.elements.dtype)
            width = T.Bind(vectors * lanes) if vectors is not most else most * lanes
            if p.planes_in:
                self._either(vectors, most, lambda count: self._copy(panel, first, count))
            else:
                self.panel.pack(panel, lambda g: self._pixel(first, g), vectors, width)
            self._compute(panel, sums, first, vectors, most, share)

    def _copy(self, panel, first, vectors: int) -> None:
        starts = [T.Bind(self._start(first, j)) for j in range(vectors)]
        self.panel.copy(panel, self.image, starts, vectors * self.lanes)

    def _start(self, first, vector):
        """Where vector number `vector` of a tile begins, a pixel of its image."""
        return tirx.min(first + vector * self.lanes, self.problem.image_pixels - self.lanes)

    def _pixel(self, first, vector):
        """The same as a pixel of the batch."""
        if not self.by_image:
            return first + vector * self.lanes
        return self.image * self.problem.image_pixels + self._start(first, vector)

    def _tile(self, tile, division: tuple[int, int, int]) -> tuple:
        """Where tile number `tile` of a `division` (`tiles_of`) begins, and how many vectors it has."""
        tiles, most, large = division
        first, vectors = T.Bind(tile * (most * self.lanes)), most
        if large < tiles:
            vectors = T.Bind(tirx.Select(tile < large, _i(most), _i(most - 1)))
            first = T.Bind(first - tirx.max(tile - large, 0) * self.lanes)
        return first, vectors

    def _either(self, vectors, most: int, body) -> None:
        """`body(number of vectors)` for a tile of `most` of them, or one less."""
        if vectors is most:
            body(most)
            return
        with T.If(vectors == most):
            with T.Then():
                body(most)
            with T.Else():
                body(most - 1)

    def _each_tile(self, division: tuple[int, int, int], body) -> None:
        """`body(first, vectors)` for the tiles of a `division` (`tiles_of`): the large ones in a loop, those with one vector
        less in another."""
        tiles, most, large = division
        behind = large * most * self.lanes
        for count, vectors, lead in ((large, most, 0), (tiles - large, most - 1, behind)):
            if count:
                with T.serial(0, count) as tile:
                    body(T.Bind(tile * (vectors * self.lanes) + lead), vectors)

    def _compute(self, panel, sums, first, vectors, most: int, share) -> None:
        """The share-th part of the output channels for `vectors` (`most` or one less) vectors from pixel `first`."""
        width = T.Bind(vectors * self.lanes) if vectors is not most else most * self.lanes
        with T.serial(*self._share_of_parts(share)) as part:
            first_channel, channels = self._part(part)
            if self.chunks > 1:
                self._clear(sums, channels, width)
            self._either(
                vectors,
                most,
                lambda n: self._multiply(panel, sums, first, first_channel, channels, n),
            )
            if self.by_quads:
                self._store_quads(sums, first, first_channel, channels, vectors, width)
            elif self.problem.outputs < self.lanes:
                self._store_few(sums, first, width)
            else:
                self._store(sums, first, first_channel, channels, vectors, width)

    def _share_of_parts(self, share) -> tuple:
        """The first part that the share-th task of a tile computes, and the one behind its last."""
        count, splits = len(self.parts), self.point.splits
        if splits == 1:
            return 0, count
        return share * count // splits, (share + 1) * count // splits

    def _part(self, part) -> tuple:
        """(first channel, channels) of a part."""
        count, channels = len(self.parts), self.parts[-1][1]
        if channels != self.point.part and count > 1:
            channels = T.Bind(tirx.Select(part == count - 1, _i(channels), _i(self.point.part)))
        return T.Bind(part * self.point.part), channels

    def _sums_size(self, vectors: int) -> int:
        block = self.problem.block
        return -(-self.parts[-1][1] // block) * block * vectors * self.lanes

    # -- multiply ------------------------------------------------------------------------------------------------------

    def _clear(self, sums, channels, width) -> None:
        block = self.problem.block
        with T.serial(0, (channels + block - 1) // block * block * width // self.lanes) as i:
            T.buffer_store(sums, self._zeros(), [T.ramp(i * self.lanes, 1, self.lanes)])

    def _multiply(self, panel, sums, first, first_channel, channels, vectors: int) -> None:
        """The sums of a part's channels, chunk of panel rows by chunk."""
        p, rows = self.problem, self.point.rows
        width = vectors * self.lanes
        with (
            T.serial(0, self.chunks) as chunk,
            T.serial(0, (channels + p.block - 1) // p.block) as b,
        ):
            at = T.Bind(chunk * p.blocks + first_channel // p.block + b)
            begin, end = T.Bind(self.pointer[at]), T.Bind(self.pointer[at + 1])
            block = T.Bind(self.order[at].astype("int32"))
            if p.planes_out:
                pass  # stored line by line
            elif self.chunks == 1:
                self._fetch_output(first, first_channel, width, b)
            else:
                with T.If(chunk == self.chunks - 1), T.Then():
                    self._fetch_output(first, first_channel, width, b)
            with T.serial(0, p.block // rows) as half:
                row = T.Bind(block * p.block + half * rows)
                base = T.Bind(self._place(row, first, width))
                channel = T.Bind(first_channel + row)
                acc = self._multiply_rows(
                    panel, sums, base, (begin, end), chunk * self.point.chunk, half * rows, vectors,
                    channel,
                )  # fmt: skip
                self._keep(acc, sums, base, vectors, channel)

    def _place(self, row, first, width):
        """Where in the sums those of row `row` of a part begin."""
        return row * width

    def _fetch_output(self, first, first_channel, width: int, b) -> None:
        """While block number b of a part is computed, fetch its share of the lines that the part is stored with.

        The lines of a tile lie apart, which no hardware prefetcher follows.
        """
        p = self.problem
        blocks = -(-self.point.part // p.block)
        each = -(-width // blocks)
        channels = min(self.point.part, p.outputs)

        def fetch(pixel) -> None:
            start = T.Bind(self._flat_pixel(T.Bind(first + pixel)) * p.outputs + first_channel)
            for buffer in self._output_like():
                for channel in range(
                    0, channels, LINE_BYTES // tvm.DataType(buffer.dtype).itemsize
                ):
                    prefetch(buffer[start + channel])

        if each == 1:
            with T.If(b < width), T.Then():
                fetch(b)
        else:
            with T.serial(0, each) as k:
                fetch(T.Bind(b * each + k))

    def _output_like(self) -> list:
        """The output and what the epilogue reads of its shape, flat."""
        kernel, size = self.kernel, self.problem.pixels * self.problem.outputs
        found = [kernel.output, *(r for r in kernel.residuals if not r.same_as(kernel.output))]
        return [T.decl_buffer((size,), str(b.dtype), data=b.data) for b in found]

    def _flat_pixel(self, pixel):
        """The output pixel, counted over all images, of a tile's pixel."""
        return self.image * self.problem.image_pixels + pixel if self.by_image else pixel


def arguments(kernel: Emission, inputs: int = 1) -> dict:
    """The anchor's arguments by name, in the order of the operator's definition. Raises ScheduleError if one is missing."""
    names = (*INPUTS[:inputs], "pointer", "index", "values", "order", "slot")
    fused = kernel.fused
    buffers = [
        b for p, b in zip(fused.params, kernel.buffers) if any(p.same_as(i) for i in fused.inputs)
    ]
    if len(buffers) != len(names):
        raise ScheduleError(
            "the anchor of a sparse kernel has other arguments",
            found=str(len(buffers)),
            wanted=str(names),
        )
    return dict(zip(names, buffers))


def _i(value: int):
    return T.int32(value)
