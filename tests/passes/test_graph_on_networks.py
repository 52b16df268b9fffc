# SPDX-License-Identifier: Apache-2.0
"""The passes in the pipeline's order over small networks: same values, canonical form."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from compiler.frontend import import_model
from compiler.pipeline import canonical_passes
from passes.channels_last import ChannelsLast, layout_changes
from passes.evaluate import evaluate
from passes.rewriting import bindings_of

# Folding rounds every weight to float32 once; on a network of tens of layers that shows as this.
FOLDED = 1e-5

NETWORKS = {
    # name: (from ONNX, 4-D permutes that are left, operators that must be there, that must not)
    "resnet50": (
        False,
        1,
        {"conv2d": 17, "dense": 1},
        ("batch_norm", "multiply", "adaptive_avg_pool2d"),
    ),
    "mobilenetv2": (True, 1, {"relu": 35, "minimum": 35}, ("batch_norm", "clip", "pad")),
    "convnext_t": (True, 1, {"gelu": 4, "layer_norm": 9}, ("multiply", "erf")),
    "vgg16": (False, 1, {"dense": 3}, ("adaptive_avg_pool2d",)),
    "vit_s16": (True, 1, {"attention": 2, "gelu": 2}, ("softmax", "matmul", "erf")),
    "gpt2": (
        True,
        0,
        {"attention": 2, "gelu_tanh": 2},
        ("softmax", "matmul", "tanh", "attention_bias"),
    ),
}


@pytest.fixture(scope="module")
def zoo():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
    import zoo

    yield zoo
    sys.path.pop(0)


@pytest.mark.parametrize("name", NETWORKS)
def test_network(zoo, tmp_path, name):
    from_onnx, permutes, present, absent = NETWORKS[name]
    module, example = zoo.build(name, tiny=True, batch=2)
    if from_onnx:
        zoo.save_onnx(module, example, tmp_path / "model.onnx")
        imported = import_model(tmp_path / "model.onnx")
    else:
        imported = import_model(module, example=example)
    inputs = [x.numpy() for x in example]
    with torch.no_grad():
        wanted = module(*example).numpy()
    mod = imported.mod
    values = evaluate(mod, inputs)[0]
    scale = np.abs(values).max()
    assert np.abs(values - wanted).max() <= 1e-4 * scale  # torch computes in float32
    for each in [*canonical_passes(), ChannelsLast()]:
        mod = each(mod)
        relax.analysis.well_formed(mod)
        found = evaluate(mod, inputs)[0]
        assert np.abs(found - values).max() <= FOLDED * scale, each.info.name
    operators = Counter(
        b.value.op.name.split(".")[-1]
        for b in bindings_of(mod["main"])
        if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.Op)
    )
    assert len(layout_changes(mod)) == permutes, layout_changes(mod)
    assert {k: operators[k] for k in present} == present
    assert not [k for k in absent if operators[k]]
