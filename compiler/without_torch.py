# SPDX-License-Identifier: Apache-2.0
"""Import TVM without torch, in processes of our own.

TVM's FFI imports torch wherever it is installed, for torch's types as arguments and against a clash of symbols on Windows.
A process that runs what was built needs neither, and torch costs it three seconds and 200 MB. What is imported
afterwards meets an ordinary torch: arrays are exchanged by DLPack.
"""

from __future__ import annotations

import sys


def import_tvm() -> None:
    """Import TVM as if torch were not installed; nothing to do where either is imported already."""
    if "tvm_ffi" in sys.modules or "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # Python's way to say that there is no such module
    try:
        import tvm  # noqa: F401
    finally:
        del sys.modules["torch"]
