# SPDX-License-Identifier: Apache-2.0
"""A built model on disk: libraries, weights, manifest, checked byte for byte when read.

    OUT/manifest.json          what was built, for what, how it was proven; every file's sha256
    OUT/manifest.sha256        of manifest.json, in sha256sum's format
    OUT/dense.so               one library of kernels per variant
    OUT/compressed.so          (a .tar of objects when cross-compiled)
    OUT/weights.safetensors    constants of all variants, each distinct one once (see `storage`)
    OUT/reference.safetensors  inputs and the original model's outputs for them (optional)

Nothing is unpickled and no name in the manifest can leave the directory. The hashes find damage,
not malice: a library is machine code, so open only artifacts whose origin you trust.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.arrays import ALIGNMENT
from compiler.frontend import TensorSpec
from compiler.storage import StoredForm, restore
from schedules.errors import ArtifactError, UserError
from schedules.target import CpuTarget, detect_host

if TYPE_CHECKING:
    import numpy as np

    from schedules.preparation import Source

FORMAT = "kerf-artifact"
FORMAT_VERSION = 3
# Constants of the first are stored as they are, those of the second never deflated.
_READABLE = (1, 2, 3)
MANIFEST = "manifest.json"
MANIFEST_SUM = "manifest.sha256"
WEIGHTS = "weights.safetensors"
REFERENCE = "reference.safetensors"
VARIANTS = ("dense", "compressed")
_MAX_MANIFEST_BYTES = 256 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,100}")
_REBUILD = "Build it again with compile-model build"


@dataclass(frozen=True)
class KernelCall:
    """One kernel call of a variant, in call order: `layers` are those whose weights it reads
    (none for a glue kernel), `flops` the dense operations of those layers, `bytes` what it reads
    and writes at least; `serves`, of a glue kernel, the layers for which alone it computes."""

    function: str
    layers: list[str]
    loops: str
    point: dict
    flops: int
    bytes: int
    serves: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CompiledVariant:
    """A compiled variant in memory: the VM entry is `main(*inputs, constants)`, the constants in
    one tuple.

    `index` tells which constants say where values are rather than what they are: the overhead of a
    sparse format. `sources` has what some constants are made of, None for the others; it may be
    left empty. `unscheduled` holds the fused PrimFuncs before scheduling, by the functions'
    names; what the kernels must compute. Inputs begin at multiples of `input_alignment` bytes and of
    their elements' size.
    """

    name: str
    executable: Any
    constants: Sequence[np.ndarray]
    constant_names: Sequence[str]
    index: Sequence[bool]
    kernels: Sequence[KernelCall]
    unscheduled: Any = None
    sources: Sequence[Source | None] = ()
    input_alignment: int = ALIGNMENT

    @property
    def made_of(self) -> list[tuple[np.ndarray, Source | None]]:
        """Each constant with its source."""
        return list(zip(self.constants, self.sources or [None] * len(self.constants)))


@dataclass(frozen=True)
class ReferenceRun:
    """Inputs, what the original framework computed for them, and what each variant's graph gives in
    float64 (`exact`) and plain float32, by variant; all in the model's order."""

    inputs: Sequence[np.ndarray]
    outputs: Sequence[np.ndarray]
    exact: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    float32: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class VariantInfo:
    """A variant as the manifest describes it; `constants` are keys of the weights file in the
    tuple's order, `constant_bytes` their sizes in memory, `stored_bytes` in the file, and
    `index_bytes` those of the latter that say where values are; `input_alignment` as of
    `CompiledVariant`, which older artifacts do not name."""

    name: str
    library: str
    constants: tuple[str, ...]
    constant_names: tuple[str, ...]
    constant_bytes: tuple[int, ...]
    stored_bytes: tuple[int, ...]
    index_bytes: tuple[int, ...]
    kernels: tuple[KernelCall, ...]
    bytes: Mapping[str, int]
    input_alignment: int = ALIGNMENT


