# SPDX-License-Identifier: Apache-2.0
"""Lower the binary operators: definitions over packed words, weights packed for the kernel.

rewrite: kerf.binary_conv2d(x, w)  ->  call_tir(binary_conv3x3, (x, packed w))
"""

from __future__ import annotations

import numpy as np
from tvm import relax, te, tirx

from passes.binary.bits import pack_bits, with_parities
from passes.binary.operators import (
    BINARY_CONV2D,
    BINARY_CONV2D_BITS,
    BINARY_DENSE,
    BINARY_DENSE_BITS,
    BINARY_MAX_POOL2D,
    BINARY_PACK,
)
from passes.family import Lowering
from passes.layers import attrs_of, const_array, shape_of, windows_of
from passes.lower import call_te
from schedules import binary_contraction
from schedules.binary_problem import (
    Point,
    Problem,
    line_words,
    packed_shape,
    panel_width,
    place_on_border,
    run_words,
    whole_lines,
)
from schedules.bit_words import WORD_BITS, words_for
from schedules.fused import annotations
from schedules.spaces import point_for
from schedules.target import CpuTarget


def problem_of(call: relax.Call) -> Problem:
    """The problem of a binary convolution (channels last) or dense layer. Raises ScheduleError in another layout."""
    w = shape_of(call.args[1])
    padded = {"pad_value": attrs_of(call)["pad_value"]} if len(w) == 4 else {}
    return Problem(*windows_of(call), bits=w[1], **padded)


