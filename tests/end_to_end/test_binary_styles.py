# SPDX-License-Identifier: Apache-2.0
"""Binary networks as other projects spell them: what is found in their graphs, and that the rewritten graph computes the same."""

from __future__ import annotations

import numpy as np
import pytest

import passes
from compiler import pipeline
from compiler.frontend import import_model
from passes.evaluate import evaluate
from passes.family import Context
from passes.treat_layers import layers_of, treat_layers
from passes.treatment import Treatment
from schedules.target import NAMED

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper
from torch import nn


def treated_as_binary(imported, inputs):
    """The decisions by layer, having checked that the treated graph gives what the imported one does."""
    graph = pipeline.canonicalize(imported.mod)
    asked = {layer.name: Treatment("binary") for layer in layers_of(graph)}
    found = treat_layers(graph, asked, Context(NAMED["avx512"]))
    references = {n: f for family in passes.families() for n, f in family.references.items()}
    (wanted,) = evaluate(graph, inputs)
    (got,) = evaluate(found.treated, inputs, references=references)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    return {d.layer: d for d in found.decisions}


class XnorBlock(nn.Module):
    """BN, sign, convolution with alpha sign(w) and a bias, ReLU (Rastegari et al. 2016), maximum pooling behind some.

    `scaled`: sums times the mean |input| of their windows, K in the paper, which differs from pixel to pixel.
    """

    def __init__(self, channels: int, outputs: int, pool: bool, scaled: bool = False):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=1e-4)
        self.conv = nn.Conv2d(channels, outputs, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2) if pool else nn.Identity()
        self.scaled = scaled

    def forward(self, x):
        x = self.norm(x)
        w = self.conv.weight
        alpha = w.abs().mean((1, 2, 3), keepdim=True)
        y = nn.functional.conv2d(x.sign(), alpha * w.sign(), None, padding=1)
        if self.scaled:
            y = y * nn.functional.avg_pool2d(x.abs().mean(1, keepdim=True), 3, 1, 1)
        return self.pool(torch.relu(y + self.conv.bias.reshape(-1, 1, 1)))


def _xnor_net(scaled: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(),
        XnorBlock(32, 64, pool=True, scaled=scaled), XnorBlock(64, 64, pool=False, scaled=scaled),
        XnorBlock(64, 32, pool=False, scaled=scaled), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.3, 0.2)
            module.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                module.weight.normal_(0, 1)  # of either sign
                module.bias.normal_(0, 0.3)
    return net.eval()


@pytest.mark.parametrize("scaled", [False, True], ids=["alpha", "alpha and K"])
def test_xnor_net(scaled, rng):
    x = rng.standard_normal((1, 3, 13, 12)).astype("float32")
    net = _xnor_net(scaled)
    decisions = treated_as_binary(import_model(net, example=(torch.from_numpy(x),)), [x])
    binary = [d for d in decisions.values() if d.treatment == "binary"]
    assert len(binary) == 3
    signs = [d.found["signs"] for d in binary]
    if scaled:
        assert all(s.startswith("packed from float32") for s in signs)
        return
    # Through ReLU, maximum pooling and batch norm; the first sign is of real numbers.
    assert signs[0].startswith("packed") and all("thresholds folded" in s for s in signs[1:])


def _larq_model(rng, twice: bool = True):
    """Channels last outside, sign(sign(x) + 0.1) on both operands, padding with +1, batch norm behind ReLU, a shortcut."""
    c, nodes, constants = 32, [], {}

    def constant(name, value):
        constants[name] = np.asarray(value, np.float32)
        return name

    def node(operator, inputs, output, **attributes):
        nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def ste_sign(x, name):
        once = node("Sign", [x], name + "_once")
        if not twice:
            return node("Add", [once, "bit"], name)
        return node("Sign", [node("Add", [once, "bit"], name + "_bit")], name)

    constant("bit", 0.1)
    constants["margins"] = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    constant("one", 1.0)
    y = node("Transpose", ["x"], "first", perm=[0, 3, 1, 2])
    for i in range(2):
        around = y
        w = ste_sign(constant(f"latent{i}", rng.uniform(-1, 1, (c, c, 3, 3))), f"w{i}")
        padded = node("Pad", [ste_sign(y, f"s{i}"), "margins", "one"], f"pad{i}")
        y = node("Conv", [padded, w], f"conv{i}", kernel_shape=[3, 3])
        y = node("Relu", [y], f"relu{i}")
        y = node("Mul", [y, constant(f"gain{i}", rng.uniform(0.01, 0.1, (1, c, 1, 1)))], f"mul{i}")
        y = node("Add", [y, constant(f"shift{i}", rng.standard_normal((1, c, 1, 1)))], f"norm{i}")
        y = node("Add", [y, around], f"sum{i}")
    node("Transpose", [y], "y", perm=[0, 2, 3, 1])
    graph = helper.make_graph(
        nodes, "larq",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6, 5, c])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, 5, c])],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def test_larq(rng, tmp_path):
    path = tmp_path / "larq.onnx"
    onnx.save(_larq_model(rng), path)
    x = rng.standard_normal((1, 6, 5, 32)).astype("float32")
    x[0, 0, 0, :3] = 0.0, -0.0, 1e-30  # zeros count as +1
    decisions = treated_as_binary(import_model(path), [x])
    assert [d.treatment for d in decisions.values()] == ["binary"] * 2
    assert all("sign_of_zero" not in d.found for d in decisions.values())


def test_what_only_looks_like_larq(rng, tmp_path):
    """Without the second sign there are three values: -0.9, 0.1 and 1.1."""
    path = tmp_path / "not_larq.onnx"
    onnx.save(_larq_model(rng, twice=False), path)
    x = rng.standard_normal((1, 6, 5, 32)).astype("float32")
    decisions = treated_as_binary(import_model(path), [x])
    assert all("real numbers" in d.declined for d in decisions.values())
