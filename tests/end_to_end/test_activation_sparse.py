# SPDX-License-Identifier: Apache-2.0
"""Whole builds of small MLPs with activation sparsity, from both front ends; every build verifies itself."""

from __future__ import annotations

import numpy as np
import pytest

import compiler
from compiler.recipe import Recipe, Rule
from schedules.errors import KerfError

torch = pytest.importorskip("torch")
nn = torch.nn

WIDTH, HIDDEN, TOKENS = 48, 160, 4


class Block(nn.Module):
    """A residual MLP after a LayerNorm, as in a transformer; few of its hidden units are active."""

    def __init__(self, kind: str):
        super().__init__()
        from compiler.nn.activation_sparse import DBMLP, JSquaredReLU

        self.kind = kind
        self.norm = nn.LayerNorm(WIDTH)
        if kind in ("input", "output"):
            self.mlp = DBMLP(WIDTH, HIDDEN, TOKENS + 2, placement=kind, activation=JSquaredReLU())
            up = self.mlp.fc1
        else:
            up = self.up = nn.Linear(WIDTH, HIDDEN)
            self.down = nn.Linear(HIDDEN, WIDTH)
        if kind == "gated":
            up = self.gate = nn.Linear(WIDTH, HIDDEN)
        nn.init.constant_(up.bias, -0.9)
        for parameter in self.parameters():
            if parameter.ndim == 2 and parameter.shape[0] == TOKENS + 2:
                nn.init.normal_(parameter, std=0.1)

    def forward(self, x):
        z = self.norm(x)
        if self.kind in ("input", "output"):
            return x + self.mlp(z)
        if self.kind == "gated":
            return x + self.down(torch.relu(self.gate(z)) * self.up(z))
        h = torch.relu(self.up(z))
        return x + self.down(h * h if self.kind == "square" else h)


def network(*kinds: str):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(kind) for kind in kinds]).eval()


def build(source, *, calibration="random", parameters=None, **options):
    recipe = Recipe("all", (Rule("*", "activation_sparse", parameters or {}),))
    return compiler.compile_model(
        source, recipe=recipe, calibration=calibration, choose="asked", **options
    )


def rows(artifact) -> dict[str, dict]:
    return {row["name"]: row for row in artifact.layers}


def test_every_kind_of_mlp_from_torch():
    """One token: gathered rows, and a gate that up waits for; zeroth biases on both sides."""
    kinds = ("relu", "square", "gated", "input", "output")
    artifact = build(network(*kinds), example=(torch.randn(1, 1, WIDTH),))
    found = rows(artifact)
    assert {row["treatment"] for row in found.values()} == {"activation_sparse"}
    densities = [r["found"].get("activation_density") for r in found.values()]
    assert sum(d is not None and 0 < d < 0.5 for d in densities) == len(kinds)
    zeros = [r["found"]["input_zeros"] for r in found.values() if "input_zeros" in r["found"]]
    assert sorted(zeros) == ["gated relu", "j-squared-relu", "j-squared-relu", "relu", "relu^2"]


def test_several_tokens_from_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)

    def array(name, *shape, shift=0.0):
        values = rng.standard_normal(shape).astype(np.float32) / np.sqrt(shape[0]) + shift
        return onnx.numpy_helper.from_array(values.astype(np.float32), name)

    node = onnx.helper.make_node
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]), node("Add", ["a", "b1"], ["b"]), node("Relu", ["b"], ["h"]),
        node("MatMul", ["h", "w2"], ["c"]), node("Add", ["c", "b2"], ["y"]),
    ]  # fmt: skip
    weights = [
        array("w1", WIDTH, HIDDEN), array("b1", HIDDEN, shift=-1.8),
        array("w2", HIDDEN, WIDTH), array("b2", WIDTH),
    ]  # fmt: skip
    info = onnx.helper.make_tensor_value_info
    shape = [1, "tokens", WIDTH]
    graph = onnx.helper.make_graph(
        nodes, "mlp", [info("x", 1, shape)], [info("y", 1, shape)], weights
    )
    path = tmp_path / "mlp.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)
    np.savez(tmp_path / "c.npz", x=rng.standard_normal((3, TOKENS, WIDTH)).astype(np.float32))
    artifact = build(
        str(path),
        inputs={"x": (1, TOKENS, WIDTH)},
        calibration=str(tmp_path / "c.npz"),
        parameters={"density": 0.05},
        target="native",
    )
    (down,) = (r for r in artifact.layers if "activation_density" in r["found"])
    assert down["found"]["activation_density_union"] >= down["found"]["activation_density"]
    # On so small a layer the crossover may lie anywhere: either outcome says what was found.
    assert down["treatment"] == "activation_sparse" or "dense is faster above" in down["declined"]


def test_int8_rows_behind_a_gate_in_int8():
    """Two families in one MLP: the gate's bytes are calibrated, the rows that it leaves open are int8 by themselves."""
    rules = (Rule("*gate", "int8"), Rule("*", "activation_sparse", {"weights": "int8"}))
    artifact = compiler.compile_model(
        network("gated"),
        (torch.randn(1, 1, WIDTH),),
        recipe=Recipe("both", rules),
        calibration="random",
        choose="asked",
    )
    found = {name.split(".")[-1]: row for name, row in rows(artifact).items()}
    assert {n: r["treatment"] for n, r in found.items()} == {
        "gate": "int8", "up": "activation_sparse", "down": "activation_sparse",
    }  # fmt: skip
    assert all(0 < found[n]["found"]["int8_weight_error"] < 0.02 for n in ("up", "down"))


def test_without_data_nothing_is_assumed():
    artifact = build(network("relu"), example=(torch.randn(1, 1, WIDTH),), calibration=None)
    (down,) = (r for r in artifact.layers if "input_zeros" in r["found"])
    assert down["treatment"] == "dense" and "give --calibration" in down["declined"]


def test_more_tokens_than_the_zeroth_bias_has_rows():
    with pytest.raises((KerfError, ValueError), match="zeroth bias has rows for 6"):
        build(network("input"), example=(torch.randn(1, TOKENS + 3, WIDTH),))
