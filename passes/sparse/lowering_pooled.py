# SPDX-License-Identifier: Apache-2.0
"""Lower `kerf.sparse_pooled_conv2d`: as `kerf.sparse_conv2d`, and the maximum over windows in the same kernel.

rewrite: kerf.sparse_pooled_conv2d(x, w, grain)  ->  call_tir(sparse_conv_max_pool, (x, pointer, index, values, order, slot))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tvm import relax

from passes.layers import attrs_of, const_array, shape_of
from passes.lower import call_te
from passes.max_pooling import largest_of, pool_of
from passes.sparse.format import block_of
from passes.sparse.lowering import definition, pack_at, problem_of
from passes.sparse.operators import image_of
from schedules import pooled_windows, sparse_groups, windows
from schedules.errors import Declined
from schedules.fused import annotations
from schedules.sparse_problem import Problem
from schedules.target import CpuTarget


def pays(outputs: int, groups: int, channels: int) -> bool | Declined:
    """Whether to pool where sums are computed that `outputs` channels share a pattern of; over single channels, or quads
    of them."""
    if outputs == 1 and not sparse_groups.few_channels(groups, channels):
        return Declined("single output channels over many channels are faster by pixels")
    return True


def suits(conv: relax.Call, _windows: Mapping) -> bool | Declined:
    """Whether to pool where a `kerf.sparse_conv2d` in NCHW is computed."""
    attrs = attrs_of(conv)
    return pays(block_of(attrs["grain"]), attrs["groups"], shape_of(conv.args[0])[1])


def lower_pooled(bb: relax.BlockBuilder, call: relax.Call, target: CpuTarget) -> relax.Expr:
    """Activations channels last or in planes, on either side."""
    problem, pool = problems_of(call)
    return lower_at(bb, call, pooled_windows.default_point(problem, pool, target))


def problems_of(call: relax.Call) -> tuple[Problem, windows.Problem]:
    """The convolution, and the windows over its result."""
    return replace(problem_of(call), output_plane=0), pool_of(call, image_of(call))


def define_pooled(
    problem: Problem, pool: windows.Problem, lines: int, packed, notes: dict, plane: int, *terms
):
    """The te function of the maxima over the windows `pool` of what `definition` computes with `terms`: channels last, or in
    planes of `plane` elements if that is not 0."""
    of_pixels = (pool.n, pool.h, pool.w, pool.c)
    sums = definition(replace(problem, planes_out=False), lines, packed, of_pixels, {}, *terms)

    def define(x, *indexed):
        return largest_of(pool, sums(x, *indexed), notes, plane, problem.together)

    return define


def lower_at(bb: relax.BlockBuilder, call: relax.Call, point: pooled_windows.Point) -> relax.Expr:
    """As `lower_pooled`, with the kernel's parameters given."""
    problem, pool = problems_of(call)
    grain = attrs_of(call)["grain"]
    packed = pack_at(const_array(call.args[1]), grain, problem, pooled_windows, point)
    arrays = [relax.const(a) for a in packed.arrays()]
    notes = annotations(
        "pooled_windows", problem=problem.to_dict(), pool=pool.to_dict(), point=point.to_dict()
    )
    plane = shape_of(call)[-1] if problem.planes_out else 0
    define = define_pooled(problem, pool, point.lines, packed, notes, plane)
    kernel, taken = ("{}x{}".format(*size) for size in (problem.kernel, (pool.r, pool.s)))
    hint = f"sparse_conv{kernel}_{grain.replace(':', '')}_max_pool{taken}"
    return call_te(bb, define, call.args[0], *arrays, hint=hint, indices=(1, 2, 4, 5))
