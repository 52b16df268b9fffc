# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile

import numpy as np
import pytest

from compiler import artifact_writer, linker
from compiler.arrays import ALIGNMENT
from compiler.artifact import (
    MANIFEST,
    MANIFEST_SUM,
    REFERENCE,
    WEIGHTS,
    ReferenceRun,
    open_artifact,
    read_constants,
    read_references,
    read_tensors,
)
from compiler.artifact_writer import check_output, update_manifest
from schedules.errors import ArtifactError, UserError


@pytest.fixture
def copied(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact.path, tmp_path / "copy")


def rewrite_manifest(path, change):
    """Change the manifest as an attacker would: with a matching sum."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    text = json.dumps(manifest)
    (path / MANIFEST).write_text(text)
    (path / MANIFEST_SUM).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}\n")


def test_what_is_written_is_what_is_read(tiny_artifact, tiny):
    read = open_artifact(tiny_artifact.path)
    assert read.inputs == tiny.inputs and read.outputs == tiny.outputs
    assert read.target == tiny.target
    assert [k.layers for k in read.variant("dense").kernels] == [["fc1"], ["fc2"]]
    weights = read_constants(read, list(read.variants.values()), np.copy)
    for variant in tiny.variants:
        for key, constant in zip(read.variant(variant.name).constants, variant.constants):
            np.testing.assert_array_equal(weights[key], constant)


def test_whoever_may_read_one_file_may_read_all(tiny_artifact):
    readable = {p.name: oct(p.stat().st_mode & 0o444) for p in tiny_artifact.path.iterdir()}
    assert len(set(readable.values())) == 1, readable


def test_constants_of_both_variants_are_stored_once(tiny_artifact):
    dense, compressed = (tiny_artifact.variant(n).constants for n in ("dense", "compressed"))
    assert dense[1] == compressed[1] and dense[0] != compressed[0]
    stored = {name.partition(".")[0] for name in read_tensors(tiny_artifact.path / WEIGHTS)}
    assert stored == {*dense, *compressed} and len(stored) == 3


def test_equal_bytes_of_another_shape_or_type_are_not_the_same_constant():
    a = np.zeros((2, 3), "float32")
    keys = {artifact_writer._content_key(b) for b in (a, a.T, a.view("int32"), a.copy())}
    assert len(keys) == 3


def test_sizes_per_variant_count_the_index(tiny, write_tiny, tmp_path):
    dense = tiny.variants[0]
    indices = np.arange(10, dtype="uint16")
    fake = dataclasses.replace(
        dense,
        name="compressed",
        constants=[*dense.constants, indices],
        constant_names=[*dense.constant_names, "fc2/1"],
        index=[*dense.index, True],
    )
    written = write_tiny(tmp_path / "out", [dense, fake])
    sizes = written.variant("compressed").bytes
    assert sizes["index"] == 20 and written.variant("dense").bytes["index"] == 0
    assert sizes["weights"] == 20 + sum(c.nbytes for c in dense.constants)
    assert sizes["total"] == sizes["weights"] + (written.path / "compressed.so").stat().st_size


def test_nothing_is_written_elsewhere(write_tiny, tmp_path, monkeypatch):
    """LLVM ends the process where a disk is full, and only the output's room is checked."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    written = write_tiny(tmp_path / "out")
    assert {p.name for p in written.path.iterdir()} == {
        *written.manifest["files"],
        MANIFEST,
        MANIFEST_SUM,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_dense_build_has_one_variant_that_both_names_give(tiny, write_tiny, tmp_path):
    written = write_tiny(tmp_path / "out", tiny.variants[:1])
    assert open_artifact(written.path).variant("compressed").name == "dense"
    assert not (written.path / "compressed.so").exists()


def test_references_round_trip(write_tiny, tmp_path, rng):
    run = ReferenceRun([rng.standard_normal((4, 64))], [rng.standard_normal((4, 16))])
    written = write_tiny(tmp_path / "out", references=[run, run])
    found = read_references(open_artifact(written.path))
    assert len(found) == 2
    np.testing.assert_array_equal(found[1].outputs[0], run.outputs[0])


def test_update_manifest_replaces_a_section(copied):
    update_manifest(open_artifact(copied), verify={"max_abs": 0.5})
    assert open_artifact(copied).manifest["verify"] == {"max_abs": 0.5}


@pytest.mark.parametrize("name", ["dense.so", WEIGHTS, MANIFEST, MANIFEST_SUM])
@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_any_changed_byte_is_found(copied, name, where):
    file = copied / name
    data = bytearray(file.read_bytes())
    data[{"start": 0, "middle": len(data) // 2, "end": -1}[where]] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"was changed since it was built"):
        open_artifact(copied)


@pytest.mark.parametrize("name", ["dense.so", WEIGHTS, MANIFEST, MANIFEST_SUM])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        open_artifact(copied)


def test_a_truncated_file_is_found_by_its_size(copied):
    with (copied / WEIGHTS).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match=r"wrong size.*found 100 bytes"):
        open_artifact(copied)


def test_not_an_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="no such directory"):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="missing"):
        open_artifact(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".hidden", "", ".."])
