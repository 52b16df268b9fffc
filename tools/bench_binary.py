# SPDX-License-Identifier: Apache-2.0
"""What `bench_families.py binary` measures: single layers beside Kerf's dense ones, networks beside other engines' float and int8."""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from passes.family import Context
from passes.layers import conv2d, register
from passes.treat_layers import layers_of, treat_layers
from passes.treatment import Treatment
from schedules.target import detect_host
from tools.bench_families import Case, Measured

# name -> channels, outputs, kernel, extent of the image; the largest share of the dense kernel's time.
_LAYERS: tuple[tuple[str, tuple[int, int, int, int], Mapping[str, float]], ...] = (
    ("3x3, 256 -> 256, 14x14", (256, 256, 3, 14), {"binary": 1 / 6}),
    ("1x1, 512 -> 512, 14x14", (512, 512, 1, 14), {"binary": 1 / 12}),
    ("3x3, 64 -> 64, 56x56", (64, 64, 3, 56), {}),
    ("3x3, 128 -> 128, 28x28", (128, 128, 3, 28), {}),
    ("3x3, 512 -> 512, 7x7", (512, 512, 3, 7), {}),
    ("1x1, 128 -> 128, 56x56", (128, 128, 1, 56), {}),
)
# Of signs as weights alone: the inputs are real numbers.
_WEIGHTS: tuple[tuple[str, tuple[int, int, int, int]], ...] = (
    ("1-bit weights: 1x1, 512 -> 512, 14x14", (512, 512, 1, 14)),
    ("1-bit weights: 1x1, 4096 -> 4096, 1x1", (4096, 4096, 1, 1)),
    ("1-bit weights: 3x3, 256 -> 256, 14x14", (256, 256, 3, 14)),
    ("1-bit weights: 3x3, 512 -> 512, 7x7", (512, 512, 3, 7)),
)
_NETWORKS = ("birealnet18", "quicknet", "reactnet")
# What becomes of the real layers of a binary network, by the ending of the case's name.
_RESTS = {"": None, ", rest int8": "int8"}
_ENGINES = ("onnxruntime", "openvino")


def cases() -> list[Case]:
    """Layers, then networks, in the order of the document."""
    layers = [Case(name, functools.partial(_layer, *of), wanted) for name, of, wanted in _LAYERS]
    layers += [Case(name, functools.partial(_layer, *of, signs=False)) for name, of in _WEIGHTS]
    networks = [(f"{n}{ending}", n, rest) for n in _NETWORKS for ending, rest in _RESTS.items()]
    return layers + [Case(name, functools.partial(_network, *of)) for name, *of in networks]


def _layer(
    channels: int, outputs: int, kernel: int, extent: int, *, signs: bool = True
) -> Measured:
    """Signs of a layer's sums: of floats that are +-1 by the dense kernel, and packed, counted and compared as bits.

    Without `signs` both read the floats as they are, and only the weights are bits.
    """
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((outputs, channels, kernel, kernel)) < 0.5, -1, 1)
    threshold = rng.integers(-9, 9, (outputs, 1, 1)) + 0.5
    shape = (1, extent, extent, channels)
    make = functools.partial(
        _graph, shape, weight.astype("float32"), threshold.astype("float32"), kernel // 2
    )
    x = np.where(rng.random(shape) < 0.5, -1, 1).astype("float32")
    graphs = {"dense": make(False), "binary": _binary(make(signs))}
    return Measured(graphs, {"signs": [x]})


def _graph(shape, weight: np.ndarray, threshold: np.ndarray, padding: int, signs: bool):
    """where(conv2d(x, weight) >= threshold, 1, -1), of sign(x) if `signs`; channels last on both sides, as in a network."""
    register()
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))

    def sign(value, at):
        above = builder.emit(relax.op.greater_equal(value, relax.const(at)))
        return builder.emit(
            relax.op.where(above, relax.const(np.float32(1)), relax.const(np.float32(-1)))
        )

    with builder.function("main", [x]):
        with builder.dataflow():
            image = builder.emit(relax.op.permute_dims(x, [0, 3, 1, 2]))
            given = sign(image, np.float32(0)) if signs else image
            sums = builder.emit(
                conv2d(given, relax.const(weight), name="layer", padding=[padding] * 4)
            )
            result = sign(sums, threshold)
            result = builder.emit(relax.op.permute_dims(result, [0, 2, 3, 1]))
            # One row of it: memory of results is new in every run, and the system's time to give it is not the layer's.
            result = builder.emit_output(relax.op.strided_slice(result, [1], [0], [1]))
        builder.emit_func_output(result)
    return builder.get()


def _binary(graph: tvm.IRModule, rest: Treatment | None = None, observe=None) -> tvm.IRModule:
    """The graph with its binary layers on bits and, of the others, what `rest` asks."""
    asked = {layer.name: Treatment("binary", otherwise=rest) for layer in layers_of(graph)}
    return treat_layers(graph, asked, Context(detect_host(), observe)).treated


def _network(name: str, rest: str | None) -> Measured:
    """A binary network, its real layers as they are or as `rest`; and its float twin in other engines: float32, and int8 of
    ONNX Runtime's quantizer."""
    from compiler import pipeline
    from compiler.calibration import load_calibration
    from compiler.frontend import import_model
    from compiler.observe import Observer
    from tools import zoo_binary

    module, (x,) = zoo_binary.build(name)
    imported = import_model(module, example=(x,))
    graph = pipeline.canonicalize(imported.mod)
    observe = Observer(load_calibration("random", imported.inputs), detect_host())
    label = "binary" if rest is None else f"binary+{rest}"
    treated = _binary(graph, None if rest is None else Treatment(rest), observe)
    twin, _ = zoo_binary.float_twin(name)
    return Measured({label: treated}, {"random": [x.numpy()]}, peers=_engines(twin, x.numpy()), cold=False)  # fmt: skip


def _engines(module, x: np.ndarray) -> dict[str, Callable]:
    from compiler import peers
    from tools.quantize_onnx import quantize_onnx, random_samples

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = peers.export_onnx(module, [x], Path(scratch))
        quantize_onnx(path, path.with_suffix(".int8.onnx"), random_samples(path))
        for kind, model in (("", path), (" int8", path.with_suffix(".int8.onnx"))):
            for name in _ENGINES:
                engine = importlib.import_module(name)
                opened = peers.OPENERS[name](engine, model, {0: x}, 1)
                found[name + kind] = opened.call
    return found
