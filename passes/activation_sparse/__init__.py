# SPDX-License-Identifier: Apache-2.0
"""Activation sparsity: dense layers that skip the zeros which ReLU-like activations leave in their input."""

from __future__ import annotations

from passes.activation_sparse import reference
from passes.activation_sparse.lowering import lower_cut, lower_dense, lower_gated
from passes.activation_sparse.operators import CUT, DENSE, GATED, register
from passes.activation_sparse.rewrite import PARAMETERS, found_in, observed_in, rewrite
from passes.activation_sparse.samples import samples
from passes.family import Family

FAMILY = Family(
    name="activation_sparse",
    register=register,
    lowerings={DENSE: lower_dense, GATED: lower_gated, CUT: lower_cut},
    references={
        DENSE: reference.sparse_dense,
        GATED: reference.sparse_gated,
        CUT: reference.cut,
    },
    parameters=PARAMETERS,
    rewrite=rewrite,
    found_in=found_in,
    observed_in=observed_in,
    samples=samples,
    jumps=(CUT,),
)
