# SPDX-License-Identifier: Apache-2.0
"""Keep activations in planes, one per channel, where sparse layers hand them to one another.

    rewrite: y = kerf.sparse_conv2d(x, w1); z = relu(y + b); kerf.sparse_conv2d(z, w2)
             ->  the same with y and z [N, C, H * W], up to a whole cache line, instead of [N, H, W, C]
    requires: channels last
    ensures: what lies in planes is written and read by sparse layers, elementwise operators, means over pixels, and a
      transformer's norms and attention (`streams.py`) only; a network's image, which comes in planes, is read there by a
      sparse layer

Integer layers whose zeros are left out do the same with planes of quads, [N, C / 4, H * W, 4]: four neighbouring channels of
a pixel are one element of their kernels.
"""

from __future__ import annotations

import tvm
from tvm import relax

from passes.rewriting import rewrite_module
from passes.sparse.planner import Planner
from passes.sparse.streams import StreamPlanner, may_hold_stream


def _planner_of(func: relax.Function) -> Planner:
    """The one that keeps more in planes, if its copies pay."""
    if may_hold_stream(func):
        planner = StreamPlanner(func)
        if planner.pays:
            return planner
    return Planner(func)


@tvm.transform.module_pass(opt_level=0, name="kerf.KeepPlanes")
class KeepPlanes:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(mod, lambda func: _planner_of(func).run())
