# SPDX-License-Identifier: Apache-2.0
"""Lower `kerf.sparse_conv2d` and `kerf.sparse_dense`: pack the weight and define the sum over its non-zeros.

rewrite: kerf.sparse_conv2d(x, w, grain)  ->  call_tir(sparse_conv, (x, pointer, index, values, order, slot))
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import numpy as np
from tvm import relax, te, tirx

from passes.layers import attrs_of, const_array, conv2d_output_hw, shape_of
from passes.lower import call_te
from passes.sparse.format import SparseFormat, block_of, pack, run_of, stored_pattern
from passes.sparse.operators import image_of, inputs_of
from schedules import (
    row_sum,
    sparse_chain,
    sparse_groups,
    sparse_near,
    sparse_planes,
    sparse_vector,
    sparse_windows,
    transposition,
)
from schedules.fused import annotations
from schedules.spaces import point_for
from schedules.sparse_problem import Problem, parts_of
from schedules.target import CpuTarget


def problem_of(call: relax.Call) -> Problem:
    """The kernel's problem: of a convolution (channels last), or of a matrix product seen as a 1x1 convolution."""
    attrs, w, image = attrs_of(call), shape_of(call.args[1]), image_of(call)
    weight, block = const_array(call.args[1]), block_of(attrs["grain"])
    stored = int(stored_pattern(weight, block).sum())
    planes = {side: bool(attrs.get(side, 0)) for side in ("planes_in", "planes_out")}
    if planes["planes_in"]:
        planes["input_plane"] = shape_of(call.args[0])[-1]
    if planes["planes_out"]:
        planes["output_plane"] = shape_of(call)[-1]
    if len(w) == 2:
        pixels = math.prod(image)
        return Problem(
            1, 1, pixels, w[1], w[0], 1, pixels, block=block, stored=stored, **planes
        )  # fmt: skip
    out = conv2d_output_hw(attrs, *image[1:], w[2:])
    problem = Problem(
        *image, w[1] * attrs["groups"], w[0], *out, tuple(w[2:]), tuple(attrs["strides"]), tuple(attrs["dilation"]),
        tuple(attrs["padding"]), attrs["groups"], block, stored, **planes, beside=_beside(call),
    )  # fmt: skip
    if block > 1 or panel_structure(problem) in (sparse_chain, sparse_planes):
        return problem  # indices are panel rows: the taps of a channel lie far apart
    if (run := run_of(weight)) == 1:
        return problem
    return replace(problem, run=run, stored=int(stored_pattern(weight, block, run).sum()))


def _beside(call: relax.Call) -> int:
    """Channels of the second input, in planes, of a call that has one."""
    return sum(shape_of(x)[1] for x in inputs_of(call)[1:])


