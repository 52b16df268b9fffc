# SPDX-License-Identifier: Apache-2.0
"""The dense family: every operator computed as it is, by kernels of our own."""

from __future__ import annotations

from passes import layers
from passes.dense import (
    activation,
    attention,
    broadcast,
    conv2d,
    conv2d_max_pool,
    depth_to_space,
    matmul,
    normalization,
    pooling,
    row_sum,
)
from passes.evaluate import LAYER_REFERENCES
from passes.family import Family
from passes.layers import CONV2D_MAX_POOL

FAMILY = Family(
    name="dense",
    register=layers.register,
    lowerings={
        **conv2d.LOWERINGS,
        **conv2d_max_pool.LOWERINGS,
        **depth_to_space.LOWERINGS,
        **matmul.LOWERINGS,
        **pooling.LOWERINGS,
        **activation.LOWERINGS,
        **attention.LOWERINGS,
        **broadcast.LOWERINGS,
        **normalization.LOWERINGS,
        **row_sum.LOWERINGS,
    },
    pooling=conv2d_max_pool.POOLING,
    references={**LAYER_REFERENCES, CONV2D_MAX_POOL: conv2d_max_pool.reference},
)
