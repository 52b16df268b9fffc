# SPDX-License-Identifier: Apache-2.0
"""Small networks for quantization, and observing them in numpy."""

from __future__ import annotations

import pytest
import tvm

from passes.evaluate import evaluate
from passes.quantized import FAMILY, lowering, lowering_sparse
from schedules import int8_depthwise, sparse_elements, terms


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


@pytest.fixture
def signed_pixels(monkeypatch):
    """Kernels as for a target whose dot product takes signed bytes only."""

    def signed(held, quads, weights, width):
        wide = f"int32x{width}" if width > 1 else "int32"
        for byte in range(4):
            up, down = (tvm.tirx.const(n, "int32") for n in (24 - 8 * byte, 24))
            if width > 1:
                up, down = (tvm.tirx.Broadcast(n, width) for n in (up, down))
            x, w = (
                tvm.tirx.shift_right(tvm.tirx.shift_left(v, up), down)
                for v in (quads, tvm.tirx.reinterpret(wide, weights))
            )
            held = held + x * w
        return held

    for module in (terms, int8_depthwise, sparse_elements):
        monkeypatch.setattr(module, "dot_product", lambda target: signed)
    for module in (terms, int8_depthwise, sparse_elements, lowering, lowering_sparse):
        monkeypatch.setattr(module, "reads_signed_pixels", lambda target: True)