def lower_sparse(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """Both operators; activations channels last."""
    problem = problem_of(call)
    structure = structure_for(problem)
    return lower_at(bb, call, problem, structure, point_for(structure, problem, target))


def lower_transpose(bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget) -> relax.Expr:
    """`kerf.transpose`."""
    attrs = attrs_of(call)

    def define(x):
        return transposition.define_transposition(x, attrs["rows"], attrs["columns"])

    return call_te(bb, define, call.args[0], hint="transpose")


def lower_mean_of_planes(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """The mean of the pixels of each plane."""
    point = row_sum.Point(mean=True, keepdims=True, count=int(attrs_of(call)["pixels"]))
    hint = "mean_{}x{}x{}".format(*shape_of(call.args[0])[:2], point.count)
    return call_te(bb, lambda x: row_sum.define_row_sum(x, point), call.args[0], hint=hint)


def structure_for(problem: Problem) -> ModuleType:
    """The loop structure that suits a problem: for a few rows, or one with panels."""
    return sparse_vector if sparse_vector.suits(problem) else panel_structure(problem)


def panel_structure(problem: Problem) -> ModuleType:
    """The loop structure with panels that suits a problem: into planes, over padded planes (of one group, or all), or with
    one panel row per tap."""
    if sparse_chain.suits(problem):
        return sparse_chain
    if sparse_groups.suits(problem):
        return sparse_groups
    if sparse_near.suits(problem):
        return sparse_near
    return sparse_windows if sparse_windows.suits(problem) else sparse_planes


def default_point(problem: Problem, target: CpuTarget):
    """The parameters of the kernel that a problem gets where none were recorded."""
    return structure_for(problem).default_point(problem, target)


def pack_at(
    weight: np.ndarray, grain: str, problem: Problem, structure: ModuleType, point
) -> SparseFormat:
    """The weight packed for one kernel."""
    if structure is sparse_vector:
        return pack(weight, grain, part=problem.block)
    if structure is sparse_chain:
        # Planes are written from registers, one behind the other, which hardware prefetchers follow; not so where the sums of
        # an element's channels are kept, and loops of two and more non-zeros end where the ones before did.
        kept = point.rows < problem.together and problem.stored >= 2 * problem.blocks
        chunk = problem.inputs[0] if problem.beside else None  # one input behind the other
        return pack(
            weight, grain, groups=problem.groups, chunk=chunk, part=point.part, by_fill=kept
        )
    if structure is sparse_planes:
        return pack(weight, grain, groups=problem.groups, chunk=point.chunk, part=point.part)
    outputs, per_group = weight.shape[:2]
    if structure is sparse_groups:
        places = sparse_groups.group_offsets(problem, point.lines).reshape(1, -1)
        columns, part = np.repeat(places, outputs, axis=0), outputs // problem.groups
        return pack(
            weight, grain, groups=problem.groups, part=part, columns=columns, run=problem.run
        )
    places = sparse_windows.offsets(problem, point.lines)
    first = np.arange(outputs) // (outputs // problem.groups) * per_group
    columns = places[first[:, None] + np.arange(per_group)[None, :]].reshape(outputs, -1)
    chunk = sparse_near.panel_elements(problem, point) if structure is sparse_near else None
    return pack(
        weight, grain, groups=problem.groups, chunk=chunk, part=point.part, columns=columns, run=problem.run,
    )  # fmt: skip


def lower_at(
    bb: relax.BlockBuilder, call: relax.Call, problem: Problem, structure: ModuleType, point
) -> relax.Expr:
    """As `lower_sparse`, with the loop structure and the kernel's parameters given."""
    attrs = attrs_of(call)
    weight = const_array(call.args[1])
    packed = pack_at(weight, attrs["grain"], problem, structure, point)
    arrays = [relax.const(a) for a in packed.arrays()]
    loops = structure.__name__.rpartition(".")[2]
    notes = annotations(loops, problem=problem.to_dict(), point=point.to_dict())
    kind = "dense" if weight.ndim == 2 else "conv{}x{}".format(*problem.kernel)
    hint = f"sparse_{kind}_{attrs['grain'].replace(':', '')}"
    define = definition(
        problem, sparse_windows.lines_of(point), packed, shape_of(call), notes, rows=image_of(call),
        by_group=structure is sparse_groups,
    )  # fmt: skip
    inputs = inputs_of(call)
    if len(inputs) > 1:
        define = _of_two_inputs(define)
    behind = len(inputs)
    indices = [behind + i for i in (0, 1, 3, 4)]
    return call_te(bb, define, *inputs, *arrays, hint=hint, indices=indices)


def _of_two_inputs(define):
    """The te function of (x, beside, *arrays) that is `define` of their planes, one's behind the other's, and the arrays."""

    def joined(x, beside, *arrays):
        images, channels, plane = x.shape
        shape = (images, channels + beside.shape[1], plane)

        def element(n, c, i):
            return tirx.if_then_else(c < channels, x[n, c, i], beside[n, c - channels, i])

        return define(te.compute(shape, element, name="joined"), *arrays)

    return joined


def _product(weight, x, place: tuple, inside):
    """A weight times x at `place`, which is 0 outside the image (`inside` None: it is inside)."""
    return weight * (x[place] if inside is None else tirx.if_then_else(inside, x[place], 0.0))


def definition(
    problem: Problem, lines: int, packed: SparseFormat, out_shape: tuple[int, ...], notes: dict,
    product=_product, zero=0.0, rows: tuple[int, ...] = (), by_group: bool = False,
):  # fmt: skip
    """The te function (x, pointer, index, values, order, slot) -> y, one sum over the non-zeros of each output channel.

    `lines` are those of a tile whose indices are places in padded planes, 0 where they are panel rows; `by_group` counts
    these planes from the first one of the output's group.
    `product(weight, x, place, inside)` is one term, of an element of x that may be several of its values.
    `rows` are the leading axes of a matrix, needed where one side of its product lies in planes.
    """
    p, block, blocks, chunk = problem, packed.block, packed.blocks, packed.chunk
    parts = parts_of(p.outputs, packed.part)
    conv = len(packed.shape) == 4

    def first_of_part(o):
        return tirx.min(o // packed.part, len(parts) - 1) * packed.part

    def split_output(at: tuple) -> tuple:
        """(output channel, its pixel: indices of the image, or of the rows of a matrix)."""
        if not p.planes_out:
            return at[-1], at[:-1]
        pixel, channel = at[2], at[1] if len(at) == 3 else at[1] * out_shape[3] + at[3]
        if p.plane_out != p.image_pixels:
            pixel = tirx.min(pixel, p.image_pixels - 1)
        return channel, (at[0], pixel // p.out_width, pixel % p.out_width) if conv else (pixel,)

    def flat(pixel: tuple):
        """A row of a matrix, counted over its leading axes `rows`, or as it is."""
        number = pixel[0]
        for extent, i in zip(rows[1:], pixel[1:]):
            number = number * extent + i
        return number

    def unflat(pixel: tuple) -> tuple:
        """The indices of the leading axes of a matrix."""
        if not p.planes_out:
            return pixel
        found, rest = [], pixel[0]
        for extent in reversed(rows[1:]):
            found.insert(0, rest % extent)
            rest = rest // extent
        return (rest, *found)

    def place_of(row):
        """(channel, pixels down, pixels right of the window's corner) of a stored position."""
        if not lines:
            tap = row // p.channels
            return (
                row % p.channels,
                tap // p.kernel[1] * p.dilation[0],
                tap % p.kernel[1] * p.dilation[1],
            )
        window = sparse_windows.window_of(p, lines)
        phase, within = row % window.channel // window.plane, row % window.channel % window.plane
        down = within // window.line * p.strides[0] + phase // window.phases[1]
        return (
            row // window.channel,
            down,
            within % window.line * p.strides[1] + phase % window.phases[1],
        )

    def define(x, pointer, index, values, order, slot):
        q = te.reduce_axis((0, packed.chunks), "chunk")
        j = te.reduce_axis((0, min(chunk, p.panel_rows // p.groups)), "nonzero")

        def term(*at):
            o, pixel = split_output(at)
            slot_of = slot[q * p.outputs + o].astype("int32")
            b = q * blocks + first_of_part(o) // block + slot_of // block
            n = pointer[b] + j
            row = q * chunk + index[n].astype("int32")
            mine = order[b].astype("int32") == (o - first_of_part(o)) // block
            present = tirx.all(n < pointer[b + 1], mine)
            weight = values[n, slot_of % block]
            if not conv:
                place = (0, row, flat(pixel)) if p.planes_in else (*unflat(pixel), row)
                return tirx.if_then_else(present, product(weight, x, place, None), zero)
            c, down, right = place_of(row)
            if by_group:
                c = c + o // (p.outputs // p.groups) * (p.channels // p.groups)
            image, height, width = pixel
            h = height * p.strides[0] + down - p.padding[0]
            w = width * p.strides[1] + right - p.padding[1]
            inside = tirx.all(h >= 0, h < p.height, w >= 0, w < p.width)
            place = (image, c, h * p.width + w) if p.planes_in else (image, h, w, c)
            return tirx.if_then_else(present, product(weight, x, place, inside), zero)

        return te.compute(
            out_shape, lambda *at: te.sum(term(*at), axis=[q, j]), name="sparse", attrs=notes
        )

    return define
