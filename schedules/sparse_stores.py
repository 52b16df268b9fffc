# SPDX-License-Identifier: Apache-2.0
"""How the sparse kernels store their sums through the fused epilogue: transposed to channels last, or into planes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import contextmanager

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.byte_stores import Cell, quads_of, store_cells, store_quads
from schedules.emission import covering, pieces, ramp
from schedules.sparse_panel import NEAR, joined_quads, scratch, transpose
from schedules.windows import prefetch, splat


class Stores:
    """The stores of `sparse_planes.Planes`, which has the members they use."""

    def _store_planes(self, acc: list, first, channel, vectors: int) -> None:
        """Store the sums of a tile's channels from `channel` on into their planes, through the epilogue."""
        starts = [T.Bind(self._start(first, j)) for j in range(vectors)]
        together = self.problem.together

        def store(rows: list, o) -> None:
            for j, start in enumerate(starts):
                values = [row[T.ramp(j * self.lanes, 1, self.lanes)] for row in rows]
                self._store_plane(values, o, start, self.lanes)
            self._store_past(rows, o, starts[-1], vectors)

        for r in range(0, len(acc), together):
            o = T.Bind(channel + r)
            if self.problem.outputs % self.problem.block == 0:
                store(acc[r : r + together], o)
            else:
                with T.If(o < self.problem.outputs), T.Then():
                    store(acc[r : r + together], o)

    def _fetch_planes(self, channel, pixel, vectors: int) -> None:
        """Before `rows` channels from `channel` on are multiplied for a tile from `pixel` on, ask for the lines they will be
        stored in, where the output is large: so many planes are more streams than a hardware prefetcher follows."""
        p = self.problem
        if p.together > 1 or 4 * p.pixels * p.outputs <= NEAR * self.target.l2_bytes:
            return
        pixel = T.Bind(pixel)
        for r, j in itertools.product(range(self.point.rows), range(vectors)):
            at = pixel + j * self.lanes
            prefetch(self.kernel.output[self.image, channel + r, at], write=True)

    def _store_past(self, rows: list, channel, start, vectors: int) -> None:
        """Store what is past the computed elements of the plane of `channel` if a tile's last vector, from `start` on, is the
        last of those."""
        p = self.problem
        if p.plane_out == p.computed:
            return
        with T.If(start == p.computed - self.lanes), T.Then():
            last = [T.Bind(row[vectors * self.lanes - 1]) for row in rows]
            self._repeat(last, channel, p.computed, p.plane_out)

    def _store_plane(self, values: list, channel, pixel, lanes: int) -> None:
        """Store the vectors of the channels of one plane, from `channel` on, through the epilogue."""
        if self.problem.together > 1:
            plane = T.Bind(channel // self.problem.together)
            store_quads(self.kernel, self.target, values, (self.image, plane, pixel, lanes))
        else:
            self.kernel.store(values[0], [self.image, channel, ramp(pixel, lanes)])

    def _repeat(self, last: list, channel, start: int, stop: int) -> None:
        """Store the sums `last`, one of each channel of a plane, into all its elements from `start` to `stop`."""
        for behind, lanes in pieces(stop - start, self.lanes):
            values = [splat(value, lanes) for value in last]
            self._store_plane(values, channel, T.int32(start + behind), lanes)

    def _store_behind(self, sums, begin, channel) -> None:
        """Store what lies behind the pixels of a channel's plane, whose last one it repeats, if its sums are those of the
        last band, from `begin` on, in lines."""
        p = self.problem
        if p.plane_out == p.image_pixels:
            return
        line = T.Bind(T.int32(p.out_height - 1) - self.first_line)
        with T.If(line < self.lines), T.Then():
            last = T.Bind(sums[begin + line * self.window.line + (p.out_width - 1)])
            self._repeat([last], channel, p.image_pixels, p.plane_out)

    def _stages(self) -> bool:
        """Whether the elements of a band, of several channels each, are complete before lines are picked from it: if nothing
        is read by pixel."""
        joined = self.problem.planes_out and self.problem.together > 1
        return (
            joined and not self.kernel.follows_pixels and str(self.kernel.output.dtype) == "uint8"
        )

    def _stage(self, values: list, plane, channel, at) -> None:
        """Complete a vector of elements of the plane number `plane` of a part, of the channels from `channel` on."""
        last = self.problem.outputs // self.problem.together - 1
        of = T.Bind(tirx.min(channel // self.problem.together, last))
        made = quads_of(self.kernel, self.target, values, (self.image, of, T.int32(0), self.lanes))
        T.buffer_store(self.staged, made, [ramp(T.Bind(plane * self.band + at), self.lanes)])

    def _store_staged(self, first_channel, channels) -> None:
        """Copy a part's elements of a band to their planes, without what lies beyond the lines of the output."""
        p, window, together = self.problem, self.window, self.problem.together
        planes = p.outputs // together
        size = p.batch * planes * p.image_pixels
        out = T.decl_buffer((size,), self.elements.dtype, data=self.kernel.output.data)
        with T.serial(0, channels // together) as plane, T.serial(0, self.lines) as line:
            row = T.Bind(self.first_line + line)
            with T.If(row < p.out_height), T.Then():
                start = T.Bind(plane * self.band + line * window.line)
                to = T.Bind(
                    (self.image * planes + first_channel // together + plane) * p.image_pixels
                    + row * p.out_width
                )
                for column, lanes in covering(p.out_width, self.lanes):
                    value = self.staged[ramp(start + column, lanes)]
                    T.buffer_store(out, value, [ramp(to + column, lanes)])

    def _store_kept_planes(self, sums, first, first_channel, channels, vectors: int) -> None:
        """Store a part's sums of a tile, kept `[channel][pixel]`, into their planes."""
        starts = [T.Bind(self._start(first, j)) for j in range(vectors)]

        def store(values: list, _plane, channel, j: int) -> None:
            self._store_plane(values, channel, starts[j], self.lanes)

        self._each_kept(sums, first_channel, channels, vectors, store)

    def _each_kept(self, sums, first_channel, channels, vectors: int, then: Callable) -> None:
        """`then(values, plane, channel, j)` for vector j of a tile and each plane of a part, whose sums `[channel][pixel]`
        are kept: those of its channels, from `channel` on."""
        width, together = vectors * self.lanes, self.problem.together
        with T.serial(0, channels // together) as plane:
            channel = T.Bind(first_channel + plane * together)
            for j in range(vectors):
                begin = T.Bind(plane * (together * width) + j * self.lanes)
                values = [sums[ramp(begin + i * width, self.lanes)] for i in range(together)]
                then(values, plane, channel, j)

    def _store_quads(self, sums, first, first_channel, channels, vectors, width) -> None:
        """Store a part's sums, kept by 4 channels, through the epilogue."""
        lanes = self.lanes
        pieces = lanes // 4
        with T.serial(0, vectors) as g, T.serial(0, pieces) as s:
            for q in range(4):
                with self._stored(T.Bind(self._pixel(first, g) + s * 4 + q)) as place:
                    at = T.Bind((g * 4 + q) * lanes + s * 4)

                    def load(c, at=at):
                        quads = [
                            sums[T.ramp((c + 4 * k) * width + at, 1, 4)] for k in range(pieces)
                        ]
                        return joined_quads(quads)

                    self._store_channels(load, place, first_channel, channels)

    def _store_few(self, sums, first, width) -> None:
        """Store fewer channels than one vector holds."""
        lanes = self.lanes
        with (
            T.serial(0, width) as pixel,
            self._stored(T.Bind(self._pixel(first, pixel // lanes) + pixel % lanes)) as place,
        ):
            for o in range(self.problem.outputs):
                self.kernel.store(sums[o * width + pixel], [*place, T.int32(o)])

    def _store(self, sums, first, first_channel, channels, vectors, width) -> None:
        """Transpose a part's sums to channels last and store them through the epilogue."""
        lanes = self.lanes
        stride = self.parts[-1][1]
        staged = scratch(lanes * stride, self.elements.dtype)
        blocks = T.Bind((channels + lanes - 1) // lanes)

        def channel(b):
            return tirx.min(b * lanes, channels - lanes)

        # A group of pixels is transposed whole before it is stored, so that each pixel's channels are written in one go.
        with T.serial(0, vectors) as g:
            with T.serial(0, blocks) as b:
                c = T.Bind(channel(b))
                at = [T.Bind((c + lane) * width + g * lanes) for lane in range(lanes)]
                columns = transpose(
                    lambda lane, quad: sums[T.ramp(at[lane] + 4 * quad, 1, 4)], lanes // 4, lanes
                )
                for k, value in enumerate(columns):
                    T.buffer_store(staged, value, [T.ramp(c + k * stride, 1, lanes)])
            with T.serial(0, lanes) as j, self._stored(T.Bind(self._pixel(first, g) + j)) as place:

                def load(c, j=j):
                    return staged[T.ramp(c + j * stride, 1, lanes)]

                self._store_channels(load, place, first_channel, channels)

    def _store_channels(self, load, place: list, first_channel, channels) -> None:
        """Store the vectors `load(c)` of one pixel's channels c, of a part's; bytes several vectors at a time."""
        lanes = self.lanes
        together = 1
        if self.elements.dtype == "int32" and isinstance(channels, int) and channels % lanes == 0:
            together = math.gcd(channels // lanes, 4)
        with T.serial(0, (channels + lanes * together - 1) // (lanes * together)) as b:
            cells = []
            for i in range(together):
                c = (b * together + i) * lanes
                c = T.Bind(c if together > 1 else tirx.min(c, channels - lanes))
                cells.append(Cell(load(c), tuple(place), first_channel + c, lanes))
            store_cells(self.kernel, self.target, [cells])

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
        if self.by_image or self.problem.pixels % self.lanes == 0:
            yield indices
        else:
            with T.If(pixel < self.problem.pixels), T.Then():
                yield indices
