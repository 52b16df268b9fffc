# SPDX-License-Identifier: Apache-2.0
"""How an artifact holds its constants: by what they are made of, and without their zeros where that is smaller. Indices
are made of the differences between neighbours, whose upper bytes are mostly zeros. Numbers of one or two bytes are deflated
(RFC 1950) where that saves a tenth: weights in bytes are mostly small. Floats are not: their digits are noise.

    KEY                     an array as it is, or
    KEY.mask, KEY.values    where its values lie (a bit each, the first in the highest of a byte), and those

What else there is to know about a key is its `StoredForm` in the manifest.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from schedules.preparation import Source

# Less than this is not worth two tensors, or the time that loading takes to fill in zeros.
_SMALL_BYTES = 4096
_WORTH = 0.75
# Inflating makes about 150 MB a second: less than a tenth is not worth that. Whether it is more, parts of an array tell.
_WORTH_INFLATING = 0.9
_DEFLATED = ("int8", "uint8", "int16", "uint16")
_PARTS, _PART_BYTES = 16, 4096


@dataclass(frozen=True)
class Deflated:
    """The array that a vector of bytes is inflated to."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, entry: Mapping) -> Deflated:
        """From the manifest's JSON. Raises KeyError, TypeError or ValueError."""
        if entry["dtype"] not in _DEFLATED:
            raise ValueError(f"dtype {entry['dtype']}")
        return cls(entry["dtype"], _shape(entry["shape"]))

    def to_json(self) -> dict:
        return {"dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class StoredForm:
    """What loading does to a stored constant: `shape`, unless None, is that of an array stored without its zeros;
    `preparation` and `parameters` are those of `schedules.preparation.Source`; `deflated` has what is made of those of
    its tensors, by suffix, that are inflated first."""

    shape: tuple[int, ...] | None = None
    preparation: str = ""
    parameters: Mapping[str, int] = field(default_factory=dict)
    deflated: Mapping[str, Deflated] = field(default_factory=dict)

    @classmethod
    def parse(cls, entry: Mapping) -> StoredForm:
        """From the manifest's JSON. Raises KeyError, TypeError or ValueError."""
        shape = entry.get("shape")
        shape = None if shape is None else _shape(shape)
        parameters = {str(k): int(v) for k, v in entry.get("parameters", {}).items()}
        deflated = {str(k): Deflated.parse(v) for k, v in entry.get("deflated", {}).items()}
        return cls(shape, str(entry.get("preparation", "")), parameters, deflated)

    def to_json(self) -> dict:
        """Only what is to be done."""
        prepared = {"preparation": self.preparation, "parameters": dict(self.parameters)}
        deflated = {suffix: made.to_json() for suffix, made in self.deflated.items()}
        return {
            **({} if self.shape is None else {"shape": list(self.shape)}),
            **(prepared if self.preparation else {}),
            **({"deflated": deflated} if deflated else {}),
        }


def _shape(entry: Sequence) -> tuple[int, ...]:
    shape = tuple(int(d) for d in entry)
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {shape}")
    return shape


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
    return _deflate(best if best.nbytes <= _WORTH * whole.nbytes else whole)


def _without_zeros(source: Source, bytes_with_zeros: int) -> Stored:
    import numpy as np

    flat = np.ascontiguousarray(source.array).reshape(-1)
    used = flat.view(f"u{flat.itemsize}") != 0  # -0.0 is a value
    tensors = {".mask": np.packbits(used), ".values": flat[used]}
    form = StoredForm(source.array.shape, source.preparation, source.parameters)
    return Stored(tensors, form, bytes_with_zeros)


def _deflate(stored: Stored) -> Stored:
    """The same with those tensors deflated for which that pays."""
    import numpy as np

    tensors, deflated = dict(stored.tensors), {}
    for suffix, array in stored.tensors.items():
        if array.dtype.name not in _DEFLATED or array.nbytes < _SMALL_BYTES:
            continue
        data = array.tobytes()
        step = max(_PART_BYTES, len(data) // _PARTS)
        parts = b"".join(data[at : at + _PART_BYTES] for at in range(0, len(data), step))
        if len(_compress(parts)) > _WORTH_INFLATING * len(parts):
            continue
        tensors[suffix] = np.frombuffer(_compress(data), np.uint8)
        deflated[suffix] = Deflated(array.dtype.name, array.shape)
    return replace(stored, tensors=tensors, form=replace(stored.form, deflated=deflated))


def _compress(data: bytes) -> bytes:
    # Runs of one byte and Huffman codes: of weights and indices all that there is, in half the time.
    stream = zlib.compressobj(1, strategy=zlib.Z_RLE)
    return stream.compress(data) + stream.flush()


def _inflate(data: np.ndarray, made: Deflated, limit: int) -> np.ndarray:
    import numpy as np

    size = math.prod(made.shape) * np.dtype(made.dtype).itemsize
    if data.dtype != np.uint8 or data.ndim != 1 or size > limit:
        raise ValueError(f"{data.dtype} {data.shape} inflated to {size} bytes")
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, size + 1)  # the one more would be too many
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(found) != size or not stream.eof or stream.unused_data:
        raise ValueError(f"{len(found)} bytes inflated, not {size}")
    return np.frombuffer(found, made.dtype).reshape(made.shape)


def restore(form: StoredForm, read: Callable[[str], np.ndarray], size: int) -> np.ndarray:
    """The constant of `size` bytes whose tensors `read` gives by suffix. Raises ValueError for tensors that do not fit its
    form."""

    def tensor(suffix: str) -> np.ndarray:
        made = form.deflated.get(suffix)
        return read(suffix) if made is None else _inflate(read(suffix), made, size)

    fill_in = form.shape is not None
    base = _fill_in(form.shape, tensor(".mask"), tensor(".values")) if fill_in else tensor("")
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
