# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: which layers lose most when they alone are quantized.

The noise of a network is close to the sum of what its layers add, so the layers with the largest share are the ones whose
float32 buys most accuracy for its time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import tvm

from passes.family import Observe
from passes.rewriting import variables


def rank_sensitivity(
    mod: tvm.IRModule,
    layers: Sequence[str],
    quantize: Callable[[Collection[str]], tvm.IRModule],
    observe: Observe,
) -> dict[str, float]:
    """Noise over signal, in power, of the worst output when one layer alone is quantized; the most sensitive layer first.

    `quantize(names)` is `mod` with these layers quantized, under the same names of its outputs. Every layer costs one
    compilation and one run over the calibration data.
    """
    wanted = _outputs(mod, observe)
    found = {layer: _noise(wanted, _outputs(quantize({layer}), observe)) for layer in layers}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def most_sensitive(sensitivity: Mapping[str, float], count: int) -> list[str]:
    """The `count` layers that lose most."""
    return sorted(sensitivity, key=lambda layer: -sensitivity[layer])[:count]


def _outputs(mod: tvm.IRModule, observe: Observe) -> list[np.ndarray]:
    """Every output over all samples, flat."""
    names = [var.name for var in variables(mod["main"].body.body)]
    samples = [[s[name].reshape(-1) for name in names] for s in observe(mod, names)]
    return [np.concatenate(values).astype("float64") for values in zip(*samples)]


def _noise(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    ratios = []
    for a, b in zip(wanted, found, strict=True):
        signal = float(a @ a)
        noise = float((a - b) @ (a - b))
        ratios.append(noise / signal if signal else float(noise > 0))
    return max(ratios, default=0.0)
