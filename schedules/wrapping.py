# SPDX-License-Identifier: Apache-2.0
"""Vectors of int32 modulo 2^32: named as in the standard library's `operator`, in whose place it may be given.

TVM tells LLVM that sums of int32 never overflow, which makes those that do undefined. LLVM's predicated operations carry no
such promise; with every lane on they become the plain instructions.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from schedules.lanes import lanes_of


def add(a, b):
    return _every_lane("add", a, b)


def sub(a, b):
    return _every_lane("sub", a, b)


def mul(a, b):
    return _every_lane("mul", a, b)


def _every_lane(name: str, a, b):
    lanes = lanes_of(a)
    on = T.broadcast(tirx.const(True, "bool"), lanes)
    return tirx.call_llvm_pure_intrin(
        f"int32x{lanes}", f"llvm.vp.{name}", a, b, on, tirx.const(lanes, "int32")
    )
