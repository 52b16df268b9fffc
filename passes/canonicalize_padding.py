# SPDX-License-Identifier: Apache-2.0
"""Let a convolution do the zero padding in front of it.

rewrite: kerf.conv2d(nn.pad(x, zeros around height and width), w) -> kerf.conv2d(x, w, padding=...)
requires: NCHW
ensures: a convolution reads no padded copy of zeros; a pad by another value, of another kind or of
  other axes stays
"""

from __future__ import annotations

import tvm
from tvm import relax

from passes.layers import CONV2D, attrs_of, is_call, operator_call
from passes.rewriting import Graph, ints, rewrite_function, rewrite_module


def fold_padding(value: relax.Expr, graph: Graph) -> relax.Expr | None:
    """kerf.conv2d(pad(x)) -> kerf.conv2d(x)"""
    if not is_call(value, CONV2D):
        return None
    attrs, pad = attrs_of(value), graph.call(value.args[0], "relax.nn.pad")
    if (
        pad is None
        or attrs["layout"] != "NCHW"
        or str(pad.attrs.pad_mode) != "constant"
        or float(pad.attrs.pad_value) != 0
    ):
        return None
    widths = ints(pad.attrs.pad_width)
    if any(widths[:4]) or min(widths) < 0:
        return None
    added = (widths[4], widths[6], widths[5], widths[7])
    attrs["padding"] = [p + a for p, a in zip(attrs["padding"], added)]
    return operator_call(CONV2D, [pad.args[0], *list(value.args)[1:]], **attrs)


@tvm.transform.module_pass(opt_level=0, name="kerf.CanonicalizePadding")
class CanonicalizePadding:
    """See the module's docstring."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return rewrite_module(mod, lambda func: rewrite_function(func, (fold_padding,)))
