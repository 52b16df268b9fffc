# SPDX-License-Identifier: Apache-2.0
"""Weight sparsity: grains, storage, operators, rules, pruning and lowering.

`FAMILY` is made when it is first asked for: grains and pruning are numpy only, and code that trains in torch uses them
without loading TVM.
"""

from __future__ import annotations


def __getattr__(name: str):
    if name == "FAMILY":
        from passes.sparse.family import FAMILY

        return FAMILY
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
