# SPDX-License-Identifier: Apache-2.0
"""PrimFuncs without an anchor: elementwise, layout changes, reductions. What has no rule is left as it is, correct."""

from __future__ import annotations

import math

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import Schedule, renew_defs

from schedules.fused import leaf_blocks
from schedules.target import CpuTarget

_SPATIAL, _REDUCE = 0, 2  # tirx.IterVar types
_PARALLEL_FROM = 32 * 1024  # elements below which starting the threads costs more than it saves
# How often a block may read memory for one element and still be computed where it is read, anew for each reader.
_MOST_READS = 64


def schedule(func: tirx.PrimFunc, target: CpuTarget) -> tirx.PrimFunc:
    """`func` with its loops vectorised and, for several threads, parallel. Unchanged if a block is of an unknown kind."""
    if not _regular(func):
        return func
    # Schedule primitives change the function they are given in place; the caller's stays as it is.
    sch = Schedule(tvm.IRModule({"main": renew_defs(func).with_attr("global_symbol", "main")}))
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    outputs = list(sch.mod["main"].params)
    for block in blocks[:-1]:
        if (
            not _reduces(sch, block)
            and _reads(sch.get(block).body) <= _MOST_READS
            and not any(b.same_as(sch.get(block).writes[0].source) for b in outputs)
        ):
            sch.compute_inline(block)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        if _reduces(sch, block):
            _schedule_reduction(sch, block, target)
        else:
            _schedule_elementwise(sch, block, target)
    result = sch.mod["main"].without_attr("global_symbol")
    name = (func.attrs or {}).get("global_symbol")
    return result if name is None else result.with_attr("global_symbol", str(name))


def _reads(body) -> int:
    """How often a block reads memory for one element."""
    found = []
    tvm_ffi.structural_walk(body, (tvm.ir.expr.TensorLoad, found.append))
    return len(found)


def _regular(func: tirx.PrimFunc) -> bool:
    """Whether every block is one store to one buffer over spatial and reduction axes, each in loops of its own."""
    blocks = leaf_blocks(func.body)
    if not blocks:
        return False
    body = func.body.block.body if isinstance(func.body, tvm.s_tir.SBlockRealize) else func.body
    nests = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    if len(nests) != len(blocks):
        return False
    for nest, block in zip(nests, blocks):
        depth = 0
        while isinstance(nest, tirx.For):
            nest, depth = nest.body, depth + 1
        if not isinstance(nest, tvm.s_tir.SBlockRealize) or not isinstance(
            block.body, tirx.BufferStore
        ):
            return False
        kinds = [int(v.iter_type) for v in block.iter_vars]
        if len(block.writes) != 1 or depth != len(kinds) or not set(kinds) <= {_SPATIAL, _REDUCE}:
            return False
        if not all(isinstance(v.dom.extent, tvm.ir.prim.expr.IntImm) for v in block.iter_vars):
            return False
    return True


def _reduces(sch: Schedule, block) -> bool:
    return any(int(v.iter_type) == _REDUCE for v in sch.get(block).iter_vars)


def _extent(sch: Schedule, axis) -> int:
    return int(sch.get(axis).extent)


def _parallelise(sch: Schedule, axes: list, elements: int, target: CpuTarget) -> None:
    """Run the outer axes in parallel, as many of them fused as give every thread work."""
    if target.threads == 1 or elements < _PARALLEL_FROM or not axes:
        return
    count, extent = 0, 1
    while count < len(axes) and extent < 4 * target.threads:
        extent *= _extent(sch, axes[count])
        count += 1
    sch.parallel(sch.fuse(*axes[:count]) if count > 1 else axes[0])


def _vectorise(sch: Schedule, axis, lanes: int) -> None:
    """Vectors of `lanes`, or fewer that divide the axis; where none of 4 or more do, whole ones and a rest.

    Left to itself LLVM may vectorise an outer loop instead, and gather.
    """
    extent, most = _extent(sch, axis), lanes
    while lanes > 1 and extent % lanes:
        lanes //= 2
    if lanes < 4:
        lanes = min(most, 1 << (extent.bit_length() - 1))
        if lanes < 4:
            return
        axis = sch.loop_partition(axis, [extent // lanes * lanes, None])[0]
    sch.vectorize(sch.split(axis, [None, lanes])[1])


def _calls_llvm(body) -> bool:
    """Whether LLVM's own operations are called by name. TVM takes vectors of them apart again; LLVM vectorises the loop."""
    found = []

    def visit(call) -> None:
        named = isinstance(call.op, tvm.ir.Op) and call.op.name == "tirx.call_llvm_pure_intrin"
        found.append(named)

    tvm_ffi.structural_walk(body, (tvm.ir.expr.Call, visit))
    return any(found)


def _schedule_elementwise(sch: Schedule, block, target: CpuTarget) -> None:
    axes = sch.get_loops(block)
    if not axes:
        return
    elements = math.prod(_extent(sch, a) for a in axes)
    last = axes[-1]
    if _extent(sch, last) <= 4 and len(axes) > 2:
        sch.unroll(last)  # an image's channels: fusing would put a division in every element
        _parallelise(sch, axes[:-1], elements, target)
        return
    _parallelise(sch, axes[:-1], elements, target)  # not allowed once the loop is in two parts
    if not _calls_llvm(sch.get(block).body):
        _vectorise(sch, last, target.lanes)


def _schedule_reduction(sch: Schedule, block, target: CpuTarget) -> None:
    axes = sch.get_loops(block)
    kinds = [int(v.iter_type) for v in sch.get(block).iter_vars]
    spatial = [a for a, k in zip(axes, kinds) if k == _SPATIAL]
    reduced = [a for a, k in zip(axes, kinds) if k == _REDUCE]
    elements = math.prod(_extent(sch, a) for a in axes)
    lanes = target.lanes
    while spatial and lanes > 1 and _extent(sch, spatial[-1]) % lanes:
        lanes //= 2
    if not spatial or lanes < 4 or kinds[-1] != _REDUCE or not _last_axis_contiguous(sch, block):
        _parallelise(sch, spatial, elements, target)
        return
    outer, vector = sch.split(spatial[-1], [None, lanes])
    sch.reorder(*spatial[:-1], outer, *reduced, vector)
    sch.vectorize(vector)
    _parallelise(
        sch, [*spatial[:-1], outer], elements, target
    )  # not allowed once the block is in two parts
    sch.vectorize(sch.get_loops(sch.decompose_reduction(block, reduced[0]))[-1])


def _last_axis_contiguous(sch: Schedule, block) -> bool:
    """Whether the last spatial axis is the last index of what the reduction reads."""
    info = sch.get(block)
    last = [v.var for v in info.iter_vars if int(v.iter_type) == _SPATIAL][-1]
    region = info.reads[-1].region if len(info.reads) else []
    return len(region) > 0 and region[-1].min.same_as(last)
