# SPDX-License-Identifier: Apache-2.0
"""Contractions of float32 pixels with weights of +-1, a bit each: sums of a few signed channels are looked up, not computed.

    Y[n, oh, ow, o] = sum over r, s, c of X[n, ih, iw, c] * (1 if bit(W[o, r, s], c) else -1)

The channels of a pixel are cut into fields of log2(lanes). A field of one pixel can only add so many different sums as a
vector has lanes: these are its table, computed once for all taps and output channels that read the pixel. What a field
of weights selects for a vector of output channels is then one permutation of the table, and an addition: two instructions
for 64 products with AVX-512 (a multiply-add computes 16), two for 24 with AVX2.

Weights are packed `[panels][R][S][words][nv][lanes]`: a word holds the fields of one output channel, first field lowest, and
is shifted as it is used up. Rows of output are computed in strips whose tables stay in the second-level cache; beyond the border
the tables are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules import windows
from schedules.annotated import Annotated
from schedules.bit_words import WORD_BITS
from schedules.emission import PARALLEL_WORK
from schedules.errors import Declined
from schedules.fused import Emission, Fused
from schedules.target import CpuTarget
from schedules.windows import RowTiles, loop, span, splat, tile_rows, unravel, vectors

LOOPS = "sign_tables"
_PERMUTE = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}
_TILE, _SMALL_TILE = (4, 4), (3, 3)  # pixels, vectors of output channels; of 16 registers
CACHED = 0.25  # of the second-level cache, for tables


@dataclass(frozen=True)
class Problem(windows.Problem):
    """A window problem on float32 pixels."""

    @property
    def image(self) -> Problem:
        """The problem on the padded image."""
        top, left, bottom, right = self.padding
        return Problem(
            self.n, self.h + top + bottom, self.w + left + right, self.c, self.o, self.r, self.s,
            self.stride, (0, 0, 0, 0), self.dilation, self.groups,
        )  # fmt: skip


@dataclass(frozen=True)
class Point(Annotated):
    """Parameters of one kernel: `mr` pixels by `nv` vectors of `lanes` output channels; `strip` rows of output (tiles, if
    flat) whose tables are in memory at one time."""

    lanes: int
    mr: int
    nv: int
    strip: int

    @property
    def field(self) -> int:
        """Channels of a table."""
        return self.lanes.bit_length() - 1

    @property
    def per_word(self) -> int:
        """Fields of a word of weights."""
        return WORD_BITS // self.field


def supports(target: CpuTarget) -> Declined | None:
    """Why a target has no such kernel; None if it has."""
    if target.arch == "x86_64" and target.lanes in _PERMUTE:
        return None
    return Declined(f"{target.name} has no permutation of the lanes of a vector")


def fields(problem: Problem, point: Point) -> int:
    """Tables of one group of a pixel."""
    return -(-problem.group_inputs // point.field)


def packed_shape(problem: Problem, point: Point) -> tuple[int, ...]:
    """[panels of all groups, R, S, words, nv, lanes]."""
    panels = problem.groups * -(-problem.group_outputs // (point.nv * point.lanes))
    words = -(-fields(problem, point) // point.per_word)
    return (panels, problem.r, problem.s, words, point.nv, point.lanes)


def _strip_rows(problem: Problem, strip: int) -> int:
    """Rows of the image that so many rows of output read."""
    return (strip - 1) * problem.stride[0] + (problem.r - 1) * problem.dilation[0] + 1


def strip_of(problem: Problem, target: CpuTarget, mr: int, share: float) -> int:
    """`Point.strip` of about equal strips whose tables take `share` of the second-level cache, or one row more."""
    lanes, image = target.lanes, problem.image
    tables = image.groups * fields(image, Point(lanes, mr, 1, 1))
    room = int(share * target.l2_bytes) // (4 * lanes * tables)
    if image.flat:
        units, held = -(-image.row // mr), max(1, room // mr)
    else:
        units = image.oh
        held = max(1, (room // image.w - _strip_rows(image, 1)) // image.stride[0] + 1)
    return -(-units // -(-units // min(units, held)))


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """The tile that fits the registers; strips as high as the cache allows."""
    count = len(vectors(problem.group_outputs, target.lanes))
    most, nv = _TILE if target.registers == 32 else _SMALL_TILE
    mr = tile_rows(problem.image.row, most)
    return Point(target.lanes, mr, min(nv, count), strip_of(problem, target, mr, CACHED))


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused contraction. Raises ScheduleError if the packed weights do not fit its parameters."""
    problem = Problem.from_dict(fused.point["problem"])
    point = Point.from_dict(fused.point["point"])
    with fused.emit() as kernel:
        kernel.require_packed(packed_shape(problem, point))
        SignTables(kernel, fused.shape, problem, point, target).emit()
    return kernel.func


