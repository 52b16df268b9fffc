# SPDX-License-Identifier: Apache-2.0
"""Take a named layer for weight sparsity, or say why not.

rewrite: kerf.conv2d(x, w), w with zeros  ->  kerf.sparse_conv2d(x, w, grain)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tvm import relax

from passes.family import Layer
from passes.layers import conv2d_output_hw
from passes.sparse.cost import estimate
from passes.sparse.format import GRAINS, best_grain, block_of, block_pattern, grain_densities
from passes.sparse.grains import Grain
from passes.sparse.operators import sparse_call
from passes.treatment import parse_density
from schedules.errors import Declined
from schedules.sparse_problem import Problem
from schedules.target import CpuTarget

# The estimate is rough and every variant is measured later: decline only what is clearly slower.
_HOPELESS = 1.25
# Below this many multiplications per output channel the packing costs more than the layer.
_SMALLEST_REDUCTION = 16


def parse_grain(value: object) -> str:
    """A grain's name. Raises ValueError."""
    return Grain.parse(value).name


PARAMETERS = {"grain": parse_grain, "density": parse_density}


def layer_problem(layer: Layer, grain: str) -> Problem:
    """The kernel's problem of a dense layer, in either layout, with the zeros that its weight has."""
    weight, x = layer.weight, layer.input_shape
    block = block_of(grain)
    stored = int(block_pattern(weight, block).sum())
    if weight.ndim == 2:
        pixels = int(np.prod(x[:-1]))
        return Problem(1, 1, pixels, x[-1], weight.shape[0], 1, pixels, block=block, stored=stored)
    attrs = layer.attrs
    height, width, channels = x[1:] if attrs["layout"] == "NHWC" else (x[2], x[3], x[1])
    out = conv2d_output_hw(attrs, height, width, weight.shape[2:])
    return Problem(
        x[0], height, width, channels, weight.shape[0], *out, tuple(weight.shape[2:]), tuple(attrs["strides"]),
        tuple(attrs["dilation"]), tuple(attrs["padding"]), attrs["groups"], block, stored,
    )  # fmt: skip


def choose_grain(weight: np.ndarray, asked: str | None) -> str | Declined:
    """The grain to store: the one asked for if the zeros support it as well as any finer one, else the best they support."""
    best = best_grain(weight)
    asked = None if asked is None else Grain.parse(asked).runs_as()
    if asked is None or GRAINS.index(best) >= GRAINS.index(asked):
        return best
    densities = grain_densities(weight)
    return Declined(
        f"the zeros do not lie in grains of {asked}: density {densities[asked]:.0%} at {asked}, "
        f"{densities['element']:.0%} at element; prune at {asked}, or ask for {best}"
    )


def treat(layer: Layer, parameters: Mapping, target: CpuTarget) -> relax.Call | Declined:
    """The sparse call of a layer, or why it stays dense. The weight is used as it is; `density` is for pruning only."""
    weight = layer.weight
    if reason := _unsupported(layer, weight, target):
        return Declined(reason)
    grain = choose_grain(weight, parameters.get("grain"))
    if isinstance(grain, Declined):
        return grain
    groups = layer.attrs.get("groups", 1)
    while groups > 1 and weight.shape[0] // groups % block_of(grain):
        grain = GRAINS[GRAINS.index(grain) - 1]
    problem = layer_problem(layer, grain)
    cost = estimate(problem, target)
    if cost.ratio > _HOPELESS:
        density = grain_densities(weight)[grain]
        break_even = density * max(
            0.0, 1 - (cost.sparse - cost.dense) / max(1.0, _multiply_share(problem, target))
        )
        above = (
            f", above the {break_even:.0%} where it would break even" if break_even > 0.005 else ""
        )
        return Declined(
            f"density {density:.0%} at {grain} is estimated {cost.ratio:.1f} times as slow as dense{above}"
        )
    return sparse_call(layer.call, grain)


def _multiply_share(problem: Problem, target: CpuTarget) -> float:
    """The part of the sparse estimate that is proportional to the density."""
    from dataclasses import replace

    return estimate(problem, target).sparse - estimate(replace(problem, stored=0), target).sparse


def _unsupported(layer: Layer, weight: np.ndarray, target: CpuTarget) -> str | None:
    """Why a layer cannot or should not be sparse whatever its density, else None."""
    if weight.dtype != np.float32:
        return f"weights are {weight.dtype}, the sparse kernels take float32"
    if target.arch not in ("x86_64", "aarch64"):
        return f"no sparse kernel for {target.arch}"
    zeros = weight.size - np.count_nonzero(weight)
    if zeros == 0:
        return "the weight has no zeros; prune it, or give --prune"
    if zeros == weight.size:
        return "every weight is zero"
    groups = layer.attrs.get("groups", 1)
    if groups > 1 and weight.shape[1] == 1:
        return "depthwise: one multiplication per output and tap, nothing to skip that pays"
    reduction = int(np.prod(weight.shape[1:]))
    if reduction < _SMALLEST_REDUCTION:
        return f"{reduction} multiplications per output: too few to pay for packing"
    return None
