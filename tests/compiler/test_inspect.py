# SPDX-License-Identifier: Apache-2.0
"""Inspection: every layer by its name in the model, with its cost and its zeros."""

from __future__ import annotations

import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compiler import tables
from compiler.inspect import Inspection, inspect_model


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.depthwise(self.conv(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def found() -> Inspection:
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():
        model.conv.weight[4:] = 0  # half of the filters
    return inspect_model(model, example=(torch.zeros(2, 4, 9, 9),))


def test_layers_have_their_names_shapes_and_costs(found):
    assert [layer.name for layer in found.layers] == ["conv", "depthwise", "head"]
    conv, depthwise, head = found.layers
    assert conv.operator == "conv2d" and head.operator == "dense"
    assert conv.output_shape == (2, 8, 5, 5)
    assert conv.flops == 2 * (2 * 8 * 5 * 5) * (4 * 9)
    assert depthwise.flops == 2 * (2 * 8 * 5 * 5) * 9
    assert head.flops == 2 * 2 * 5 * 8
    assert conv.parameters == 8 * 4 * 9
    assert found.parameters == 8 * 4 * 9 + 8 * 9 + 5 * 8
    assert found.inputs[0][1:] == ((2, 4, 9, 9), "float32")
    assert found.unsupported == ""


def test_zeros_are_found_with_their_grain(found):
    conv, depthwise, _ = found.layers
    assert conv.zeros == 0.5
    assert conv.found["grain"] == "filter"
    assert depthwise.zeros == 0.0
    assert depthwise.found["grain"] is None
    assert found.zeros == pytest.approx(144 / found.parameters)


def test_the_table_and_the_json_say_the_same(found):
    from rich.console import Console

    console = Console(width=200, file=io.StringIO())
    console.print(tables.inspection(found))
    text = console.file.getvalue()
    document = found.to_json()
    for layer in document["layers"]:
        assert layer["name"] in text
    assert "3 layers" in text and document["totals"]["parameters"] == found.parameters
    assert "50.0%" in text and "grain filter" in text
    assert "groups 8" in text and "/2" in text


def test_calibration_data_shows_the_zeros_among_activations():
    """Two of four hidden units are open for positive inputs, the others for negative ones."""
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 1)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]))
    samples = [np.full((1, 1), value, np.float32) for value in (1.0, -1.0)]
    found = inspect_model(model.eval(), example=(torch.zeros(1, 1),), calibration=samples)
    facts = {layer.name: layer.found for layer in found.layers}["2"]
    assert facts["input_zeros"] == "relu"
    assert facts["activation_density"] == facts["activation_density_densest_token"] == 0.5