def test_no_name_leaves_the_directory(copied, name):
    def change(manifest):
        manifest["variants"]["dense"]["library"] = name
        manifest["files"][name] = manifest["files"]["dense.so"]

    rewrite_manifest(copied, change)
    with pytest.raises(ArtifactError, match=r"impossible file|is malformed"):
        open_artifact(copied)


def test_a_library_that_no_hash_covers_is_refused(copied):
    rewrite_manifest(copied, lambda m: m["files"].pop("dense.so"))
    with pytest.raises(ArtifactError, match=r"does not list dense\.so"):
        open_artifact(copied)


def test_a_symbolic_link_is_refused(copied, tmp_path):
    shutil.move(copied / "dense.so", tmp_path / "elsewhere.so")
    (copied / "dense.so").symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(ArtifactError, match="not a regular file"):
        open_artifact(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("variants"),
        lambda m: m["variants"].clear(),
        lambda m: m["variants"]["dense"].update(kernels=[{"function": "f"}]),
        lambda m: m["target"].update(speed=1),
        lambda m: m.update(inputs=[{"name": "x"}]),
        lambda m: m.update(files=[]),
        lambda m: m.update(aliases={"compressed": "../x"}),
    ],
)
def test_a_malformed_manifest_is_one_clear_error(copied, change):
    rewrite_manifest(copied, change)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_artifact(copied)


def test_inputs_of_older_artifacts_are_aligned(copied):
    rewrite_manifest(copied, lambda m: [v.pop("input_alignment") for v in m["variants"].values()])
    assert {v.input_alignment for v in open_artifact(copied).variants.values()} == {ALIGNMENT}


def test_another_format_version_is_refused(copied):
    rewrite_manifest(copied, lambda m: m.update(format_version=99))
    with pytest.raises(ArtifactError, match="found 99; wanted 1"):
        open_artifact(copied)


def test_garbage_weights_are_an_artifact_error(tmp_path):
    for i, data in enumerate([b"", b"\xff" * 64, (1 << 60).to_bytes(8, "little") + b"{}"]):
        file = tmp_path / f"{i}.safetensors"
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match="not a readable safetensors file"):
            read_tensors(file)


def test_absent_cpu_features_are_named(tiny, write_tiny, tmp_path):
    target = dataclasses.replace(tiny.target, features=(*tiny.target.features, "sve"))
    written = write_tiny(tmp_path / "out", target=target)
    with pytest.raises(ArtifactError, match="features this machine lacks: sve"):
        open_artifact(written.path).check_host()


def test_an_unknown_variant_is_a_user_error(tiny_artifact):
    with pytest.raises(UserError, match="wanted dense, compressed"):
        tiny_artifact.variant("binary")


