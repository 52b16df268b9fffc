# SPDX-License-Identifier: Apache-2.0
"""Inputs to verify and measure with: seeded, and such that a network can make sense of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tvm
from tvm import relax

from compiler.frontend import TensorSpec

# Operators through which an index stays an index.
_INDEX_PRESERVING = (
    "relax.astype",
    "relax.reshape",
    "relax.expand_dims",
    "relax.squeeze",
    "relax.permute_dims",
    "relax.broadcast_to",
    "relax.flatten",
    "relax.strided_slice",
)


def sample_inputs(
    specs: Sequence[TensorSpec],
    *,
    seed: int = 0,
    runs: int = 2,
    ranges: Mapping[str, int] | None = None,
) -> list[list[np.ndarray]]:
    """`runs` lists of inputs in order, the same for the same seed.

    Floats are standard normal, booleans true for the first part of each row and false for the
    rest, as masks are. Integers are below `ranges[name]` (`index_ranges` finds them) if given;
    others are masks of zeros and ones.
    """
    rng = np.random.default_rng(seed)
    return [
        [_sample(spec, rng, (ranges or {}).get(spec.name)) for spec in specs] for _ in range(runs)
    ]


def _sample(spec: TensorSpec, rng: np.random.Generator, high: int | None) -> np.ndarray:
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return rng.standard_normal(spec.shape).astype(dtype)
    if dtype.kind in "iu" and high is not None:
        return rng.integers(0, max(high, 1), spec.shape).astype(dtype)
    if not spec.shape:
        return np.ones((), dtype)
    width = spec.shape[-1]
    kept = rng.integers((width + 1) // 2, width + 1, (*spec.shape[:-1], 1))
    return np.broadcast_to(np.arange(width) < kept, spec.shape).astype(dtype)


def index_ranges(mod: tvm.IRModule) -> dict[str, int]:
    """Input name -> the number of rows of the smallest table it indexes (`relax.take` along an
    axis)."""
    main = mod["main"]
    origin = {param: param.name for param in main.params}
    ranges: dict[str, int] = {}
    for block in main.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Var) and value in origin:
                origin[binding.var] = origin[value]
            if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
                continue
            if value.op.name in _INDEX_PRESERVING and value.args[0] in origin:
                origin[binding.var] = origin[value.args[0]]
            if value.op.name == "relax.take" and value.args[1] in origin:
                axis = value.attrs.axis
                rows = int(value.args[0].ty.shape[0 if axis is None else int(axis)])
                name = origin[value.args[1]]
                ranges[name] = min(rows, ranges.get(name, rows))
    return ranges
