# SPDX-License-Identifier: Apache-2.0
"""Layer norm, RMS norm, softmax and log-softmax lowered to one kernel each.

    rewrite: y = relax.nn.layer_norm(x, gamma, beta)  ->  y = call_tir(layer_norm, (x, gamma, beta))

float32; a normalisation over anything but the last axis, or the channels of planes [N, C, P], is left to TVM.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import relax

from passes.family import Lowering
from passes.layers import shape_of
from passes.lower import call_te
from schedules import layer_norm, softmax
from schedules.target import CpuTarget


def _is_float32(*exprs) -> bool:
    return all(str(e.ty.dtype) == "float32" for e in exprs)


def _axis(call: relax.Call) -> int | None:
    """The axis of a normalisation that the kernel covers: -1, or 1 of three; else None."""
    rank = len(shape_of(call.args[0]))
    axes = [int(a) % rank for a in call.attrs.axes]
    if axes == [rank - 1]:
        return -1
    return 1 if rank == 3 and axes == [1] else None


def lower_layer_norm(
    bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget
) -> relax.Expr | None:
    """relax.nn.layer_norm over the last axis, or over planes."""
    x, gamma, beta = call.args
    axis = _axis(call)
    if axis is None or not _is_float32(x, gamma, beta):
        return None
    if not (bool(call.attrs.center) and bool(call.attrs.scale)):
        return None
    point = layer_norm.Point(epsilon=float(call.attrs.epsilon), axis=axis)
    return call_te(
        bb, lambda *t: layer_norm.define_layer_norm(*t, point), x, gamma, beta, hint="layer_norm"
    )


def lower_rms_norm(
    bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget
) -> relax.Expr | None:
    """relax.nn.rms_norm over the last axis, or over planes."""
    x, weight = call.args
    axis = _axis(call)
    if axis is None or not _is_float32(x, weight):
        return None
    point = layer_norm.Point(epsilon=float(call.attrs.epsilon), centered=False, axis=axis)
    return call_te(bb, lambda *t: layer_norm.define_rms_norm(*t, point), x, weight, hint="rms_norm")


def _lower_softmax(log: bool) -> Lowering:
    def lower(bb: relax.BlockBuilder, call: relax.Call, _target: CpuTarget) -> relax.Expr | None:
        (x,) = call.args
        if not _is_float32(x) or not shape_of(x):
            return None
        point = softmax.Point(axis=int(call.attrs.axis) % len(shape_of(x)), log=log)
        return call_te(
            bb,
            lambda t: softmax.define_softmax(t, point),
            x,
            hint="log_softmax" if log else "softmax",
        )

    return lower


LOWERINGS: Mapping[str, Lowering] = {
    "relax.nn.layer_norm": lower_layer_norm,
    "relax.nn.rms_norm": lower_rms_norm,
    "relax.nn.softmax": _lower_softmax(log=False),
    "relax.nn.log_softmax": _lower_softmax(log=True),
}
