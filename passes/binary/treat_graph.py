# SPDX-License-Identifier: Apache-2.0
"""Give binary layers their operators, and let bits flow between them.

rewrite: conv2d(sign(x), w)                    ->  float(binary_conv2d(pack(x), w)) * s
         conv2d(sign(f(conv2d(sign(x), v))), w)  ->  float(binary_conv2d(binary_conv2d_bits(pack(x), v, t), w)) * s
         conv2d(x, w)  ->  sign_conv2d(x, sign(w)) * s
requires: a canonical graph, NCHW
ensures: layers asked of this family that are binary have its operators; f is batch norm, bias and activation, and t the
  integer sums at which the sign of f changes

What lies between two binary layers folds into thresholds where nothing else reads it: a residual connection needs the
number itself, and then its sign is packed from float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax

from passes.binary.binarize import binarize
from passes.binary.bits import pack_bits
from passes.binary.operators import (
    BINARY_CONV2D,
    BINARY_CONV2D_BITS,
    BINARY_DENSE,
    BINARY_DENSE_BITS,
    BINARY_MAX_POOL2D,
    BINARY_PACK,
    SIGN_CONV2D,
    SIGN_DENSE,
    binary_call,
)
from passes.binary.recognize import (
    BinaryLayer,
    SignWeights,
    recognize,
    two_planes,
)
from passes.binary.steps import (
    Chain,
    Composed,
    Plane,
    Steps,
    byte_plane,
    chains,
    float_steps,
    integer_steps,
)
from passes.channel_flow import Uses
from passes.family import Context, Layer, Rewritten
from passes.layers import attrs_of, is_call, is_layer, multiply_accumulates, shape_of
from passes.quantized.operators import DEQUANTIZE
from passes.quantized.reference import dequantize
from passes.rewriting import Graph, constant, ints, rewrite_module
from passes.treat_layers import decide
from passes.treatment import Decision, Treatment
from schedules.bit_words import WORD_BITS
from schedules.errors import Declined
from schedules.sign_tables import supports
from schedules.target import CpuTarget

_BITS_OF = {BINARY_CONV2D: BINARY_CONV2D_BITS, BINARY_DENSE: BINARY_DENSE_BITS}
_THROUGH = ("relax.nn.pad", "relax.nn.max_pool2d", "relax.reshape")


@dataclass(frozen=True)
class Folded:
    """The sign that one layer reads, as thresholds on the sums of another.

    Where max pooling lies between sums and sign, `pool` is its call: it pools the bits, in the `falling` channels, whose sign
    falls with what is pooled, their opposites.
    """

    source: str
    steps: Steps
    pool: relax.Call | None = None
    falling: np.ndarray | None = None


def rewrite(mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context) -> Rewritten:
    """`Family.rewrite`. Layers that are no binary ones are declined, each with the reason."""
    asked = {n for n, t in treatments.items() if t.parameters.get("binarize")}
    original = mod
    while True:
        uses = Uses(mod := binarize(original, asked) if asked else original)
        found = _recognized(uses, treatments, context.target)
        binary, folds = _plan(found, uses)
        declined = {n for n in asked if found[n][1] is not None}
        if not declined:
            break
        asked -= declined  # they keep their values
    decisions = [
        _decision(binary.get(name, layer), outcome, treatments[name], folds.get(name))
        for name, (layer, outcome) in found.items()
    ]
    weights = {n: layer for n, (layer, _) in found.items() if isinstance(layer, SignWeights)}
    if not binary and not weights:
        return Rewritten(mod, decisions)
    layers = {**binary, **weights}
    treated = rewrite_module(mod, lambda func: _Rewriter(func, uses, layers, folds).run())
    # Its operators have references of their own: signs are compared where they are taken.
    return Rewritten(treated, decisions, reference=treated)


def _plan(found: dict, uses: Uses) -> tuple[dict[str, BinaryLayer], dict[str, Folded | str]]:
    """The layers that stay binary and where their signs come from; `found` learns of those that do not."""
    while True:
        binary = {n: layer for n, (layer, _) in found.items() if isinstance(layer, BinaryLayer)}
        folds = {}
        for (
            name,
            layer,
        ) in binary.items():  # in program order: a layer's signs decide what its sums mean
            folds[name] = fold = _fold(layer, binary, uses)
            if isinstance(fold, Folded):
                binary[name] = replace(layer, input=replace(layer.input, steps=fold.steps))
        refused = {n: reason for n, layer in binary.items() if (reason := two_planes(layer))}
        if not refused:
            return binary, folds
        found |= {name: (binary[name].layer, reason) for name, reason in refused.items()}


def _recognized(uses: Uses, treatments: Mapping[str, Treatment], target: CpuTarget) -> dict:
    """name -> (BinaryLayer or SignWeights, None), or (Layer, why not)."""
    found: dict = {}
    for binding in uses.bindings:
        if not is_layer(binding.value):
            continue
        layer = Layer(binding.value)
        if layer.name not in treatments:
            continue
        if layer.name in found:
            found[layer.name] = (layer, "its weight is used in several places")
            continue
        outcome = recognize(layer, uses, treatments[layer.name].parameters.get("zero", "exact"))
        declined = outcome.reason if isinstance(outcome, Declined) else None
        if isinstance(outcome, SignWeights) and (missing := supports(target)) is not None:
            declined = (
                f"its weights are +-s per output channel, but {outcome.reason}; {missing.reason}"
            )
        found[layer.name] = (layer if declined else outcome, declined)
    return found


def _decision(found, declined: str | None, treatment: Treatment, fold) -> Decision:
    layer = found.layer if declined is None else found
    shown = {}
    if isinstance(found, SignWeights):
        shown["signs"] = f"weights only: {found.reason}"
    elif declined is None:
        if isinstance(fold, Folded):
            shown["signs"] = f"bits of {fold.source}, thresholds folded"
        elif _dequantized(found.input.chain) is not None:
            shown["signs"] = "packed from bytes"
        else:
            shown["signs"] = f"packed from float32: {fold}"
        if len(found.input.steps.planes) > 1:
            shown["sign_of_zero"] = "exact, on two planes of bits"
    changed = bool(treatment.parameters.get("binarize")) and declined is None
    return decide(layer, treatment, declined, found=shown, pruned=changed)


def _fold(layer: BinaryLayer, binary: Mapping[str, BinaryLayer], uses: Uses) -> Folded | str:
    """The layer whose sums hold this layer's signs, or why they are packed from numbers."""
    given = layer.input
    if not _read_by(given.chain.result, {n: b.layer.call for n, b in binary.items()}, uses):
        return "other operators read the signs"
    reason = "no binary layer before it"
    for chain in chains(uses, given.chain.result, given.chain.axis):
        value = uses.definitions.get(chain.root)
        if is_call(value, "relax.nn.max_pool2d"):
            return _fold_through_pool(layer, chain, value, binary, uses)
        if not is_layer(value):
            reason = _between(value, reason)
            continue
        if not chain.is_only_reader():
            return "a residual connection reads the same numbers"
        return _fold_into(chain, Layer(value).name, layer, binary)
    return reason


