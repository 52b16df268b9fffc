# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant-style migration: move activation outliers behind a norm into the weights that read them.

    rewrite: dense(layer_norm(x, g, b), w)  ->  dense(layer_norm(x, g / s, b / s), w * s)
             other readers of the norm      ->  multiply(layer_norm(x, g / s, b / s), s)
    requires: canonical; calibration data
    ensures: the same function bit by bit; every s is a power of two

s = max|x| ** alpha / max|w| ** (1 - alpha) per channel (Xiao et al., "SmoothQuant"), up to a common
factor, which changes neither range against the other channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.channel_flow import Uses, layer_counts, replace_values, with_weight
from passes.family import Observe
from passes.layers import DENSE, attrs_of, const_array, is_call, is_const, is_layer, shape_of
from passes.rewriting import Graph, axes_of, constant

_NORMS = ("relax.nn.layer_norm", "relax.nn.rms_norm")
_LARGEST_EXPONENT = 16


@dataclass(frozen=True)
class Migrated:
    """`scales` has the factor of each input column of each dense layer that was changed."""

    mod: tvm.IRModule
    scales: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Norm:
    binding: relax.VarBinding
    dense: tuple[relax.VarBinding, ...]
    others: tuple[relax.VarBinding, ...]


def migrate_outliers(
    mod: tvm.IRModule,
    observe: Observe,
    alpha: float = 0.5,
    layers: Collection[str] | None = None,
) -> Migrated:
    """Migrate at every norm over the last axis whose dense readers are all in `layers` (None: all).

    `alpha`, between 0 and 1, says how much of the difficulty moves into the weights.
    """
    norms = _norms(mod, layers)
    changes: dict = {}
    scales: dict[str, np.ndarray] = {}
    for norm, largest in zip(norms, _largest_inputs(mod, norms, observe)):
        s = _factors(norm, largest, alpha)
        if not np.any(s != 1):
            continue
        changes[norm.binding.var] = _divide(s)
        for binding in norm.dense:
            scales[attrs_of(binding.value)["name"]] = s
            changes[binding.var] = _multiply_columns(s)
        for binding in norm.others:
            changes[binding.var] = _restore(norm.binding.var, s, changes.get(binding.var))
    return Migrated(replace_values(mod, changes), scales)


def _norms(mod: tvm.IRModule, layers: Collection[str] | None) -> list[_Norm]:
    uses = Uses(mod)
    counts = layer_counts(uses)
    found = []
    for binding in uses.bindings:
        if not _is_norm(binding.value) or binding.var in uses.outputs:
            continue
        readers = list(dict.fromkeys(uses.readers.get(binding.var, [])))
        dense = [r for r in readers if is_layer(r.value) and is_call(r.value, DENSE)]
        names = [attrs_of(r.value)["name"] for r in dense]
        asked = names and (layers is None or set(names) <= set(layers))
        if asked and all(counts[name] == 1 for name in names):
            others = tuple(r for r in readers if r not in dense)
            found.append(_Norm(binding, tuple(dense), others))
    return found


def _is_norm(value: relax.Expr) -> bool:
    if not any(is_call(value, name) for name in _NORMS):
        return False
    over = axes_of(value.attrs.axes, len(shape_of(value)))
    return over == [len(shape_of(value)) - 1] and all(is_const(p) for p in value.args[1:])


def _largest_inputs(mod: tvm.IRModule, norms: list[_Norm], observe: Observe) -> list[np.ndarray]:
    """The largest magnitude of each channel of each norm's result."""
    if not norms:
        return []
    largest = [np.zeros(shape_of(n.binding.value)[-1]) for n in norms]
    for sample in observe(mod, [n.binding.var.name for n in norms]):
        for norm, most in zip(norms, largest):
            values = np.abs(sample[norm.binding.var.name])
            np.maximum(most, values.reshape(-1, len(most)).max(axis=0), out=most)
    return largest


def _factors(norm: _Norm, x: np.ndarray, alpha: float) -> np.ndarray:
    """Powers of two near max|x| ** alpha / max|w| ** (1 - alpha); 1 for a channel that is always zero."""
    w = np.max([np.abs(const_array(b.value.args[1])).max(axis=0) for b in norm.dense], axis=0)
    used = (x > 0) & (w > 0)
    x, w = np.where(used, x, 1).astype("float64"), np.where(used, w, 1).astype("float64")
    exponent = alpha * np.log2(x) - (1 - alpha) * np.log2(w)
    # Only the differences between channels matter: keep the overall range where it was.
    exponent -= np.median(exponent[used]) if used.any() else 0
    exponent = np.clip(np.rint(exponent), -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return np.where(used, 2.0**exponent, 1.0)


def _divide(s: np.ndarray):
    def change(norm: relax.Call, _graph) -> relax.Call:
        x, *parameters = norm.args
        scaled = [constant((const_array(p) / s).astype(const_array(p).dtype)) for p in parameters]
        return relax.Call(norm.op, [x, *scaled], norm.attrs)

    return change


def _multiply_columns(s: np.ndarray):
    def change(call: relax.Call, _graph) -> relax.Call:
        weight = const_array(call.args[1])
        return with_weight(call, (weight * s).astype(weight.dtype))

    return change


def _restore(norm: relax.Var, s: np.ndarray, before):
    """Readers that are no layers see the norm's result as it was."""

    def change(value: relax.Expr, graph: Graph) -> relax.Expr:
        value = before(value, graph) if before is not None else value
        scaled = graph.substitute(norm)
        whole = relax.op.multiply(scaled, constant(s.astype("float32")))
        return _replace_operand(value, scaled, graph.emit(whole, f"{norm.name}_whole"))

    return change


def _replace_operand(value: relax.Expr, old: relax.Expr, new: relax.Expr) -> relax.Expr:
    if isinstance(value, relax.Call):
        args = [_replace_operand(a, old, new) for a in value.args]
        return relax.Call(value.op, args, value.attrs, value.ty_args, ret_ty=value.ty)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([_replace_operand(f, old, new) for f in value.fields])
    return new if isinstance(value, relax.Var) and value.same_as(old) else value
