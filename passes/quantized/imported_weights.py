# SPDX-License-Identifier: Apache-2.0
"""Weights that a model stores as integers: found again behind the float32 constants that import makes of them."""

from __future__ import annotations

import numpy as np

from passes.family import Layer
from passes.quantized.quantize_layers import QuantizedWeight
from passes.quantized.weights import overflows

_LOWEST, _HIGHEST = -128, 127


def imported_weight(layer: Layer) -> QuantizedWeight:
    """The integers that the model stores. Raises ValueError, to be shown as a reason, where they are not int8."""
    weight, scale = layer.weight, layer.attrs.get("weight_scale")
    if scale is None:
        raise ValueError("the model does not store its weight in 8 bits, per tensor or per output")
    scale = np.broadcast_to(np.asarray(scale, "float32"), len(weight)).copy()
    rows = scale.reshape(-1, *[1] * (weight.ndim - 1))
    steps = np.rint(weight.astype("float64") / rows)
    if not np.array_equal((steps.astype("float32") * rows).astype("float32"), weight):
        raise ValueError("its weight was changed after the model was quantized")
    if steps.min() < _LOWEST or steps.max() > _HIGHEST:
        found = f"{steps.min():.0f} to {steps.max():.0f}"
        raise ValueError(
            f"its weight less its zero point goes from {found}, which int8 does not hold"
        )
    if overflows(weight.shape):
        raise ValueError(f"sums of {int(np.prod(weight.shape[1:]))} products may not fit 32 bits")
    return QuantizedWeight(steps.astype("int8"), scale)
