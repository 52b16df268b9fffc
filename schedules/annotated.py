# SPDX-License-Identifier: Apache-2.0
"""What a kernel's definition says of itself travels as a dictionary: in its block's annotations, in tuning records."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class Annotated:
    """A frozen dataclass of numbers, strings and tuples of them, to and from the dictionary that JSON keeps."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`, also of what JSON made of it (tuples come back as lists)."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
