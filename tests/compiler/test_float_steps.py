# SPDX-License-Identifier: Apache-2.0
"""Networks of signs as ordinary graphs: what rounding may do to them is measured, and their kernels are compared singly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tvm import relax

import compiler
from compiler.float_steps import compares_floats, farthest


@pytest.mark.parametrize(
    ("make", "jumps"),
    [
        (lambda x: relax.op.sign(x), True),
        (lambda x: relax.op.where(relax.op.greater(x, x), x, x), True),
        (lambda x: relax.op.nn.relu(x), False),
        (lambda x: relax.op.less(relax.op.astype(x, "int32"), relax.const(3)), False),
    ],
)
def test_what_jumps(make, jumps):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((3,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(builder.emit(make(x)))
        builder.emit_func_output(out)
    assert compares_floats(builder.get()) is jumps


def test_a_tie_is_found_by_looking_nearby():
    one = np.ones(1, "float32")

    def above(inputs):
        return [(inputs[0] > 1).astype("float32") * 5]

    assert farthest(above, [one], above([one]))[0] == 5.0  # one unit up, and it jumps
    assert farthest(above, [3 * one], above([3 * one]))[0] == 5.0
    assert farthest(lambda i: [i[0] * 2], [one], [2 * one])[0] == pytest.approx(2.0, abs=1e-5)


class Signs(torch.nn.Module):
    """Deep enough that a flipped sign reaches every output."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(4)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(torch.where(x >= 0, 1.0, -1.0)) + 0.1 * x
        return x.mean((2, 3))


def test_a_network_of_signs_builds_dense_and_runs_from_its_artifact(tmp_path):
    """Its thresholds are scalar constants, which must come back as scalars."""
    torch.manual_seed(0)
    net, x = Signs().eval(), torch.randn(1, 16, 20, 20)
    built = compiler.compile_model(net, (x,), output=tmp_path / "out")
    assert built.manifest["verify"]["passed"]
    found = compiler.load(tmp_path / "out")(x.numpy())
    assert found.shape == (1, 16)
    # A sign may flip, but most of the sums that are averaged here stay what they are.
    np.testing.assert_allclose(found, net(x).detach().numpy(), atol=0.2)


class Ties(torch.nn.Module):
    """Sums of signs, compared with 0, which one in thirty of them is: Winograd's rounding decides about these."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 64, 3, padding=1, stride=2)
        self.signs = torch.nn.Conv2d(64, 64, 3, padding=1, bias=False)
        weight = torch.where(self.signs.weight >= 0, 0.037, -0.037)
        self.signs.weight = torch.nn.Parameter(weight)
        self.last = torch.nn.Linear(64, 10)

    def forward(self, x):
        x = self.signs(torch.where(self.stem(x) >= 0, 1.0, -1.0))
        return self.last(torch.where(x >= 0, 1.0, -1.0).mean((2, 3)))


def test_kernels_may_flip_sums_of_signs_at_their_threshold(monkeypatch):
    monkeypatch.setattr("compiler.verify.require_passed", lambda *_: None)  # each kernel alone
    torch.manual_seed(0)
    built = compiler.compile_model(Ties().eval(), (torch.randn(1, 3, 32, 32),))
    loops = [k["loops"] for k in built.manifest["variants"]["dense"]["kernels"]]
    assert "winograd" in loops
