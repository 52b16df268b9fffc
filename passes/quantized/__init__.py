# SPDX-License-Identifier: Apache-2.0
"""Int8: activations as unsigned bytes, weights as signed ones, sums in 32 bits; calibration, rewriting and lowering."""

from __future__ import annotations

from passes.family import Family, Pooling
from passes.quantized.lowering import LOWERINGS, suits_pooling
from passes.quantized.lowering_elementwise import lower_quantize_dynamic, lower_steps
from passes.quantized.operators import (
    DEQUANTIZE,
    DEQUANTIZE_ADD,
    INT8_AVERAGE_POOL,
    INT8_CONV2D,
    INT8_DENSE,
    INT8_POOLED_CONV2D,
    QUANTIZE,
    QUANTIZE_DYNAMIC,
    STEPS,
    register,
)
from passes.quantized.parameters import PARAMETERS, check
from passes.quantized.reference import (
    dequantize,
    dequantize_add,
    int8_average_pool,
    int8_conv2d,
    int8_dense,
    int8_pooled_conv2d,
    quantize,
    quantize_dynamic,
    steps,
)
from passes.quantized.samples import samples
from passes.quantized.take_imported import describe_imported
from passes.quantized.treat_graph import prune, rewrite

FAMILY = Family(
    name="int8",
    register=register,
    lowerings={**LOWERINGS, QUANTIZE_DYNAMIC: lower_quantize_dynamic, STEPS: lower_steps},
    references={
        INT8_CONV2D: int8_conv2d,
        INT8_POOLED_CONV2D: int8_pooled_conv2d,
        INT8_DENSE: int8_dense,
        INT8_AVERAGE_POOL: int8_average_pool,
        QUANTIZE: quantize,
        DEQUANTIZE: dequantize,
        DEQUANTIZE_ADD: dequantize_add,
        QUANTIZE_DYNAMIC: quantize_dynamic,
        STEPS: steps,
    },
    parameters=PARAMETERS,
    prune=prune,
    check=check,
    rewrite=rewrite,
    found_in=describe_imported,
    jumps=(QUANTIZE, QUANTIZE_DYNAMIC),
    samples=samples,
    pooling={INT8_CONV2D: Pooling(INT8_POOLED_CONV2D, suits_pooling, (QUANTIZE,))},
)
