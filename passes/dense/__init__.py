# SPDX-License-Identifier: Apache-2.0
"""The dense family: every operator computed as it is, by kernels of our own."""

from __future__ import annotations

from passes import layers, numpy_images, numpy_nn
from passes.dense import (
    activation,
    attention,
    broadcast,
    conv2d,
    matmul,
    normalization,
    pooling,
)
from passes.family import Family

FAMILY = Family(
    name="dense",
    register=layers.register,
    lowerings={
        **conv2d.LOWERINGS,
        **matmul.LOWERINGS,
        **pooling.LOWERINGS,
        **activation.LOWERINGS,
        **attention.LOWERINGS,
        **broadcast.LOWERINGS,
        **normalization.LOWERINGS,
    },
    references={layers.CONV2D: numpy_images.conv2d, layers.DENSE: numpy_nn.dense},
)
