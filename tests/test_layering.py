# SPDX-License-Identifier: Apache-2.0
"""Imports only go down: compiler -> passes -> schedules -> tvm; nothing imports tools or tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "compiler": {"compiler", "passes", "schedules"},
    "passes": {"passes", "schedules"},
    "schedules": {"schedules"},
}
OURS = {"compiler", "passes", "schedules", "tools", "tests"}


def imported(source: str, package: str) -> set[str]:
    """Top-level packages that `source`, a module of `package`, imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(package if node.level else node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_only_go_down(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no files in {package}"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(imported(path.read_text(), package) & OURS - MAY_IMPORT[package])
    ]
    assert not wrong, "\n".join(wrong)


def test_the_walk_sees_imports_inside_functions():
    source = (
        "def f():\n    import passes.layers\n    from compiler import cli\n    from . import x\n"
    )
    assert imported(source, "schedules") == {"passes", "compiler", "schedules"}


def test_every_file_carries_a_licence_line():
    files = [p for d in OURS for p in (ROOT / d).rglob("*.py")]
    missing = [
        str(p.relative_to(ROOT))
        for p in files
        if "SPDX-License-Identifier: Apache-2.0" not in "\n".join(p.read_text().splitlines()[:3])
    ]
    assert not missing, missing
