# SPDX-License-Identifier: Apache-2.0
"""Graph passes and families of operators. `families()` is the one list of families."""

from __future__ import annotations


def families() -> tuple:
    """Every family of operators, dense first. Adding one: its folder and its line here."""
    from passes import activation_sparse, binary, dense, quadratic, quantized, sparse

    return (
        dense.FAMILY,
        sparse.FAMILY,
        quantized.FAMILY,
        binary.FAMILY,
        activation_sparse.FAMILY,
        quadratic.FAMILY,
    )


def family_named(name: str):
    """The family of that name. Raises RecipeError, listing the names there are."""
    from schedules.errors import RecipeError

    known = {f.name: f for f in families()}
    if name not in known:
        raise RecipeError("unknown treatment", found=repr(name), wanted=" or ".join(known))
    return known[name]
