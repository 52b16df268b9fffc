# SPDX-License-Identifier: Apache-2.0
"""Bad input at the command line: one clear line on standard error, the right exit code, nothing
half-written."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from compiler.cli import main
from schedules.errors import ScheduleError, UnsupportedModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fails(tmp_path, monkeypatch):
    """`fails(code, *arguments)`: run in `tmp_path`; check code, one line, no new file; return the
    line."""
    monkeypatch.chdir(tmp_path)

    def check(code, *arguments):
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == code, (result.exit_code, result.output, result.exception)
        lines = result.stderr.splitlines()
        messages = [line for line in lines if line and line[0] != "["]  # progress is no message
        assert len(messages) == 1, lines
        assert messages[0].startswith("compile-model")
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
        return messages[0]

    return check


def save_onnx(path: Path, weight: np.ndarray) -> Path:
    """x [1, K] -> relu(x @ weight) [1, N], weight [K, N]"""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "fc"),
        helper.make_node("Relu", ["h"], ["y"], "relu"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def small_onnx(tmp_path_factory) -> Path:
    weight = np.arange(32, dtype="float32").reshape(8, 4) - 15.5
    return save_onnx(tmp_path_factory.mktemp("onnx") / "small.onnx", weight)


@pytest.mark.parametrize("command", ["inspect", "build"])
def test_a_missing_model(fails, command):
    extra = ["-o", "out"] if command == "build" else []
    assert "nothing.onnx: no such file" in fails(2, command, "nothing.onnx", *extra)


def test_a_truncated_model(fails, tmp_path, small_onnx):
    (tmp_path / "cut.onnx").write_bytes(small_onnx.read_bytes()[:-20])
    assert "cut.onnx" in fails(2, "build", "cut.onnx", "-o", "out")


def test_an_operator_refused_while_converting(tmp_path):
    """In a process of its own: TVM's C++ would print to the real standard error."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(save_onnx(tmp_path / "m.onnx", np.ones((8, 4), "float32")))
    model.graph.node[1].op_type = "Einsum"
    model.graph.node[1].attribute.append(onnx.helper.make_attribute("equation", "...a->...a"))
    onnx.save(model, tmp_path / "m.onnx")
    line = [sys.executable, "-m", "compiler.cli", "inspect", "m.onnx"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Einsum (relu)" in done.stderr


def test_a_file_that_is_no_model(fails, tmp_path):
    (tmp_path / "text.onnx").write_text("not a model\n")
    (tmp_path / "model.txt").write_text("not a model\n")
    assert "text.onnx" in fails(2, "inspect", "text.onnx")
    assert "model.txt" in fails(2, "inspect", "model.txt")


def test_missing_external_data(fails, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = save_onnx(tmp_path / "big.onnx", np.ones((8, 4), "float32"))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    assert "w.bin" in fails(2, "build", "big.onnx", "-o", "out")


def test_a_nan_among_the_weights(fails, tmp_path):
    weight = np.ones((8, 4), "float32")
    weight[3, 2] = np.nan
    save_onnx(tmp_path / "nan.onnx", weight)
    assert "weight w holds NaN; found 1 of 32" in fails(2, "build", "nan.onnx", "-o", "out")


def test_an_infinite_weight(fails, tmp_path):
    weight = np.ones((8, 4), "float32")
    weight[3, 2] = np.inf
    save_onnx(tmp_path / "inf.onnx", weight)
    said = fails(2, "build", "inf.onnx", "-o", "out")
    assert "its weight holds infinity or NaN; found 1 of 32 values" in said


def test_unsupported_operators_are_all_listed(fails, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = save_onnx(tmp_path / "odd.onnx", np.ones((8, 4), "float32"))
    model = onnx.load(path)
    del model.graph.node[1]
    first = onnx.helper.make_node("Det", ["h"], ["d"], "odd_one")
    second = onnx.helper.make_node("StringNormalizer", ["d"], ["y"], "odd_two")
    model.graph.node.extend([first, second])
    onnx.save(model, path)
    for command in (["inspect", "odd.onnx"], ["build", "odd.onnx", "-o", "out"]):
        line = fails(3, *command)
        assert "Det" in line and "odd_one" in line
        assert "StringNormalizer" in line and "odd_two" in line


@pytest.mark.parametrize("shape", ["z=1x8", "x=1x9", "x=8"])
def test_an_input_shape_that_does_not_fit(fails, small_onnx, shape):
    assert "compile-model" in fails(2, "build", small_onnx, "-o", "out", "--input", shape)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--input", "x=1x0x3"], "'x=1x0x3' is not NAME=DxDxD"),
        (["--input", "1x3"], "'1x3' is not NAME=DxDxD"),
        (["--input", "x=axb"], "'x=axb' is not NAME=DxDxD"),
        (["--batch", "0"], "0 is not in the range"),
        (["--threads", "0"], "0 is not in the range"),
        (["--threads", "two"], "'two' is not a valid integer"),
        (["--target", "pentium"], "--target: unknown target"),
        (["--target", '{"arch"'], "--target: malformed JSON"),
        (["--target", '{"colour": 1}'], "--target: unknown key"),
        (["--recipe", "missing.toml"], "missing.toml: no such recipe"),
        (["--recipe", "dense", "--density", "0.5"], "--density: the recipe 'dense' takes no"),
        (["--recipe", "sparse", "--density", "0"], "--density: density"),
        (["--recipe", "sparse", "--density", "1.01"], "--density: density"),
        (["--recipe", "sparse", "--density", "nan"], "--density: density"),
        (["--recipe", "sparse", "--grain", "out:3"], "--grain: unknown grain"),
        (["--recipe", "sparse", "--prune"], "--prune: pruning needs to know the density"),
        (["--recipe", "int8", "--set", "observer=most"], "--set observer: unknown observer"),
        (["--recipe", "int8", "--set", "observe=mse"], "--set observe: unknown key"),
        (["--recipe", "int8", "--prune"], "--prune: pruning needs to know the density"),
        (["--preprocess", "crop=8"], "--preprocess: says how calibration images are prepared"),
        (["--winograd", "sometimes"], "'sometimes' is not one of"),
        (["--json", "nowhere/report.json"], "no such directory"),
        (["--json", "/"], "is a directory"),
        (["--nonsense"], "No such option"),
    ],
)  # fmt: skip
def test_a_wrong_option(fails, small_onnx, arguments, said):
    assert said in fails(2, "build", small_onnx, "-o", "out", *arguments)


def test_an_option_is_named_once(fails, small_onnx):
    line = fails(2, "build", small_onnx, "-o", "out", "--recipe", "sparse", "--density", "2")
    assert line == "compile-model: --density: density must be in (0, 1], not 2.0"


def test_too_many_threads_are_refused_before_the_work(fails, small_onnx, monkeypatch):
    monkeypatch.setattr("compiler.frontend.import_model", lambda *_, **__: pytest.fail("imported"))
    line = fails(2, "build", small_onnx, "-o", "out", "--threads", "999")
    assert "more threads than usable cores" in line


@pytest.mark.parametrize("seconds", ["nan", "inf", "0"])
def test_a_duration_that_never_ends(fails, small_onnx, seconds):
    assert "--duration" in fails(2, "bench", "out", "--duration", seconds)
    assert "--seconds" in fails(2, "tune", small_onnx, "--records", "r", "--seconds", seconds)


def test_tuning_a_model_that_cannot_be_read_leaves_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.onnx").write_text("hello")
    result = CliRunner().invoke(main, ["tune", "text.onnx", "--records", "r"])
    assert result.exit_code == 2 and "not an ONNX model" in result.stderr
    assert not (tmp_path / "r").exists()


def test_tuning_what_cannot_be_treated_leaves_no_directory(tmp_path, small_onnx, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["tune", str(small_onnx), "--records", "r", "--recipe", "int8"]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 2 and "int8 needs samples" in result.stderr
    assert not (tmp_path / "r").exists()


def test_no_command_shows_the_help():
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 0 and result.stdout.startswith("Usage: ")


def test_build_without_an_output(fails, small_onnx):
    assert "Missing option" in fails(2, "build", small_onnx)


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "[[rule]]\nmatch = 'fc'\ntreatment = 'sparse'\nsize = 3\n",
            "r.toml:4: unknown key 'size'",
        ),
        ("[[rule]]\nmatch = 'gone.*'\ntreatment = 'sparse'\n", "r.toml:2: match: matches no layer"),
        ("[[rule]]\nmatch = '*'\ntreatment = 'sparse'\ndensity = 7\n", "r.toml:4: density: "),
        ("[[rule]\n", "r.toml:1: malformed TOML"),
    ],
)
def test_a_bad_recipe(fails, small_onnx, tmp_path, text, said):
    (tmp_path / "r.toml").write_text(text)
    assert said in fails(2, "build", small_onnx, "-o", "out", "--recipe", "r.toml")


