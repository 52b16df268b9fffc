# SPDX-License-Identifier: Apache-2.0
"""The C++ linker that turns object code into a library: the system's, or `ziglang` from PyPI."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from schedules.errors import UserError

# The order in which TVM looks for one; CXX and CC come before.
_NAMES = ("g++", "gcc", "clang++", "clang", "c++", "cc")


@dataclass(frozen=True)
class Linker:
    """`command` starts the linker; `name` is what the manifest records."""

    name: str
    command: tuple[str, ...]

    def __call__(self, output: str, objects: list[str], options: list[str] | None = None) -> None:
        """Link `objects` to the shared library `output`; the signature that TVM's export calls."""
        line = [
            *self.command,
            "-shared",
            "-fPIC",
            "-Wl,--strip-debug",  # more than half of what TVM generates, and nothing reads it
            "-o",
            str(output),
            *map(str, objects),
            *(options or []),
        ]
        done = subprocess.run(line, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            text = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(
                "linking the library failed",
                where=self.name,
                found=text[-1] if text else "no message",
                todo="See whether the disk is full, or set CXX to a working C++ compiler",
            )

    def get_target_triple(self) -> str:
        """What TVM's export generates code for where it packs the program beside the kernels."""
        import tvm

        return str(tvm.get_global_func("target.llvm_get_system_triple")())


@dataclass(frozen=True)
class Archiver:
    """Puts objects for the machine `triple` into an archive, to be linked there; called as a `Linker` is."""

    triple: str
    name: str = ""

    def __call__(self, output: str, objects: list[str], options: list[str] | None = None) -> None:
        from tvm.support.tar import tar

        tar(output, objects)

    def get_target_triple(self) -> str:
        return self.triple


def find_linker() -> Linker | None:
    """CXX or CC from the environment, else a compiler on the path, else `ziglang` if it is
    installed."""
    for variable in ("CXX", "CC"):
        try:
            words = shlex.split(os.environ.get(variable, ""))
        except ValueError as error:
            raise UserError(
                str(error).lower(), where=variable, found=os.environ[variable]
            ) from None
        if words and (path := shutil.which(words[0])):
            return Linker(Path(path).name, (path, *words[1:]))
    for name in _NAMES:
        if path := shutil.which(name):
            return Linker(name, (path,))
    if importlib.util.find_spec("ziglang") is not None:
        return Linker("ziglang", (sys.executable, "-m", "ziglang", "c++"))
    return None


def require_linker() -> Linker:
    """`find_linker`, raising UserError where there is none; call it before any long work."""
    linker = find_linker()
    if linker is None:
        raise UserError(
            "no C++ compiler to link the library with",
            wanted="g++ or clang++ on PATH, or CXX set",
            todo="Install one (apt install g++), or pip install ziglang",
        )
    return linker
