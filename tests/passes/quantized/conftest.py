# SPDX-License-Identifier: Apache-2.0
"""Small networks for quantization, and observing them in numpy."""

from __future__ import annotations

import pytest

from passes.evaluate import evaluate
from passes.quantized import FAMILY


@pytest.fixture
def observing():
    """`observing(samples)`: an `observe` that evaluates the graph in numpy, in float32."""

    def make(samples):
        def observe(mod, names, further=None):
            params = [p.name for p in mod["main"].params]
            for given in samples:
                sample = [*given, *(further or {}).values()]
                values = {n: a for n, a in zip(params, sample) if n in names}

                def keep(name, array, values=values):
                    if name in names:
                        values[name] = array

                evaluate(mod, sample, dtype="float32", references=FAMILY.references, observe=keep)
                yield values

        return observe

    return make
