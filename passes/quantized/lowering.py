# SPDX-License-Identifier: Apache-2.0
"""Lower the integer layer operators: pack the weight, fold the zero point into what a sum starts with.

    rewrite: kerf.int8_conv2d(x, w)  ->  call_tir(int8_conv, (x, packed w[, starts]))

Pixels outside the image count 0, so a sum over the taps inside starts at -zero_point * (the sum of their weights). Channels
are padded to a multiple of 4 per group where they are none, in a pass of its own over x; where a kernel row reads several
pixels of them, that pass gives the image a border of its zero point instead, and a kernel row's bytes are padded together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from tvm import relax, te, tirx

from passes.family import Lowering
from passes.layers import attrs_of, const_array, shape_of, windows_of
from passes.lower import call_te
from passes.max_pooling import largest_of, pool_of, pool_windows
from passes.quantized import lowering_sparse, lowering_winograd
from passes.quantized.lowering_elementwise import (
    lower_dequantize,
    lower_dequantize_add,
    lower_quantize,
)
from passes.quantized.lowering_pooling import lower_average_pool
from passes.quantized.operators import (
    DEQUANTIZE,
    DEQUANTIZE_ADD,
    INT8_AVERAGE_POOL,
    INT8_CONV2D,
    INT8_DENSE,
    INT8_POOLED_CONV2D,
    QUANTIZE,
)
from passes.sparse.operators import image_of
from schedules import byte_border, contraction, int8_contraction, int8_depthwise, int8_pooled
from schedules.errors import Declined, ScheduleError
from schedules.fused import annotations
from schedules.int8_contraction import QUAD, Point, Problem
from schedules.spaces import point_for
from schedules.target import CpuTarget
from schedules.terms import reads_signed_pixels


def pad_channels(weight: np.ndarray) -> np.ndarray:
    """[O, C/groups, R, S] with zeros up to a multiple of 4 channels."""
    missing = -weight.shape[1] % QUAD
    return np.pad(weight, ((0, 0), (0, missing), (0, 0), (0, 0)))


def _panels(values: np.ndarray, problem: Problem, point: Point) -> np.ndarray:
    """[O, ...] -> [panels of all groups, channels of a panel, ...], zeros where a group's last panel has no channel."""
    count = contraction.panels_per_group(problem, point)
    full = np.zeros((problem.groups, count * point.panel, *values.shape[1:]), values.dtype)
    full[:, : problem.group_outputs] = values.reshape(problem.groups, -1, *values.shape[1:])
    return full.reshape(problem.groups * count, point.panel, *values.shape[1:])


def pack_weights(weight: np.ndarray, problem: Problem, point: Point) -> np.ndarray:
    """int8 [O, C/groups, R, S], channels a multiple of 4 -> `int8_contraction.packed_shape`."""
    panels = _panels(weight, problem, point)
    quads = panels.reshape(*panels.shape[:2], -1, QUAD, *weight.shape[2:])
    packed = quads.transpose(0, 4, 5, 2, 1, 3)
    return np.ascontiguousarray(packed).reshape(int8_contraction.packed_shape(problem, point))


def pack_starts(weight: np.ndarray, offset: int, problem: Problem, point: Point) -> np.ndarray:
    """int32 `int8_contraction.starts_shape`: -offset * the sums of weights of a tap, a kernel row, or all taps."""
    taps = -offset * weight.astype(np.int64).sum(axis=1)
    if any(problem.padding):
        taps = np.concatenate([taps, taps.sum(axis=2, keepdims=True)], axis=2)
    else:
        taps = taps.sum(axis=(1, 2), keepdims=True)
    panels = _panels(taps.astype(np.int32), problem, point)
    return np.ascontiguousarray(panels.transpose(0, 2, 3, 1))


def pack_depthwise(weight: np.ndarray, problem: Problem) -> np.ndarray:
    """int8 [C, 1, R, S] -> `int8_depthwise.packed_shape`, zeros in the bytes of no tap."""
    shape = int8_depthwise.packed_shape(problem)
    packed = np.zeros((*shape[:3], problem.c, QUAD), np.int8)
    for shift in range(shape[1]):
        for s, (quad, byte) in enumerate(int8_depthwise.slots(problem, shift)):
            packed[:, shift, quad, :, byte] = weight[:, 0, :, s].T
    return packed.reshape(shape)


