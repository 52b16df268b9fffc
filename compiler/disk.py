# SPDX-License-Identifier: Apache-2.0
"""Whether there is room on a disk, before something is written that could not fail in good order."""

from __future__ import annotations

import shutil
from pathlib import Path

from schedules.errors import UserError

# LLVM ends the process when it cannot write an object file, so room for the code is checked before.
CODE_BYTES = 16 << 20


def check_space(directory: Path, wanted: int) -> None:
    """Raise UserError if the disk of `directory` surely has no room for `wanted` bytes."""
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise UserError(
            "not enough space",
            where=str(directory),
            found=f"{free >> 20} MiB free",
            wanted=f"about {wanted >> 20} MiB",
            todo="Free some space, or give another directory: -o, or TMPDIR for temporary files",
        )
