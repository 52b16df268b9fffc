# SPDX-License-Identifier: Apache-2.0
"""A sparse network with max pooling behind its convolutions, from both front ends, proven by the driver."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

import compiler
from passes import pool_convolutions
from tests.end_to_end.test_tiny_models import _zoo

torch = pytest.importorskip("torch")


class Network(torch.nn.Module):
    """An image's convolution and a pointwise one with a maximum behind it, and one whose result is read twice."""

    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.twice, self.last = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.linear = nn.Linear(16 * 3 * 4, 10)

    def forward(self, x):
        pool = torch.nn.functional.max_pool2d
        x = pool(torch.relu(self.norm(self.stem(x))), 3, 2, 1)
        y = torch.relu(self.twice(x))
        y = pool(y, 2) + torch.nn.functional.avg_pool2d(y, 2)
        y = pool(torch.nn.functional.relu6(self.last(y)), 2, 2, ceil_mode=True)
        return self.linear(y.flatten(1))


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_pooled_convolutions_of_a_network(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(pool_convolutions, "_NEAR", 0)
    monkeypatch.setattr(importlib.import_module("passes.sparse.treat"), "_HOPELESS", float("inf"))
    torch.manual_seed(0)
    module, x = Network().eval(), torch.randn(2, 3, 41, 57)
    with torch.no_grad():
        for layer in (m for m in module.modules() if isinstance(m, torch.nn.Conv2d)):
            kept = torch.rand_like(layer.weight[::8]) < 0.3
            layer.weight *= kept.repeat_interleave(8, dim=0)
    path = tmp_path / f"network.{suffix}"
    {"pt2": _zoo().save_pt2, "onnx": _zoo().save_onnx}[suffix](module, (x,), path)
    artifact = compiler.compile_model(
        path, output=tmp_path / "out", recipe="sparse", choose="asked"
    )
    kernels = artifact.variant("compressed").kernels
    assert [k.loops for k in kernels].count("pooled_windows") == 2
    assert [k.loops for k in kernels].count("pooling") == 2
    notes = " ".join(artifact.manifest["source"]["notes"])
    assert "twice: others read its result" in notes and "stem" not in notes
    found = compiler.load(tmp_path / "out")(x.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-4, atol=1e-5)
