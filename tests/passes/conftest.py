# SPDX-License-Identifier: Apache-2.0
"""What every test of a graph pass does: build, rewrite, compare structure and values."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from passes import layers, pool_convolutions
from passes.evaluate import evaluate


def build_function(inputs, body) -> tvm.IRModule:
    """A module whose `main` takes tensors of `inputs` ((shape, dtype) or shape) and returns
    `body(builder, *variables)`.
    """
    layers.register()
    builder = relax.BlockBuilder()
    variables = []
    for i, given in enumerate(inputs):
        shape, dtype = given if isinstance(given[0], tuple) else (given, "float32")
        variables.append(relax.Var(f"x{i}", relax.TensorType(shape, dtype)))
    with builder.function("main", variables):
        with builder.dataflow():
            result = builder.emit_output(body(builder, *variables))
        builder.emit_func_output(result)
    return builder.finalize()


def random_inputs(mod: tvm.IRModule, rng) -> list[np.ndarray]:
    arrays = []
    for param in mod["main"].params:
        shape, dtype = layers.shape_of(param), str(param.ty.dtype)
        if "float" in dtype:
            arrays.append(rng.standard_normal(shape).astype(dtype))
        elif dtype == "bool":
            arrays.append(rng.integers(0, 2, shape).astype(bool))
        else:
            arrays.append(rng.integers(0, 3, shape).astype(dtype))
    return arrays


@pytest.fixture
def build():
    return build_function


@pytest.fixture
def rewrites(rng):
    """`rewrites(pass_, inputs, before, after)`: the pass turns one body into the other, and their
    values agree.

    `tolerance` is relative to the largest output; 0 where nothing is rounded differently.
    """

    def check(pass_, inputs, before, after, tolerance: float = 1e-12) -> tvm.IRModule:
        source, wanted = build_function(inputs, before), build_function(inputs, after)
        found = pass_(source)
        relax.analysis.well_formed(found)
        tvm.ir.assert_structural_equal(found, wanted)
        arrays = random_inputs(source, rng)
        for a, b in zip(evaluate(source, arrays), evaluate(found, arrays), strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max(initial=0) <= tolerance * max(1.0, np.abs(a).max(initial=0))
        return found

    return check


@pytest.fixture
def declines():
    """`declines(pass_, inputs, body)`: the pass leaves the function as it is."""

    def check(pass_, inputs, body) -> None:
        source = build_function(inputs, body)
        tvm.ir.assert_structural_equal(pass_(source), build_function(inputs, body))

    return check


@pytest.fixture
def same_values(rng):
    """`same_values(pass_, mod)`: the rewritten module, whose values are those of `mod`."""

    def check(pass_, mod: tvm.IRModule, tolerance: float = 1e-12) -> tvm.IRModule:
        found = pass_(mod)
        relax.analysis.well_formed(found)
        arrays = random_inputs(mod, rng)
        for a, b in zip(evaluate(mod, arrays), evaluate(found, arrays), strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max(initial=0) <= tolerance * max(1.0, np.abs(a).max(initial=0))
        return found

    return check


@pytest.fixture
def every_image_is_far(monkeypatch):
    """Convolutions pool in their kernel however small their result is."""
    monkeypatch.setattr(pool_convolutions, "_NEAR", 0)
