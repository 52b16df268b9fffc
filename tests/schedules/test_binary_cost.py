# SPDX-License-Identifier: Apache-2.0
"""Predicted instructions of binary kernels against the assembly, also of processors that are not here."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from passes.binary import FAMILY, operators
from passes.lower import lower_operators
from schedules.binary_cost import instructions
from schedules.binary_problem import Problem, default_point
from schedules.bit_words import BitCounter
from schedules.dispatch import schedule_module
from schedules.target import NAMED

# Straight-line code: a pointwise sum of 16 words, a 3x3 of 18.
SHAPES = {"1x1, 512": (512, 1), "3x3, 64": (64, 3)}


def _assembly(channels: int, kernel: int, target) -> str:
    rng = np.random.default_rng(0)
    signs = np.where(rng.random((64, channels, kernel, kernel)) < 0.5, -1, 1).astype(np.int8)
    attrs = {
        "strides": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1, "layout": "NHWC",
        "pad_value": 0, "name": "layer", "flops": 0,
    }  # fmt: skip
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 14, 14, channels // 32), "uint32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            call = operators.binary_call(operators.BINARY_CONV2D, [x, relax.const(signs)], **attrs)
            out = builder.emit_output(builder.emit(call))
        builder.emit_func_output(out)
    lowered = lower_operators(builder.finalize(), FAMILY.lowerings, target)
    functions = schedule_module(lowered.mod, target)[0].functions.values()
    (kernel_function,) = (f for f in functions if not isinstance(f, relax.Function))
    mod = tvm.IRModule({"main": kernel_function.with_attr("global_symbol", "main")})
    return tvm.compile(mod, target.tvm()).mod.inspect_source("asm")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["avx512-vnni-vpopcntdq", "avx512-vnni"])
def test_counts_are_those_of_the_assembly(name, shape):
    channels, kernel = SHAPES[shape]
    target = NAMED[name]
    problem = Problem(1, 14, 14, channels // 32, 64, kernel, kernel, bits=channels)
    point = default_point(problem, target)
    found = instructions(problem, point, BitCounter.of(target))
    text = _assembly(channels, kernel, target)
    counted = point.mr * found.counts
    if "vpopcntdq" in name:
        assert (found.xors, found.adders, found.counts) == (problem.steps, 0, problem.steps)
        assert found.per_512(problem.steps, target.lanes) == 3.0
        assert text.count("vpopcntd\t") == text.count("vpxord\t") == counted
    else:
        assert text.count("vpdpbusd\t") == counted and text.count("vpshufb\t") == 2 * counted
