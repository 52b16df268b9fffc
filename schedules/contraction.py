# SPDX-License-Identifier: Apache-2.0
"""Contractions by register tile: convolution of any kernel, stride, dilation and groups; dense layers; matrix-vector.

    Y[n, oh, ow, o] = sum over r, s, c of X[n, oh*sh + r*dh - top, ow*sw + s*dw - left, c] * W[o, c, r, s]

A tile of `mr` pixels x `nv` vectors of output channels stays in registers while the sum runs. Weights are packed
`[panels][R][S][C/groups][nv * lanes]`, so that one panel is read in order. There is no padded copy of the input: rows
outside the image shorten the loop over r, columns outside it are left out of the edge tiles when they are generated.
Where a row is no multiple of `mr`, the last tile overlaps the one before it; both write the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.errors import ScheduleError
from schedules.fused import Emission, Fused
from schedules.target import CpuTarget


@dataclass(frozen=True)
class Problem:
    """X [n, h, w, c] (*) W [o, c/groups, r, s]; a dense layer with M rows is n = h = 1, w = M."""

    n: int
    h: int
    w: int
    c: int
    o: int
    r: int = 1
    s: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def oh(self) -> int:
        return (self.h + self.padding[0] + self.padding[2] - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def ow(self) -> int:
        return (self.w + self.padding[1] + self.padding[3] - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1

    @property
    def group_inputs(self) -> int:
        return self.c // self.groups

    @property
    def group_outputs(self) -> int:
        return self.o // self.groups

    @property
    def flat(self) -> bool:
        """Whether output pixel i reads exactly input pixel i, so that tiles may run across rows and images."""
        return (self.r, self.s, self.stride) == (1, 1, (1, 1)) and not any(self.padding)

    @property
    def row(self) -> int:
        """Pixels in a row of tiles."""
        return self.n * self.h * self.w if self.flat else self.ow

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return 1 if self.flat else self.n * self.oh

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(fields: dict) -> Problem:
        return Problem(**{k: tuple(v) if isinstance(v, (list, tuple)) else int(v) for k, v in fields.items()})


@dataclass(frozen=True)
class Point:
    """Parameters of one kernel.

    `order`: "panels" runs all pixels for one panel of weights before the next (weights are read once); "blocks" runs
    all panels for `block` rows of tiles (flat problems: for `block` tiles). `unroll`: steps of the sum per loop
    iteration. `sums`: independent partial sums, for tiles too small to hide the latency of an addition.
    """

    lanes: int
    mr: int
    nv: int
    order: str
    block: int = 1
    unroll: int = 1
    sums: int = 1
    prefetch: int = 0

    @property
    def panel(self) -> int:
        """Output channels of one panel of weights."""
        return self.nv * self.lanes

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(fields: dict) -> Point:
        return Point(**fields)


def panels_per_group(problem: Problem, point: Point) -> int:
    return -(-problem.group_outputs // point.panel)


def packed_shape(problem: Problem, point: Point) -> tuple[int, int, int, int, int]:
    """[panels of all groups, R, S, C/groups, channels of a panel]."""
    return (problem.groups * panels_per_group(problem, point), problem.r, problem.s, problem.group_inputs, point.panel)


def vectors(outputs: int, lanes: int) -> list[tuple[int, int]]:
    """(lanes computed, lanes stored) of the vectors covering `outputs` channels; only the last may be narrower."""
    widths = [(lanes, lanes)] * (outputs // lanes)
    if rest := outputs % lanes:
        widths.append((min(lanes, max(4, 1 << (rest - 1).bit_length())), rest))
    return widths


# ---------------------------------------------------------------------------------------------- decide

_WEIGHT_BYTES_KEPT = 0.4  # share of L2 that weights may take and still be there for the next block of pixels
_ALIAS_BYTES = 4096  # addresses this far apart compete for one set of the first-level cache


def tile_rows(row: int, largest: int) -> int:
    """The tile height that covers `row` pixels with as few tiles as `largest` would and overlaps least."""
    tiles = -(-row // max(1, min(row, largest)))
    return -(-row // tiles)


def _tile_cycles(mr: int, widths: list, sums: int) -> float:
    """Cycles per step of the sum: two FMA and two load ports, latency 4, and what instructions beside FMAs cost.

    The last two terms are measured (Cascade Lake, tiles from 28x1 to 4x6): each broadcast and each vector of weights
    delays the FMAs a little, more so when another thread shares the core's front end.
    """
    nv = len(widths)
    return max(mr * nv / 2, 0.58 * (mr + nv), 4 / sums) + 0.1 * mr + 0.2 * nv


def estimated_cycles(problem: Problem, lanes: int, mr: int, nv: int, sums: int) -> float:
    """Cycles of a whole row of tiles over all channels of one group."""
    tiles = -(-problem.row // mr)
    widths = vectors(problem.group_outputs, lanes)
    steps = problem.r * problem.s * problem.group_inputs
    total = 0.0
    for first in range(0, len(widths), nv):
        part = widths[first : first + nv]
        total += tiles * (steps * _tile_cycles(mr, part, sums) + 2 * mr * len(part) + 12)
    return total


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """The tile with the least estimated time, and the order that reads the larger operand from memory once."""
    lanes = target.lanes
    pixel_bytes = problem.c * 4 * (1 if problem.flat else problem.stride[1])
    aliased = pixel_bytes % _ALIAS_BYTES == 0
    count = len(vectors(problem.group_outputs, lanes))
    best = None
    for nv in range(1, min(count, 8 if problem.row <= 2 else 6) + 1):
        largest = (target.registers - 1 - nv) // nv
        if largest < 1:
            break
        mr = tile_rows(problem.row, min(largest, 8) if aliased else largest)
        sums = 1
        while mr * nv * sums < 8 and (2 * sums * mr * nv + nv + 1) <= target.registers and sums * 2 <= problem.group_inputs:
            sums *= 2
        cost = estimated_cycles(problem, lanes, mr, nv, sums)
        if best is None or cost < best[0] * 0.99:
            best = (cost, mr, nv, sums)
    _, mr, nv, sums = best
    weight_bytes = 4 * problem.r * problem.s * problem.c * (problem.group_outputs + lanes - 1) // lanes * lanes
    panels = problem.groups * -(-count // nv)
    tiles = problem.rows * -(-problem.row // mr)
    order = "blocks" if weight_bytes <= _WEIGHT_BYTES_KEPT * target.l2_bytes or panels == 1 else "panels"
    if target.threads > 1:
        order = _order_for_threads(order, panels, tiles if problem.flat else problem.rows, target.threads)
    unroll = max(sums, 4 if mr * nv <= 14 else 2)
    prefetch = int(order == "panels" and tiles > 1)
    return Point(lanes, mr, nv, order, 1, min(unroll, problem.group_inputs), sums, prefetch)


def _order_for_threads(order: str, panels: int, units: int, threads: int) -> str:
    """The other order if the preferred one has too few parts to keep every thread busy."""

    def busy(parts: int) -> float:
        return parts / (-(-parts // threads) * threads)

    mine, other = (panels, units) if order == "panels" else (units, panels)
    if busy(mine) < 0.9 and busy(other) > busy(mine):
        return "blocks" if order == "panels" else "panels"
    return order


# ---------------------------------------------------------------------------------------------- act


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused contraction. Raises ScheduleError if the packed weights do not fit its parameters."""
    problem, point = Problem.from_dict(fused.point["problem"]), Point.from_dict(fused.point["point"])
    with fused.emit() as kernel:
        if tuple(int(d) for d in kernel.inputs[1].shape) != packed_shape(problem, point):
            raise ScheduleError(
                "packed weights of another shape", found=str(kernel.inputs[1].shape), wanted=str(packed_shape(problem, point))
            )
        _Contraction(kernel, fused.shape, problem, point, target.threads).emit()
    return kernel.func


