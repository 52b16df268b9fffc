# SPDX-License-Identifier: Apache-2.0
"""What a model is made of: its layers by name, what they cost, and what their weights already
are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from schedules.errors import UnsupportedModel


@dataclass(frozen=True)
class LayerInfo:
    """One named layer. `flops` counts 2 per multiply-add of the dense operator; `found` is what the
    families see."""

    name: str
    operator: str
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    flops: int
    zeros: float  # share of the weights that are zero
    attributes: Mapping[str, object] = field(default_factory=dict)
    found: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """A model's layers in program order, its other operators by count, and every reason why it
    cannot be compiled."""

    model: str
    kind: str
    inputs: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    outputs: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    layers: tuple[LayerInfo, ...] = ()
    other_operators: Mapping[str, int] = field(default_factory=dict)
    unsupported: str = ""

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @property
    def zeros(self) -> float:
        """Share of all layer weights that are zero."""
        total = self.parameters
        return (
            sum(layer.zeros * layer.parameters for layer in self.layers) / total if total else 0.0
        )

    def to_json(self) -> dict:
        totals = {"parameters": self.parameters, "flops": self.flops, "zeros": self.zeros}
        return {**asdict(self), "totals": totals}


def inspect_model(
    source,
    *,
    example=None,
    inputs=None,
    batch: int | None = None,
    calibration=None,
    preprocess: str | None = None,
) -> Inspection:
    """Look at a model without compiling it, and at its activations on `calibration` data if given, prepared as in `build`.

    A model with operators Kerf does not support gives an Inspection whose `unsupported` lists them
    all. Raises ModelError for a file that cannot be read.
    """
    from compiler.frontend import import_model

    name = str(source) if isinstance(source, str) or hasattr(source, "__fspath__") else ""
    try:
        imported = import_model(source, example=example, inputs=inputs, batch=batch)
    except UnsupportedModel as error:
        return Inspection(name, "", unsupported=str(error))
    layers, others = _walk(imported.mod)
    shown = _shown(imported, calibration, preprocess)
    layers = [replace(x, found={**x.found, **shown.get(x.name, {})}) for x in layers]
    return Inspection(
        model=name or type(source).__name__,
        kind=str(imported.source_kind),
        inputs=tuple((t.name, tuple(t.shape), str(t.dtype)) for t in imported.inputs),
        outputs=tuple((t.name, tuple(t.shape), str(t.dtype)) for t in imported.outputs),
        layers=tuple(layers),
        other_operators=others,
    )


def _shown(imported, calibration, preprocess: str | None) -> dict[str, dict]:
    """What the families see in the graph as they meet it, and in its values on calibration data."""
    from compiler.pipeline import canonicalize
    from passes import families
    from passes.treat_layers import describe_graph

    mod = canonicalize(imported.mod)
    shown = describe_graph(mod)
    if calibration is None:
        return shown
    from compiler.calibration import load_calibration
    from compiler.observe import Observer
    from compiler.samples import index_ranges
    from passes.family import Context
    from schedules.target import detect_host

    host = detect_host()
    ranges = index_ranges(imported.mod)
    samples = load_calibration(calibration, imported.inputs, preprocess, ranges)
    context = Context(host, Observer(samples, host))
    for family in families():
        if family.observed_in is not None:
            for layer, facts in family.observed_in(mod, context).items():
                shown.setdefault(layer, {}).update(facts)
    return shown


def _walk(mod) -> tuple[list[LayerInfo], dict[str, int]]:
    import tvm
    from tvm import relax

    from passes.family import Layer
    from passes.layers import is_layer

    layers: list[LayerInfo] = []
    others: Counter[str] = Counter()
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if is_layer(call):
                layers.append(_layer_info(Layer(call)))
            elif isinstance(call, relax.Call) and isinstance(call.op, tvm.ir.Op):
                others[call.op.name.removeprefix("relax.")] += 1
    return layers, dict(others.most_common())


def _layer_info(layer) -> LayerInfo:
    from passes.layers import multiply_accumulates
    from passes.treat_layers import describe_weight

    weight = np.asarray(layer.weight)
    return LayerInfo(
        name=layer.name,
        operator=layer.operator.removeprefix("kerf."),
        input_shape=layer.input_shape,
        weight_shape=tuple(weight.shape),
        output_shape=layer.output_shape,
        parameters=int(math.prod(weight.shape)),
        flops=2 * multiply_accumulates(layer.call),
        zeros=float(np.mean(weight == 0)) if weight.size else 0.0,
        attributes={k: v for k, v in layer.attrs.items() if k not in ("name", "layout")},
        found=describe_weight(weight),
    )
