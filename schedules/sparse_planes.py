# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse convolution and matrix product: planes of pixels times broadcast non-zeros.

A tile of output pixels is transposed into a panel `[row][pixel]` that stays in cache, row `tap * C + c` holding what
input channel c contributes under one tap of the kernel. A block of output channels that shares one pattern then walks its
non-zeros, each one a broadcast weight times a panel row, all loads aligned. The sums go back through a transposition
to channels last, where the fused epilogue is applied. So one loop serves every kernel size, stride, dilation, padding
and group count, and every grain whose blocks lie along output channels.

Arrays, packed for a `Point`: `pointer[chunk * blocks + block]` delimits a block's non-zeros within one chunk of panel rows,
`index` their rows relative to the chunk, `values[n, lane]` their weights, `slot[o]` the place of channel o in its part
(blocks are ordered by fill within a part, so that loop counts stay predictable).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.errors import ScheduleError
from schedules.fused import Emission, Fused
from schedules.target import CpuTarget


@dataclass(frozen=True)
class Problem:
    """A weight-sparse convolution; a matrix product is a 1x1 one whose rows are pixels of one image row.

    `padding` is (top, left, bottom, right); `block` output channels share one pattern; `stored` counts the blocks stored.
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

    @property
    def pixels(self) -> int:
        return self.batch * self.out_height * self.out_width

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

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(fields: dict) -> Problem:
        return Problem(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


@dataclass(frozen=True)
class Point:
    """Frozen parameters of one kernel.

    vectors  pixel vectors of a tile: accumulators per output channel
    rows     output channels computed at once, a divisor of the block
    chunk    panel rows walked in one pass over a part's output channels
    part     output channels whose sums are kept before they are stored (the last part takes the remainder)
    splits   tasks that share one pixel tile, each with its own parts; each packs the panel again
    lines    0, or the output lines of a tile whose input stays padded planes (`sparse_windows`)
    """

    vectors: int
    rows: int
    chunk: int
    part: int
    splits: int = 1
    lines: int = 0

    def to_dict(self) -> dict:
        return asdict(self)


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


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """Tile by register count, cache sizes and shape."""
    lanes, registers = target.lanes, target.registers
    if problem.block == 1:
        rows, vectors = 1, 8
        # Wider tiles share the loads of index and weight; narrower ones keep the panel in cache.
        while vectors > 4 and problem.panel_rows * vectors * lanes * 4 > target.l2_bytes // 2:
            vectors -= 1
    else:
        rows = min(problem.block, 8 if registers == 32 else 4)
        vectors = {4: 6, 8: 3}[rows] if registers == 32 else 2
    row_bytes = vectors * lanes * 4
    chunk = problem.panel_rows
    limit = target.l2_bytes * 6 // 10
    if chunk * row_bytes > limit:
        passes = -(-chunk * row_bytes // (target.l2_bytes // 3))
        chunk = -(-chunk // passes)
    part = max(lanes, problem.block)
    part = min(max(part, 64), 64) if chunk == problem.panel_rows else max(part, 128)
    tiles = tiles_of(problem.pixels, lanes, vectors)[0]
    splits = 1
    if target.threads > 1 and tiles < 2 * target.threads:
        splits = min(target.threads, len(parts_of(problem.outputs, part)))
    return Point(vectors, rows, chunk, part, splits)


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused function whose anchor is annotated `sparse_planes`."""
    notes = dict(fused.point)
    problem = Problem.from_dict(notes.pop("problem"))
    with fused.emit() as kernel:
        Planes(kernel, problem, Point(**notes), target).emit()
    return kernel.func


def scratch(shape: tuple[int, ...], dtype: str = "float32", scope: str = "global"):
    """A buffer inside the current loop: registers if `local`, else the runtime's workspace of the thread."""
    return T.alloc_buffer(shape, dtype, scope=scope)


def _arena(sizes: list[int]) -> list:
    """One workspace of the thread, cut into float32 buffers of these sizes, each aligned to a cache line."""
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // 16) * 16)
    whole = T.alloc_buffer((starts[-1],), "float32")
    return [
        T.decl_buffer((size,), "float32", data=whole.data, elem_offset=at)
        for size, at in zip(sizes, starts)
    ]


def _i(value: int):
    return T.int32(value)


# Pixel vectors between packing and prefetching: large images come from beyond the second-level cache.
_VECTORS_AHEAD = 2