def loop(extent: int, parallel: bool = False):
    """A loop frame over `extent`."""
    return T.parallel(0, extent) if parallel else T.serial(0, extent)


def unravel(index, shape: tuple[int, ...]) -> list:
    """The indices of flat position `index` in `shape`; dimensions of 1 get the constant 0."""
    out: list = []
    inner = math.prod(shape)
    first = True
    for extent in shape:
        inner //= extent
        if extent == 1:
            out.append(0)
            continue
        part = tirx.floordiv(index, inner) if inner > 1 else index
        out.append(part if first else tirx.floormod(part, extent))
        first = False
    return out


def kernel_rows(problem: Problem, oh) -> tuple:
    """First and one past the last kernel row that lies inside the image for output row `oh`."""
    step, dilation, top = problem.stride[0], problem.dilation[0], problem.padding[0]
    first, last = 0, problem.r
    if top > 0:
        first = tirx.max(0, tirx.floordiv(top - oh * step + dilation - 1, dilation))
    if (problem.oh - 1) * step - top + (problem.r - 1) * dilation >= problem.h:
        last = tirx.min(problem.r, tirx.floordiv(problem.h + top - oh * step + dilation - 1, dilation))
    return first, last


@dataclass(frozen=True)
class _Panel:
    """Where the panel being computed is: `index` in the packed weights, first input and output channel, its vectors."""

    index: object
    first_input: object
    first_output: object
    widths: tuple


