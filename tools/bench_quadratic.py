# SPDX-License-Identifier: Apache-2.0
"""What `bench_families.py quadratic` measures: single neurons as one operator, as three layers, and in other engines."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from compiler import peers, pipeline
from compiler.frontend import import_model
from compiler.nn.quadratic import (
    QuadraticConv1d,
    QuadraticConv2d,
    QuadraticConvTranspose2d,
    QuadraticLinear,
)
from passes.family import Context
from passes.treat_layers import layers_of, treat_layers
from passes.treatment import Treatment
from schedules.target import detect_host
from tools.bench_families import Case, Measured

_ENGINES = ("onnxruntime", "openvino")
_LAYERS: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...]], ...] = (
    ("3x3, 128 -> 128, 28x28", lambda: QuadraticConv2d(128, 128, 3, padding=1), (1, 128, 28, 28)),
    ("linear 768 -> 768, 128 rows", lambda: QuadraticLinear(768, 768), (128, 768)),
    ("linear 768 -> 768, 1 row", lambda: QuadraticLinear(768, 768), (1, 768)),
    ("3x3, stride 2, 64 -> 128, 56x56", lambda: QuadraticConv2d(64, 128, 3, 2, 1), (1, 64, 56, 56)),
    ("1x1, 256 -> 64, 28x28", lambda: QuadraticConv2d(256, 64, 1), (1, 256, 28, 28)),
    ("1-D, 9 taps, 64 -> 64, 512", lambda: QuadraticConv1d(64, 64, 9, padding=4), (1, 64, 512)),
    (
        "transposed 4x4, stride 2, 64 -> 32, 28x28",
        lambda: QuadraticConvTranspose2d(64, 32, 4, 2, 1), (1, 64, 28, 28),
    ),
)  # fmt: skip


def cases() -> list[Case]:
    """Fan's neuron with a constant, in the order of the document."""
    return [Case(name, functools.partial(_neuron, make, shape)) for name, make, shape in _LAYERS]


def _neuron(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Measured:
    torch.manual_seed(0)
    module = make().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.05)
    x = torch.randn(shape)
    written_out = pipeline.canonicalize(import_model(module, example=(x,)).mod)
    asked = {layer.name: Treatment("quadratic") for layer in layers_of(written_out)}
    fused = treat_layers(written_out, asked, Context(detect_host())).treated
    return Measured(
        {"fused": fused, "three layers": written_out},
        {"random": [x.numpy()]},
        peers=_engines(module, x),
        cold=False,
    )


def _engines(module: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], list[np.ndarray]]]:
    """The neuron written out in the engines that are installed, one thread each."""
    feed = {"x": x.numpy()}
    with tempfile.TemporaryDirectory() as scratch:
        path = peers.export_onnx(module, [x.numpy()], Path(scratch))
        found = {
            name: peers.OPENERS[name](importlib.import_module(name), path, feed, 1)
            for name in _ENGINES
            if importlib.util.find_spec(name)
        }
    found["torch.compile"] = peers.open_torch(torch, torch.compile(module), feed, 1)
    return {name: peer.call for name, peer in found.items()}
