# SPDX-License-Identifier: Apache-2.0
"""What `bench_families.py activation-sparse` measures: second layers, MLPs, gated pairs, a transformer, densities."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
import tvm
from tvm import relax

from passes.activation_sparse.byte_weights import ByteWeight
from passes.activation_sparse.crossover import crossover
from passes.activation_sparse.operators import sparse_dense
from passes.family import Context
from passes.layers import const_array, dense
from passes.samples import Layers, graph
from passes.treat_layers import layers_of, treat_layers
from passes.treatment import Treatment
from schedules.target import detect_host
from tools.bench_families import Case, Measured

_SWEEP = (0.01, 0.03, 0.063, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 1.0)
_SHAPES = (
    (1, 3072, 768),
    (1, 5632, 2048),
    (4, 3072, 768),
    (8, 2048, 512),
    (16, 3072, 768),
    (128, 3072, 768),
    (197, 1536, 384),
)
_FLOAT, _BYTES = "rows", "int8 rows"
FAMILY = "activation_sparse"


def cases() -> list[Case]:
    """In the order of the document."""
    found = [
        Case(
            f"second layer 3072 -> 768, {tokens} token{'s' * (tokens > 1)}",
            functools.partial(_second_layer, tokens, 3072, 768, (0.063, 0.03)),
            {_FLOAT: wanted},
        )
        for tokens, wanted in ((1, 0.1), (128, 0.45))
    ]
    found += [
        Case(
            f"MLP 768-3072-768, 1 token, {density:.1%}",
            functools.partial(_mlp, 768, 3072, density),
            {_FLOAT: wanted},
        )
        for density, wanted in ((0.063, 0.58), (0.03, 0.56))
    ]
    found.append(
        Case(
            "gated MLP 2048-5632-2048, 1 token, 10 %",
            functools.partial(_gated, 2048, 5632, 0.1),
            {_FLOAT: 0.45},
        )
    )
    found.append(Case("ViT-S/16 with ReLU, 5 % of the hidden units", _vit, {_FLOAT: 0.85}))
    found += [
        Case(
            f"densities, {tokens} x {inputs} -> {outputs}",
            functools.partial(_second_layer, tokens, inputs, outputs, _SWEEP),
            {_FLOAT: 1.03},
        )
        for tokens, inputs, outputs in _SHAPES
    ]
    return found


def activations(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> np.ndarray:
    """Magnitudes of normal numbers, of which all but a share `density` are 0."""
    values = np.abs(rng.standard_normal(shape, dtype=np.float32))
    return values * (rng.random(shape) < density)


def _second_layer(tokens: int, inputs: int, outputs: int, densities: Sequence[float]) -> Measured:
    """One layer that is given its input with the zeros in it. Kernels are made for 6.3 %."""
    target = detect_host()
    shape, notes, graphs = (tokens, inputs), {}, {}
    graphs["dense"] = _graph(shape, lambda layers, x: layers.dense("down", x, outputs))
    kinds = {_FLOAT: "float32", _BYTES: "int8"}
    if tokens > 16:
        del kinds[_BYTES]
    for name, dtype in kinds.items():
        limit = crossover(tokens, inputs, outputs, target, 0.063, dtype)
        if tokens > 1:
            notes[f"crossover {dtype}"] = limit
        graphs[name] = _graph(
            shape, functools.partial(_gathered, outputs=outputs, dtype=dtype, limit=limit)
        )
    rng = np.random.default_rng(1)
    given = {f"{d:.1%}": [activations(rng, shape, d)] for d in densities}
    # What the layer is as int8 altogether, input too.
    treatments = {"down": Treatment("int8", {})}
    graphs["int8 dense"] = _treated(graphs["dense"], treatments, [*given.values()])
    return Measured(graphs, given, notes)


def _gathered(layers: Layers, x, *, outputs: int, dtype: str, limit: float):
    weight = layers.constant(outputs, int(x.ty.shape[-1]))
    bias, call = layers.constant(outputs), dense(x, weight, name="down")
    if dtype == "float32":
        return layers.emit(
            relax.op.add(layers.emit(sparse_dense(call, weight, 0.063, limit)), bias)
        )
    stored = ByteWeight.of(const_array(weight))
    sums = layers.emit(sparse_dense(call, relax.const(stored.values), 0.063, limit))
    scaled = layers.emit(relax.op.multiply(sums, relax.const(stored.scale)))
    return layers.emit(relax.op.add(scaled, bias))


def _graph(shape: tuple[int, ...], body) -> tvm.IRModule:
    return graph(shape, body)(np.random.default_rng(0))


def _treated(
    mod: tvm.IRModule, treatments: Mapping[str, Treatment], samples: Sequence[Sequence[np.ndarray]]
) -> tvm.IRModule:
    """The graph with its layers treated as asked. Raises SystemExit where a layer is declined."""
    from compiler.calibration import load_calibration
    from compiler.frontend import TensorSpec
    from compiler.observe import Observer
    from passes.layers import shape_of

    target = detect_host()
    specs = [TensorSpec(p.name, shape_of(p), str(p.ty.dtype)) for p in mod["main"].params]
    calibration = load_calibration([s[0] for s in samples], specs)
    found = treat_layers(mod, treatments, Context(target, Observer(calibration, target)))
    declined = [f"{d.layer}: {d.declined}" for d in found.decisions if d.declined]
    if declined:
        raise SystemExit("; ".join(declined))
    return found.treated


def _shift(density: float) -> float:
    """What to add to a sum of two standard normal numbers for so large a share to be positive."""
    return -(2**0.5) * NormalDist().inv_cdf(1 - density)


def _one_token(body, width: int, layers: Sequence[str], first: Sequence[str]) -> Measured:
    """A network for one token: all layers float32; second ones with int8 rows; `first`, which are dense, int8 as well."""
    mod = _graph((1, width), body)
    rng = np.random.default_rng(1)
    samples = [[rng.standard_normal((1, width), dtype=np.float32)] for _ in range(4)]

    def asked(dtype: str) -> dict[str, Treatment]:
        return dict.fromkeys(layers, Treatment(FAMILY, {"weights": dtype}))

    int8 = dict.fromkeys(layers, Treatment("int8", {}))
    graphs = {
        "dense": mod,
        _FLOAT: _treated(mod, asked("float32"), samples),
        _BYTES: _treated(mod, asked("int8"), samples),
        "int8 + int8 rows": _treated(
            mod, {**asked("int8"), **{n: int8[n] for n in first}}, samples
        ),
        "int8": _treated(mod, int8, samples),
    }
    return Measured(graphs, {"": samples[0]})


def _mlp(width: int, hidden: int, density: float) -> Measured:
    def body(layers: Layers, x):
        h = layers.emit(relax.op.nn.relu(layers.dense("fc1", x, hidden, shift=_shift(density))))
        return layers.dense("fc2", h, width)

    return _one_token(body, width, ("fc1", "fc2"), ("fc1",))


def _gated(width: int, hidden: int, density: float) -> Measured:
    def body(layers: Layers, x):
        gate = layers.emit(relax.op.nn.relu(layers.dense("gate", x, hidden, shift=_shift(density))))
        h = layers.emit(relax.op.multiply(gate, layers.dense("up", x, hidden)))
        return layers.dense("down", h, width)

    return _one_token(body, width, ("gate", "up", "down"), ("gate",))


def _vit() -> Measured:
    """A ViT-S/16 of `transformers` with random weights; biases are set so that each unit fires for 5 % of the tokens."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from compiler.frontend import import_model
    from compiler.pipeline import canonicalize

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, hidden_act="relu", num_labels=1000
    )  # fmt: skip
    network = ViTForImageClassification(config).eval()
    images = [torch.randn(1, 3, 224, 224) for _ in range(4)]

    def set_bias(module, _inputs, output) -> torch.Tensor:
        at = torch.quantile(output.reshape(-1, output.shape[-1]), 0.95, dim=0)
        module.bias.data -= at
        return output - at

    first = [m for m in network.modules() if getattr(m, "out_features", 0) == 1536]
    hooks = [m.register_forward_hook(set_bias) for m in first]
    with torch.no_grad():
        network(images[0])
    for hook in hooks:
        hook.remove()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, image):
            return self.network(image).logits

    mod = canonicalize(import_model(Logits().eval(), example=(images[0],)).mod)
    mlps = [x.name for x in layers_of(mod) if 1536 in x.weight.shape]
    arrays = [[image.numpy()] for image in images]
    treated = _treated(mod, dict.fromkeys(mlps, Treatment(FAMILY, {})), arrays[1:])
    return Measured({"dense": mod, _FLOAT: treated}, {"": arrays[3]})