def test_an_existing_output_without_force(fails, small_onnx, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "out: exists already" in fails(2, "build", small_onnx, "-o", "out")
    assert "not an artifact" in fails(2, "build", small_onnx, "-o", "out", "--force")


def test_an_output_whose_parent_is_missing(fails, small_onnx):
    assert "does not exist" in fails(2, "build", small_onnx, "-o", "a/b/out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_output(fails, small_onnx, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "not writable" in fails(2, "build", small_onnx, "-o", "locked/out")


def test_a_full_disk_while_the_json_is_written(fails):
    assert "No space left on device" in fails(2, "hardware", "--no-measure", "--json", "/dev/full")


def test_a_full_disk_is_seen_before_the_work(fails, small_onnx, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(9, 9, 0))
    assert "not enough space; found 0 MiB free" in fails(2, "build", small_onnx, "-o", "out")


def test_a_full_disk_while_the_artifact_is_written(tmp_path_factory, tmp_path):
    """No file may grow beyond 48 KiB, and the weights have 128."""
    weight = np.linspace(-1, 1, 16 * 2048, dtype="float32").reshape(16, 2048)
    model = save_onnx(tmp_path_factory.mktemp("model") / "wide.onnx", weight)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (49152, 49152))"
    script = f"{limit}; from compiler.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, "build", str(model), "-o", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    messages = [line for line in done.stderr.splitlines() if line and line[0] != "["]
    assert done.returncode == 2, done.stderr
    assert len(messages) == 1, messages
    assert [p.name for p in tmp_path.iterdir() if p.name != ".ses"] == []


def test_a_linker_with_an_open_quote(fails, small_onnx, monkeypatch):
    monkeypatch.setenv("CXX", "'g++")
    assert "CXX: no closing quotation" in fails(2, "build", small_onnx, "-o", "out")


def test_no_linker(fails, small_onnx, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "no C++ compiler" in fails(2, "build", small_onnx, "-o", "out")


@pytest.fixture
def arrays(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros((4, 64), "float32"))
    return path


def run_line(artifact, arrays, output="y.npz"):
    return ["run", artifact, "--input", arrays, "--output", output]


def test_an_artifact_that_is_none(fails, arrays, tmp_path):
    assert "no such directory" in fails(2, *run_line("gone", arrays))
    (tmp_path / "empty").mkdir()
    assert "missing" in fails(2, *run_line("empty", arrays))


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "dense.so"])
def test_an_artifact_with_a_changed_byte(fails, arrays, tiny_artifact, tmp_path, name):
    copy = tmp_path / "changed"
    shutil.copytree(tiny_artifact.path, copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    line = fails(2, *run_line(copy, arrays))
    assert name in line and "changed since it was built" in line


def test_an_artifact_for_another_processor(fails, arrays, write_tiny, tiny, tmp_path):
    from dataclasses import replace

    alien = replace(tiny.target, features=(*tiny.target.features, "avx512bf16", "sve"))
    write_tiny(tmp_path / "alien", target=alien)
    line = fails(2, *run_line(tmp_path / "alien", arrays))
    assert "built for CPU features this machine lacks" in line and "sve" in line


@pytest.mark.parametrize(
    "given, said",
    [
        ({"z": np.zeros((4, 64), "float32")}, "unknown input 'z'"),
        ({}, "missing input 'x'"),
        ({"x": np.zeros((4, 63), "float32")}, "wrong shape"),
        ({"x": np.zeros((4, 64), "float64")}, "wrong dtype"),
    ],
)
def test_wrong_arrays(fails, tiny_artifact, tmp_path, given, said):
    np.savez(tmp_path / "x.npz", **given)
    assert said in fails(2, *run_line(tiny_artifact.path, "x.npz"))


def test_files_that_are_no_arrays(fails, tiny_artifact, tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    for name in ("text.npz", "empty.npz", "pickled.npz"):
        assert f"{name}: not a readable .npz" in fails(2, *run_line(tiny_artifact.path, name))
    assert "without a name" in fails(2, *run_line(tiny_artifact.path, "one.npy"))
    assert "gone.npz: no such file" in fails(2, *run_line(tiny_artifact.path, "gone.npz"))


def test_arrays_that_cannot_be_decoded(fails, tiny_artifact, tmp_path):
    np.savez_compressed(tmp_path / "z.npz", x=np.arange(256, dtype="float32").reshape(4, 64))
    whole = (tmp_path / "z.npz").read_bytes()
    start = whole.index(b"x.npy") + len(b"x.npy")
    (tmp_path / "data.npz").write_bytes(whole[: start + 40] + b"\xff" * 60 + whole[start + 100 :])
    method = bytearray(whole)
    for at in (whole.index(b"PK\3\4") + 8, whole.index(b"PK\1\2") + 10):
        method[at] = 99  # a compression method that is none
    (tmp_path / "method.npz").write_bytes(method)
    for name in ("data.npz", "method.npz"):
        assert f"{name}: not a readable .npz" in fails(2, *run_line(tiny_artifact.path, name))


def test_an_array_of_more_bytes_than_there_is_memory(fails, tiny_artifact, tmp_path):
    header = io.BytesIO()
    claims = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 3)}
    np.lib.format.write_array_header_1_0(header, claims)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as file:
        file.writestr("x.npy", header.getvalue())
    line = fails(2, *run_line(tiny_artifact.path, "huge.npz"))
    assert "huge.npz: its arrays do not fit into memory" in line


def test_an_output_that_cannot_be_written(fails, tiny_artifact, arrays, tmp_path):
    assert "no such directory" in fails(2, *run_line(tiny_artifact.path, arrays, "no/y.npz"))
    assert "is a directory" in fails(2, *run_line(tiny_artifact.path, arrays, "."))
    assert "No space left" in fails(2, *run_line(tiny_artifact.path, arrays, "/dev/full"))


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UnsupportedModel("two operators\nand more"), 3, "two operators and more"),
        (ScheduleError("no kernel"), 4, "no kernel"),
        (KeyError("x"), 4, "this is a bug in Kerf: KeyError: 'x'"),
        (RuntimeError("line one\nline two"), 4, "line one line two (--debug shows where)"),
        (RecursionError(), 4, "this is a bug in Kerf: RecursionError"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (MemoryError(), 2, "out of memory"),
    ],
)
def test_every_kind_of_failure_is_one_line(fails, monkeypatch, error, code, said):
    def fail():
        raise error

    monkeypatch.setitem(main.commands, "fail", click.Command("fail", callback=fail))
    assert said in fails(code, "fail")


