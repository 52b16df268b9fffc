# SPDX-License-Identifier: Apache-2.0
"""`python -m compiler.memory_probe OUT VARIANT INPUTS.npz THREADS`: memory of a process that runs
a model.

Prints {"start": bytes, "peak": bytes}. The peak is VmHWM, which belongs to this program alone; the
ru_maxrss of a process that was forked from a large one begins at the parent's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (at most) of this process in bytes; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def main() -> None:
    import numpy as np

    from compiler.without_torch import import_tvm

    import_tvm()
    from compiler.runtime import load

    path, variant, arrays, threads = sys.argv[1:]
    with np.load(arrays, allow_pickle=False) as file:
        inputs = [file[name] for name in file.files]
    start = resident("VmRSS")
    model = load(path, variant, int(threads))
    for _ in range(3):
        model(*inputs)
    sys.stdout.write(json.dumps({"start": start, "peak": resident("VmHWM")}))


if __name__ == "__main__":
    main()