class Planes:
    """Emits one kernel. Python loops unroll, `T.serial` loops."""

    def __init__(self, kernel: Emission, problem: Problem, point: Point, target: CpuTarget):
        self.kernel, self.problem, self.point = kernel, problem, point
        self.lanes, self.threads = target.lanes, target.threads
        buffers = _arguments(kernel)
        self.x = T.decl_buffer(
            (problem.batch * problem.height * problem.width * problem.channels,),
            "float32",
            data=buffers["x"].data,
        )
        self.pointer, self.index = buffers["pointer"], buffers["index"]
        self.values, self.slot = buffers["values"], buffers["slot"]
        self.parts = parts_of(problem.outputs, point.part)
        self.chunks = -(-problem.panel_rows // point.chunk)

    def emit(self) -> None:
        p, splits, lanes = self.problem, self.point.splits, self.lanes
        tiles, most, large = tiles_of(p.pixels, lanes, self.point.vectors)
        loop = T.parallel if self.threads > 1 and tiles * splits > 1 else T.serial
        with loop(0, tiles * splits) as task:
            tile, share = T.Bind(task // splits), task % splits
            vectors, first = most, T.Bind(tile * (most * lanes))
            if large < tiles:
                vectors = T.Bind(tirx.Select(tile < large, _i(most), _i(most - 1)))
                first = T.Bind(first - tirx.max(tile - large, 0) * lanes)
            self._tile(first, vectors, most, share)

    def _tile(self, first, vectors, most: int, share) -> None:
        """The share-th part of one tile's output channels: `vectors` (`most` or one less) vectors from pixel `first`."""
        p = self.problem
        panel = scratch((p.panel_rows * most * self.lanes,))
        sums = scratch((self._sums_size(most),))
        width = T.Bind(vectors * self.lanes) if vectors is not most else most * self.lanes
        self._pack(panel, first, vectors, width)
        self._compute(panel, sums, first, vectors, most, share)

    def _compute(self, panel, sums, first, vectors, most: int, share) -> None:
        """The share-th part of the output channels for `vectors` vectors from pixel `first`, out of a packed panel."""
        count, splits = len(self.parts), self.point.splits
        width = T.Bind(vectors * self.lanes) if vectors is not most else most * self.lanes
        begin, end = (
            (0, count) if splits == 1 else (share * count // splits, (share + 1) * count // splits)
        )
        with T.serial(begin, end) as part:
            first_channel = T.Bind(part * self.point.part)
            channels = self.parts[-1][1]
            if count > 1:
                channels = T.Bind(tirx.Select(part == count - 1, _i(channels), _i(self.point.part)))
            if self.chunks > 1:
                self._clear(sums, channels, width)
            if vectors is most:
                self._multiply(panel, sums, first_channel, channels, most)
            else:
                with T.If(vectors == most):
                    with T.Then():
                        self._multiply(panel, sums, first_channel, channels, most)
                    with T.Else():
                        self._multiply(panel, sums, first_channel, channels, most - 1)
            self._store(sums, first, first_channel, channels, vectors, width)

    def _sums_size(self, vectors: int) -> int:
        block = self.problem.block
        return -(-self.parts[-1][1] // block) * block * vectors * self.lanes

    # -- panel ---------------------------------------------------------------------------------------------------------

    def _pack(self, panel, first, vectors, width) -> None:
        """Fill `panel[tap * C + c][pixel]` from channels-last x; zero where a tap falls on padding."""
        p, lanes = self.problem, self.lanes
        with T.serial(0, vectors) as g:
            pixel = T.Bind(
                tirx.min(T.ramp(first + g * lanes, 1, lanes), T.broadcast(_i(p.pixels - 1), lanes))
            )
            offset = scratch((lanes,), "int32", scope="local")
            inside = scratch((lanes,), "int32", scope="local")
            every = T.ramp(0, 1, lanes)
            if p.pointwise:
                T.buffer_store(offset, pixel * p.channels, [every])
                ahead = _VECTORS_AHEAD * lanes * p.channels
                self._pack_vector(panel, g * lanes, width, offset, None, ahead)
                return
            row = T.Bind(pixel // p.out_width)
            top = T.Bind(row % p.out_height * p.strides[0] - p.padding[0])
            left = T.Bind(pixel % p.out_width * p.strides[1] - p.padding[1])
            image = T.Bind(row // p.out_height)
            with T.serial(0, p.kernel[0]) as r:
                with T.serial(0, p.kernel[1]) as s:
                    h = T.Bind(top + r * p.dilation[0])
                    w = T.Bind(left + s * p.dilation[1])
                    within = None
                    if any(p.padding):
                        within = inside
                        bounds = tirx.all(h >= 0, h < p.height, w >= 0, w < p.width)
                        one, zero = T.broadcast(_i(1), lanes), T.broadcast(_i(0), lanes)
                        T.buffer_store(inside, tirx.Select(bounds, one, zero), [every])
                        h = T.Bind(tirx.max(tirx.min(h, p.height - 1), 0))
                        w = T.Bind(tirx.max(tirx.min(w, p.width - 1), 0))
                    T.buffer_store(
                        offset, ((image * p.height + h) * p.width + w) * p.channels, [every]
                    )
                    start = T.Bind((r * p.kernel[1] + s) * p.channels * width + g * lanes)
                    self._pack_vector(panel, start, width, offset, within)

    def _pack_vector(self, panel, start, step, offset, inside, ahead: int = 0) -> None:
        """Transpose one vector of pixels: channel c of x[offset[lane] + c] to panel[start + c * step + lane].

        `ahead` elements on, x is fetched into the second-level cache.
        """
        p, lanes = self.problem, self.lanes

        def keep(value, at):
            T.buffer_store(panel, value, [at])

        def target(c):
            return start + c * step

        if p.channels < 4:
            for c in range(p.channels):
                for lane in range(lanes):
                    value = self.x[offset[lane] + c]
                    keep(
                        value
                        if inside is None
                        else tirx.Select(inside[lane] != 0, value, T.float32(0)),
                        target(c) + lane,
                    )
            return
        span = lanes if p.channels >= lanes else 4
        with T.serial(0, -(-p.channels // span)) as b:
            # The last block overlaps the one before where channels are no multiple of it: same values, written twice.
            c = T.Bind(
                b * span if p.channels % span == 0 else tirx.min(b * span, p.channels - span)
            )
            at = [T.Bind(offset[lane] + c) for lane in range(lanes)]
            for lane in range(lanes if ahead else 0):
                line = tirx.address_of(self.x[at[lane] + ahead])
                T.evaluate(tirx.call_intrin("void", "tirx.prefetch", line, _i(0), _i(2), _i(1)))
            columns = _transpose(
                lambda lane, quad: self.x[T.ramp(at[lane] + 4 * quad, 1, 4)], span // 4, lanes
            )
            for k, value in enumerate(columns):
                if inside is not None:
                    within = inside[T.ramp(0, 1, lanes)] != T.broadcast(_i(0), lanes)
                    value = tirx.Select(within, value, T.broadcast(T.float32(0), lanes))
                keep(value, T.ramp(target(c + k), 1, lanes))

    # -- multiply ------------------------------------------------------------------------------------------------------

    def _clear(self, sums, channels, width) -> None:
        block = self.problem.block
        with T.serial(0, (channels + block - 1) // block * block * width // self.lanes) as i:
            T.buffer_store(
                sums, T.broadcast(T.float32(0), self.lanes), [T.ramp(i * self.lanes, 1, self.lanes)]
            )

    def _multiply(self, panel, sums, first_channel, channels, vectors: int) -> None:
        """The sums of a part's channels, chunk of panel rows by chunk."""
        p, rows = self.problem, self.point.rows
        with (
            T.serial(0, self.chunks) as chunk,
            T.serial(0, (channels + p.block - 1) // p.block) as b,
        ):
            at = T.Bind(chunk * p.blocks + first_channel // p.block + b)
            begin, end = T.Bind(self.pointer[at]), T.Bind(self.pointer[at + 1])
            with T.serial(0, p.block // rows) as half:
                base = T.Bind((b * p.block + half * rows) * (vectors * self.lanes))
                self._multiply_rows(
                    panel, sums, base, (begin, end), chunk * self.point.chunk, half * rows, vectors
                )

    def _multiply_rows(self, panel, sums, base, span, first_row, lane, vectors: int) -> None:
        """`rows` channels: sums[base ...] from the non-zeros in `span`, weights `lane ...` of each, rows from `first_row`."""
        lanes, rows = self.lanes, self.point.rows
        width = vectors * lanes
        acc = scratch((rows * vectors,), f"float32x{lanes}", scope="local")

        def vector(start):
            return T.ramp(start, 1, lanes)

        for i in range(rows * vectors):
            start = (
                T.broadcast(T.float32(0), lanes)
                if self.chunks == 1
                else sums[vector(base + i * lanes)]
            )
            T.buffer_store(acc, start, [i])
        begin, end = span
        with T.serial(0, end - begin) as i:
            n = T.Bind(begin + i)
            row = T.Bind(self._panel_start(first_row + self.index[n].astype("int32"), width))
            x = [T.Bind(panel[vector(row + j * lanes)]) for j in range(vectors)]
            for r in range(rows):
                weight = T.Bind(T.broadcast(self.values[n, lane + r], lanes))
                for j in range(vectors):
                    at = r * vectors + j
                    T.buffer_store(acc, acc[at] + weight * x[j], [at])
        for i in range(rows * vectors):
            T.buffer_store(sums, acc[i], [vector(base + i * lanes)])

    def _panel_start(self, position, width: int):
        """Where in the panel the vectors of a packed position begin."""
        return position * width

    # -- store ---------------------------------------------------------------------------------------------------------

    def _store(self, sums, first, first_channel, channels, vectors, width) -> None:
        """Transpose a part's sums to channels last and store them through the epilogue."""
        p, lanes = self.problem, self.lanes
        if p.outputs < lanes:
            with T.serial(0, width) as pixel, self._stored(T.Bind(first + pixel)) as place:
                for o in range(p.outputs):
                    self.kernel.store(sums[self.slot[o] * width + pixel], [*place, _i(o)])
            return
        stride = self.parts[-1][1]
        staged = scratch((lanes * stride,))
        blocks = T.Bind((channels + lanes - 1) // lanes)

        def channel(b):
            return tirx.min(b * lanes, channels - lanes)

        # A group of pixels is transposed whole before it is stored, so that each pixel's channels are written in one go.
        with T.serial(0, vectors) as g:
            with T.serial(0, blocks) as b:
                c = T.Bind(channel(b))
                row = scratch((lanes,), "int32", scope="local")
                slots = self.slot[T.ramp(first_channel + c, 1, lanes)]
                T.buffer_store(row, slots * width + g * lanes, [T.ramp(0, 1, lanes)])
                at = [T.Bind(row[lane]) for lane in range(lanes)]
                columns = _transpose(
                    lambda lane, quad: sums[T.ramp(at[lane] + 4 * quad, 1, 4)], lanes // 4, lanes
                )
                for k, value in enumerate(columns):
                    T.buffer_store(staged, value, [T.ramp(c + k * stride, 1, lanes)])
            with T.serial(0, lanes) as j, self._stored(T.Bind(first + g * lanes + j)) as place:
                with T.serial(0, blocks) as b:
                    c = T.Bind(channel(b))
                    value = staged[T.ramp(c + j * stride, 1, lanes)]
                    self.kernel.store(value, [*place, T.ramp(first_channel + c, 1, lanes)])

    @contextmanager
    def _stored(self, pixel):
        """The indices of the output, without the channel, for a pixel of a tile; its body only runs if there is one."""
        indices: list = []
        rest = pixel
        for extent in reversed(self.kernel.fused.shape[1:-1]):
            indices.insert(0, rest % extent)
            rest = rest // extent
        if len(self.kernel.fused.shape) > 1:
            indices.insert(0, rest)
        if self.problem.pixels % self.lanes == 0:
            yield indices
        else:
            with T.If(pixel < self.problem.pixels), T.Then():
                yield indices


def _transpose(load, quads: int, lanes: int) -> list:
    """`4 * quads` vectors, the k-th holding value k of each of `lanes` sources; `load(lane, quad)` reads 4 of a source.

    Groups of 4 are inserted where they end, so that two rounds of shuffles within groups of 4 finish the transposition.
    They are read source by source, because sources 4 KiB apart share one cache set.
    """
    pieces = lanes // 4

    def joined(k: int, quad: int):
        parts = [load(4 * s + k, quad) for s in range(pieces)]
        return T.Bind(parts[0] if pieces == 1 else tirx.Shuffle(parts, list(range(lanes))))

    def in_lane(a, b, pattern):
        """The same selection of 4 from two vectors in every group of 4; 0..3 from a, 4..7 from b."""
        chosen = [4 * s + (q if q < 4 else lanes + q - 4) for s in range(pieces) for q in pattern]
        return T.Bind(tirx.Shuffle([a, b], chosen))

    sources = [[joined(k, quad) for quad in range(quads)] for k in range(4)]
    columns = []
    for quad in range(quads):
        a = [sources[k][quad] for k in range(4)]
        low01, high01 = in_lane(a[0], a[1], (0, 4, 1, 5)), in_lane(a[0], a[1], (2, 6, 3, 7))
        low23, high23 = in_lane(a[2], a[3], (0, 4, 1, 5)), in_lane(a[2], a[3], (2, 6, 3, 7))
        columns += [
            in_lane(low01, low23, (0, 1, 4, 5)), in_lane(low01, low23, (2, 3, 6, 7)),
            in_lane(high01, high23, (0, 1, 4, 5)), in_lane(high01, high23, (2, 3, 6, 7)),
        ]  # fmt: skip
    return columns


def _arguments(kernel: Emission) -> dict:
    """The anchor's inputs by name, in the order of the operator's definition. Raises ScheduleError if one is missing."""
    names = ("x", "pointer", "index", "values", "slot")
    fused = kernel.fused
    buffers = [
        b for p, b in zip(fused.params, kernel._buffers) if any(p.same_as(i) for i in fused.inputs)
    ]
    if len(buffers) != len(names):
        raise ScheduleError(
            "the anchor of a sparse kernel has other arguments",
            found=str(len(buffers)),
            wanted=str(names),
        )
    return dict(zip(names, buffers))
