# SPDX-License-Identifier: Apache-2.0
"""Calibration data: samples of a model's inputs, streamed from where the user keeps them.

`.npz`: one array per input by name (or a single array for a model with one input), samples along the first axis.
Directory: `.npy` files (models with one input) or `.npz` files, in the order of their names, each as above; or images
(PNG, JPEG), prepared as `preprocess` says (see `compiler.images`).
`random`: standard normal values, only where the user asks for them.
Iterable: each item one sample, an array, a sequence of arrays in the inputs' order, or arrays by name. A generator is
kept in memory, since families go through the samples more than once; anything else is gone through again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compiler.arrays import read_npz
from compiler.images import SUFFIXES, Preprocessing, read_image
from schedules.errors import UserError

RANDOM = "random"
LABELS = "labels"  # of evaluation data, in the same file
_RANDOM_SAMPLES = 8

Sample = Sequence[np.ndarray]


@dataclass(frozen=True)
class Calibration:
    """Samples to go through as often as needed, each with one array per input of the shape the model takes.

    `description` says where they come from, for the artifact; its `warning`, if any, is for the user.
    """

    samples: Callable[[], Iterator[Sample]]
    description: Mapping[str, object] = field(default_factory=dict)


def load_calibration(
    source,
    specs: Sequence,
    preprocess: str | None = None,
    ranges: Mapping[str, int] | None = None,
) -> Calibration:
    """Calibration data for inputs `specs` (name, shape, dtype). Raises UserError for what cannot be used.

    Indices are below `ranges[name]`, if given (see `compiler.samples`).
    """
    found = _load(source, specs, preprocess, ranges)
    for i, sample in enumerate(found.samples() if ranges else ()):
        for spec, array in zip(specs, sample):
            limit = ranges.get(spec.name)
            if limit is not None and array.size and not 0 <= array.min() <= array.max() < limit:
                raise UserError(
                    f"{spec.name} holds an index out of range",
                    where=f"calibration sample {i}",
                    found=f"{array.min()} to {array.max()}",
                    wanted=f"0 to {limit - 1}",
                )
    return found


def _load(source, specs: Sequence, preprocess: str | None, ranges) -> Calibration:
    named = isinstance(source, (str, Path)) and bool(str(source))
    if preprocess is not None and (not named or source == RANDOM):
        found = RANDOM if source == RANDOM else type(source).__name__
        raise _not_images(found)
    if isinstance(source, Calibration):
        return source
    if source == RANDOM:
        return _random(specs, ranges)
    if named:
        return _files(Path(source), specs, preprocess)
    if isinstance(source, Iterable) and not isinstance(source, (bytes, Mapping)):
        return _iterable(source, specs)
    raise UserError(
        "is not calibration data",
        where="calibration",
        found="an empty path" if source == "" else type(source).__name__,
        wanted="a .npz file, a directory, an iterable of samples, or 'random'",
    )


def _not_images(found: str) -> UserError:
    return UserError("is for images", where="--preprocess", found=found, wanted="PNG or JPEG files")


def _random(specs: Sequence, ranges: Mapping[str, int] | None) -> Calibration:
    from compiler.samples import sample_inputs

    samples = sample_inputs(specs, seed=1, runs=_RANDOM_SAMPLES, ranges=ranges)
    return Calibration(
        lambda: iter(samples),
        {
            "kind": RANDOM,
            "samples": len(samples),
            "warning": "calibrated on random data: ranges say nothing about real inputs",
        },
    )


def _iterable(source: Iterable, specs: Sequence) -> Calibration:
    once = iter(source)
    items = list(once) if once is source else source  # a generator can be gone through once

    def samples() -> Iterator[Sample]:
        for i, item in enumerate(items):
            yield _sample(item, specs, f"calibration sample {i}")

    count = _count(samples(), "calibration")
    return Calibration(samples, {"kind": "iterable", "samples": count})


def _count(samples: Iterator[Sample], where: str) -> int:
    """How many samples there are; reads and checks everything before a long build begins."""
    count = sum(1 for _ in samples)
    if not count:
        raise UserError("holds no samples", where=where)
    return count


def _files(path: Path, specs: Sequence, preprocess: str | None) -> Calibration:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    arrays = [f for f in files if not path.is_dir() or f.suffix in (".npz", ".npy")]
    images = [f for f in files if f.suffix.lower() in SUFFIXES]
    if images and arrays and path.is_dir():
        raise UserError(
            "holds images and arrays",
            where=str(path),
            found=f"{images[0].name}, {arrays[0].name}",
            wanted="calibration data of one kind",
        )
    if images:
        return _images(path, images, specs, preprocess)
    if not arrays:
        raise UserError(
            "holds no calibration data", where=str(path), wanted=".npy, .npz, PNG or JPEG files"
        )
    if preprocess is not None:
        raise _not_images(str(path))

    def samples() -> Iterator[Sample]:
        for file in arrays:
            yield from cut_samples(_read(file), specs, str(file))

    count = left = 0
    for file in arrays:  # read once, which looks at all of it
        held = _read(file)
        count += sum(1 for _ in cut_samples(held, specs, str(file)))
        left += _rows(inputs_of(held, specs, str(file)), specs)[1]
    return Calibration(
        samples,
        {
            "kind": "files",
            "path": str(path),
            "sha256": _digest(arrays),
            "samples": count,
            **_left_out(count, left, specs, str(path)),
        },
    )


def _left_out(runs: int, left: int, specs: Sequence, where: str) -> dict:
    """What a description says of samples that fill no run. Raises UserError if there are no others."""
    batch = specs[0].shape[0] if specs and specs[0].shape else 1
    if not runs:
        raise UserError(
            "holds too few samples for one run" if left else "holds no samples",
            where=where,
            found=str(left),
            wanted=f"{batch} or more",
        )
    if not left:
        return {}
    what = (
        f"{left} calibration sample{'s' if left > 1 else ''} left out: they fill no run of {batch}"
    )
    return {"left_out": left, "warning": what}


def _images(
    path: Path, files: Sequence[Path], specs: Sequence, preprocess: str | None
) -> Calibration:
    if len(specs) != 1 or len(specs[0].shape) != 4 or specs[0].dtype != "float32":
        raise UserError(
            "images fit no input of this model",
            where=str(path),
            wanted="a model with one float32 input of four axes",
        )
    if preprocess is None:
        raise UserError(
            "images need to be prepared as the network's inputs are",
            where=str(path),
            todo="Give --preprocess, for example resize=256,crop=224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225",
        )
    prepared = Preprocessing.parse(preprocess)
    spec, batch = specs[0], specs[0].shape[0]

    def samples() -> Iterator[Sample]:
        for i in range(0, len(files) - batch + 1, batch):
            rows = [read_image(f, prepared, spec.shape) for f in files[i : i + batch]]
            yield [np.concatenate(rows)]

    count = sum(1 for _ in samples())
    return Calibration(
        samples,
        {
            "kind": "images",
            "path": str(path),
            "sha256": _digest(files),
            "samples": count,
            **_left_out(count, len(files) % batch, specs, str(path)),
            "preprocess": prepared.to_json(),
        },
    )


def _digest(files: Sequence[Path]) -> str:
    """sha256 of the contents of all files, one after another."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _read(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name; the name of the one in a `.npy` file is empty."""
    if file.suffix != ".npy":
        return read_npz(file)
    try:
        return {"": np.load(file, allow_pickle=False, mmap_mode="r")}
    except FileNotFoundError:
        raise UserError("no such file", where=str(file)) from None
    except (ValueError, EOFError, OSError):
        raise UserError("not a readable .npy file", where=str(file)) from None