def pack_depthwise_starts(weight: np.ndarray, offset: int, problem: Problem) -> np.ndarray:
    """int32 [R, S, C], or [1, 1, C] where nothing is padded: -offset * (the weight of a tap, or the sum of all)."""
    taps = -offset * weight[:, 0].astype(np.int64).transpose(1, 2, 0)
    if not any(problem.padding):
        taps = taps.sum(axis=(0, 1), keepdims=True)
    return np.ascontiguousarray(taps.astype(np.int32))


def define_pad_channels(shape: tuple[int, ...], groups: int):
    """te function x [..., C] -> [..., groups * (C / groups rounded up to a multiple of 4)], zeros in the gaps."""
    given = shape[-1] // groups
    padded = -(-given // QUAD) * QUAD

    def pad(x):
        def value(*at):
            group, within = (0, at[-1]) if groups == 1 else (at[-1] // padded, at[-1] % padded)
            zero = tirx.const(0, "uint8")
            return te.if_then_else(within < given, x[(*at[:-1], group * given + within)], zero)

        return te.compute((*shape[:-1], groups * padded), value, name="pad_channels")

    return pad


def row_quads(problem: Problem) -> Problem | None:
    """The convolution as one whose kernel rows are single taps, over images that hold their own border, or None.

    A pixel's few channels lie beside those of the next: the S * C bytes that a kernel row reads are together in fewer
    quads than S pixels of channels each padded to quads. Output pixels read overlapping runs, `step` bytes apart.
    """
    if problem.groups > 1 or problem.s == 1 or problem.dilation[1] > 1 or problem.c % QUAD == 0:
        return None
    top, _, bottom, _ = problem.padding
    return replace(
        problem, h=problem.h + top + bottom, w=problem.ow, c=-(-problem.s * problem.c // QUAD) * QUAD, s=1,
        stride=(problem.stride[0], 1), padding=(0, 0, 0, 0), dilation=(problem.dilation[0], 1),
    )  # fmt: skip


def suits_pooling(conv: relax.Call, windows: Mapping) -> bool | Declined:
    """Whether to take the maxima over `windows` where a `kerf.int8_conv2d` in NCHW is computed: see `Pooling.suits`."""
    attrs, (n, c, h, w) = attrs_of(conv), shape_of(conv.args[0])
    if "grain" in attrs:
        return lowering_sparse.suits_pooling(conv)
    o, _, r, s = shape_of(conv.args[1])
    stride, padding, dilation = (tuple(attrs[k]) for k in ("strides", "padding", "dilation"))
    problem = Problem(n, h, w, c, o, r, s, stride, padding, dilation, attrs["groups"])
    if row_quads(problem) is None:
        return False
    pool = pool_windows(windows, n, problem.oh, problem.ow, problem.o)
    return int8_pooled.suits(pool) or Declined("its kernel takes windows of 3x3 and stride 2 only")


def border_of(problem: Problem, value: int) -> byte_border.Problem:
    """What a convolution of `row_quads` reads: its image with `value` around it, as wide as quads reach."""
    top, left, bottom, right = problem.padding
    reach = (problem.ow - 1) * problem.stride[1] + -(-row_quads(problem).c // problem.c)
    columns = max(left + problem.w + right, reach)
    return byte_border.Problem(
        problem.n, problem.h, problem.w, problem.c, top, left, top + problem.h + bottom, columns, value
    )  # fmt: skip


def define_border(border: byte_border.Problem):
    """te function x uint8 [n, h, w, c] -> [n, rows, columns, c]."""
    few = border.c <= byte_border.MOST_CHANNELS
    notes = annotations("byte_border", problem=border.to_dict()) if few else {}

    def define(x):
        def pixel(b, i, j, k):
            i, j = i - border.top, j - border.left
            inside = tirx.all(i >= 0, i < border.h, j >= 0, j < border.w)
            return te.if_then_else(inside, x[b, i, j, k], tirx.const(border.value, "uint8"))

        shape = (border.n, border.rows, border.columns, border.c)
        return te.compute(shape, pixel, name="border", attrs=notes)

    return define


def define_planes_of_quads(image: tuple[int, ...]):
    """te function x uint8 `image` [n, h, w, c], up to 3 channels -> [n, 1, h * w, 4], zeros behind the channels."""
    n, h, w, c = image
    border = byte_border.Problem(n, h, w, c, 0, 0, h, w, 0, QUAD)
    notes = annotations("byte_border", problem=border.to_dict())

    def define(x):
        def byte(b, _plane, q, k):
            return te.if_then_else(k < c, x[b, q // w, q % w, k], tirx.const(0, "uint8"))

        return te.compute((n, 1, h * w, QUAD), byte, name="planes_of_quads", attrs=notes)

    return define


def _inside(problem: Problem, h, w):
    return tirx.all(h >= 0, h < problem.h, w >= 0, w < problem.w)


def annotations_of(loops: str, problem: Problem, point: Point, step: int | None) -> dict[str, str]:
    """Of the kernel of a contraction, with the `step` between its pixels where they overlap."""
    more = {} if step is None else {"step": step}
    return annotations(loops, problem=problem.to_dict(), point=point.to_dict(), **more)


def define(
    shape: tuple[int, ...], problem: Problem, point: Point, shift: int, step: int | None = None,
    anchor: bool = True,
):  # fmt: skip
    """te function (x, packed w[, starts]) -> int32 of `shape`, [N, OH, OW, O] or [..., O] of a matrix product.

    `shift` is subtracted from every pixel inside the image. With `step`, the problem is one of `row_quads`. What is no
    `anchor` has its kernel from what reads it.
    """
    notes = annotations_of("int8_contraction", problem, point, step) if anchor else {}
    (sh, sw), (dh, dw), (top, left, _, _) = problem.stride, problem.dilation, problem.padding
    inputs, outputs = problem.group_inputs, problem.group_outputs
    panels = contraction.panels_per_group(problem, point)
    image = len(shape) == 4 and not (problem.flat and problem.h == 1 and problem.n == 1)

    def place(o):
        """(panel, channel within it, first input) of output channel o."""
        group, within = (0, o) if problem.groups == 1 else (o // outputs, o % outputs)
        return group * panels + within // point.panel, within % point.panel, group * inputs

    def corner(at):
        return at[1] * sh - top, at[2] * sw - left

    def int8(x, w, *starts):
        r, s = te.reduce_axis((0, problem.r), "r"), te.reduce_axis((0, problem.s), "s")
        k = te.reduce_axis((0, inputs), "k")

        def term(*at):
            panel, lane, first = place(at[-1])
            if not image:
                pixel = x[(*at[:-1], first + k)].astype("int32") - shift
                weight = w[panel, 0, 0, k // QUAD, lane * QUAD + k % QUAD]
                return te.sum(pixel * weight.astype("int32"), axis=[k])
            h, v = corner(at)
            h, v = h + r * dh, v + s * dw
            where = (v, first + k)
            if step is not None:  # byte k of a run that begins `step` bytes behind the one before
                channels = int(x.shape[-1])
                where = (v * (step // channels) + k // channels, k % channels)
            pixel = x[(at[0], h, *where)].astype("int32") - shift
            if any(problem.padding):
                pixel = te.if_then_else(_inside(problem, h, v), pixel, tirx.const(0, "int32"))
            weight = w[panel, r, s, k // QUAD, lane * QUAD + k % QUAD]
            return te.sum(pixel * weight.astype("int32"), axis=[r, s, k])

        if not starts:
            return te.compute(shape, term, name="int8_sum", attrs=notes)
        total = te.compute(shape, term, name="int8_sum")
        if not any(problem.padding):
            start = lambda *at: starts[0][place(at[-1])[0], 0, 0, place(at[-1])[1]]  # noqa: E731
        else:
            i, j = te.reduce_axis((0, problem.r), "i"), te.reduce_axis((0, problem.s), "j")

            def tap(*at):
                panel, lane, _ = place(at[-1])
                h, v = corner(at)
                within = _inside(problem, h + i * dh, v + j * dw)
                zero = tirx.const(0, "int32")
                return te.sum(te.if_then_else(within, starts[0][panel, i, j, lane], zero), [i, j])

            start = te.compute(shape, tap, name="start")
        return te.compute(shape, lambda *at: total(*at) + start(*at), name="int8", attrs=notes)

    return int8


def define_depthwise(problem: Problem, point: Point, shift: int):
    """te function (x [N, H, W, C], packed w[, starts]) -> int32 [N, OH, OW, C]; `shift` as in `define`."""
    notes = annotations("int8_depthwise", problem=problem.to_dict(), point=point.to_dict())
    (sh, sw), (dh, dw), (top, left, _, _) = problem.stride, problem.dilation, problem.padding
    shape, zero = (problem.n, problem.oh, problem.ow, problem.c), tirx.const(0, "int32")

    def inside(i, j, r, s):
        return _inside(problem, i * sh + r * dh - top, j * sw + s * dw - left)

    def depthwise(x, w, *starts):
        r, s = te.reduce_axis((0, problem.r), "r"), te.reduce_axis((0, problem.s), "s")

        def term(n, i, j, c):
            pixel = x[n, i * sh + r * dh - top, j * sw + s * dw - left, c].astype("int32") - shift
            weight = w[r, 0, s // QUAD, c * QUAD + s % QUAD].astype("int32")
            if any(problem.padding):
                pixel = te.if_then_else(inside(i, j, r, s), pixel, zero)
            return te.sum(pixel * weight, axis=[r, s])

        if not starts:
            return te.compute(shape, term, name="int8_depthwise", attrs=notes)
        total = te.compute(shape, term, name="int8_depthwise_sum")
        start = lambda n, i, j, c: starts[0][0, 0, c]  # noqa: E731
        if any(problem.padding):
            k, m = te.reduce_axis((0, problem.r), "k"), te.reduce_axis((0, problem.s), "m")

            def tap(n, i, j, c):
                return te.sum(
                    te.if_then_else(inside(i, j, k, m), starts[0][k, m, c], zero), axis=[k, m]
                )

            start = te.compute(shape, tap, name="start")
        return te.compute(
            shape, lambda *at: total(*at) + start(*at), name="int8_depthwise", attrs=notes
        )

    return depthwise


def _lower_depthwise(bb, x, weight: np.ndarray, problem: Problem, zero_point: int, target):
    shift = 128 if reads_signed_pixels(target) else 0
    point = point_for(int8_depthwise, problem, target)
    packed = [relax.const(pack_depthwise(weight, problem))]
    if offset := zero_point - shift:
        packed.append(relax.const(pack_depthwise_starts(weight, offset, problem)))
    hint = f"int8_depthwise{problem.r}x{problem.s}_{problem.oh}x{problem.ow}_{problem.c}"
    return call_te(bb, define_depthwise(problem, point, shift), x, *packed, hint=hint)


def lower_layer(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """`kerf.int8_conv2d` and `kerf.int8_pooled_conv2d` (channels last, or in planes), and `kerf.int8_dense`."""
    attrs, x, weight = attrs_of(call), call.args[0], const_array(call.args[1])
    if weight.ndim == 2:
        rows = math.prod(image_of(call))
        problem, weight = Problem(1, 1, rows, *reversed(weight.shape)), weight[:, :, None, None]
        hint = f"int8_dense_{rows}_{problem.c}_{problem.o}"
    else:
        inputs = weight.shape[1] * attrs["groups"]
        problem = Problem(*windows_of(call, (*image_of(call), inputs)))  # x may lie in planes
        if int8_depthwise.suits(problem) and "pool_size" not in attrs:
            return _lower_depthwise(bb, x, weight, problem, attrs["zero_point"], target)
        grouped = f"_g{problem.groups}" if problem.groups > 1 else ""
        hint = f"int8_conv{problem.r}x{problem.s}_{problem.oh}x{problem.ow}_{problem.c}_{problem.o}{grouped}"
    step = None
    if "grain" not in attrs and (rows := row_quads(problem)) is not None:
        step = problem.stride[1] * problem.c
        x = _copied(bb, define_border(border_of(problem, attrs["zero_point"])), x, "border")
        # [O, S * C, R, 1]: the bytes of a kernel row in the order in which they lie in an image.
        weight = weight.transpose(0, 3, 1, 2).reshape(problem.o, -1, problem.r, 1)
        weight, problem = pad_channels(weight), rows
    elif problem.group_inputs % QUAD:
        if attrs.get("planes_in"):  # of an image, which comes channels last
            x = _copied(bb, define_planes_of_quads(shape_of(x)), x, "planes_of_quads")
        else:
            x = _copied(bb, define_pad_channels(shape_of(x), problem.groups), x, "pad_channels")
        weight = pad_channels(weight)
        problem = replace(problem, c=weight.shape[1] * problem.groups)
    shift = 128 if reads_signed_pixels(target) else 0
    if "grain" in attrs:
        return lowering_sparse.lower_sparse(bb, call, x, weight, problem, target)
    if "pool_size" in attrs:
        return _lower_pooled(bb, call, x, weight, problem, target, step)
    point = lowering_winograd.choose(weight, problem, target)
    if not isinstance(point, Declined):
        return lowering_winograd.lower_at(bb, x, weight, problem, point, attrs["zero_point"])
    point = point_for(int8_contraction, problem, target)
    packed = _packed(weight, problem, point, attrs["zero_point"] - shift)
    kernel = define(shape_of(call), problem, point, shift, step)
    return call_te(bb, kernel, x, *packed, hint=hint)


def _lower_pooled(
    bb: relax.BlockBuilder, call: relax.Call, x: relax.Expr, weight: np.ndarray, problem: Problem,
    target: CpuTarget, step: int | None,
) -> relax.Expr:  # fmt: skip
    """The maxima over windows of a first layer whose kernel rows run together; `suits_pooling` says which.

    Raises ScheduleError for any other.
    """
    if step is None:
        raise ScheduleError(
            "no kernel pools this layer", where=INT8_POOLED_CONV2D, found=str(problem),
            wanted="a first layer whose kernel rows run together",
        )  # fmt: skip
    pool, shift = pool_of(call, image_of(call)), 128 if reads_signed_pixels(target) else 0
    point = int8_pooled.default_point(problem, target)
    sums = define((pool.n, pool.h, pool.w, pool.c), problem, point, shift, step, anchor=False)
    notes = annotations_of("int8_pooled", problem, point, step)

    def kernel(*operands):
        return largest_of(pool, sums(*operands), notes)

    packed = _packed(weight, problem, point, attrs_of(call)["zero_point"] - shift)
    hint = f"int8_conv{problem.r}x{problem.s}_{problem.oh}x{problem.ow}_{problem.o}_max_pool{pool.r}x{pool.s}"
    return call_te(bb, kernel, x, *packed, hint=hint)


def _packed(weight: np.ndarray, problem: Problem, point, offset: int) -> list[relax.Expr]:
    """The weight as a kernel reads it and, where pixels are `offset` from what they stand for, what its sums begin with."""
    arrays = [pack_weights(weight, problem, point)]
    if offset:
        arrays.append(pack_starts(weight, offset, problem, point))
    return [relax.const(array) for array in arrays]


def _copied(bb: relax.BlockBuilder, define_copy, x: relax.Expr, hint: str) -> relax.Expr:
    """A copy of x in a pass of its own, into which what makes x fuses."""
    # Injective to TVM (2): with more elements than its input, it must not become an epilogue.
    return bb.emit(
        bb.call_te(define_copy, x, primfunc_name_hint=hint, primfunc_attrs={"op_pattern": 2})
    )


LOWERINGS: dict[str, Lowering] = {
    INT8_CONV2D: lower_layer,
    INT8_POOLED_CONV2D: lower_layer,
    INT8_DENSE: lower_layer,
    INT8_AVERAGE_POOL: lower_average_pool,
    QUANTIZE: lower_quantize,
    DEQUANTIZE: lower_dequantize,
    DEQUANTIZE_ADD: lower_dequantize_add,
}
