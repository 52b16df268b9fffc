# SPDX-License-Identifier: Apache-2.0
"""The order of everything between an imported graph and a compiled library. Order lives here and nowhere else."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import tvm
import tvm_ffi
from tvm import relax, tirx

from compiler.arrays import ALIGNMENT
from compiler.artifact import CompiledVariant, KernelCall
from compiler.code_generation import GeneratedCode, generate_code
from passes import families
from passes.accept_unaligned_inputs import AcceptUnalignedInputs
from passes.hoist_constants import Hoisted, hoist_constants
from passes.layers import (
    CONV2D,
    attrs_of,
    is_call,
    layers_computed_by,
    multiply_accumulates,
    operator_call,
    shape_of,
)
from passes.lower import lower_operators
from passes.rewriting import bindings_of, variables
from passes.write_over_residuals import MarkDying, WriteOverResiduals
from schedules.dispatch import Kernel, schedule_module
from schedules.preparation import Source
from schedules.target import CpuTarget

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Graphs:
    """What each variant must compute: the canonical graph as imported, and `Treated.reference`.

    `floats` is `Treated.floats`, what the second rounds to steps, if it rounds at all; `notes` is `Treated.notes`.
    """

    original: tvm.IRModule
    reference: tvm.IRModule
    floats: tvm.IRModule | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FusedGraph:
    """A graph fused into PrimFuncs, before and independent of any schedule.

    `mod` holds unscheduled PrimFuncs and `main`; `layers_of` the layers of each packed constant by handle, `indices` the
    handles of those that say where values are;
    `sources` what some of them are made of; `flops` the dense operations of each layer (2 per multiply-accumulate).
    """

    mod: tvm.IRModule
    layers_of: dict[int, tuple[str, ...]]
    indices: frozenset[int]
    sources: dict[int, Source]
    flops: dict[str, int]


def canonicalize(mod: tvm.IRModule) -> tvm.IRModule:
    """The graph in one spelling per operation: constants folded in numpy, batch norm folded, NCHW."""
    return tvm.transform.Sequential(canonical_passes())(mod)


def canonical_passes() -> list[tvm.transform.Pass]:
    """Graph passes that no treatment or target changes."""
    from passes.canonicalize_elementwise import CanonicalizeElementwise
    from passes.canonicalize_flatten import CanonicalizeFlatten
    from passes.canonicalize_padding import CanonicalizePadding
    from passes.canonicalize_pooling import CanonicalizePooling
    from passes.canonicalize_shapes import CanonicalizeShapes
    from passes.fold_batch_norm import FoldBatchNorm
    from passes.fold_constants import FoldConstants
    from passes.recognize_activation import RecognizeActivation
    from passes.recognize_attention import RecognizeAttention
    from passes.recognize_normalization import RecognizeNormalization

    return [
        # One spelling first: the recognisers and folds below match no other.
        FoldConstants(),
        CanonicalizeShapes(),
        CanonicalizeElementwise(),
        FoldConstants(),
        # Composite operators before batch norm folding, which would take a norm's scale for its own.
        RecognizeNormalization(),
        RecognizeActivation(),
        RecognizeAttention(),
        CanonicalizePadding(),
        CanonicalizePooling(),
        FoldBatchNorm(),
        CanonicalizeFlatten(),
        # What became constant or cancels only now.
        FoldConstants(),
        CanonicalizeShapes(),
        CanonicalizeElementwise(),
    ]


def lay_out(mod: tvm.IRModule) -> tvm.IRModule:
    """Channels last for the whole graph, planes where sparse layers hand them to one another; pooling in convolutions, and
    large shortcuts in those they are added to."""
    from passes.channels_last import ChannelsLast
    from passes.pool_convolutions import PoolConvolutions
    from passes.sparse.keep_planes import KeepPlanes
    from passes.sparse.merge_shortcuts import MergeShortcuts

    passes = [PoolConvolutions(), ChannelsLast(), KeepPlanes(), MergeShortcuts()]
    return tvm.transform.Sequential(passes)(mod)


def forbid_winograd(mod: tvm.IRModule) -> tvm.IRModule:
    """Mark every convolution so that its lowering does not consider Winograd's algorithm."""
    from passes.treat_layers import rewrite_layers

    def mark(call: relax.Call) -> relax.Call:
        return (
            operator_call(call.op.name, call.args, **attrs_of(call), winograd="never")
            if is_call(call, CONV2D)
            else call
        )

    return rewrite_layers(mod, mark)


