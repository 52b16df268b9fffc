# SPDX-License-Identifier: Apache-2.0
"""The wheel by itself: built, installed into an empty environment, used from outside the
repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools")
    source = tmp_path_factory.mktemp("source")
    # A copy, so that building leaves nothing in the repository and an old build/ cannot get in.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for package in ("compiler", "passes", "schedules", "tests", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    line = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, "-m", *line, "-w", str(out), str(source)], check=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    info = {t for t in tops if t.endswith(".dist-info")}
    assert tops - info == {"compiler", "passes", "schedules"}
    shipped = {n for n in names if n.endswith(".py")}
    packages = ("compiler", "passes", "schedules")
    ours = {str(p.relative_to(ROOT)) for d in packages for p in (ROOT / d).rglob("*.py")}
    assert shipped == ours
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_outside_the_repository(wheel, tmp_path):
    """Its dependencies come from this environment by a .pth file; the package itself must come from
    the wheel."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    install = ["pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, "-m", *install, str(wheel)], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*line: str) -> str:
        done = subprocess.run(line, capture_output=True, text=True, cwd=outside, env=clean)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(str(python), "-c", "import compiler, passes, schedules; print(compiler.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    command = str(environment / "bin" / "compile-model")
    assert "build" in run(command, "--help")
    assert "0.1.0" in run(command, "--version")
    shown = run(command, "hardware", "--no-measure", "--json", "hardware.json")
    assert "features" in shown
    assert (outside / "hardware.json").is_file()
    weight = write_model(outside / "model.onnx")
    assert "verified" in run(command, "build", "model.onnx", "-o", "out")
    x = np.linspace(-1, 1, 8, dtype="float32").reshape(1, 8)
    np.savez(outside / "x.npz", x=x)
    run(command, "run", "out", "--input", "x.npz", "--output", "y.npz")
    with np.load(outside / "y.npz") as found:
        np.testing.assert_allclose(found["y"], x @ weight, rtol=1e-5, atol=1e-5)


def write_model(path: Path) -> np.ndarray:
    """x [1, 8] -> x @ weight [1, 4]; returns the weight."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = np.linspace(-2, 3, 32, dtype="float32").reshape(8, 4)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")],
        "model",
        [helper.make_tensor_value_info("x", kind, [1, 8])],
        [helper.make_tensor_value_info("y", kind, [1, 4])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return weight