@dataclass(frozen=True)
class Artifact:
    """An artifact whose files were found as its manifest says. `manifest` is the JSON as it
    stands, `stored` the forms of those constants that are not stored as they are."""

    path: Path
    manifest: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    target: CpuTarget
    variants: Mapping[str, VariantInfo]
    aliases: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, StoredForm] = field(default_factory=dict)

    @property
    def layers(self) -> list[dict]:
        return list(self.manifest.get("layers", []))

    def variant(self, name: str) -> VariantInfo:
        """By name; a dense build has one variant, which both names give."""
        found = self.variants.get(self.aliases.get(name, name))
        if found is None:
            known = ", ".join([*self.variants, *self.aliases])
            raise UserError("unknown variant", where=str(self.path), found=repr(name), wanted=known)
        return found

    def check_host(self) -> None:
        """Raise ArtifactError unless this CPU has what the artifact was built for."""
        missing = self.target.missing_on_host()
        if missing:
            host = detect_host()
            raise ArtifactError(
                f"built for CPU features this machine lacks: {', '.join(missing)}",
                where=str(self.path),
                found=f"{host.arch} with {', '.join(host.features) or 'no known features'}",
                wanted=", ".join(self.target.features) or self.target.arch,
                todo="Build with --target native on this machine",
            )


def open_artifact(path: str | Path) -> Artifact:
    """Read and check an artifact: format, names, sizes and sha256 of every file. Raises
    ArtifactError.

    Whether this CPU can run it is `Artifact.check_host`'s question, so that any machine can
    report on it.
    """
    path = Path(path)
    if not path.is_dir():
        raise ArtifactError(
            "no such directory", where=str(path), wanted="the directory given to build -o"
        )
    manifest = _read_manifest(path)
    artifact = parse_manifest(path, manifest)
    files = _field(path, manifest, "files", dict)
    needed = {v.library for v in artifact.variants.values()} | {WEIGHTS}
    if lost := sorted(needed - set(files)):
        raise _damaged(path / MANIFEST, f"does not list {lost[0]}")
    for name, entry in files.items():
        _check_file(path, name, entry)
    return artifact


def _read_manifest(path: Path) -> dict:
    file, sums = path / MANIFEST, path / MANIFEST_SUM
    try:
        if file.stat().st_size > _MAX_MANIFEST_BYTES:
            raise _damaged(file, "is too large to be a manifest")
        text, wanted = file.read_bytes(), sums.read_text(errors="replace")
    except FileNotFoundError as error:
        raise ArtifactError(
            "missing", where=error.filename, wanted="an artifact directory", todo=_REBUILD
        ) from None
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}", where=str(file)) from None
    found = f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n"
    if found != wanted:
        raise ArtifactError(
            "was changed since it was built",
            where=str(file),
            found=f"sha256 beginning {found[:12]}",
            wanted=wanted[:12],
            todo=_REBUILD,
        )
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(file, "is not a Kerf manifest")
    version = manifest.get("format_version")
    if version not in _READABLE:
        raise ArtifactError(
            "another format version",
            where=str(file),
            found=repr(version),
            wanted=" or ".join(map(str, _READABLE)),
            todo=_REBUILD,
        )
    return manifest


def _damaged(where: Path, what: str) -> ArtifactError:
    return ArtifactError(what, where=str(where), todo=_REBUILD)


def _field(path: Path, mapping: Mapping, key: str, kind: type):
    value = mapping.get(key)
    if not isinstance(value, kind):
        raise _damaged(path / MANIFEST, f"has no proper {key!r}")
    return value


def _check_file(path: Path, name: str, entry: object) -> None:
    if not _FILE_NAME.fullmatch(name) or not isinstance(entry, dict):
        raise _damaged(path / MANIFEST, f"lists an impossible file {name!r}")
    file = path / name
    if file.is_symlink() or not file.is_file():
        raise ArtifactError("missing or not a regular file", where=str(file), todo=_REBUILD)
    size, wanted = file.stat().st_size, entry.get("bytes")
    if size != wanted:
        raise ArtifactError(
            "has the wrong size",
            where=str(file),
            found=f"{size} bytes",
            wanted=f"{wanted}",
            todo=_REBUILD,
        )
    found, wanted = sha256_of(file), str(entry.get("sha256"))
    if found != wanted:
        raise ArtifactError(
            "was changed since it was built",
            where=str(file),
            found=f"sha256 beginning {found[:12]}",
            wanted=wanted[:12],
            todo=_REBUILD,
        )


