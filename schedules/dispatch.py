# SPDX-License-Identifier: Apache-2.0
"""Schedule every PrimFunc of a module: by the loop structure its anchor block names, else by what its blocks are."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import tvm
from tvm import tirx

from schedules import generic
from schedules.errors import ScheduleError
from schedules.fused import Fused
from schedules.target import CpuTarget


@dataclass(frozen=True)
class Kernel:
    """How one PrimFunc was scheduled, for the report: loop structure, the parameters of its kernel, whether tuning found them."""

    function: str
    loops: str
    point: dict
    tuned: bool = False


# Each is a module of this package with `schedule(fused, target) -> PrimFunc`; imported when first met.
LOOP_STRUCTURES = (
    "attention", "attention_planes", "attention_queries", "batch_matmul", "binary_contraction", "binary_pack", "byte_border", "contraction", "depthwise", "gathered_gate", "gathered_rows", "grouped", "int8_contraction", "int8_depthwise", "int8_pooled", "int8_winograd", "layer_norm", "pooled_windows", "pooling", "quadratic_contraction", "quadratic_winograd", "row_sum", "sign_tables", "softmax", "sparse_chain", "sparse_groups", "sparse_near", "sparse_planes", "sparse_vector", "sparse_windows", "transposition", "winograd",
)  # fmt: skip


def loop_structure(name: str):
    """`schedule(fused, target) -> PrimFunc` of a loop structure. Raises ScheduleError for an unknown name."""
    if name not in LOOP_STRUCTURES:
        raise ScheduleError(
            "unknown loop structure", found=repr(name), wanted=" or ".join(LOOP_STRUCTURES)
        )
    return importlib.import_module(f"schedules.{name}").schedule


def schedule_function(
    name: str, func: tirx.PrimFunc, target: CpuTarget
) -> tuple[tirx.PrimFunc, Kernel]:
    """The scheduled PrimFunc and what was done. Raises ScheduleError, naming the function, if its kernel cannot be made."""
    fused = Fused.read(func)
    try:
        if fused is None:
            return generic.schedule(func, target), Kernel(name, "generic", {})
        return loop_structure(fused.loops)(fused, target), Kernel(
            name, fused.loops, fused.point, _tuned(fused, target)
        )
    except ScheduleError:
        raise
    except Exception as error:
        raise ScheduleError(f"{type(error).__name__}: {error}", where=f"kernel {name}") from error


def _tuned(fused: Fused, target: CpuTarget) -> bool:
    """Whether the point of this kernel is one that tuning recorded for it."""
    if target.records is None or "problem" not in fused.point:
        return False
    recorded = target.records.lookup(target, fused.loops, fused.point["problem"])
    return recorded is not None and dict(recorded) == fused.point.get("point")


def schedule_module(mod: tvm.IRModule, target: CpuTarget) -> tuple[tvm.IRModule, dict[str, Kernel]]:
    """Every PrimFunc of `mod` scheduled, and what was done with each, by function name."""
    kernels = {}
    for gv, func in list(mod.functions_items()):
        if isinstance(func, tirx.PrimFunc):
            scheduled, kernels[gv.name_hint] = schedule_function(gv.name_hint, func, target)
            mod.update_func(gv, scheduled.with_attr("tirx.noalias", True))
    return mod, kernels
