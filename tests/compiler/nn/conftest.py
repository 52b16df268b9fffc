# SPDX-License-Identifier: Apache-2.0
"""Export a module both ways and compare what the front ends read with torch."""

from __future__ import annotations

import io

import numpy as np
import onnx
import pytest
import torch

from compiler.frontend import import_model
from passes.evaluate import evaluate


@pytest.fixture
def agrees_when_exported():
    """`check(module, *example)`: torch.export and torch.onnx graphs, evaluated in numpy, equal torch; both imports."""

    def check(module: torch.nn.Module, *example: torch.Tensor) -> list:
        module = module.eval()
        file = io.BytesIO()
        torch.onnx.export(module, example, file, dynamo=True, verbose=False)
        file.seek(0)
        found = [import_model(module, example=example), import_model(onnx.load_model(file))]
        with torch.no_grad():
            wanted = module(*example).numpy()
        assert wanted.std() > 1e-3  # an output that depends on nothing would always agree
        for imported in found:
            (result,) = evaluate(imported.mod, [e.numpy() for e in example])
            np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
        return found

    return check