def inputs_of(
    arrays: Mapping[str, np.ndarray], specs: Sequence, where: str
) -> dict[str, np.ndarray]:
    """The arrays of a file that are inputs `specs` of the model, all of them; labels are passed over. Raises UserError for
    missing and for other arrays."""
    names = [spec.name for spec in specs]
    arrays = {name: array for name, array in arrays.items() if name in names or name != LABELS}
    if len(specs) == 1 and len(arrays) == 1:
        arrays = {specs[0].name: next(iter(arrays.values()))}
    if missing := [spec.name for spec in specs if spec.name not in arrays]:
        raise UserError(
            "lacks an input of the model",
            where=where,
            found=", ".join(arrays),
            wanted=", ".join(missing),
        )
    if unknown := [name for name in arrays if name not in names]:
        raise UserError(
            f"{unknown[0]} is no input of the model", where=where, wanted=", ".join(names)
        )
    return arrays


def _rows(arrays: Mapping[str, np.ndarray], specs: Sequence) -> tuple[int, int]:
    """How many runs the first input's samples fill, and how many samples are left over."""
    if not specs or not specs[0].shape:
        return 1, 0
    return divmod(len(arrays[specs[0].name]), specs[0].shape[0])


def cut_samples(arrays: Mapping[str, np.ndarray], specs: Sequence, where: str) -> Iterator[Sample]:
    """Runs of the model's batch size along the first axis; a rest that does not fill one is left out.

    Raises UserError for arrays that are no inputs `specs` of the model; labels are passed over.
    """
    arrays = inputs_of(arrays, specs, where)
    counts = set()
    for spec in specs:
        array, batch = arrays[spec.name], spec.shape[0] if spec.shape else 1
        if array.ndim != len(spec.shape) or array.shape[1:] != tuple(spec.shape[1:]):
            raise UserError(
                f"wrong shape of {spec.name}",
                where=where,
                found="x".join(map(str, array.shape)),
                wanted="Nx" + "x".join(map(str, spec.shape[1:])),
            )
        counts.add(array.shape[0] // batch if spec.shape else 1)
    if len(counts) > 1:
        raise UserError(
            "holds different numbers of samples for its inputs",
            where=where,
            found=", ".join(map(str, sorted(counts))),
        )
    for i in range(min(counts)):
        rows = {spec.name: spec.shape[0] if spec.shape else 1 for spec in specs}
        yield [
            _checked(
                arrays[spec.name][i * rows[spec.name] : (i + 1) * rows[spec.name]], spec, where
            )
            for spec in specs
        ]


def _sample(item, specs: Sequence, where: str) -> Sample:
    if isinstance(item, Mapping):
        item = inputs_of(item, specs, where)
        item = [item[spec.name] for spec in specs]
    elif len(specs) == 1 and not isinstance(item, (list, tuple)):
        item = [item]
    if len(item) != len(specs):
        raise UserError(
            "wrong number of inputs", where=where, found=str(len(item)), wanted=str(len(specs))
        )
    return [_checked(np.asarray(array), spec, where) for array, spec in zip(item, specs)]


def _checked(array: np.ndarray, spec, where: str) -> np.ndarray:
    if tuple(array.shape) != tuple(spec.shape):
        raise UserError(
            f"wrong shape of {spec.name}",
            where=where,
            found="x".join(map(str, array.shape)),
            wanted="x".join(map(str, spec.shape)),
        )
    if array.dtype.kind not in ("f" if np.dtype(spec.dtype).kind == "f" else "iub"):
        raise UserError(
            f"wrong dtype of {spec.name}",
            where=where,
            found=str(array.dtype),
            wanted=str(spec.dtype),
            todo="Prepare the samples as the network's inputs are",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{spec.name} holds NaN or infinity", where=where)
    return np.asarray(array, dtype=spec.dtype, order="C")
