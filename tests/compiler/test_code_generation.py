# SPDX-License-Identifier: Apache-2.0
"""Code generated side by side: the same code whatever the number of threads, errors of one kernel, a full disk."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import tvm
from tvm import te

from compiler import code_generation
from compiler.code_generation import GeneratedCode, generate_code
from schedules.errors import UserError
from schedules.target import NAMED, detect_host


def functions(count: int) -> dict:
    found = {}
    for i in range(count):
        x = te.placeholder((16 + i,), name="x")
        y = te.compute(x.shape, lambda j: x[j] * te.const(i, "float32"), name="y")  # noqa: B023
        func = te.create_prim_func([x, y])
        found[f"times_{i}"] = func.with_attr("global_symbol", f"times_{i}")
    return found


def test_code_does_not_depend_on_the_number_of_threads(monkeypatch, tmp_path):
    target = detect_host().tvm()
    objects = {}
    for cores in (1, 3):
        monkeypatch.setattr(code_generation, "usable_cores", lambda: cores)  # noqa: B023
        for i, module in enumerate(generate_code(functions(4), target)):
            module.write_to_file(str(tmp_path / "kernel.o"))
            objects[cores, i] = (tmp_path / "kernel.o").read_bytes()
    assert len(objects) == 8
    for i in range(4):
        assert objects[1, i] == objects[3, i]
        assert f"times_{i}".encode() in objects[1, i]  # in the order given


def test_functions_known_by_name_target_and_body_are_not_compiled_again(monkeypatch):
    target, compiled = detect_host().tvm(), []
    build = tvm.tirx.build

    def count(module, target):
        compiled.append(module.get_global_vars()[0].name_hint)
        return build(module, target)

    monkeypatch.setattr(tvm.tirx, "build", count)
    known = GeneratedCode()
    first = generate_code(functions(3), target, known=known)
    again = generate_code(functions(4), target, known=known)
    assert sorted(compiled) == ["times_0", "times_1", "times_2", "times_3"]
    assert all(a.same_as(b) for a, b in zip(first, again)) and len(again) == 4
    compiled.clear()
    other = functions(2)["times_1"].with_attr("global_symbol", "times_0")
    generate_code({"times_0": other, "times_1": other}, target, known=known)  # other bodies
    generate_code(functions(1), NAMED["generic"].tvm(), known=known)
    assert sorted(compiled) == ["times_0", "times_0", "times_1"]


def test_the_error_of_one_kernel_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(code_generation, "usable_cores", lambda: 1)
    begun, build = [], tvm.tirx.build

    def fails(module, target):
        begun.append(module.get_global_vars()[0].name_hint)
        if begun[-1] == "times_1":
            raise ValueError("no code for this")
        return build(module, target)

    monkeypatch.setattr(tvm.tirx, "build", fails)
    with pytest.raises(ValueError, match="no code for this"):
        generate_code(functions(6), detect_host().tvm())
    assert begun[:2] == ["times_0", "times_1"] and len(begun) < 6
    assert not list(tmp_path.iterdir())


def test_long_work_is_not_silent(monkeypatch):
    monkeypatch.setattr(code_generation, "_SILENCE", 0.0)
    monkeypatch.setattr(code_generation, "usable_cores", lambda: 1)
    said: list[str] = []
    generate_code(functions(3), detect_host().tvm(), said.append)
    assert said[0] == "0 of 3 kernels compiled" and set(said) <= {
        f"{i} of 3 kernels compiled" for i in range(3)
    }


def test_a_full_directory_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 0))
    with pytest.raises(UserError, match="TMPDIR"):
        generate_code(functions(1), detect_host().tvm())
