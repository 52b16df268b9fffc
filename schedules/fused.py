# SPDX-License-Identifier: Apache-2.0
"""Read a fused PrimFunc back: its anchor operator, its inputs, and what follows as a function on vectors.

FuseTIR leaves `anchor blocks -> elementwise blocks` in one PrimFunc. A kernel that schedule primitives cannot reach is
emitted anew; `Fused` gives it the parameters to declare and an `epilogue(value, indices)` to apply at its store, where
`value` is the anchor's result (a scalar or a vector) at `indices` (the last one a ramp when `value` is a vector).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property

import tvm
import tvm_ffi
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from schedules.errors import ScheduleError
from schedules.lanes import lanes_of, rebuild

LOOPS = "kerf.loops"
POINT = "kerf.point"
# Attributes of a PrimFunc: its arguments that nothing reads after any of its calls; of its kernel, the one it writes over.
DYING = "kerf.dying"
IN_PLACE = "kerf.in_place"
# How often a value may read what it is made of and still be bound to a variable: TVM's simplifier puts a bound value in place
# of its variable, each time anew, so that activations of activations would grow without end. Less than an exponential reads:
# rounding to bytes reads one four times, and stores that share a register each read four roundings.
_MOST_READS = 16


def annotations(loops: str, **point) -> dict[str, str]:
    """Block annotations of an anchor: its loop structure and the frozen parameters of its kernel."""
    return {LOOPS: loops, POINT: json.dumps(point, sort_keys=True)}


def leaf_blocks(stmt) -> list:
    """The blocks of a PrimFunc body, in program order, without the root."""
    found: list = []

    def visit(node) -> None:
        if isinstance(node, tvm.s_tir.SBlockRealize):
            found.append(node.block)

    tvm_ffi.structural_walk(stmt, (tvm.s_tir.SBlockRealize, visit))
    return [b for b in found if b.name_hint != "root"]


def _position(buffers: list, buffer) -> int | None:
    return next((i for i, b in enumerate(buffers) if b.same_as(buffer)), None)


@dataclass(frozen=True)
class Fused:
    """A fused PrimFunc read back around its anchor block.

    `loops` and `point` are the anchor's annotations; `params` the function's buffers in order (the last one is the
    output); `inputs` those that the anchor's definition reads, in the order in which it first reads them.
    """

    func: tirx.PrimFunc
    loops: str
    point: dict
    blocks: tuple
    anchor_index: int

    @staticmethod
    def read(func: tirx.PrimFunc) -> Fused | None:
        """None if no block of the function is annotated. Raises ScheduleError if several are."""
        blocks = leaf_blocks(func.body)
        anchors = [i for i, b in enumerate(blocks) if LOOPS in b.annotations]
        if not anchors:
            return None
        if len(anchors) > 1:
            raise ScheduleError(
                f"{len(anchors)} anchor blocks in one function",
                found=str([b.name_hint for b in blocks]),
            )
        notes = blocks[anchors[0]].annotations
        made = blocks[anchors[0]].writes[0].source.shape
        if math.prod(int(d) for d in made) > math.prod(int(d) for d in func.params[-1].shape):
            raise ScheduleError(
                "the function's output is smaller than what its anchor computes",
                found=str(list(made)),
            )
        return Fused(
            func, str(notes[LOOPS]), json.loads(str(notes[POINT])), tuple(blocks), anchors[0]
        )

    @property
    def anchor(self):
        return self.blocks[self.anchor_index]

    @cached_property
    def params(self) -> list:
        return list(self.func.params)

    @cached_property
    def definition(self) -> tuple[int, ...]:
        """The blocks the anchor's result is computed by: itself and those that it reads from, in program order."""
        needed = [self.anchor_index]
        for i in reversed(range(self.anchor_index)):
            written = self.blocks[i].writes[0].source
            if any(r.source.same_as(written) for n in needed for r in self.blocks[n].reads):
                needed.append(i)
        return tuple(sorted(needed))

    @cached_property
    def inputs(self) -> list:
        read: list = []
        for index in self.definition:
            for region in self.blocks[index].reads:
                if (
                    _position(self.params, region.source) is not None
                    and _position(read, region.source) is None
                ):
                    read.append(region.source)
        return read

    @property
    def output(self):
        return self.params[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the anchor's result, which is the function's."""
        return tuple(int(d) for d in self.output.shape)

    def has_epilogue(self) -> bool:
        return self.anchor_index + 1 < len(self.blocks)

    def emit(self) -> Emission:
        """Start the replacement kernel: `with fused.emit() as kernel: ...; func = kernel.func`."""
        return Emission(self)


class Emission:
    """The function being emitted: same parameters, `inputs` to read, `store` to write through the epilogue."""

    def __init__(self, fused: Fused):
        self.fused = fused

    def __enter__(self) -> Emission:
        self._builder = IRBuilder()
        self._builder.__enter__()
        self._frame = T.prim_func(private=True, s_tir=True)
        self._frame.__enter__()
        fused = self.fused
        self._buffers = [
            T.arg(f"p{i}", T.buffer(tuple(int(d) for d in p.shape), str(p.dtype)))
            for i, p in enumerate(fused.params)
        ]
        T.func_attr({"tirx.noalias": True})
        # RewriteDataflowReshape looks for a root block, which exists only where a buffer is allocated.
        T.sblock_alloc_buffer((1,), "float32", scope="local")
        self.inputs = [self._new(p) for p in fused.inputs]
        self._in_sums: int | None = None  # the block that `bias_of_sums` has taken
        self.output = self._buffers[-1]
        self.in_place = False
        return self

    def __exit__(self, kind, value, traceback) -> None:
        self._frame.__exit__(kind, value, traceback)
        self._builder.__exit__(kind, value, traceback)
        if kind is None:
            self.func = self._builder.get()
            if self.in_place:
                at = _position(self._buffers, self.output)
                self.func = self.func.with_attr(IN_PLACE, at)

    @property
    def buffers(self) -> list:
        """The emitted function's buffers, in the order of the fused function's parameters."""
        return self._buffers

    @property
    def residuals(self) -> list:
        """The buffers of the output's shape that only the epilogue reads."""
        shape = self.fused.shape
        return [
            new
            for new, old in zip(self._buffers[:-1], self.fused.params)
            if tuple(int(d) for d in old.shape) == shape
            and _position(self.fused.inputs, old) is None
        ]

    def write_over_residual(self) -> None:
        """Make a residual that nothing reads afterwards the output, if there is one; `in_place` says so.

        For kernels that store every element of the output once, through the epilogue, which reads a residual only where
        it stores: the result needs no storage of its own, which would be fetched from memory to be overwritten.
        """
        attrs = self.fused.func.attrs
        dying = [int(i) for i in attrs[DYING]] if attrs and DYING in attrs.keys() else []
        for buffer in self.residuals:
            same_type = str(buffer.dtype) == str(self.output.dtype)
            if not self.in_place and same_type and _position(self._buffers, buffer) in dying:
                self.output, self.in_place = buffer, True

    @property
    def follows_pixels(self) -> bool:
        """Whether the epilogue reads parameters of the output's shape, be it one that the anchor reads too."""
        fused = self.fused
        blocks = [b for i, b in enumerate(fused.blocks) if i not in fused.definition]
        read = [r.source for b in blocks for r in b.reads]
        return any(
            _position(fused.params, source) is not None
            and tuple(int(d) for d in source.shape) == fused.shape
            for source in read
        )

    def _new(self, param):
        return self._buffers[_position(self.fused.params, param)]

    def bias_of_sums(self, axes: tuple[int, ...] = (-1,)):
        """The int32 constant of one number per channel that the epilogue adds first, or None; it adds it no more then.

        For kernels whose integer sums can start with it: addition without rounding may happen in any order. `axes` of the
        output are those that count channels.
        """
        fused, index = self.fused, self.fused.anchor_index + 1
        if index >= len(fused.blocks):
            return None
        found = _added_vector(fused.blocks[index], fused.anchor.writes[0].source, axes)
        readers = [
            b
            for b in fused.blocks[index:]
            if any(r.source.same_as(fused.anchor.writes[0].source) for r in b.reads)
        ]
        if found is None or _position(fused.params, found) is None or len(readers) > 1:
            return None
        self._in_sums = index
        return self._new(found)

    def require_packed(self, wanted: tuple[int, ...]) -> None:
        """Raise ScheduleError unless the packed weights, the anchor's second input, have this shape."""
        found = tuple(int(d) for d in self.inputs[1].shape)
        if found != wanted:
            raise ScheduleError(
                "packed weights of another shape", found=str(found), wanted=str(wanted)
            )

    def store(self, value, indices) -> None:
        """Write `epilogue(value)` at `indices` of the output; the last index is a ramp if `value` is a vector."""
        T.buffer_store(self.output, self.epilogue(value, indices), list(indices))

    def operand(self, source, indices):
        """What the anchor reads at `indices` of `source`: a parameter's, or computed by the blocks before the anchor."""
        fused = self.fused
        if _position(fused.params, source) is not None:
            return self._new(source)[tuple(indices)]
        for block in (fused.blocks[i] for i in fused.definition if i != fused.anchor_index):
            if block.writes[0].source.same_as(source) and isinstance(block.body, tirx.BufferStore):
                indices = [tirx.const(i, "int32") if isinstance(i, int) else i for i in indices]
                values = {v.var: a for v, a in zip(block.iter_vars, indices)}
                return rebuild(block.body.value, values, self.operand)
        raise ScheduleError(f"the anchor reads {source.name}, which no elementwise block makes")

    def epilogue(self, value, indices, read=None):
        """What the fused function computes from the anchor's result `value` at `indices`.

        `read(buffer, indices)`, if given, is how it loads from parameters.
        """
        fused = self.fused
        produced = {
            i: b.body.buffer for i, b in enumerate(fused.blocks) if i not in fused.definition
        }
        results = [fused.anchor.writes[0].source]
        if self._in_sums is not None:
            results.append(produced.pop(self._in_sums))
        bound: dict = {}
        reads = 0  # of the value that is being evaluated, down to parameters and values kept in scratch memory

        def load(buffer, at):
            """An operand bound to a variable: an activation's polynomial reads its argument dozens of times."""
            nonlocal reads
            key = (buffer.__chandle__(), *(i.__chandle__() for i in at))
            if key not in bound:  # with what the handles point to, so that they stay those objects'
                before, reads = reads, 0
                value = fetch(buffer, at)
                if reads <= _MOST_READS or "bool" in str(value.ty.dtype):
                    bound[key] = (_bound(value), max(reads, 1), buffer, at)
                else:
                    bound[key] = (_in_scratch(value), 1, buffer, at)
                reads = before
            value, inner, *_ = bound[key]
            reads += inner
            return value

        def require_here(what: str, at) -> None:
            for got, wanted, extent in zip(at, indices, fused.shape):
                if extent != 1 and not (got is wanted or got.same_as(wanted)):
                    raise ScheduleError(
                        f"the epilogue reads {what} elsewhere than it writes", found=str(at)
                    )

        def fetch(buffer, at):
            if any(buffer.same_as(b) for b in results):
                require_here("the anchor's result", at)
                return value
            if _position(fused.params, buffer) is not None:
                found = self._new(buffer)
                if self.in_place and found.same_as(self.output):
                    require_here("the residual", at)
                return found[tuple(at)] if read is None else read(found, at)
            for i, written in produced.items():
                if written.same_as(buffer):
                    return evaluate(i, at)
            raise ScheduleError(
                f"the epilogue reads {buffer.name}, which neither the anchor nor a parameter holds"
            )

        def evaluate(i, at):
            block = fused.blocks[i]
            if not isinstance(block.body, tirx.BufferStore):
                raise ScheduleError(f"epilogue block {block.name_hint} is not elementwise")
            return rebuild(block.body.value, {v.var: a for v, a in zip(block.iter_vars, at)}, load)

        if len(fused.blocks) - 1 not in produced:
            return value
        indices = [tirx.const(i, "int32") if isinstance(i, int) else i for i in indices]
        return evaluate(len(fused.blocks) - 1, indices)


def _bound(value):
    """A float in a variable; TVM's simplifier fails on a bound vector of truth values."""
    return T.bind(value) if "float" in str(value.ty.dtype) else value


def _in_scratch(value):
    """A value in memory that TVM's simplifier does not look through; LLVM keeps it in a register all the same."""
    lanes = lanes_of(value)
    scratch = T.alloc_buffer((lanes,), str(value.ty.dtype).split("x")[0])
    every = tirx.Ramp(0, 1, lanes) if lanes > 1 else 0
    T.buffer_store(scratch, value, [every])
    return scratch[every]


def _added_vector(block, result, axes: tuple[int, ...]):
    """The buffer b of an elementwise block `result[..., c] + b[0, ..., c]` of int32, all of c in the loops `axes`, which
    count from the last; else None."""
    value = block.body.value if isinstance(block.body, tirx.BufferStore) else None
    if not isinstance(value, tvm.ir.prim.expr.Add) or str(value.ty.dtype) != "int32":
        return None
    loads = [e for e in (value.a, value.b) if isinstance(e, tvm.ir.expr.TensorLoad)]
    others = [e for e in loads if not e.source.same_as(result)]
    if len(loads) != 2 or len(others) != 1:
        return None
    found = others[0]
    if len(found.indices) < -min(axes):
        return None
    for axis in range(-len(found.indices), 0):
        if axis not in axes and int(found.source.shape[axis]) != 1:
            return None
        if axis in axes and int(block.iter_vars[axis].dom.extent) != 1:
            if not found.indices[axis].same_as(block.iter_vars[axis].var):
                return None
    return found.source