def _fold_through_pool(
    layer: BinaryLayer,
    chain: Chain,
    pool: relax.Call,
    binary: Mapping[str, BinaryLayer],
    uses: Uses,
) -> Folded | str:
    """`_fold` where `chain` begins with max pooling: the sign of a maximum is the maximum, or the minimum, of signs."""
    steps, pooled = float_steps(chain), pool.args[0]
    if steps is None:
        return "the sign behind max pooling does not rise or fall with what is pooled"
    if (
        not chain.is_only_reader()
        or len(uses.readers.get(pooled, [])) > 1
        or pooled in uses.outputs
    ):
        return "other operators read what is pooled"
    reason = "no binary layer before it"
    if is_layer(uses.definitions.get(pooled)):
        above = [Chain(uses, pooled, pooled, chain.axis)]
    else:
        above = chains(uses, pooled, chain.axis)
    for before in above:
        value = uses.definitions.get(before.root)
        if not is_layer(value):
            reason = _between(value, reason)
            continue
        if before.inside() and not before.is_only_reader():
            return "a residual connection reads the same numbers"
        found = _fold_into(Composed(before, chain), Layer(value).name, layer, binary)
        if isinstance(found, str):
            return found
        return replace(found, pool=pool, falling=steps.planes[0].flip)
    return reason


