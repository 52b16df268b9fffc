# SPDX-License-Identifier: Apache-2.0
"""Write an artifact: either the whole directory appears or nothing does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.artifact import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MANIFEST_SUM,
    REFERENCE,
    VARIANTS,
    WEIGHTS,
    Artifact,
    CompiledVariant,
    ReferenceRun,
    parse_manifest,
    sha256_of,
)
from compiler.disk import CODE_BYTES, check_space
from compiler.environment import versions
from compiler.frontend import TensorSpec
from compiler.linker import Archiver, Linker, require_linker
from compiler.storage import Stored, store
from schedules.errors import UserError
from schedules.target import CpuTarget, detect_host

if TYPE_CHECKING:
    import numpy as np

    from schedules.preparation import Source


def check_output(path: str | Path, force: bool = False) -> Path:
    """That an artifact may be written at `path`; call it before any long work. Raises UserError."""
    path = Path(os.path.abspath(path))
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError("exists and is not a directory", where=str(path), todo="Give another -o")
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise UserError(
                "exists already", where=str(path), todo="Give --force to replace it, or another -o"
            )
        if not (path / MANIFEST).is_file():
            raise UserError(
                "holds something that is not an artifact, and is not replaced",
                where=str(path),
                todo="Give another -o",
            )
    parent = path.parent
    if not parent.is_dir():
        raise UserError(
            "the directory to write into does not exist",
            where=str(parent),
            todo=f"mkdir -p {parent}",
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError("the directory is not writable", where=str(parent))
    check_space(path.parent, CODE_BYTES)  # how much the weights will take is not known yet
    return path


def write_artifact(
    output: str | Path,
    variants: Sequence[CompiledVariant],
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    target: CpuTarget,
    recipe: Mapping,
    layers: Sequence[Mapping] = (),
    verification: Mapping | None = None,
    source: Mapping | None = None,
    references: Sequence[ReferenceRun] = (),
    accuracy: Mapping | None = None,
    force: bool = False,
) -> Artifact:
    """Write `variants` ("dense", and "compressed" if anything was compressed) and return the
    artifact.

    Either the whole directory appears at `output` or nothing does; with `force` an older artifact
    stays in place until the new one is complete. `recipe`, `layers`, `verification`, `source` and
    `accuracy` go into the manifest as they are. Raises UserError for an output that cannot be written.
    """
    names = [v.name for v in variants]
    if not names or len(set(names)) != len(names) or any(n not in VARIANTS for n in names):
        raise ValueError(f"variants must be some of {VARIANTS}, each once: {names}")
    path = check_output(output, force)
    cross = target.arch != detect_host().arch
    linker = Archiver(str(target.tvm().attrs["mtriple"])) if cross else require_linker()
    keys, stored = _stored_constants(variants)
    check_space(path.parent, sum(s.nbytes for s in stored.values()) + CODE_BYTES * len(variants))
    with _written_beside(path, force) as work:
        tensors = {k + suffix: a for k, s in stored.items() for suffix, a in s.tensors.items()}
        _save_tensors(work / WEIGHTS, tensors)
        if references:
            _write_reference(work / REFERENCE, references)
        described = {}
        for variant in variants:
            library = f"{variant.name}.{'tar' if cross else 'so'}"
            _export(variant, work / library, linker)
            described[variant.name] = _describe(variant, library, keys[variant.name], stored, work)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "versions": versions(),
            "source": _describe_source(source or {}),
            "recipe": recipe,
            "target": target.to_json(),
            "linker": linker.name,
            "inputs": [asdict(s) for s in inputs],
            "outputs": [asdict(s) for s in outputs],
            "variants": described,
            "stored": {k: form for k, s in stored.items() if (form := s.form.to_json())},
            "aliases": {
                name: names[0] for name in VARIANTS if len(names) == 1 and name not in names
            },
            "layers": [dict(row) for row in layers],
            "verify": dict(verification or {}),
            "accuracy": dict(accuracy) if accuracy else None,
            "files": {p.name: _file_entry(p) for p in sorted(work.iterdir())},
        }
        _write_manifest(work, manifest)
    return parse_manifest(path, manifest)


def update_manifest(artifact: Artifact, **sections) -> Artifact:
    """Replace top-level sections of the manifest ("verify", "layers") in place, atomically."""
    manifest = {**artifact.manifest, **sections}
    try:
        _write_manifest(artifact.path, manifest)
    except OSError as error:
        raise _output_error(artifact.path, error) from None
    return parse_manifest(artifact.path, manifest)


@contextmanager
def _written_beside(path: Path, force: bool) -> Iterator[Path]:
    """A directory that becomes `path` when the block ends, and vanishes if it does not end well."""
    work = path.parent / f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"
    try:
        work.mkdir()
        yield work
        for entry in work.iterdir():
            _sync(entry)
        _sync(work)
        _move_into_place(work, path)
        _sync(path.parent)
    except OSError as error:
        raise _output_error(path, error) from None
    finally:  # also for KeyboardInterrupt
        shutil.rmtree(work, ignore_errors=True)


def _move_into_place(work: Path, path: Path) -> None:
    if not path.exists():
        work.rename(path)
        return
    old = work.with_suffix(".old")
    path.rename(old)
    try:
        work.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _output_error(path: Path, error: OSError) -> UserError:
    todo = "Free some space" if error.errno == 28 else ""
    return UserError(f"cannot be written: {error.strerror or error}", where=str(path), todo=todo)


def _content_key(array: np.ndarray, source: Source | None = None) -> str:
    """A name for an array by type, shape and bytes, of it or of its source: equal arrays of all
    variants share one entry."""
    import numpy as np

    made = (source.preparation, dict(source.parameters)) if source is not None else ""
    array = array if source is None else source.array
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}{made}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def _stored_constants(
    variants: Sequence[CompiledVariant],
) -> tuple[dict[str, list[str]], dict[str, Stored]]:
    """Each variant's keys in order, and how the constant behind each key is stored: equal ones stand once."""
    keys: dict[str, list[str]] = {}
    stored: dict[str, Stored] = {}
    for variant in variants:
        keys[variant.name] = [_content_key(*made) for made in variant.made_of]
        for key, made in zip(keys[variant.name], variant.made_of):
            if key not in stored:
                stored[key] = store(*made)
    return keys, stored


