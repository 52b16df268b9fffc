# SPDX-License-Identifier: Apache-2.0
"""Lower `kerf.sparse_conv2d` and `kerf.sparse_dense`: pack the weight and define the sum over its non-zeros.

    rewrite: kerf.sparse_conv2d(x, w, grain)  ->  call_tir(sparse_conv, (x, pointer, index, values, slot))
"""

from __future__ import annotations

import math

from tvm import relax, te, tirx

from passes.layers import attrs_of, const_array, shape_of
from passes.lower import call_te
from passes.sparse.format import SparseFormat, block_of, block_pattern, pack
from schedules import sparse_planes
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
    return lower_at(bb, call, problem, sparse_planes.default_point(problem, target))


def lower_at(bb: relax.BlockBuilder, call: relax.Call, problem: Problem, point: Point) -> relax.Expr:
    """As `lower_sparse`, with the kernel's parameters given."""
    attrs = attrs_of(call)
    weight = const_array(call.args[1])
    packed = pack(weight, attrs["grain"], groups=problem.groups, chunk=point.chunk, part=point.part)
    arrays = [relax.const(a) for a in (packed.pointer, packed.index, packed.values, packed.slot)]
    notes = annotations("sparse_planes", problem=problem.to_dict(), **point.to_dict())
    kind = "dense" if weight.ndim == 2 else "conv{}x{}".format(*problem.kernel)
    hint = f"sparse_{kind}_{attrs['grain'].replace(':', '')}"
    return call_te(bb, definition(problem, packed, shape_of(call), notes), call.args[0], *arrays, hint=hint)


def definition(problem: Problem, packed: SparseFormat, out_shape: tuple[int, ...], notes: dict):
    """The te function (x, pointer, index, values, slot) -> y, one sum over the non-zeros of each output channel."""
    p, block, blocks, chunk = problem, packed.block, packed.blocks, packed.chunk
    parts = sparse_planes.parts_of(p.outputs, packed.part)
    conv = len(packed.shape) == 4

    def first_of_part(o):
        return tirx.min(o // packed.part, len(parts) - 1) * packed.part

    def define(x, pointer, index, values, slot):
        q = te.reduce_axis((0, packed.chunks), "chunk")
        j = te.reduce_axis((0, chunk), "nonzero")

        def term(*at):
            o = at[-1]
            b = q * blocks + first_of_part(o) // block + slot[o] // block
            n = pointer[b] + j
            row = q * chunk + index[n].astype("int32")
            present = n < pointer[b + 1]
            if not conv:
                return tirx.if_then_else(present, values[n, slot[o] % block] * x[(*at[:-1], row)], 0.0)
            tap, c = row // p.channels, row % p.channels
            h = at[1] * p.strides[0] + tap // p.kernel[1] * p.dilation[0] - p.padding[0]
            w = at[2] * p.strides[1] + tap % p.kernel[1] * p.dilation[1] - p.padding[1]
            inside = tirx.all(h >= 0, h < p.height, w >= 0, w < p.width)
            product = values[n, slot[o] % block] * tirx.if_then_else(inside, x[at[0], h, w, c], 0.0)
            return tirx.if_then_else(present, product, 0.0)

        return te.compute(
            out_shape, lambda *at: te.sum(term(*at), axis=[q, j]), name="sparse_planes", attrs=notes
        )

    return define