def _between(value, reason: str) -> str:
    """What stops the search above a chain's root, for the report."""
    if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
        return f"{value.op.name.removeprefix('relax.')} lies between"
    return reason


def _fold_into(
    chain: Chain | Composed, name: str, layer: BinaryLayer, binary: Mapping[str, BinaryLayer]
) -> Folded | str:
    """The signs of `layer` as thresholds on the sums of the layer `name`, where `chain` begins."""
    if name not in binary:
        return f"{name} before it is not binary"
    if layer.layer.attrs.get("groups", 1) > 1:
        per_group = layer.layer.weight.shape[1]
        if per_group % WORD_BITS:
            return f"its groups of {per_group} channels begin inside words"
    source = binary[name]
    planes = len(source.input.steps.planes)
    terms = math.prod(source.layer.weight.shape[1:]) * planes
    bordered = any(source.input.padding) and source.input.pad_value == 0
    steps = integer_steps(chain, sum_scale(source), terms, None if bordered else terms % 2)
    return steps if isinstance(steps, str) else Folded(name, steps)


def sum_scale(layer: BinaryLayer) -> np.ndarray:
    """What one unit of a layer's integer sums is worth, [O] float32."""
    steps = layer.input.steps
    return (layer.weight.scale * np.float32(steps.size) / np.float32(len(steps.planes))).astype(
        np.float32
    )


def _read_by(var: relax.Var, layers: Mapping[str, relax.Call], uses: Uses) -> bool:
    """Whether only these layers read a variable, directly or padded, pooled or reshaped."""
    if var in uses.outputs:
        return False
    for binding in uses.readers.get(var, []):
        value = binding.value
        if is_layer(value) and layers.get(Layer(value).name) is not None:
            continue
        through = any(is_call(value, name) for name in _THROUGH)
        if not through or not _read_by(binding.var, layers, uses):
            return False
    return True


