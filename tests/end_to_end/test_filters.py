# SPDX-License-Identifier: Apache-2.0
"""A network whose filters are pruned and removed is built, verified and smaller."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn

import compiler
from compiler.recipe import load_recipe


class Net(nn.Module):
    """A residual block with batch norm, and a classifier; x [1, 3, 10, 10] -> [1, 5]"""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.a = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.b = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.norm(self.a(x)))))
        return self.head(x.mean((2, 3)))


def test_filters_leave_through_batch_norm_and_the_residual_sum(tmp_path):
    torch.manual_seed(0)
    net = Net().eval()
    nn.init.normal_(net.norm.bias)
    recipe = load_recipe("sparse", grain="filter", density=0.5, prune=True)
    built = compiler.compile_model(
        net, (torch.randn(1, 3, 10, 10),), recipe=recipe, choose="asked", output=tmp_path / "out"
    )
    rows = {row["name"]: row for row in built.layers}
    assert {n: r["found"]["outputs"] for n, r in rows.items()} == {
        "stem": [32, 16], "a": [32, 16], "b": [32, 16], "head": [5, 5],
    }  # fmt: skip
    assert all(r["treatment"] == "sparse" for r in rows.values())
    assert built.manifest["verify"]["passed"]
    sizes = {n: sum(v.constant_bytes) for n, v in built.variants.items()}
    assert sizes["compressed"] < 0.35 * sizes["dense"]
    x = np.random.default_rng(0).standard_normal((1, 3, 10, 10)).astype("float32")
    assert np.isfinite(compiler.load(tmp_path / "out")(x)).all()
