# SPDX-License-Identifier: Apache-2.0
"""Arrays by name in .npz files, and files written whole or not at all."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from schedules.errors import UserError

if TYPE_CHECKING:
    import numpy as np

# NotImplementedError and RuntimeError: compressed by an unknown method, encrypted.
_UNREADABLE = (
    ValueError,
    EOFError,
    AttributeError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


ALIGNMENT = 64  # bytes; what kernels may assume of every tensor but the model's inputs


def aligned(array: np.ndarray, alignment: int = ALIGNMENT) -> np.ndarray:
    """A copy of `array` whose memory begins at a multiple of `alignment` bytes, as that of torch's tensors does."""
    import numpy as np

    memory = np.empty(array.nbytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def read_npz(path: Path) -> dict:
    """The arrays of a .npz file by name. Raises UserError; never unpickles."""
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise UserError("holds one array without a name", where=str(path), wanted="a .npz")
        with loaded as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except _UNREADABLE:
        wanted = "what numpy.savez writes, without Python objects"
        raise UserError("not a readable .npz file", where=str(path), wanted=wanted) from None
    except MemoryError:
        raise UserError("its arrays do not fit into memory", where=str(path)) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=str(path)) from None


def write_npz(path: Path, arrays: Mapping) -> None:
    """Write arrays by name to exactly `path`. Raises UserError."""
    import numpy as np

    write_whole(path, lambda file: np.savez(file, **arrays))


def check_writable(path: Path) -> None:
    """That a file may be written at `path`: to be asked before the work, not after it. Raises
    UserError."""
    path = path.absolute()
    if path.is_dir():
        raise UserError("is a directory", where=str(path))
    if not path.parent.is_dir():
        raise UserError("no such directory", where=str(path.parent))
    replaceable = path.is_file() or not path.exists()
    if (replaceable and not os.access(path.parent, os.W_OK)) or (
        path.exists() and not os.access(path, os.W_OK)
    ):
        raise UserError("cannot be written", where=str(path))


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write(file)` such that either the complete file appears at `path` or nothing
    changes."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.exists() and not path.is_file():  # a device or pipe: there is nothing to replace
            with open(path, "wb") as file:
                write(file)
            return
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", where=str(path)) from None
    finally:
        partial.unlink(missing_ok=True)
