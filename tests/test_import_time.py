# SPDX-License-Identifier: Apache-2.0
"""`import compiler` and `compile-model --help` load neither TVM nor torch, and help comes at
once."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("tvm", "torch", "onnx", "numpy", "rich", "transformers", "passes.layers")
LIMIT_S = 0.5


@pytest.mark.parametrize(
    "statement",
    [
        "import compiler",
        "import compiler.recipe",
        "import compiler.hardware",
        "from compiler.cli import main; main(['--help'])",
        "from compiler.cli import main; main(['build', '--help'])",
    ],
)
def test_nothing_heavy_is_imported(statement):
    script = (
        f"import sys\ntry:\n    {statement}\nexcept SystemExit: pass\n"
        f"print('loaded', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_help_is_quick():
    """Processor time, the least of five: what a machine that is not busy elsewhere would take."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        line = [sys.executable, "-m", "compiler.cli", "--help"]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert "build" in done.stdout
    assert min(times) < LIMIT_S, times


def test_tvm_is_imported_without_torch_and_torch_works_after_it():
    pytest.importorskip("torch")
    script = """
import sys
from compiler.without_torch import import_tvm
import_tvm()
import_tvm()
assert "tvm" in sys.modules and "torch" not in sys.modules
import numpy, torch, tvm_ffi
given = torch.arange(32, dtype=torch.float32)
shared = tvm_ffi.from_dlpack(given)
assert torch.from_dlpack(shared).data_ptr() == given.data_ptr()
assert numpy.from_dlpack(shared).sum() == 496
print("shared")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout == "shared\n", done.stderr