class SignTables:
    """One kernel being emitted. `shape` is the output's: [N, OH, OW, O] or, flat, any [..., O]."""

    def __init__(
        self,
        kernel: Emission,
        shape: tuple[int, ...],
        problem: Problem,
        point: Point,
        target: CpuTarget,
    ):
        self.kernel, self.shape, self.point = kernel, shape, point
        self.whole, self.problem = problem, problem.image
        self.x, self.w = kernel.inputs
        self.x_lead = tuple(int(d) for d in self.x.shape)[:-1]
        self.row = RowTiles(self.problem, point.mr, self.problem.row)
        self.fields = fields(problem, point)
        work = problem.row * problem.rows * problem.o * problem.steps
        self.parallel = target.threads > 1 and work >= PARALLEL_WORK

    def emit(self) -> None:
        """Strip by strip: its tables, then all panels of weights over all of its tiles."""
        p, strip = self.problem, self.point.strip
        size = p.groups * self.fields * self.point.lanes
        if p.flat:
            pixels = min(p.row, strip * self.point.mr)
            self.tables = T.sblock_alloc_buffer((pixels, size), "float32")
            strips = -(-self.row.count // strip)
            with loop(strips) as number:
                # The last strip begins earlier: what two strips compute is the same.
                first = tirx.min(number * (strip * self.point.mr), p.row - pixels)
                self._tabulate_flat(first, pixels)
                self._over_panels(lambda panel: self._flat_tiles(panel, first, pixels))
            return
        rows = _strip_rows(p, strip)
        self.tables = T.sblock_alloc_buffer((rows, p.w, size), "float32")
        with loop(p.n) as image, loop(-(-p.oh // strip)) as number:
            first = tirx.min(number * strip, p.oh - strip)
            self._tabulate_rows(image, first * p.stride[0], rows)
            self._over_panels(lambda panel: self._rows_of_tiles(panel, image, first))

    # ---- tables

    def _tabulate_flat(self, first, pixels: int) -> None:
        with loop(pixels, self.parallel) as i:
            self._tables_of(lambda c: self.x[(*unravel(first + i, self.x_lead), c)], [i])

    def _tabulate_rows(self, image, first, rows: int) -> None:
        """Tables of `rows` rows of the padded image from row `first` on."""
        top, left, _, right = self.whole.padding
        size = self.problem.groups * self.fields * self.point.lanes

        def zeros(i, columns: int, start: int) -> None:
            with T.serial(0, columns) as j, T.serial(0, size // self.point.lanes) as k:
                at = span(k * self.point.lanes, self.point.lanes)
                T.buffer_store(
                    self.tables, splat(T.float32(0), self.point.lanes), [i, start + j, at]
                )

        def inside(i) -> None:
            if left:
                zeros(i, left, 0)
            with T.serial(0, self.whole.w) as j:
                self._tables_of(lambda c: self.x[image, first + i - top, j, c], [i, left + j])
            if right:
                zeros(i, right, left + self.whole.w)

        with loop(rows, self.parallel) as i:
            if not (top or self.whole.padding[2]):
                inside(i)
                return
            with T.If(tirx.all(first + i >= top, first + i < self.whole.h + top)):
                with T.Then():
                    inside(i)
                with T.Else():
                    zeros(i, self.problem.w, 0)

    def _tables_of(self, channel, at: list) -> None:
        """The tables of one pixel, whose channel c is `channel(c)`: entry k adds channel i of the field where bit i of k is set."""
        lanes, width, inputs = self.point.lanes, self.point.field, self.problem.group_inputs
        signs = [
            tirx.Shuffle(
                [T.float32(1 if k >> i & 1 else -1) for k in range(lanes)], list(range(lanes))
            )
            for i in range(width)
        ]

        def table(group, number, channels: int) -> None:
            total = None
            for i in range(channels):
                term = splat(channel(group * inputs + number * width + i), lanes) * signs[i]
                total = term if total is None else total + term
            place = (group * self.fields + number) * lanes
            T.buffer_store(self.tables, total, [*at, span(place, lanes)])

        with loop(self.problem.groups) as group:
            full, rest = divmod(inputs, width)
            if full:
                with loop(full) as number:
                    table(group, number, width)
            if rest:
                table(group, full, rest)

    # ---- sums

    def _over_panels(self, tiles) -> None:
        """`tiles(panel)` for every panel: (its number, its group, its first channel, the channels it has)."""
        p, width = self.problem, self.point.nv * self.point.lanes
        full, rest = divmod(p.group_outputs, width)
        count = full + (rest > 0)

        def group(g, parallel: bool) -> None:
            start = g * p.group_outputs
            if full:
                with loop(full, parallel) as q:
                    tiles((g * count + q, g, start + q * width, width))
            if rest:
                tiles((g * count + full, g, start + full * width, rest))

        if p.groups == 1:
            group(0, self.parallel)
        else:
            with loop(p.groups, self.parallel) as g:
                group(g, False)

    def _flat_tiles(self, panel: tuple, first, pixels: int) -> None:
        mr = self.point.mr
        with loop(-(-pixels // mr)) as t:
            base = t * mr if pixels % mr == 0 else tirx.min(t * mr, pixels - mr)
            places = [list(unravel(first + base + i, self.shape[:-1])) for i in range(mr)]
            self._tile(panel, lambda r, s, i: [base + i], places)

    def _rows_of_tiles(self, panel: tuple, image, first) -> None:
        p = self.problem
        with loop(self.point.strip) as u, loop(self.row.count) as t:
            base = self.row.base(t)

            def table(r, s, i) -> list:
                column = (base + i) * p.stride[1] + s * p.dilation[1]
                return [u * p.stride[0] + r * p.dilation[0], column]

            self._tile(panel, table, [[image, first + u, base + i] for i in range(self.point.mr)])

    def _tile(self, panel: tuple, table, places: list) -> None:
        """All taps of a tile; `table(r, s, pixel)` indexes what the tap reads, `places` is where the sums go."""
        point, p = self.point, self.problem
        index, group, first_output, channels = panel
        count = -(-channels // point.lanes)
        sums = [[T.alloc_buffer((point.lanes,), "float32") for _ in range(count)] for _ in places]
        held = [T.alloc_buffer((point.lanes,), "uint32") for _ in range(count)]
        every = span(0, point.lanes)
        for row in sums:
            for each in row:
                T.buffer_store(each, splat(T.float32(0), point.lanes), [every])

        def word(r, s, q, taken: int) -> None:
            for v, each in enumerate(held):
                T.buffer_store(each, self.w[index, r, s, q, v, every], [every])
            for f in range(taken):
                number = group * self.fields + q * point.per_word + f
                for i, row in enumerate(sums):
                    at = [*table(r, s, i), span(number * point.lanes, point.lanes)]
                    entries = T.bind(self.tables[tuple(at)])
                    for each, selected in zip(row, held):
                        found = self._permuted(entries, selected[every])
                        T.buffer_store(each, each[every] + found, [every])
                if f + 1 < taken:
                    shift = splat(T.uint32(point.field), point.lanes)
                    for each in held:
                        T.buffer_store(each, tirx.shift_right(each[every], shift), [every])

        full, rest = divmod(self.fields, point.per_word)
        with loop(p.r) as r, loop(p.s) as s:
            if full:
                with loop(full) as q:
                    word(r, s, q, point.per_word)
            if rest:
                word(r, s, full, rest)
        for row, at in zip(sums, places):
            for v, each in enumerate(row):
                stored = min(point.lanes, channels - v * point.lanes)
                where = [*at, span(first_output + v * point.lanes, stored)]
                self.kernel.store(each[span(0, stored)], where)

    def _permuted(self, entries, selected):
        """Lane by lane the entry of the table that the lowest bits of `selected` number."""
        lanes = self.point.lanes
        numbers = selected.astype(f"int32x{lanes}")
        return tirx.call_llvm_pure_intrin(f"float32x{lanes}", _PERMUTE[lanes], entries, numbers)
