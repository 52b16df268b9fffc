# SPDX-License-Identifier: Apache-2.0
"""The dense family: every operator computed as it is, by kernels of our own."""

from __future__ import annotations

from passes import layers
from passes.dense import (
    activation,
    attention,
    broadcast,
    conv2d,
    depth_to_space,
    matmul,
    normalization,
    pooled_conv2d,
    pooling,
    row_sum,
)
from passes.evaluate import LAYER_REFERENCES
from passes.family import Family
from passes.layers import POOLED_CONV2D

FAMILY = Family(
    name="dense",
    register=layers.register,
    lowerings={
        **conv2d.LOWERINGS,
        **pooled_conv2d.LOWERINGS,
        **depth_to_space.LOWERINGS,
        **matmul.LOWERINGS,
        **pooling.LOWERINGS,
        **activation.LOWERINGS,
        **attention.LOWERINGS,
        **broadcast.LOWERINGS,
        **normalization.LOWERINGS,
        **row_sum.LOWERINGS,
    },
    pooling=pooled_conv2d.POOLING,
    references={**LAYER_REFERENCES, POOLED_CONV2D: pooled_conv2d.reference},
)
