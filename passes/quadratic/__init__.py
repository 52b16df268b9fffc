# SPDX-License-Identifier: Apache-2.0
"""Quadratic neurons: recognised where they are written out as layers, computed in one pass over their input."""

from __future__ import annotations

from passes.family import Family
from passes.quadratic.lowering import lower_quadratic
from passes.quadratic.operators import QUADRATIC_CONV2D, QUADRATIC_DENSE, register
from passes.quadratic.reference import quadratic_conv2d, quadratic_dense
from passes.quadratic.rewrite import PARAMETERS, found_in, rewrite
from passes.quadratic.samples import samples

FAMILY = Family(
    name="quadratic",
    register=register,
    lowerings={QUADRATIC_CONV2D: lower_quadratic, QUADRATIC_DENSE: lower_quadratic},
    references={QUADRATIC_CONV2D: quadratic_conv2d, QUADRATIC_DENSE: quadratic_dense},
    parameters=PARAMETERS,
    rewrite=rewrite,
    found_in=found_in,
    samples=samples,
)
