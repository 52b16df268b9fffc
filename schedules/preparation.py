# SPDX-License-Identifier: Apache-2.0
"""What is done to a constant, by name, before a kernel reads it: a file may then hold the smaller one that it is made of.

A preparation is numpy's elementwise arithmetic and sums of integers, which give the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from schedules.winograd_matrices import transform_weights


def running_sum(planes: np.ndarray, signed: int = 0) -> np.ndarray:
    """uint8 [bytes, n] of 2 or 4, the lowest byte first -> integers [n], the sums so far, modulo their range. Raises
    ValueError for another dtype or shape."""
    size = planes.shape[0] if planes.ndim == 2 and planes.dtype == np.uint8 else 0
    if size not in (2, 4):
        raise ValueError(f"no bytes of integers: {planes.dtype} {planes.shape}")
    steps = np.ascontiguousarray(planes.T).view(f"<u{size}").reshape(-1)
    return np.cumsum(steps, dtype=steps.dtype).view(f"<{'i' if signed else 'u'}{size}")


def differences(array: np.ndarray) -> Source | None:
    """What a vector of integers is made of by `running_sum`; None for anything else."""
    size = array.itemsize
    if array.ndim != 1 or array.dtype.kind not in "iu" or size not in (2, 4):
        return None
    numbers = array.astype(array.dtype.newbyteorder("<")).view(f"<u{size}")
    steps = np.diff(numbers, prepend=numbers.dtype.type(0))
    planes = np.ascontiguousarray(steps.view(np.uint8).reshape(-1, size).T)
    return Source(planes, "running_sum", {"signed": int(array.dtype.kind == "i")})


# By name: (array, **parameters) -> prepared array. ValueError or TypeError for what does not fit.
PREPARATIONS: Mapping[str, Callable[..., np.ndarray]] = {
    "running_sum": running_sum,
    "winograd": transform_weights,
}


@dataclass(frozen=True)
class Source:
    """What a constant is made of: an array, and the name of its preparation with its parameters (whole numbers), or none."""

    array: np.ndarray
    preparation: str = ""
    parameters: Mapping[str, int] = field(default_factory=dict)

    def prepared(self) -> np.ndarray:
        """The constant. Raises ValueError for an unknown preparation, an array or parameters that it does not take."""
        if not self.preparation:
            return self.array
        function = PREPARATIONS.get(self.preparation)
        if function is None:
            raise ValueError(f"unknown preparation {self.preparation!r}")
        try:
            return function(self.array, **self.parameters)
        except TypeError as error:
            raise ValueError(f"{self.preparation}: {error}") from None