def fuse_graph(mod: tvm.IRModule, target: CpuTarget) -> FusedGraph:
    """Lower a canonical, channels-last graph to fused PrimFuncs."""
    flops = _layer_flops(mod)
    lowerings = {name: lower for family in families() for name, lower in family.lowerings.items()}
    with target.tvm():
        # Scans have no legalisation, only this.
        mod = relax.backend.DispatchSortScan()(mod)
    lowered = lower_operators(mod, lowerings, target)
    fused = tvm.transform.Sequential(
        [
            relax.transform.AnnotateTIROpPattern(),
            _mark_crops(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
        ]
    )(lowered.mod)
    return FusedGraph(fused, lowered.layers_of, lowered.indices, lowered.sources, flops)


def _mark_crops() -> tvm.transform.Pass:
    """A slice from 0 on reads where it writes, so TVM calls it elementwise; fused, it would cut off the kernel's output."""
    elementwise, broadcast, injective = 0, 1, 2

    def crops(func: tirx.PrimFunc) -> bool:
        *given, out = [tuple(p.shape) for p in func.params]
        same_rank = [shape for shape in given if len(shape) == len(out)]
        return any(int(have) > int(made) for x in same_rank for have, made in zip(x, out))

    def mark(func: tirx.PrimFunc, mod, context) -> tirx.PrimFunc:
        pattern = func.attrs.get("op_pattern") if func.attrs else None
        if pattern in (elementwise, broadcast) and crops(func):
            return func.with_attr("op_pattern", injective)
        return func

    return tirx.transform.prim_func_pass(mark, opt_level=0, name="kerf.MarkCrops")


def compile_graph(
    name: str,
    graph: FusedGraph,
    target: CpuTarget,
    earlier: CompiledVariant | None = None,
    progress: Progress | None = None,
    code: GeneratedCode | None = None,
) -> CompiledVariant:
    """Schedule and compile one variant. One compiled `earlier` for the same target and model lends its program if that is
    the same, whatever the constants are; others lend the kernels that they have in common by `code`."""
    hoisted = hoist_constants(graph.mod)
    unscheduled = hoisted.mod
    constants = {
        "constants": hoisted.constants,
        "constant_names": _constant_names(hoisted, graph.layers_of),
        "index": [handle in graph.indices for handle in hoisted.handles],
        "sources": [graph.sources.get(handle) for handle in hoisted.handles],
    }
    if earlier is not None and tvm_ffi.structural_equal(earlier.unscheduled, unscheduled):
        return replace(earlier, name=name, **constants)
    scheduled, kernels = schedule_module(MarkDying()(_copy(unscheduled)), target)
    backend = importlib.import_module("tvm.relax.backend.cpu_generic.pipeline")
    tvm_target = target.tvm()
    with tvm_target:
        lowered = tvm.transform.Sequential(
            [
                *backend.dataflow_lower_passes(tvm_target),
                WriteOverResiduals(),
                *([AcceptUnalignedInputs()] if target.reads_unaligned else []),
                *backend.finalize_passes(tvm_target),
            ]
        )(scheduled)
    functions = {
        gv.name_hint: f for gv, f in lowered.functions_items() if isinstance(f, tirx.PrimFunc)
    }
    program = tvm.IRModule({"main": lowered["main"]}, attrs=lowered.attrs)
    executable = relax.build(program, tvm_target, relax_pipeline=None)
    executable.mod.clear_imports()  # the empty C source of a program without kernels
    for library in generate_code(functions, tvm_target, progress, code):
        executable.mod.import_module(library)
    return CompiledVariant(
        name=name,
        executable=executable,
        **constants,
        kernels=_kernel_calls(lowered["main"], hoisted, graph, kernels),
        unscheduled=unscheduled,
        input_alignment=1 if target.reads_unaligned else ALIGNMENT,
    )


def _copy(mod: tvm.IRModule) -> tvm.IRModule:
    return tvm.IRModule({gv: func for gv, func in mod.functions_items()}, attrs=mod.attrs)


def _layer_flops(mod: tvm.IRModule) -> dict[str, int]:
    """Dense operations by layer; those of an operator that computes several layers in equal shares."""
    flops = {}
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            layers = layers_computed_by(call) if isinstance(call, relax.Call) else ()
            if layers:
                attrs = attrs_of(call)
                total = attrs["flops"] if "flops" in attrs else 2 * multiply_accumulates(call)
                flops.update({layer: total // len(layers) for layer in layers})
    return flops


def _constant_names(hoisted: Hoisted, layers_of: dict[int, tuple[str, ...]]) -> list[str]:
    """`layer/0`, `layer/1`, ... for a layer's packed arrays (the first layer's, where one operator computes several);
    `shared/n` for what belongs to no layer."""
    counts: dict[str, int] = {}
    names = []
    for handle in hoisted.handles:
        owner = layers_of.get(handle, ("shared",))[0]
        names.append(f"{owner}/{counts.get(owner, 0)}")
        counts[owner] = counts.get(owner, 0) + 1
    return names


def _kernel_calls(
    main: relax.Function, hoisted: Hoisted, graph: FusedGraph, kernels: dict[str, Kernel]
) -> list[KernelCall]:
    """The kernels in the order in which the virtual machine calls them, each with the layers whose weights it reads."""
    params = main.params[-1]
    index_of: dict = {}
    calls, arguments = [], []
    for block in main.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.TupleGetItem) and value.tuple_value.same_as(params):
                index_of[binding.var.__chandle__()] = value.index
            if not (isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar)):
                continue
            indices = [index_of.get(a.__chandle__()) for a in value.args]
            handles = [hoisted.handles[i] for i in indices if i is not None]
            layers = list(dict.fromkeys(n for h in handles for n in graph.layers_of.get(h, ())))
            kernel = kernels[value.op.name_hint]
            arguments.append(list(value.args))
            calls.append(
                KernelCall(
                    function=kernel.function,
                    layers=layers,
                    loops=kernel.loops,
                    point={**kernel.point, "tuned": True} if kernel.tuned else kernel.point,
                    # Products of activations belong to no layer: their kernels say what they do.
                    flops=sum(graph.flops.get(layer, 0) for layer in layers)
                    or kernel.point.get("flops", 0),
                    bytes=sum(_tensor_bytes(a) for a in value.args),
                )
            )
    served = _served(main, arguments, [call.layers for call in calls])
    return [replace(call, serves=names) for call, names in zip(calls, served)]


def _served(
    main: relax.Function,
    arguments: Sequence[Sequence[relax.Expr]],
    layers: Sequence[Sequence[str]],
) -> list[list[str]]:
    """For each kernel call, given with its arguments, that has no layers: those for which alone it computes, directly or
    through other such kernels. A tensor's first call writes it, all others read it, one that has it twice and last also
    writes it."""
    same: dict[relax.Var, relax.Var] = {}  # what a reshape made -> what it is a view of
    allocated, kept = set(), set(variables(main.body.body))
    for binding in bindings_of(main):
        value = binding.value
        if is_call(value, "relax.vm.alloc_tensor"):
            allocated.add(binding.var)
        elif _is_packed(value, "vm.builtin.reshape"):
            same[binding.var] = same.get(value.args[0], value.args[0])
        elif not isinstance(getattr(value, "op", None), tvm.ir.GlobalVar):
            if not is_call(value, "relax.vm.kill_object"):
                kept.update(variables(value))
    kept |= {same[v] for v in kept if v in same}
    # What each kernel writes: the tensor, and who reads it until another kernel writes over it.
    writes: list[list[tuple[relax.Var, set[int]]]] = [[] for _ in arguments]
    readers: dict[relax.Var, set[int]] = {}
    for i, args in enumerate(arguments):
        tensors = [same.get(a, a) for a in args]
        for var in set(tensors) & allocated:
            if var in readers:
                readers[var].add(i)
            if var not in readers or (tensors.count(var) > 1 and var.same_as(tensors[-1])):
                readers[var] = set()
                writes[i].append((var, readers[var]))
    served: list[list[str]] = [[] for _ in arguments]
    for i in reversed(range(len(arguments))):
        found = [layers[j] or served[j] for _, read in writes[i] for j in sorted(read)]
        if not layers[i] and all(found) and kept.isdisjoint(var for var, _ in writes[i]):
            served[i] = list(dict.fromkeys(name for names in found for name in names))
    return served


def _is_packed(value: relax.Expr, name: str) -> bool:
    """Whether a value calls a packed function of this name."""
    op = value.op if isinstance(value, relax.Call) else None
    return isinstance(op, relax.ExternFunc) and str(op.global_symbol) == name


def _tensor_bytes(expr: relax.Expr) -> int:
    if not isinstance(expr.ty, relax.TensorType):
        return 0
    return math.prod(shape_of(expr)) * (tvm.DataType(expr.ty.dtype).bits + 7) // 8
