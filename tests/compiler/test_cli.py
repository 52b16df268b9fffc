# SPDX-License-Identifier: Apache-2.0
"""The command line by click's runner, and once as a subprocess from outside the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from compiler.cli import main

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("inspect", "build", "verify", "run", "bench", "profile", "hardware", "tune", "what-if")


@pytest.fixture
def invoke():
    def call(*arguments):
        return CliRunner().invoke(main, [str(a) for a in arguments])

    return call


def test_help_lists_every_command(invoke):
    result = invoke("--help")
    assert result.exit_code == 0
    assert set(main.commands) == set(COMMANDS)
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_every_option(invoke, command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    hidden = [
        p.name
        for p in main.commands[command].params
        if p.param_type_name == "option" and not p.help
    ]
    assert not hidden, f"no help text for {hidden}"


def test_every_command_and_option_is_documented():
    text = (ROOT / "docs" / "commands.md").read_text()
    for name, command in main.commands.items():
        section = text.partition(f"## {name}")[2].partition("\n## ")[0]
        assert section, f"docs/commands.md has no section for {name}"
        options = {o for p in command.params for o in p.opts if o.startswith("--")}
        assert not {o for o in options if f"`{o}" not in section}, name


def test_hardware_without_measuring_names_what_is_missing(invoke, tmp_path):
    result = invoke("hardware", "--no-measure", "--json", tmp_path / "h.json")
    assert result.exit_code == 0, result.stderr
    machine = json.loads((tmp_path / "h.json").read_text())
    assert machine["usable_cores"] == len(os.sched_getaffinity(0))
    assert machine["tier"] in result.stdout
    assert {e["family"] for e in machine["expectations"]} >= {"dense", "sparse"}
    assert machine["peak_gflops"] is None


def test_run_writes_what_the_model_computes(invoke, tiny, tiny_artifact, tmp_path, rng):
    x = rng.standard_normal((4, 64)).astype("float32")
    np.savez(tmp_path / "x.npz", x=x)
    for variant in ("dense", "compressed"):
        result = invoke(
            "run", tiny_artifact.path, "--input", tmp_path / "x.npz",
            "--output", tmp_path / "y.npz", "--variant", variant,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        with np.load(tmp_path / "y.npz") as file:
            np.testing.assert_allclose(file["y"], tiny.expected(variant, x), atol=1e-4, rtol=1e-4)


def test_as_a_subprocess_from_outside_the_repository(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "compiler.cli", "hardware", "--no-measure"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "features" in done.stdout
    assert not list(tmp_path.iterdir())
