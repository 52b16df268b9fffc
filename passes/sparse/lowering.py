# SPDX-License-Identifier: Apache-2.0
"""Lower `kerf.sparse_conv2d` and `kerf.sparse_dense`: pack the weight and define the sum over its non-zeros.

rewrite: kerf.sparse_conv2d(x, w, grain)  ->  call_tir(sparse_conv, (x, pointer, index, values, slot))
"""

from __future__ import annotations

import math

import numpy as np
from tvm import relax, te, tirx

from passes.layers import attrs_of, const_array, shape_of
from passes.lower import call_te
from passes.sparse.format import SparseFormat, block_of, block_pattern, pack
from schedules import sparse_planes, sparse_windows
from schedules.fused import annotations
from schedules.sparse_planes import Point, Problem
from schedules.target import CpuTarget


def problem_of(call: relax.Call) -> Problem:
    """The kernel's problem: of a convolution (channels last), or of a matrix product seen as a 1x1 convolution."""
    attrs = attrs_of(call)
    x, w, out = shape_of(call.args[0]), shape_of(call.args[1]), shape_of(call)
    block = block_of(attrs["grain"])
    stored = int(block_pattern(const_array(call.args[1]), block).sum())
    if len(w) == 2:
        pixels = math.prod(x[:-1])
        return Problem(1, 1, pixels, x[-1], w[0], 1, pixels, block=block, stored=stored)
    return Problem(
        x[0], x[1], x[2], x[3], w[0], out[1], out[2], tuple(w[2:]), tuple(attrs["strides"]), tuple(attrs["dilation"]),
        tuple(attrs["padding"]), attrs["groups"], block, stored,
    )  # fmt: skip


def lower_sparse(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """Both operators; activations channels last."""
    problem = problem_of(call)
    return lower_at(bb, call, problem, default_point(problem, target))


def default_point(problem: Problem, target: CpuTarget) -> Point:
    """The kernel's parameters: padded planes where they suit, else one panel row per tap."""
    return sparse_windows.default_point(problem, target) or sparse_planes.default_point(
        problem, target
    )


def pack_at(weight: np.ndarray, grain: str, problem: Problem, point: Point) -> SparseFormat:
    """The weight packed for one kernel."""
    if not point.lines:
        return pack(weight, grain, groups=problem.groups, chunk=point.chunk, part=point.part)
    outputs, per_group = weight.shape[:2]
    places = sparse_windows.offsets(problem, point.lines)
    first = np.arange(outputs) // (outputs // problem.groups) * per_group
    columns = places[first[:, None] + np.arange(per_group)[None, :]].reshape(outputs, -1)
    return pack(weight, grain, groups=problem.groups, part=point.part, columns=columns)


def lower_at(
    bb: relax.BlockBuilder, call: relax.Call, problem: Problem, point: Point
) -> relax.Expr:
    """As `lower_sparse`, with the kernel's parameters given."""
    attrs = attrs_of(call)
    weight = const_array(call.args[1])
    packed = pack_at(weight, attrs["grain"], problem, point)
    arrays = [relax.const(a) for a in (packed.pointer, packed.index, packed.values, packed.slot)]
    loops = "sparse_windows" if point.lines else "sparse_planes"
    notes = annotations(loops, problem=problem.to_dict(), **point.to_dict())
    kind = "dense" if weight.ndim == 2 else "conv{}x{}".format(*problem.kernel)
    hint = f"sparse_{kind}_{attrs['grain'].replace(':', '')}"
    define = definition(problem, point, packed, shape_of(call), notes)
    return call_te(bb, define, call.args[0], *arrays, hint=hint, indices=(1, 2, 4))


def definition(
    problem: Problem, point: Point, packed: SparseFormat, out_shape: tuple[int, ...], notes: dict
):
    """The te function (x, pointer, index, values, slot) -> y, one sum over the non-zeros of each output channel."""
    p, block, blocks, chunk = problem, packed.block, packed.blocks, packed.chunk
    parts = sparse_planes.parts_of(p.outputs, packed.part)
    conv = len(packed.shape) == 4

    def first_of_part(o):
        return tirx.min(o // packed.part, len(parts) - 1) * packed.part

    def place(row):
        """(channel, pixels down, pixels right of the window's corner) of a stored position."""
        if not point.lines:
            tap = row // p.channels
            return (
                row % p.channels,
                tap // p.kernel[1] * p.dilation[0],
                tap % p.kernel[1] * p.dilation[1],
            )
        window = sparse_windows.window_of(p, point.lines)
        phase, within = row % window.channel // window.plane, row % window.channel % window.plane
        down = within // window.line * p.strides[0] + phase // window.phases[1]
        return (
            row // window.channel,
            down,
            within % window.line * p.strides[1] + phase % window.phases[1],
        )

    def define(x, pointer, index, values, slot):
        q = te.reduce_axis((0, packed.chunks), "chunk")
        j = te.reduce_axis((0, min(chunk, p.panel_rows // p.groups)), "nonzero")

        def term(*at):
            o = at[-1]
            b = q * blocks + first_of_part(o) // block + slot[o] // block
            n = pointer[b] + j
            row = q * chunk + index[n].astype("int32")
            present = n < pointer[b + 1]
            if not conv:
                return tirx.if_then_else(
                    present, values[n, slot[o] % block] * x[(*at[:-1], row)], 0.0
                )
            c, down, right = place(row)
            h = at[1] * p.strides[0] + down - p.padding[0]
            w = at[2] * p.strides[1] + right - p.padding[1]
            inside = tirx.all(h >= 0, h < p.height, w >= 0, w < p.width)
            product = values[n, slot[o] % block] * tirx.if_then_else(inside, x[at[0], h, w, c], 0.0)
            return tirx.if_then_else(present, product, 0.0)

        return te.compute(
            out_shape, lambda *at: te.sum(term(*at), axis=[q, j]), name="sparse_planes", attrs=notes
        )

    return define
