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
    """

    vectors: int
    rows: int
    chunk: int
    part: int
    splits: int = 1

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
        rows, vectors = 1, 8 if registers == 32 else 8
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
        _Planes(kernel, problem, Point(**notes), target).emit()
    return kernel.func


def _i(value: int):
    return T.int32(value)


class _Planes:
    """Emits one kernel. Python loops unroll, `T.serial` loops."""

    def __init__(self, kernel: Emission, problem: Problem, point: Point, target: CpuTarget):
        self.kernel, self.problem, self.point = kernel, problem, point
        self.lanes, self.threads = target.lanes, target.threads
        buffers = _arguments(kernel)
        self.x = T.decl_buffer(
            (problem.batch * problem.height * problem.width * problem.channels,), "float32", data=buffers["x"].data
        )
        self.pointer, self.index = buffers["pointer"], buffers["index"]
        self.values, self.slot = buffers["values"], buffers["slot"]
        self.parts = parts_of(problem.outputs, point.part)
        self.chunks = -(-problem.panel_rows // point.chunk)

    def emit(self) -> None:
        p, splits = self.problem, self.point.splits
        tiles, vectors, large = tiles_of(p.pixels, self.lanes, self.point.vectors)
        loop = T.parallel if self.threads > 1 and tiles * splits > 1 else T.serial
        with loop(0, tiles * splits) as task:
            tile = T.Bind(task // splits)
            share = task % splits
            if large == tiles:
                self._tile(tile * vectors, vectors, share)
                return
            with T.If(tile < large):
                with T.Then():
                    self._tile(tile * vectors, vectors, share)
                with T.Else():
                    self._tile(large * vectors + (tile - large) * (vectors - 1), vectors - 1, share)

    def _tile(self, first_vector, vectors: int, share) -> None:
        """One tile of `vectors` pixel vectors from `first_vector`, the share-th part of its output channels."""
        p, count = self.problem, len(self.parts)
        width = vectors * self.lanes
        panel = T.alloc_buffer((p.panel_rows * width,), "float32")
        sums = T.alloc_buffer((-(-self.parts[-1][1] // p.block) * p.block * width,), "float32")
        first = T.Bind(first_vector * self.lanes)
        self._pack(panel, first, vectors)
        splits = self.point.splits
        begin, end = (0, count) if splits == 1 else (share * count // splits, (share + 1) * count // splits)
        with T.serial(begin, end) as part:
            first_channel = T.Bind(part * self.point.part)
            channels = self.parts[-1][1]
            if count > 1:
                channels = T.Bind(tirx.Select(part == count - 1, _i(channels), _i(self.point.part)))
            if self.chunks > 1:
                self._clear(sums, channels, vectors)
                with T.serial(0, self.chunks) as chunk:
                    self._multiply(panel, sums, first_channel, channels, chunk, vectors)
            else:
                self._multiply(panel, sums, first_channel, channels, 0, vectors)
            self._store(sums, first, first_channel, channels, vectors)

    # -- panel ---------------------------------------------------------------------------------------------------------

    def _pack(self, panel, first, vectors: int) -> None:
        """Fill `panel[tap * C + c][pixel]` from channels-last x; zero where a tap falls on padding."""
        p, lanes = self.problem, self.lanes
        with T.serial(0, vectors) as g:
            pixel = T.Bind(tirx.min(T.ramp(first + g * lanes, 1, lanes), T.broadcast(_i(p.pixels - 1), lanes)))
            offset = T.alloc_buffer((lanes,), "int32", scope="local")
            inside = T.alloc_buffer((lanes,), "int32", scope="local")
            every = T.ramp(0, 1, lanes)
            if p.pointwise:
                T.buffer_store(offset, pixel * p.channels, [every])
                self._pack_tap(panel, 0, g, offset, None, vectors)
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
                    T.buffer_store(offset, ((image * p.height + h) * p.width + w) * p.channels, [every])
                    self._pack_tap(panel, r * p.kernel[1] + s, g, offset, within, vectors)

    def _pack_tap(self, panel, tap, g, offset, inside, vectors: int) -> None:
        """Transpose one vector of pixels, every channel, to panel rows `tap * C ...`."""
        p, lanes = self.problem, self.lanes
        width = vectors * lanes

        def keep(value, at):
            T.buffer_store(panel, value, [at])

        def target(c):
            return (tap * p.channels + c) * width + g * lanes

        if p.channels < 4:
            for c in range(p.channels):
                for lane in range(lanes):
                    value = self.x[offset[lane] + c]
                    keep(value if inside is None else tirx.Select(inside[lane] != 0, value, T.float32(0)), target(c) + lane)
            return
        span = lanes if p.channels >= lanes else 4
        block = T.alloc_buffer((span * lanes,), "float32", scope="local")
        with T.serial(0, -(-p.channels // span)) as b:
            # The last block overlaps the one before where channels are no multiple of it: same values, written twice.
            c = T.Bind(b * span if p.channels % span == 0 else tirx.min(b * span, p.channels - span))
            _transpose(
                lambda lane, quad: self.x[T.ramp(offset[lane] + c + 4 * quad, 1, 4)], block, span // 4, lanes
            )
            for k in range(span):
                value = block[T.ramp(k * lanes, 1, lanes)]
                if inside is not None:
                    within = inside[T.ramp(0, 1, lanes)] != T.broadcast(_i(0), lanes)
                    value = tirx.Select(within, value, T.broadcast(T.float32(0), lanes))
                keep(value, T.ramp(target(c + k), 1, lanes))

    # -- multiply ------------------------------------------------------------------------------------------------------

    def _clear(self, sums, channels, vectors: int) -> None:
        with T.serial(0, -(-channels // self.problem.block) * self.problem.block * vectors) as i:
            T.buffer_store(sums, T.broadcast(T.float32(0), self.lanes), [T.ramp(i * self.lanes, 1, self.lanes)])

    def _multiply(self, panel, sums, first_channel, channels, chunk, vectors: int) -> None:
        """Add one chunk of panel rows to the sums of a part's channels."""
        p, lanes, rows = self.problem, self.lanes, self.point.rows
        width = vectors * lanes
        with T.serial(0, (channels + p.block - 1) // p.block) as b:
            acc = T.alloc_buffer((rows * vectors * lanes,), "float32", scope="local")
            x = T.alloc_buffer((vectors * lanes,), "float32", scope="local")
            at = T.Bind(chunk * p.blocks + first_channel // p.block + b)
            begin, end = T.Bind(self.pointer[at]), T.Bind(self.pointer[at + 1])

            def run(half) -> None:
                def place(i, j):
                    return T.ramp((b * p.block + half * rows + i) * width + j * lanes, 1, lanes)

                def a(i, j):
                    return T.ramp((i * vectors + j) * lanes, 1, lanes)

                for i in range(rows):
                    for j in range(vectors):
                        start = T.broadcast(T.float32(0), lanes) if self.chunks == 1 else sums[place(i, j)]
                        T.buffer_store(acc, start, [a(i, j)])
                with T.serial(0, end - begin) as n:
                    k = T.Bind(self.index[begin + n].astype("int32"))
                    row = T.Bind((chunk * self.point.chunk + k) * width)
                    for j in range(vectors):
                        T.buffer_store(x, panel[T.ramp(row + j * lanes, 1, lanes)], [T.ramp(j * lanes, 1, lanes)])
                    for i in range(rows):
                        weight = T.broadcast(self.values[begin + n, half * rows + i], lanes)
                        for j in range(vectors):
                            T.buffer_store(acc, acc[a(i, j)] + weight * x[T.ramp(j * lanes, 1, lanes)], [a(i, j)])
                for i in range(rows):
                    for j in range(vectors):
                        T.buffer_store(sums, acc[a(i, j)], [place(i, j)])

            if rows == p.block:
                run(0)
            else:
                with T.serial(0, p.block // rows) as half:
                    run(half)

    # -- store ---------------------------------------------------------------------------------------------------------

    def _store(self, sums, first, first_channel, channels, vectors: int) -> None:
        """Transpose a part's sums to channels last and store them through the epilogue."""
        p, lanes = self.problem, self.lanes
        width = vectors * lanes
        if p.outputs < lanes:
            with T.serial(0, width) as pixel, T.If(first + pixel < p.pixels), T.Then():
                for o in range(p.outputs):
                    self.kernel.store(sums[self.slot[o] * width + pixel], self._place(first + pixel, _i(o)))
            return
        with T.serial(0, (channels + lanes - 1) // lanes) as b:
            c = T.Bind(tirx.min(b * lanes, channels - lanes))
            row = T.alloc_buffer((lanes,), "int32", scope="local")
            every = T.ramp(0, 1, lanes)
            T.buffer_store(row, self.slot[T.ramp(first_channel + c, 1, lanes)] * width, [every])
            with T.serial(0, vectors) as g:
                block = T.alloc_buffer((lanes * lanes,), "float32", scope="local")
                _transpose(
                    lambda lane, quad: sums[T.ramp(row[lane] + g * lanes + 4 * quad, 1, 4)], block, lanes // 4, lanes
                )
                with T.serial(0, lanes) as j:
                    pixel = T.Bind(first + g * lanes + j)

                    def put() -> None:
                        value = block[T.ramp(j * lanes, 1, lanes)]
                        self.kernel.store(value, self._place(pixel, T.ramp(first_channel + c, 1, lanes)))

                    if p.pixels % lanes == 0:
                        put()
                    else:
                        with T.If(pixel < p.pixels), T.Then():
                            put()

    def _place(self, pixel, channel) -> list:
        """Indices of the output for a flat pixel number."""
        indices = [channel]
        for extent in reversed(self.kernel.fused.shape[1:-1]):
            indices.insert(0, pixel % extent)
            pixel = pixel // extent
        if len(self.kernel.fused.shape) > 1:
            indices.insert(0, pixel)
        return indices


def _transpose(load, block, quads: int, lanes: int) -> None:
    """`block[4 * quad + j][lane] = load(lane, quad)[j]` for `lanes` sources of `quads` groups of 4 values.

    Each source is read in groups of 4 that are inserted where they end, so that two rounds of shuffles within groups of 4
    finish the transposition; source by source, because sources 4 KiB apart share one cache set.
    """
    pieces = lanes // 4

    def joined(k: int, quad: int):
        parts = [load(4 * s + k, quad) for s in range(pieces)]
        return parts[0] if pieces == 1 else tirx.Shuffle(parts, list(range(lanes)))

    def in_lane(a, b, pattern):
        """The same selection of 4 from two vectors in every group of 4; 0..3 from a, 4..7 from b."""
        return tirx.Shuffle([a, b], [4 * s + (q if q < 4 else lanes + q - 4) for s in range(pieces) for q in pattern])

    at = [[T.ramp((4 * quad + k) * lanes, 1, lanes) for k in range(4)] for quad in range(quads)]
    for k in range(4):
        for quad in range(quads):
            T.buffer_store(block, joined(k, quad), [at[quad][k]])
    for quad in range(quads):
        a = [T.Bind(block[at[quad][k]]) for k in range(4)]
        low01, high01 = T.Bind(in_lane(a[0], a[1], (0, 4, 1, 5))), T.Bind(in_lane(a[0], a[1], (2, 6, 3, 7)))
        low23, high23 = T.Bind(in_lane(a[2], a[3], (0, 4, 1, 5))), T.Bind(in_lane(a[2], a[3], (2, 6, 3, 7)))
        results = (
            in_lane(low01, low23, (0, 1, 4, 5)), in_lane(low01, low23, (2, 3, 6, 7)),
            in_lane(high01, high23, (0, 1, 4, 5)), in_lane(high01, high23, (2, 3, 6, 7)),
        )  # fmt: skip
        for k in range(4):
            T.buffer_store(block, results[k], [at[quad][k]])


def _arguments(kernel: Emission) -> dict:
    """The anchor's inputs by name, in the order of the operator's definition. Raises ScheduleError if one is missing."""
    names = ("x", "pointer", "index", "values", "slot")
    fused = kernel.fused
    buffers = [b for p, b in zip(fused.params, kernel._buffers) if any(p.same_as(i) for i in fused.inputs)]
    if len(buffers) != len(names):
        raise ScheduleError("the anchor of a sparse kernel has other arguments", found=str(len(buffers)), wanted=str(names))
    return dict(zip(names, buffers))
