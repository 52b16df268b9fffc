# SPDX-License-Identifier: Apache-2.0
"""Weight sparsity: formats by grain, operators, rules, pruning and lowering."""

from __future__ import annotations

from passes.family import Family, Pooling
from passes.sparse.attention_planes import (
    ATTENTION_PLANES,
    attention_of_planes,
    lower_attention_planes,
)
from passes.sparse.detect import found
from passes.sparse.lowering import lower_mean_of_planes, lower_sparse, lower_transpose
from passes.sparse.lowering_pooled import lower_pooled, suits
from passes.sparse.operators import (
    MEAN_OF_PLANES,
    SPARSE_CONV2D,
    SPARSE_DENSE,
    SPARSE_POOLED_CONV2D,
    TRANSPOSE,
    register,
)
from passes.sparse.prune import check, prune_layer
from passes.sparse.reference import (
    mean_of_planes,
    pooled_conv2d,
    sparse_conv2d,
    sparse_dense,
    transpose,
)
from passes.sparse.rewrite import rewrite
from passes.sparse.samples import samples
from passes.sparse.treat import PARAMETERS

FAMILY = Family(
    name="sparse",
    register=register,
    lowerings={
        SPARSE_CONV2D: lower_sparse,
        SPARSE_DENSE: lower_sparse,
        SPARSE_POOLED_CONV2D: lower_pooled,
        ATTENTION_PLANES: lower_attention_planes,
        MEAN_OF_PLANES: lower_mean_of_planes,
        TRANSPOSE: lower_transpose,
    },
    references={
        SPARSE_CONV2D: sparse_conv2d,
        SPARSE_DENSE: sparse_dense,
        SPARSE_POOLED_CONV2D: pooled_conv2d,
        ATTENTION_PLANES: attention_of_planes,
        MEAN_OF_PLANES: mean_of_planes,
        TRANSPOSE: transpose,
    },
    parameters=PARAMETERS,
    prune=prune_layer,
    check=check,
    rewrite=rewrite,
    found=found,
    samples=samples,
    pooling={SPARSE_CONV2D: Pooling(SPARSE_POOLED_CONV2D, suits)},
)