class _Rewriter:
    def __init__(
        self,
        func: relax.Function,
        uses: Uses,
        layers: Mapping[str, BinaryLayer | SignWeights],
        folds: Mapping[str, Folded | str],
    ):
        self.func, self.graph, self.uses = func, Graph(func), uses
        self.layers, self.folds = layers, folds
        self.packed: dict = {}  # bits that several layers read are made once
        self.arguments: dict[str, relax.Var] = {}  # the bits that each layer reads

    def run(self) -> relax.Function:
        for binding in self.uses.bindings:
            value = self.graph.substitute(binding.value)
            if is_layer(binding.value) and Layer(binding.value).name in self.layers:
                layer = self.layers[Layer(binding.value).name]
                binary = isinstance(layer, BinaryLayer)
                value = self._layer(layer) if binary else _on_numbers(layer, value.args[0])
            self.graph.define(binding.var, value)
        return self.graph.finish(self.func)

    def _layer(self, layer: BinaryLayer) -> relax.Expr:
        name, scale = layer.layer.name, sum_scale(layer)
        self.arguments[name] = self._bits(layer)
        sums = self._contraction(layer)
        return _scaled(relax.op.astype(sums, "float32"), scale, layer.layer.weight.ndim)

    def _contraction(self, layer: BinaryLayer, *thresholds) -> relax.Call:
        """The layer's sums, or with thresholds their bits."""
        given, attrs = layer.input, layer.layer.attrs
        signs = np.concatenate([layer.weight.signs] * len(given.steps.planes), 1)
        operator = BINARY_DENSE if signs.ndim == 2 else BINARY_CONV2D
        own = {"name": attrs["name"], "flops": 2 * multiply_accumulates(layer.layer.call)}
        if signs.ndim == 4:
            own |= {k: attrs[k] for k in ("strides", "dilation", "groups", "layout")}
            own |= {"padding": list(given.padding), "pad_value": given.pad_value}
        args = [self.arguments[attrs["name"]], constant(signs), *thresholds]
        return binary_call(_BITS_OF[operator] if thresholds else operator, args, **own)

    def _bits(self, layer: BinaryLayer) -> relax.Var:
        given, fold = layer.input, self.folds[layer.layer.name]
        groups = layer.layer.attrs.get("groups", 1)
        key = (given.chain.result, given.chain.root, groups, str(given.pool), given.flat)
        if key not in self.packed:
            if isinstance(fold, Folded):
                bits = self._folded(fold)
            else:
                planes = [self._pack(layer, plane, groups) for plane in given.steps.planes]
                bits = planes[0]
                if len(planes) > 1:
                    axis = given.chain.axis if given.flat is None else 1
                    bits = self.graph.emit(relax.op.concat(planes, axis), "signs")
            self.packed[key] = self._pooled(bits, given.pool)
        return self.packed[key]

    def _folded(self, fold: Folded) -> relax.Var:
        source, plane = self.layers[fold.source], fold.steps.planes[0]
        thresholds, flips = constant(plane.threshold), constant(pack_bits(plane.flip, 0))
        call = self._contraction(source, thresholds, flips)
        bits = self.graph.emit(call, f"{fold.source}_bits")
        return self._pooled(bits, fold.pool, fold.falling)

    def _pack(self, layer: BinaryLayer, plane: Plane, groups: int) -> relax.Var:
        given, x = layer.input, layer.input.chain.root
        if (stored := _dequantized(given.chain)) is not None:
            plane, x = byte_plane(plane, _numbers_of_bytes(stored)), stored.args[0]
        thresholds, flips = plane.threshold, plane.flip
        x = self.graph.substitute(x)
        layout = {"layout": "NCHW"} if given.chain.axis == 1 and len(shape_of(x)) == 4 else {}
        if given.flat is not None:
            per_row = (shape_of(x)[1:], given.chain.axis - 1)
            thresholds, flips = (_along_flat(v, *per_row) for v in (thresholds, flips))
            x, layout = relax.op.reshape(x, given.flat), {}
        args = [x, constant(thresholds), constant(pack_bits(flips, 0, groups))]
        return self.graph.emit(binary_call(BINARY_PACK, args, groups=groups, **layout), "signs")

    def _pooled(
        self, bits: relax.Var, pool: relax.Call | None, falling: np.ndarray | None = None
    ) -> relax.Var:
        if pool is None:
            return bits
        a = pool.attrs
        opposites = [] if falling is None else [constant(pack_bits(falling, 0))]
        call = binary_call(
            BINARY_MAX_POOL2D, [bits, *opposites], window=ints(a.pool_size), strides=ints(a.strides),
            padding=ints(a.padding), dilation=ints(a.dilation), layout="NCHW",
        )  # fmt: skip
        return self.graph.emit(call, "pooled_signs")


def _on_numbers(layer: SignWeights, x: relax.Expr) -> relax.Expr:
    """The layer with the signs of its weights, and their scale behind it."""
    attrs, signs = layer.layer.attrs, layer.weight.signs
    operator = SIGN_DENSE if signs.ndim == 2 else SIGN_CONV2D
    flops = 2 * multiply_accumulates(layer.layer.call)
    call = binary_call(operator, [x, constant(signs)], **attrs, flops=flops)
    return _scaled(call, layer.weight.scale, signs.ndim)


def _scaled(value: relax.Expr, scale: np.ndarray, rank: int) -> relax.Expr:
    """`value` times a number per channel, for a weight of so many axes."""
    if (scale == 1).all():
        return value
    return relax.op.multiply(value, constant(scale.reshape((-1, 1, 1) if rank == 4 else (-1,))))


def _dequantized(chain: Chain) -> relax.Call | None:
    """What makes the numbers at a chain's root of bytes; None where they are no bytes."""
    value = chain.uses.definitions.get(chain.root)
    return value if is_call(value, DEQUANTIZE) else None


def _numbers_of_bytes(dequantized: relax.Call) -> np.ndarray:
    """float32 [256], what each byte stands for."""
    return dequantize(attrs_of(dequantized), np.arange(256, dtype=np.uint8))


def _along_flat(values: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Values per channel of a row of this shape, for every element of the row laid flat."""
    full = [1] * len(shape)
    full[axis] = -1
    return np.broadcast_to(values.reshape(full), shape).reshape(-1)
