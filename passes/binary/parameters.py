# SPDX-License-Identifier: Apache-2.0
"""What a recipe may say of binary layers."""

from __future__ import annotations


def parse_zero(value: object) -> str:
    """What the sign of 0 is taken for where a model says 0: "exact", "+1" or "-1". Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:+d}"  # as `--set zero=+1` gives it
    if value not in ("exact", "+1", "-1"):
        raise ValueError(f"zero must be 'exact', '+1' or '-1', not {value!r}")
    return str(value)


def parse_binarize(value: object) -> bool:
    """Whether a layer of real numbers is made binary. Raises ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"binarize must be true or false, not {value!r}")
    return value


PARAMETERS = {"zero": parse_zero, "binarize": parse_binarize}