@dataclass(frozen=True)
class _Pixels:
    """A row of tiles being computed: `image` and `oh` (None for flat problems), and the first tile's running number."""

    image: object
    oh: object
    first_tile: object


class _Contraction:
    """One kernel being emitted."""

    def __init__(self, kernel: Emission, shape: tuple[int, ...], problem: Problem, point: Point, threads: int):
        self.kernel, self.shape, self.problem, self.point = kernel, shape, problem, point
        self.x, self.w = kernel.inputs
        self.parallel = threads > 1
        self.tiles = -(-problem.row // point.mr)
        self.all_tiles = self.tiles * problem.rows

    # ---- loops over tiles

    def emit(self) -> None:
        units = self.tiles if self.problem.flat else self.problem.rows
        if self.point.order == "panels":
            self._over_panels(lambda panel: self._over_units(0, units, panel), self.parallel)
            return
        block = min(self.point.block, units)
        with loop(-(-units // block), self.parallel) as b:
            stop = (b + 1) * block if units % block == 0 else tirx.min((b + 1) * block, units)
            self._over_panels(lambda panel: self._over_units(b * block, stop, panel), False)

    def _over_panels(self, body: Callable[[_Panel], None], parallel: bool) -> None:
        problem, point = self.problem, self.point
        count = panels_per_group(problem, point)
        full = problem.group_outputs // point.panel
        whole = tuple(vectors(point.panel, point.lanes))
        rest = tuple(vectors(problem.group_outputs - full * point.panel, point.lanes))

        def group(g) -> None:
            def panel(q, widths):
                body(_Panel(g * count + q, g * problem.group_inputs, g * problem.group_outputs + q * point.panel, widths))

            if full == 1:
                panel(0, whole)
            elif full:
                with loop(full, parallel and problem.groups == 1) as q:
                    panel(q, whole)
            if rest:
                panel(full, rest)

        if problem.groups == 1:
            group(0)
        else:
            with loop(problem.groups, parallel) as g:
                group(g)

    def _over_units(self, start, stop, panel: _Panel) -> None:
        if self.point.block == 1 and self.point.order == "blocks":
            self._unit(start, panel)
            return
        with T.serial(start, stop) as u:
            self._unit(u, panel)

    def _unit(self, u, panel: _Panel) -> None:
        """One flat tile, or one row of an image in tiles."""
        problem, mr = self.problem, self.point.mr
        if problem.flat:
            base = u * mr if problem.row % mr == 0 else tirx.min(u * mr, problem.row - mr)
            self._tile(_Pixels(None, None, u), base, panel, None)
            return
        image, oh = (0, u) if problem.n == 1 else (tirx.floordiv(u, problem.oh), tirx.floormod(u, problem.oh))
        run: list[int] = []
        for t in range(self.tiles):
            if self._inside(t):
                run.append(t)
                continue
            self._row_tiles(run, image, oh, u, panel)
            run = []
            self._tile(_Pixels(image, oh, u * self.tiles + t), self._base(t), panel, self._base(t))
        self._row_tiles(run, image, oh, u, panel)

    def _base(self, tile):
        last = self.problem.row - self.point.mr
        if isinstance(tile, int):
            return min(tile * self.point.mr, last)
        return tile * self.point.mr if self.problem.row % self.point.mr == 0 else tirx.min(tile * self.point.mr, last)

    def _row_tiles(self, run: list[int], image, oh, u, panel: _Panel) -> None:
        """Consecutive tiles that touch no padding on the left or right."""
        if not run:
            return
        if len(run) == 1:
            self._tile(_Pixels(image, oh, u * self.tiles + run[0]), self._base(run[0]), panel, None)
            return
        with T.serial(run[0], run[-1] + 1) as t:
            self._tile(_Pixels(image, oh, u * self.tiles + t), self._base(t), panel, None)

    def _inside(self, tile: int) -> bool:
        base = self._base(tile)
        return all(len(self._valid(base, s)) == self.point.mr for s in range(self.problem.s))

    def _valid(self, base: int, s: int) -> list[int]:
        """Pixels of the tile at column `base` whose tap `s` lies inside the image."""
        problem = self.problem
        column = s * problem.dilation[1] - problem.padding[1]
        return [p for p in range(self.point.mr) if 0 <= (base + p) * problem.stride[1] + column < problem.w]

    # ---- one tile

    def _tile(self, pixels: _Pixels, base, panel: _Panel, edge: int | None) -> None:
        """`mr` pixels from column `base`; `edge` is that column if taps of this tile fall outside the image."""
        point = self.point
        registers = [
            [[T.alloc_buffer((width,), "float32") for width, _ in panel.widths] for _ in range(point.mr)]
            for _ in range(point.sums)
        ]
        for bank in registers:
            for row in bank:
                for (width, _), register in zip(panel.widths, row):
                    T.buffer_store(register, T.broadcast(T.float32(0), width), [T.ramp(0, 1, width)])
        self._sum(registers, pixels, base, panel, edge)
        for p in range(point.mr):
            at = unravel(base + p, self.shape[:-1]) if self.problem.flat else [pixels.image, pixels.oh, base + p]
            for v, (_, stored) in enumerate(panel.widths):
                parts = [bank[p][v][T.ramp(0, 1, stored)] for bank in registers]
                while len(parts) > 1:
                    parts = [a + b for a, b in zip(parts[::2], parts[1::2])]
                self.kernel.store(parts[0], [*at, T.ramp(panel.first_output + v * point.lanes, 1, stored)])

    def _sum(self, registers, pixels: _Pixels, base, panel: _Panel, edge: int | None) -> None:
        problem = self.problem
        everyone = list(range(self.point.mr))
        if problem.flat:
            lead = tuple(int(d) for d in self.x.shape)[:-1]
            self._run(
                registers, everyone, problem.group_inputs, 0, 0, panel, pixels,
                lambda p, k: (*unravel(base + p, lead), panel.first_input + k),
            )  # fmt: skip
            return
        with T.serial(*kernel_rows(problem, pixels.oh)) as r:
            ih = pixels.oh * problem.stride[0] + r * problem.dilation[0] - problem.padding[0]

            def at(s):
                def index(p, k):
                    iw = (base + p) * problem.stride[1] + s * problem.dilation[1] - problem.padding[1]
                    if problem.s == 1 or problem.group_inputs != problem.c or problem.dilation[1] != 1 or edge is not None:
                        return (pixels.image, ih, iw, panel.first_input + k)
                    return (pixels.image, ih, iw + tirx.floordiv(k, problem.c), tirx.floormod(k, problem.c))

                return index

            if edge is None and problem.dilation[1] == 1 and problem.groups == 1:
                self._run(registers, everyone, problem.s * problem.c, r, 0, panel, pixels, at(0))
                return
            for s in range(problem.s):
                valid = everyone if edge is None else self._valid(edge, s)
                if valid:
                    self._run(registers, valid, problem.group_inputs, r, s, panel, pixels, at(s))

    def _run(self, registers, valid, steps, r, s, panel, pixels, x_index) -> None:
        """`steps` terms of the sum, from tap (r, s) on, for the pixels in `valid`."""
        problem, point = self.problem, self.point

        def term(k, bank) -> None:
            if problem.s > 1 and steps > problem.group_inputs:
                at = (r, tirx.floordiv(k, problem.c), tirx.floormod(k, problem.c))
            else:
                at = (r, s, k)
            for p in valid:
                x = self.x[x_index(p, k)]
                for v, (width, _) in enumerate(panel.widths):
                    register, lane = registers[bank][p][v], T.ramp(0, 1, width)
                    w = self.w[(panel.index, *at, T.ramp(v * point.lanes, 1, width))]
                    T.buffer_store(register, register[lane] + T.broadcast(x, width) * w, [lane])

        unroll = min(point.unroll, steps)
        with T.serial(0, steps // unroll) as i:
            if point.prefetch:
                position = (r * problem.s + s) * problem.group_inputs + i * unroll
                self._prefetch(panel, pixels, position, unroll)
            for j in range(unroll):
                term(i * unroll + j, j % point.sums)
        for j in range(steps % unroll):
            term(steps - steps % unroll + j, j % point.sums)

    def _prefetch(self, panel: _Panel, pixels: _Pixels, position, unroll: int) -> None:
        """Ask for this iteration's share of the next panel: each tile fetches an equal part of it."""
        panel_size = math.prod(packed_shape(self.problem, self.point)[1:])
        share = -(-panel_size // self.all_tiles)
        step = -(-self.point.panel // self.all_tiles)
        for line in range(-(-step * unroll // 16)):
            offset = pixels.first_tile * share + position * step + line * 16
            address = tirx.address_of(self.w[panel.index + 1, 0, 0, 0, offset])
            T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, T.int32(0), T.int32(2), T.int32(1)))
