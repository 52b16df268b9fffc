# SPDX-License-Identifier: Apache-2.0
"""How the sparse kernels multiply: the non-zeros of a few output channels with vectors of a panel, in registers."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.emission import ramp
from schedules.sparse_panel import small, transpose_quads
from schedules.windows import prefetch


class Products:
    """The products of `sparse_planes.Planes`, which has the members they use."""

    def _zeros(self):
        return T.broadcast(tirx.const(0, self.elements.dtype), self.lanes)

    def _stride(self, width: int):
        """Sums of a row."""
        return width

    def _multiply_rows(
        self, panel, sums, base, span, first_row, lane, vectors: int, channel, behind: int = 0
    ) -> list:
        """`rows` channels from `channel` on: a buffer of sums of each, of the non-zeros in `span`, weights `lane ...` of
        each, panel rows from `first_row`. The sums of further chunks begin with those from `base`. The pixels `behind` the
        vectors, a few, are summed with the channels in lanes, and make one more vector, which repeats the last of them."""
        lanes, rows = self.lanes, self.point.rows
        width = vectors * lanes
        # A buffer per channel: one for all would be too large for the stack, and what is on the heap is written each time.
        acc = [small((width + lanes * (behind > 0),), self.elements.dtype) for _ in range(rows)]
        across = [small((rows,), self.elements.dtype) for _ in range(behind)]
        for pixel in across:
            zero = tirx.const(0, self.elements.dtype)
            T.buffer_store(pixel, T.broadcast(zero, rows), [ramp(0, rows)])
        for r in range(rows):
            first = self._zeros()
            if self.bias is not None:
                at = channel + r
                if self.problem.outputs % self.problem.block:  # what only fills the last block
                    at = tirx.min(at, self.problem.outputs - 1)
                first = T.Bind(T.broadcast(self.bias[at], lanes))
            for j in range(vectors):
                start = sums[self._kept(base, r, j, width)] if self.chunks > 1 else first
                T.buffer_store(acc[r], start, [T.ramp(j * lanes, 1, lanes)])
        self._add_products(acc, across, panel, span, first_row, lane, vectors)
        for r in range(rows if behind else 0):
            of_lanes = [min(pixel, behind - 1) * rows + r for pixel in range(lanes)]
            # A shuffle has no more lanes than what it picks from.
            of = [across[i % behind][ramp(0, rows)] for i in range(max(behind, lanes // rows))]
            T.buffer_store(acc[r], tirx.Shuffle(of, of_lanes), [ramp(width, lanes)])
        return acc

    def _add_products(
        self, acc: list, across: list, panel, span, first_row, lane, vectors: int
    ) -> None:
        """Add to the sums of `_multiply_rows` the products of the non-zeros in `span`."""
        rows, width = self.point.rows, vectors * self.lanes
        begin, end = span
        run = len(self.steps)
        with T.serial(0, end - begin if run == 1 else (end - begin) // run) as i:
            n = T.Bind(begin + i * run)
            row = T.Bind(self._panel_start(first_row + self.index[n].astype("int32"), width))
            self._fetch_ahead(panel, n, width)
            for which, step in enumerate(self.steps):
                self._add_row(acc, panel, row + step, (n + which, lane), vectors)
            if across:
                self._add_across(across, panel, row + width, self.values[n, ramp(lane, rows)])

    def _add_row(self, acc: list, panel, start, place: tuple, vectors: int) -> None:
        """Add the products of the weights of a non-zero at `place`, one of each row, with a panel's vectors from `start` on."""
        lanes = self.lanes
        x = [panel[T.ramp(start + self._vector(j, vectors), 1, lanes)] for j in range(vectors)]
        if self.problem.planes_in:  # copied as they lie
            x = [self.elements.pixels(pixels) for pixels in x]
        x = [T.Bind(pixels) for pixels in x]
        n, lane = place
        for r, sums in enumerate(acc):
            weight = T.Bind(T.broadcast(self.values[n, lane + r], lanes))
            for j in range(vectors):
                at = T.ramp(j * lanes, 1, lanes)
                T.buffer_store(sums, self.elements.add(sums[at], weight, x[j], lanes), [at])

    def _add_across(self, across: list, panel, start, weights) -> None:
        """Add the products of a non-zero's weights, one of each row, with the pixels of the panel from `start` on."""
        rows = self.point.rows
        weights = T.Bind(weights)
        for i, pixel in enumerate(across):
            x = T.broadcast(self.elements.pixels(panel[start + i]), rows)
            held = self.elements.add(pixel[ramp(0, rows)], weights, x, rows)
            T.buffer_store(pixel, held, [ramp(0, rows)])

    def _kept(self, base, row: int, vector: int, width: int):
        """Where in the sums a vector of a tile's row is kept."""
        return T.ramp(base + (row * self._stride(width) + vector * self.lanes), 1, self.lanes)

    def _keep(self, acc: list, sums, base, vectors: int, channel) -> None:
        """Sums of the channels from `channel` on from registers to where the store will find them."""
        lanes = self.lanes
        width = vectors * lanes
        if not self.by_quads:
            for r, row in enumerate(acc):
                for j in range(vectors):
                    at = T.ramp(j * lanes, 1, lanes)
                    T.buffer_store(sums, row[at], [self._kept(base, r, j, width)])
            return
        for r in range(0, len(acc), 4):
            for j in range(vectors):
                at = T.ramp(j * lanes, 1, lanes)
                columns = transpose_quads([acc[r + i][at] for i in range(4)], lanes)
                for q, value in enumerate(columns):
                    place = base + r * width + (4 * j + q) * lanes
                    T.buffer_store(sums, value, [T.ramp(place, 1, lanes)])

    def _fetch_ahead(self, panel, n, width: int) -> None:
        """Fetch what a non-zero after number n will read."""

    def _fetch_row(self, panel, n, width: int, lines: int) -> None:
        """Fetch what non-zero number n will read, some `lines` of the panel, into the first-level cache."""
        position = T.Bind(self.index[n].astype("int32"))
        start = T.Bind(self._panel_start(position, width))
        for j in range(lines):
            prefetch(panel[start + j * self.lanes], near=True)

    def _panel_start(self, position, width: int):
        """Where in the panel the vectors of a packed position begin."""
        if self.in_place:
            return position * self.problem.plane_in + self.starts[self.input]
        return position * width

    def _vector(self, number: int, vectors: int):
        """Where behind that a tile's vector lies."""
        if self.in_place and number == vectors - 1:
            return self.last
        return number * self.lanes

    def _begin(self, first, vectors: int) -> None:
        """A tile from pixel `first` of its image on: where its planes are read, if they are read where they lie."""
        if self.in_place:
            images = [channels * self.problem.plane_in for channels in self.problem.inputs]
            self.starts = [_fixed(self.image * image + first) for image in images]
            self.last = (vectors - 1) * self.lanes
            if self.problem.computed % self.lanes:  # the last one ends with the image
                self.last = T.Bind(self._start(first, vectors - 1) - first)


def _fixed(value):
    """`value` where it is, not simplified into the addresses that it is added to: constant parts of these stay apart."""
    kept = small((1,), "int32")
    T.buffer_store(kept, value, [0])
    return T.Bind(kept[0])