def parse_manifest(path: Path, manifest: Mapping) -> Artifact:
    try:
        variants = {
            name: VariantInfo(
                name=name,
                library=_library_name(v["library"]),
                constants=tuple(map(str, v["constants"])),
                constant_names=tuple(map(str, v["constant_names"])),
                constant_bytes=tuple(map(int, v["constant_bytes"])),
                **_stored_bytes(v),
                kernels=tuple(KernelCall(**k) for k in v["kernels"]),
                bytes=dict(v["bytes"]),
                input_alignment=int(v.get("input_alignment", ALIGNMENT)),
            )
            for name, v in manifest["variants"].items()
        }
        aliases = {str(k): str(v) for k, v in manifest["aliases"].items()}
        if not variants or any(
            name not in VARIANTS for name in (*variants, *aliases, *aliases.values())
        ):
            raise ValueError("variants")
        target = {**manifest["target"], "features": tuple(manifest["target"]["features"])}
        return Artifact(
            path,
            manifest,
            _specs(manifest["inputs"]),
            _specs(manifest["outputs"]),
            CpuTarget(**target),
            variants,
            aliases,
            {str(k): StoredForm.parse(v) for k, v in manifest.get("stored", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path / MANIFEST, f"is malformed ({type(error).__name__}: {error})") from None


def _stored_bytes(variant: Mapping) -> dict[str, tuple[int, ...]]:
    if "index" in variant:  # of the first format, where every constant is stored as it is
        sizes = tuple(map(int, variant["constant_bytes"]))
        places = tuple(size if index else 0 for size, index in zip(sizes, variant["index"]))
        return {"stored_bytes": sizes, "index_bytes": places}
    return {key: tuple(map(int, variant[key])) for key in ("stored_bytes", "index_bytes")}


def _library_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"impossible file name {name!r}")
    return name


def _specs(entries: Sequence[Mapping]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(str(e["name"]), tuple(int(d) for d in e["shape"]), str(e["dtype"]))
        for e in entries
    )


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file. Raises ArtifactError for a malformed file."""
    with _opened(path) as (names, read):
        return {name: read(name) for name in names}


def read_constants(
    artifact: Artifact, infos: Sequence[VariantInfo], convert: Callable[[np.ndarray], Any]
) -> dict[str, Any]:
    """`convert` of every constant of these variants, by key, made from what is stored one after another.

    Raises ArtifactError for a malformed file or a missing constant.
    """
    path = artifact.path / WEIGHTS
    sizes = {key: size for i in infos for key, size in zip(i.constants, i.constant_bytes)}
    found: dict[str, Any] = {}
    with _opened(path) as (_, read):
        for key, size in sizes.items():
            form = artifact.stored.get(key, StoredForm())
            try:
                array = restore(form, lambda suffix, key=key: read(key + suffix), size)
            except ValueError as error:
                raise _damaged(path, f"holds no proper constant {key}: {error}") from None
            if array.nbytes != size:
                raise _damaged(path, f"has {array.nbytes} bytes of constant {key}, not {size}")
            found[key] = convert(array)
    return found


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Callable[[str], np.ndarray]]]:
    """The names of the tensors of a safetensors file, and a function that reads one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            present = set(names)

            def read(name: str) -> np.ndarray:
                if name not in present:
                    raise _damaged(path, f"lacks the tensor {name}")
                return file.get_tensor(name)

            yield names, read
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"is not a readable safetensors file: {error}") from None


def read_references(artifact: Artifact) -> list[ReferenceRun]:
    """The inputs and original outputs stored at build time; empty if there are none."""
    if REFERENCE not in artifact.manifest["files"]:
        return []
    tensors = read_tensors(artifact.path / REFERENCE)
    inputs, outputs = range(len(artifact.inputs)), range(len(artifact.outputs))
    runs = []
    while f"{len(runs)}.output.0" in tensors:
        i = len(runs)
        names = [v for v in artifact.variants if f"{i}.exact.{v}.0" in tensors]
        try:
            runs.append(
                ReferenceRun(
                    [tensors[f"{i}.input.{j}"] for j in inputs],
                    [tensors[f"{i}.output.{j}"] for j in outputs],
                    {v: [tensors[f"{i}.exact.{v}.{j}"] for j in outputs] for v in names},
                    {v: [tensors[f"{i}.float32.{v}.{j}"] for j in outputs] for v in names},
                )
            )
        except KeyError as error:
            raise _damaged(artifact.path / REFERENCE, f"lacks {error}") from None
    return runs


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
