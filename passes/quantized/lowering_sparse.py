# SPDX-License-Identifier: Apache-2.0
"""Lower integer layers whose weight has zeros: the sparse kernels, with quads of four input channels as their elements.

    rewrite: kerf.int8_conv2d(x, w, grain="block:4x4")  ->  call_tir(sparse_conv, (x, pointer, index, values, order, slot)) + starts
    rewrite: kerf.int8_pooled_conv2d(x, w, grain)  ->  the same with the maxima over windows in one kernel

A quad is 4 bytes, as a float is: its pattern, its packing, its panels and its planes are those of `passes/sparse`. Pixels
outside the image are the zero point, so that all sums of an output channel start alike.
"""

from __future__ import annotations

import numpy as np
from tvm import relax, tirx

from passes.layers import attrs_of, shape_of
from passes.lower import call_te
from passes.max_pooling import pool_of
from passes.quantized.operators import GRAINS, QUAD
from passes.sparse.format import block_pattern
from passes.sparse.lowering import definition, pack_at, structure_for
from passes.sparse.lowering_pooled import define_pooled, pays
from passes.sparse.operators import image_of
from schedules import pooled_windows, sparse_windows
from schedules.errors import Declined
from schedules.fused import annotations
from schedules.sparse_problem import Problem
from schedules.target import CpuTarget
from schedules.terms import reads_signed_pixels
from schedules.windows import Problem as Windows

# Grain of an integer weight -> grain of the matrix of its quads.
_OF_QUADS = {grain: f"out:{n}" if n > 1 else "element" for grain, n in GRAINS.items()}


def quads_of(weight: np.ndarray) -> np.ndarray:
    """int8 [O, C/groups, R, S], channels a multiple of 4 -> int32 [O, C/groups/4, R, S]: the bytes of four channels."""
    o, c, r, s = weight.shape
    moved = weight.reshape(o, c // QUAD, QUAD, r, s).transpose(0, 1, 3, 4, 2)
    return np.ascontiguousarray(moved).view(np.int32)[..., 0]


def suits_pooling(conv: relax.Call) -> bool | Declined:
    """Whether to pool where a sparse `kerf.int8_conv2d` in NCHW is computed."""
    attrs = attrs_of(conv)
    return pays(GRAINS[attrs["grain"]], attrs["groups"], -(-shape_of(conv.args[0])[1] // QUAD))


def stored_share(weight: np.ndarray, grain: str) -> float:
    """Share of a weight [O, C, R, S] (channels a multiple of 4) that a grain stores."""
    return float(block_pattern(quads_of(weight), GRAINS[grain]).mean())


def _product_with(zero_point: int, shift: int, planes: bool):
    """A term of the definition: four products, of bytes of a quad with neighbouring channels, which lie in `planes` or in
    the last axis of x."""

    def product(weight, x, place: tuple, inside):
        total = None
        for byte in range(QUAD):
            up, down = tirx.const(24 - 8 * byte, "int32"), tirx.const(24, "int32")
            w = tirx.shift_right(tirx.shift_left(weight, up), down)
            at = (*place, byte) if planes else (*place[:-1], place[-1] * QUAD + byte)
            pixel = x[at].astype("int32")
            if inside is not None:
                pixel = tirx.if_then_else(inside, pixel, tirx.const(zero_point, "int32"))
            term = w * (pixel - shift)
            total = term if total is None else total + term
        return total

    return product


def problem_of(call: relax.Call, windows: Windows, weight: np.ndarray) -> Problem:
    """The kernel's problem, of a weight [O, C/groups, R, S] padded to multiples of 4 channels per group, in quads."""
    attrs, p = attrs_of(call), windows
    block = GRAINS[attrs["grain"]]
    planes = {side: bool(attrs.get(side, 0)) for side in ("planes_in", "planes_out")}
    more = {
        "block": block, "stored": int(block_pattern(quads_of(weight), block).sum()), "together": QUAD
    }  # fmt: skip
    if len(shape_of(call.args[1])) == 2:
        return Problem(1, 1, p.w, p.c // QUAD, p.o, 1, p.w, **more, **planes)
    return Problem(
        p.n, p.h, p.w, p.c // QUAD, p.o, p.oh, p.ow, (p.r, p.s), p.stride, p.dilation, p.padding, p.groups,
        **more, **planes,
    )  # fmt: skip


def lower_sparse(
    bb: relax.BlockBuilder, call: relax.Call, x, weight: np.ndarray, windows: Windows, target: CpuTarget,
) -> relax.Expr:  # fmt: skip
    """A layer of any operator, x and weight [O, C/groups, R, S] padded to multiples of 4 channels per group."""
    attrs, shape, quads = attrs_of(call), shape_of(call), quads_of(weight)
    grain, zero_point = attrs["grain"], attrs["zero_point"]
    problem = problem_of(call, windows, weight)
    dense = len(shape_of(call.args[1])) == 2
    pool = pool_of(call, image_of(call)) if "pool_size" in attrs else None
    if pool is None:
        structure = structure_for(problem)
        point = structure.default_point(problem, target)
    else:
        structure, point = pooled_windows, pooled_windows.default_point(problem, pool, target)
    quads = quads[:, :, 0, 0] if dense else quads
    packed = pack_at(quads, _OF_QUADS[grain], problem, structure, point)
    arrays = [relax.const(a) for a in packed.arrays()]
    loops = structure.__name__.rpartition(".")[2]
    notes = annotations(
        loops, problem=problem.to_dict(), point=point.to_dict(), zero_point=zero_point,
        **({} if pool is None else {"pool": pool.to_dict()}),
    )  # fmt: skip
    shift = 128 if reads_signed_pixels(target) else 0
    product = _product_with(zero_point, shift, problem.planes_in)
    lines = sparse_windows.lines_of(point)
    kind = "dense" if dense else f"conv{windows.r}x{windows.s}"
    hint = f"int8_sparse_{kind}_{grain.replace(':', '')}"
    zero, image = tirx.const(0, "int32"), image_of(call)
    if pool is None:
        kernel = definition(problem, lines, packed, shape, notes, product, zero, image)
    else:
        plane = pool.oh * pool.ow if problem.planes_out else 0
        kernel = define_pooled(problem, pool, lines, packed, notes, plane, product, zero)
        hint += f"_max_pool{pool.r}x{pool.s}"
    total = call_te(bb, kernel, x, *arrays, hint=hint, indices=(1, 2, 4, 5))
    if zero_point == shift:
        return total
    starts = (shift - zero_point) * weight.reshape(len(weight), -1).astype(np.int64).sum(axis=1)
    if problem.planes_out:
        starts = starts.reshape(1, -1, 1, QUAD)
    return relax.op.add(bb.emit(total), relax.const(starts.astype(np.int32)))