# ---- where it is written


def leftovers(path):
    return [p.name for p in path.iterdir()]


def test_an_existing_output_needs_force(write_tiny, tmp_path, tiny):
    first = write_tiny(tmp_path / "out")
    with pytest.raises(UserError, match="--force"):
        write_tiny(tmp_path / "out")
    write_tiny(tmp_path / "out", tiny.variants[:1], force=True)
    assert "compressed" not in open_artifact(first.path).variants
    assert leftovers(tmp_path) == ["out"]


def test_force_does_not_replace_what_is_not_an_artifact(write_tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not an artifact"):
        write_tiny(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_an_empty_directory_may_be_used(write_tiny, tmp_path):
    (tmp_path / "out").mkdir()
    assert open_artifact(write_tiny(tmp_path / "out").path)


def test_impossible_outputs_are_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for path, what in (("file", "not a directory"), ("a/b", "does not exist")):
        with pytest.raises(UserError, match=what):
            check_output(tmp_path / path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_directory_is_refused_at_once(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="not writable"):
        check_output(tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(errno.ENOSPC, "No space left on device"), UserError), (KeyboardInterrupt(), None)],
)
@pytest.mark.parametrize(
    "step", ["_save_tensors", "_export", "_write_manifest", "_move_into_place"]
)
def test_a_failure_at_any_step_leaves_the_old_artifact_and_nothing_else(
    write_tiny, tmp_path, monkeypatch, step, error, raised
):
    write_tiny(tmp_path / "out")
    before = (tmp_path / "out" / MANIFEST).read_text()

    def fail(*_args, **_more):
        raise error

    monkeypatch.setattr(artifact_writer, step, fail)
    with pytest.raises(raised or KeyboardInterrupt):
        write_tiny(tmp_path / "out", force=True)
    assert leftovers(tmp_path) == ["out"]
    assert (tmp_path / "out" / MANIFEST).read_text() == before


def test_a_full_disk_is_one_clear_error(write_tiny, tmp_path, monkeypatch):
    from safetensors import SafetensorError, numpy

    def full(*_args):
        raise SafetensorError("IoError(Os { code: 28 }) No space left on device (os error 28)")

    monkeypatch.setattr(numpy, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*Free some space"):
        write_tiny(tmp_path / "out")
    assert leftovers(tmp_path) == []


# ---- the linker


def test_no_linker_is_one_clear_error_before_anything_is_written(write_tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no C\+\+ compiler.*ziglang"):
        write_tiny(tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_ziglang_serves_where_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda name: object())
    assert linker.require_linker().command[1:] == ("-m", "ziglang", "c++")


def test_the_environment_chooses_the_linker(monkeypatch):
    monkeypatch.setenv("CXX", "sh -c")
    assert linker.find_linker().command[1:] == ("-c",)


def test_a_linker_that_fails_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="linking the library failed"):
        linker.Linker("false", ("false",))(str(tmp_path / "x.so"), [])


def test_another_architecture_gets_an_archive_and_needs_no_linker(
    tiny, write_tiny, tmp_path, monkeypatch
):
    from schedules.target import NAMED, detect_host

    other = NAMED["aarch64" if detect_host().arch == "x86_64" else "avx2"]
    monkeypatch.setattr(artifact_writer, "require_linker", lambda: pytest.fail("not needed"))
    written = write_tiny(tmp_path / "out", tiny.variants[:1], target=other)
    assert written.variant("dense").library == "dense.tar"
    assert open_artifact(written.path).variant("dense").library == "dense.tar"
    assert REFERENCE not in written.manifest["files"]


def test_too_little_space_is_found_before_anything_is_written(write_tiny, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(1 << 30, 1 << 30, 1 << 20))
    with pytest.raises(UserError, match=r"not enough space.*found 1 MiB free"):
        write_tiny(tmp_path / "out")
    assert not list(tmp_path.iterdir())
