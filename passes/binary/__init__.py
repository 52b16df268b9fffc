# SPDX-License-Identifier: Apache-2.0
"""Binary layers: weights and inputs of +-1, found in a graph and computed on bits."""

from __future__ import annotations

import functools

from passes.binary import lowering, lowering_sign_weights, operators, reference
from passes.binary.parameters import PARAMETERS
from passes.binary.recognize import found_in
from passes.binary.samples import samples
from passes.binary.treat_graph import rewrite
from passes.family import Family
from passes.layers import CONV2D, DENSE

FAMILY = Family(
    name="binary",
    register=operators.register,
    lowerings={**lowering.LOWERINGS, **lowering_sign_weights.LOWERINGS},
    references={
        operators.BINARY_PACK: reference.binary_pack,
        operators.BINARY_MAX_POOL2D: reference.binary_max_pool2d,
        operators.BINARY_CONV2D: reference.binary_conv2d,
        operators.BINARY_CONV2D_BITS: reference.binary_conv2d_bits,
        operators.BINARY_DENSE: reference.binary_dense,
        operators.BINARY_DENSE_BITS: reference.binary_dense_bits,
        operators.SIGN_CONV2D: functools.partial(reference.sign_layer, CONV2D),
        operators.SIGN_DENSE: functools.partial(reference.sign_layer, DENSE),
    },
    parameters=PARAMETERS,
    rewrite=rewrite,
    found_in=found_in,
    jumps=(operators.BINARY_PACK,),
    samples=samples,
)