def pack_weights(weight: np.ndarray, problem: Problem, point: Point, packs: bool) -> np.ndarray:
    """+-1 [O, C/groups, R, S] -> `packed_shape`, zeros where a panel has no channel."""
    weight = weight.reshape(*weight.shape[:2], problem.r, problem.s)
    words = pack_bits(weight > 0, 1)  # [O, words, R, S]
    groups, outputs = problem.groups, problem.group_outputs
    panel = panel_width(point, packs)
    panels = -(-outputs // panel)
    full = np.zeros((groups, panels * panel, *words.shape[1:]), np.uint32)
    full[:, :outputs] = words.reshape(groups, outputs, *words.shape[1:])
    split = full.reshape(groups, panels, panel, *words.shape[1:])
    packed = np.ascontiguousarray(split.transpose(0, 1, 4, 5, 3, 2))
    if point.paired:
        lines = packed.reshape(-1, line_words(problem), panel)
        packed = with_parities(lines, 1, run_words(problem, point))
    return packed.reshape(packed_shape(problem, point, packs))


def border_terms(weight: np.ndarray, problem: Problem, point: Point, packs: bool) -> np.ndarray:
    """int32 [panels, places on the border, panel]: terms of a sum, and twice the bits that padding of 0 is counted as."""
    outputs, groups = problem.group_outputs, problem.groups
    (sh, sw), (dh, dw), (top, left, _, _) = problem.stride, problem.dilation, problem.padding
    # Channels at +1 per tap differ from a bit 0.
    ones = (weight > 0).sum(1).reshape(problem.o, problem.r, problem.s)

    def inside(i: int, step: int, dilation: int, before: int, taps: int, size: int) -> np.ndarray:
        at = i * step - before + dilation * np.arange(taps)
        return (at >= 0) & (at < size)

    def rows(outputs: int, borders: tuple[int, int]) -> list[int]:
        """One output row or column of each place, in order."""
        low, high = borders
        middle = [low] if low + high < outputs else []
        return [*range(low), *middle, *range(outputs - high, outputs)]

    terms = []
    for i in rows(problem.oh, problem.border_rows()):
        for j in rows(problem.ow, problem.border_columns()):
            valid = np.outer(
                inside(i, sh, dh, top, problem.r, problem.h),
                inside(j, sw, dw, left, problem.s, problem.w),
            )
            terms.append(problem.bits * valid.sum() + 2 * (ones * ~valid).sum((1, 2)))
    panel = panel_width(point, packs)
    panels = -(-outputs // panel)
    full = np.zeros((groups, panels * panel, len(terms)), np.int32)
    full[:, :outputs] = np.stack(terms, -1).reshape(groups, outputs, -1)
    split = full.reshape(groups * panels, panel, -1).transpose(0, 2, 1)
    return np.ascontiguousarray(split)


def _padded(x, problem: Problem):
    """`x` with words of padding around it. Kernels never run this block."""
    top, left, _, _ = problem.padding
    if not any(problem.padding):
        return x
    image = problem.image

    def value(n, i, j, k):
        word = tirx.const(0, "uint32")
        if problem.pad_value == 1:
            word = tirx.const((1 << WORD_BITS) - 1, "uint32")
            if tail := problem.bits % WORD_BITS:
                last = k % problem.group_inputs == problem.group_inputs - 1
                word = tirx.Select(last, tirx.const((1 << tail) - 1, "uint32"), word)
        inside = tirx.all(i >= top, i < top + problem.h, j >= left, j < left + problem.w)
        return tirx.if_then_else(inside, x[n, i - top, j - left, k], word)

    return te.compute((image.n, image.h, image.w, image.c), value, name="pad")


def _sums(problem: Problem, point: Point, packs: bool, out_shape, x, w, terms, notes=None):
    """The te stages of the int32 sums."""
    (sh, sw), (dh, dw) = problem.stride, problem.dilation
    panel = panel_width(point, packs)
    panels, outputs = -(-problem.group_outputs // panel), problem.group_outputs
    padded = _padded(x, problem)
    r = te.reduce_axis((0, problem.r), "r")
    s = te.reduce_axis((0, problem.s), "s")
    k = te.reduce_axis((0, problem.group_inputs), "k")

    def place(o):
        """The panel of an output channel, its group, its place in the panel."""
        group, within = (0, o) if problem.groups == 1 else (o // outputs, o % outputs)
        return group * panels + within // panel, group, within % panel

    def weight(index, r, s, k, within):
        if not point.paired:
            return w[index, r, s, k, within]
        whole, words = whole_lines(problem), problem.group_inputs
        number = s * words + k if whole else k  # of its line
        place = tirx.floormod(number, run_words(problem, point))

        def stored(back: int):
            at = tirx.max(number - back, 0)
            tap, word = (tirx.floordiv(at, words), tirx.floormod(at, words)) if whole else (s, at)
            return w[index, r, tap, word, within]

        zero = tirx.const(0, "uint32")
        before = stored(1) ^ tirx.Select(place >= 2, stored(2), zero)
        return stored(0) ^ tirx.Select(tirx.floormod(place, 2) == 1, before, zero)

    def differing(*at):
        index, group, within = place(at[-1])
        channel = group * problem.group_inputs + k
        if problem.flat:
            pixel = padded[(*at[:-1], channel)]
        else:
            pixel = padded[at[0], at[1] * sh + r * dh, at[2] * sw + s * dw, channel]
        different = tirx.popcount(pixel ^ weight(index, r, s, k, within))
        return te.sum(different.astype("int32"), axis=[r, s, k])

    counted = te.compute(out_shape, differing, name="differing")

    def value(*at):
        if terms is None:
            return problem.r * problem.s * problem.bits - 2 * counted(*at)
        index, _, within = place(at[-1])
        row = place_on_border(at[1], *problem.border_rows(), problem.oh)
        column = place_on_border(at[2], *problem.border_columns(), problem.ow)
        return terms[index, row * problem.places[1] + column, within] - 2 * counted(*at)

    return te.compute(out_shape, value, name="binary_sums", attrs=notes)


def _words_of(reached, shape, channels: int, groups: int, flips, notes):
    """Two te stages: `reached(*at, channel)` gathered in words along the last axis, xor `flips`."""
    per_group = channels // groups
    words = words_for(per_group)
    b = te.reduce_axis((0, WORD_BITS), "b")

    def gather(*at):
        within = at[-1] % words * WORD_BITS + b
        channel = at[-1] // words * per_group + tirx.min(within, per_group - 1)
        bit = tirx.shift_left(tirx.const(1, "uint32"), b.astype("uint32"))
        zero = tirx.const(0, "uint32")
        chosen = tirx.all(within < per_group, reached(*at[:-1], channel))
        return te.sum(tirx.Select(chosen, bit, zero), axis=[b])

    gathered = te.compute((*shape[:-1], groups * words), gather, name="gathered")
    return te.compute(
        (*shape[:-1], groups * words), lambda *at: gathered(*at) ^ flips[at[-1]],
        name="binary_words", attrs=notes,
    )  # fmt: skip


def define_contraction(problem: Problem, point: Point, lead: tuple[int, ...], packs: bool):
    """te function (x, packed w[, thresholds, flips]) -> sums [*lead, O] or words."""
    notes = annotations(
        "binary_contraction", problem=problem.to_dict(), point=point.to_dict(), packs=int(packs)
    )

    out = (*lead, problem.o)

    def split(arrays) -> tuple:
        return (arrays[0], arrays[1:]) if problem.bordered else (None, arrays)

    def sums(x, w, *arrays):
        return _sums(problem, point, False, out, x, w, split(arrays)[0], notes)

    def words(x, w, *arrays):
        terms, (thresholds, flips) = split(arrays)
        found = _sums(problem, point, True, out, x, w, terms)

        def reached(*at):
            return found(*at) >= thresholds[at[-1]]

        return _words_of(reached, out, problem.o, 1, flips, notes)

    return words if packs else sums


def lower_contraction(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """Convolutions and dense layers, with sums or words as result."""
    problem, out = problem_of(call), shape_of(call)
    packs = len(call.args) == 4
    point = point_for(binary_contraction, problem, target)
    weight = const_array(call.args[1])
    arrays = [relax.const(pack_weights(weight, problem, point, packs))]
    if problem.bordered:
        arrays.append(relax.const(border_terms(weight, problem, point, packs)))
    if packs:
        # Whole words of thresholds, the last ones out of reach, so that the bits behind the last channel are 0.
        full = np.full(words_for(problem.o) * WORD_BITS, np.iinfo(np.int32).max, np.int32)
        full[: problem.o] = const_array(call.args[2])
        arrays += [relax.const(full), call.args[3]]
    kind = "dense" if weight.ndim == 2 else f"conv{problem.r}x{problem.s}"
    hint = f"binary_{kind}_{problem.row}_{problem.bits * problem.groups}_{problem.o}"
    define = define_contraction(problem, point, tuple(out[:-1]), packs)
    return call_te(bb, define, call.args[0], *arrays, hint=hint + ("_bits" if packs else ""))


def lower_pack(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    attrs, shape = attrs_of(call), shape_of(call.args[0])
    groups = attrs["groups"]
    notes = annotations("binary_pack", groups=groups)

    def define(x, thresholds, flips):
        return _words_of(
            lambda *at: thresholds[at[-1]] <= x(*at), shape, shape[-1], groups, flips, notes
        )

    return call_te(bb, define, *call.args, hint=f"binary_pack_{shape[-1]}")


def lower_max_pool2d(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    attrs = attrs_of(call)
    (sh, sw), (dh, dw), (top, left, _, _) = (attrs[k] for k in ("strides", "dilation", "padding"))
    _, h, w, _ = shape_of(call.args[0])

    def define(x, *flips):
        def value(n, i, j, c):
            found, zero = tirx.const(0, "uint32"), tirx.const(0, "uint32")
            for r in range(attrs["window"][0]):
                for s in range(attrs["window"][1]):
                    y, z = i * sh + r * dh - top, j * sw + s * dw - left
                    word = x[n, y, z, c] ^ flips[0][c] if flips else x[n, y, z, c]
                    if any(attrs["padding"]):
                        inside = tirx.all(y >= 0, y < h, z >= 0, z < w)
                        word = tirx.if_then_else(inside, word, zero)
                    found = found | word
            return found ^ flips[0][c] if flips else found

        return te.compute(shape_of(call), value, name="binary_max_pool2d")

    return bb.call_te(define, *call.args, primfunc_name_hint="binary_max_pool2d")


LOWERINGS: dict[str, Lowering] = {
    BINARY_PACK: lower_pack,
    BINARY_MAX_POOL2D: lower_max_pool2d,
    BINARY_CONV2D: lower_contraction,
    BINARY_CONV2D_BITS: lower_contraction,
    BINARY_DENSE: lower_contraction,
    BINARY_DENSE_BITS: lower_contraction,
}
