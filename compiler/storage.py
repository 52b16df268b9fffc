# SPDX-License-Identifier: Apache-2.0
"""How an artifact holds its constants: by what they are made of, and without their zeros where that is smaller. Indices
are made of the differences between neighbours, whose upper bytes are mostly zeros.

    KEY                     an array as it is, or
    KEY.mask, KEY.values    where its values lie (a bit each, the first in the highest of a byte), and those

What else there is to know about a key is its `StoredForm` in the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from schedules.preparation import Source

# Less than this is not worth two tensors, or the time that loading takes to fill in zeros.
_SMALL_BYTES = 4096
_WORTH = 0.75


@dataclass(frozen=True)
class StoredForm:
    """What loading does to a stored constant: `shape`, unless None, is that of an array stored without its zeros;
    `preparation` and `parameters` are those of `schedules.preparation.Source`."""

    shape: tuple[int, ...] | None = None
    preparation: str = ""
    parameters: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, entry: Mapping) -> StoredForm:
        """From the manifest's JSON. Raises TypeError or ValueError."""
        shape = entry.get("shape")
        shape = None if shape is None else tuple(int(d) for d in shape)
        if shape is not None and min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}")
        parameters = {str(k): int(v) for k, v in entry.get("parameters", {}).items()}
        return cls(shape, str(entry.get("preparation", "")), parameters)

    def to_json(self) -> dict:
        """Only what is to be done."""
        prepared = {"preparation": self.preparation, "parameters": dict(self.parameters)}
        return {
            **({} if self.shape is None else {"shape": list(self.shape)}),
            **(prepared if self.preparation else {}),
        }


@dataclass(frozen=True)
class Stored:
    """A constant as it is stored: its tensors by suffix, and the bytes of what it is made of, with all zeros."""

    tensors: Mapping[str, np.ndarray]
    form: StoredForm
    bytes_with_zeros: int

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.tensors.values())

    @property
    def mask_bytes(self) -> int:
        """Of `nbytes`, what says where values are."""
        return self.tensors[".mask"].nbytes if ".mask" in self.tensors else 0


def store(array: np.ndarray, source: Source | None = None) -> Stored:
    """The smallest form of a constant that is made of `source`, if of anything."""
    from schedules.preparation import Source, differences

    source = source or Source(array)
    whole = Stored(
        {"": source.array},
        StoredForm(None, source.preparation, source.parameters),
        source.array.nbytes,
    )
    if whole.nbytes < _SMALL_BYTES:
        return whole
    sources = [source]
    if not source.preparation and (steps := differences(array)) is not None:
        sources.append(steps)
    best = min((_without_zeros(s, whole.nbytes) for s in sources), key=lambda s: s.nbytes)
    return best if best.nbytes <= _WORTH * whole.nbytes else whole


def _without_zeros(source: Source, bytes_with_zeros: int) -> Stored:
    import numpy as np

    flat = np.ascontiguousarray(source.array).reshape(-1)
    used = flat.view(f"u{flat.itemsize}") != 0  # -0.0 is a value
    tensors = {".mask": np.packbits(used), ".values": flat[used]}
    form = StoredForm(source.array.shape, source.preparation, source.parameters)
    return Stored(tensors, form, bytes_with_zeros)


def restore(form: StoredForm, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The constant whose tensors `read` gives by suffix. Raises ValueError for tensors that do not fit its form."""
    base = read("") if form.shape is None else _fill_in(form.shape, read(".mask"), read(".values"))
    if not form.preparation:
        return base
    from schedules.preparation import Source

    return Source(base, form.preparation, form.parameters).prepared()


def _fill_in(shape: Sequence[int], mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    import numpy as np

    size = math.prod(shape)
    if mask.dtype != np.uint8 or mask.shape != ((size + 7) // 8,) or values.ndim != 1:
        found = f"{mask.dtype} {mask.shape} and {values.shape}"
        raise ValueError(f"no mask and values of an array {tuple(shape)}: {found}")
    used = np.unpackbits(mask, count=size).view(bool)
    if np.count_nonzero(used) != values.size:
        raise ValueError(f"{values.size} values where the mask has {np.count_nonzero(used)}")
    array = np.zeros(size, values.dtype)
    array[used] = values
    return array.reshape(shape)