def _save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        # Not ascontiguousarray, which makes a row of a scalar.
        save_file({k: np.asarray(v, order="C") for k, v in tensors.items()}, path)
    except SafetensorError as error:  # its I/O errors come wrapped
        match = re.search(r"os error (\d+)", str(error))
        raise OSError(int(match[1]) if match else 5, str(error)) from None
    # safetensors makes files that only their owner may read; the others follow the umask.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _write_reference(path: Path, references: Sequence[ReferenceRun]) -> None:
    tensors = {}
    for i, run in enumerate(references):
        tensors |= {f"{i}.input.{j}": a for j, a in enumerate(run.inputs)}
        tensors |= {f"{i}.output.{j}": a for j, a in enumerate(run.outputs)}
        for kind, by_variant in (("exact", run.exact), ("float32", run.float32)):
            for name, arrays in by_variant.items():
                tensors |= {f"{i}.{kind}.{name}.{j}": a for j, a in enumerate(arrays)}
    _save_tensors(path, tensors)


def _export(variant: CompiledVariant, path: Path, linker: Linker | Archiver) -> None:
    """Write the variant's library: linked, or as an archive of objects for another architecture.

    Objects lie beside it meanwhile: LLVM ends the process on a full disk, and only this one's room is known.
    """
    objects = path.with_name(f".{path.name}.objects")
    objects.mkdir()
    variant.executable.export_library(str(path), workspace_dir=str(objects), fcompile=linker)
    shutil.rmtree(objects)


def _describe(
    variant: CompiledVariant,
    library: str,
    keys: list[str],
    stored: Mapping[str, Stored],
    work: Path,
) -> dict:
    sizes = {key: stored[key].nbytes for key in keys}
    places = {
        key: sizes[key] if is_index else stored[key].mask_bytes
        for key, is_index in zip(keys, variant.index)
    }
    code, weights = (work / library).stat().st_size, sum(sizes.values())
    return {
        "library": library,
        "constants": keys,
        "constant_names": list(variant.constant_names),
        "constant_bytes": [a.nbytes for a in variant.constants],
        "stored_bytes": [sizes[key] for key in keys],
        "index_bytes": [places[key] for key in keys],
        "kernels": [asdict(k) for k in variant.kernels],
        "input_alignment": variant.input_alignment,
        "bytes": {
            "library": code,
            "weights": weights,
            "index": sum(places.values()),
            "total": code + weights,
            "with_zeros": code + sum(stored[key].bytes_with_zeros for key in sizes),
        },
    }


def _file_entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _describe_source(source: Mapping) -> dict:
    """`source`, and the sha256 of the file it names."""
    path = source.get("path")
    if not path or not Path(path).is_file():
        return dict(source)
    return {**source, "path": os.path.abspath(path), "sha256": sha256_of(Path(path))}


def _write_manifest(directory: Path, manifest: Mapping) -> None:
    text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False, default=_plain) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    for name, content in ((MANIFEST, text), (MANIFEST_SUM, f"{digest}  {MANIFEST}\n")):
        part = directory / f".{name}.partial"
        part.write_text(content)
        _sync(part)
        part.rename(directory / name)


def _plain(value):
    """Numpy scalars and mappings that are not dicts, for the JSON encoder."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot go into a manifest")
