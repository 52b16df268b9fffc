# SPDX-License-Identifier: Apache-2.0
"""The two outcomes of every step: `Declined` (not applicable, recorded and shown) and `KerfError` (broken, raised).

A message says what went wrong, where, what was found, what was wanted and what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass


class KerfError(Exception):
    """Base of every error a user may see; `exit_code` is the process's (2 the user's input, 3 unsupported, 4 a bug)."""

    exit_code = 4

    def __init__(
        self, what: str, *, where: str = "", found: str = "", wanted: str = "", todo: str = ""
    ):
        parts = [f"{where}: {what}" if where else what]
        parts += [
            f"{label} {text}" for label, text in (("found", found), ("wanted", wanted)) if text
        ]
        message = "; ".join(parts)
        super().__init__(f"{message}. {todo}" if todo else message)


class UserError(KerfError):
    """Something given by the user is wrong: a file, an option, a shape."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe cannot be read or asks for something impossible."""


class ModelError(UserError):
    """The model file is missing, corrupt, or not what its name says."""


class ArtifactError(UserError):
    """A built artifact is damaged, incomplete, or made for another machine."""


class TargetError(UserError):
    """The target is unknown or this machine lacks what it needs."""


class UnsupportedModel(KerfError):
    """The model uses operations that cannot be compiled; the message lists all of them."""

    exit_code = 3


class VerificationError(KerfError):
    """The compiled model's outputs differ from the original's by more than rounding explains."""


class ScheduleError(KerfError):
    """A kernel generator met a function it should have been able to handle: a bug in Kerf."""


class MeasurementError(KerfError):
    """A timing could not be taken honestly."""


def classes() -> list[type[KerfError]]:
    """KerfError and every class derived from it."""
    found: list[type[KerfError]] = [KerfError]
    for each in found:
        found += each.__subclasses__()
    return found


@dataclass(frozen=True)
class Declined:
    """A treatment or kernel that does not apply here. `reason` is shown to the user as it stands."""

    reason: str
