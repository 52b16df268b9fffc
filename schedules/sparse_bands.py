# SPDX-License-Identifier: Apache-2.0
"""How sparse kernels go through a band of padded lines: a few output channels at a time, tile after tile."""

from __future__ import annotations

from contextlib import contextmanager

from tvm.tirx.script.builder import ir as T


class Bands:
    """The loops of kernels whose panel, a band of padded planes, stays near: of few output channels all sums of the band
    are made before they are stored. For subclasses of `sparse_planes.Planes` with the members `lines`, `window` and `band`,
    the sums kept of a channel."""

    def _multiply_band(self, panel, sums, part, tiles: tuple[int, int, int]) -> None:
        """The output channels of a part, `rows` at a time, for all `tiles` (`tiles_of`) of a band."""
        p, rows = self.problem, self.point.rows
        first_channel, channels = self._part(part)
        with T.serial(0, (channels + p.block - 1) // p.block) as b:
            at = T.Bind(first_channel // p.block + b)
            span = T.Bind(self.pointer[at]), T.Bind(self.pointer[at + 1])
            block = T.Bind(self.order[at].astype("int32"))
            with T.serial(0, p.block // rows) as half:
                channel = T.Bind(first_channel + block * p.block + half * rows)

                def multiply(first, vectors: int, half=half, channel=channel, span=span) -> None:
                    self.first = first
                    self._fetch_stores(channel, first, vectors)
                    acc = self._multiply_rows(
                        panel, None, 0, span, 0, half * rows, vectors, channel
                    )
                    self._keep(acc, sums, first, vectors, channel)

                self._each_tile(tiles, multiply)
                self._store_band(sums, channel)

    def _fetch_stores(self, channel, first, vectors: int) -> None:
        """Before a tile of `vectors` from `first` on is multiplied, ask for the lines it will be stored in."""

    def _store_band(self, sums, channel) -> None:
        """Store the sums of a band of `rows` channels from `channel` on."""
        raise NotImplementedError

    @contextmanager
    def _output(self, channel, row):
        """(where the sums of row `row` of a tile begin, its output channel): for a body that runs if there is one."""
        p = self.problem
        begin, o = T.Bind(row * self.band), T.Bind(channel + row)
        if p.outputs % p.block == 0:
            yield begin, o
        else:  # what only fills the last block is stored nowhere
            with T.If(o < p.outputs), T.Then():
                yield begin, o

    def _stride(self, width: int):
        return self.band

    def _panel_start(self, position, width: int):
        return self.first + position