def test_ctrl_c_inside_a_callback_of_tvm_is_no_bug(fails, monkeypatch):
    """TVM turns the interrupt into an empty RuntimeError."""
    import tvm_ffi

    def interrupt_self():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    build = click.Command("build", callback=lambda: tvm_ffi.convert(interrupt_self)())
    monkeypatch.setitem(main.commands, "build", build)
    before = signal.getsignal(signal.SIGINT)
    assert fails(130, "build") == "compile-model: interrupted; nothing half-written"
    assert signal.getsignal(signal.SIGINT) is before


def test_debug_shows_the_traceback(monkeypatch):
    def fail():
        raise RuntimeError("deep down")

    monkeypatch.setitem(main.commands, "fail", click.Command("fail", callback=fail))
    for arguments in (["--debug", "fail"], ["fail", "--debug"]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 4
        assert "Traceback" in result.stderr and "in fail" in result.stderr


@pytest.mark.parametrize("phase", ["importing", "compiling", "writing"])
def test_ctrl_c_in_any_phase(small_onnx, tmp_path, phase):
    line = [sys.executable, "-m", "compiler.cli", "build", str(small_onnx), "-o", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    reached = any(phase in said for said in process.stderr)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    code = process.wait(timeout=60)
    assert reached, rest
    # .ses is a mark that ONNX Runtime, which computes the reference, leaves in TMPDIR.
    left = [p.name for p in tmp_path.iterdir() if p.name != ".ses"]
    if code == 0:  # it was faster than the signal: then the artifact is whole
        assert left == ["out"]
        return
    assert code == 130, rest
    assert rest.splitlines()[-1] == "compile-model: interrupted; nothing half-written"
    assert left == []


def test_ctrl_c_while_python_starts(small_onnx, tmp_path):
    line = [sys.executable, "-m", "compiler.cli", "build", str(small_onnx), "-o", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # A shell's background jobs ignore Ctrl-C, and so would what this test starts in one.
    process = subprocess.Popen(
        line, stderr=subprocess.DEVNULL, cwd=tmp_path, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert not list(tmp_path.iterdir())
