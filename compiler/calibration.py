# SPDX-License-Identifier: Apache-2.0
"""Calibration data: samples of a model's inputs, streamed from where the user keeps them.

`.npz`: one array per input by name (or a single array for a model with one input), samples along the first axis.
Directory: `.npy` files (models with one input) or `.npz` files, in the order of their names, each as above.
`random`: standard normal values, only where the user asks for them.
Iterable: each item one sample, an array, a sequence of arrays in the inputs' order, or arrays by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compiler.arrays import read_npz
from schedules.errors import UserError

RANDOM = "random"
_RANDOM_SAMPLES = 8

Sample = Sequence[np.ndarray]


@dataclass(frozen=True)
class Calibration:
    """Samples to go through as often as needed, each with one array per input of the shape the model takes.

    `description` says where they come from, for the artifact.
    """

    samples: Callable[[], Iterator[Sample]]
    description: Mapping[str, object] = field(default_factory=dict)


def load_calibration(source, specs: Sequence) -> Calibration:
    """Calibration data for inputs `specs` (name, shape, dtype). Raises UserError for what cannot be used."""
    if isinstance(source, Calibration):
        return source
    if isinstance(source, str) and source == RANDOM:
        return _random(specs)
    if isinstance(source, (str, Path)):
        return _files(Path(source), specs)
    if isinstance(source, Iterable):
        items = list(source)
        if not items:
            raise UserError("holds no samples", where="calibration")
        kept = [_sample(item, specs, f"calibration sample {i}") for i, item in enumerate(items)]
        return Calibration(lambda: iter(kept), {"kind": "iterable", "samples": len(kept)})
    raise UserError(
        "is not calibration data",
        where="calibration",
        found=type(source).__name__,
        wanted="a .npz file, a directory, an iterable of samples, or 'random'",
    )


def _random(specs: Sequence) -> Calibration:
    from compiler.samples import sample_inputs

    samples = sample_inputs(specs, seed=1, runs=_RANDOM_SAMPLES)
    return Calibration(
        lambda: iter(samples),
        {
            "kind": RANDOM,
            "samples": len(samples),
            "warning": "random data: ranges say nothing about real inputs",
        },
    )


def _files(path: Path, specs: Sequence) -> Calibration:
    files = sorted([*path.glob("*.npz"), *path.glob("*.npy")]) if path.is_dir() else [path]
    if path.is_dir() and not files:
        raise UserError("holds no .npy or .npz file", where=str(path))

    def samples() -> Iterator[Sample]:
        for file in files:
            yield from _split(_read(file, specs), specs, str(file))

    count = sum(1 for _ in samples())  # reads and checks everything before a long build begins
    if not count:
        raise UserError("holds no samples", where=str(path))
    return Calibration(samples, {"kind": "files", "path": str(path), "samples": count})


def _read(file: Path, specs: Sequence) -> dict[str, np.ndarray]:
    if file.suffix == ".npy":
        try:
            arrays = {"": np.load(file, allow_pickle=False, mmap_mode="r")}
        except FileNotFoundError:
            raise UserError("no such file", where=str(file)) from None
        except (ValueError, EOFError, OSError):
            raise UserError("not a readable .npy file", where=str(file)) from None
    else:
        arrays = read_npz(file)
    if len(specs) == 1 and len(arrays) == 1:
        return {specs[0].name: next(iter(arrays.values()))}
    missing = [spec.name for spec in specs if spec.name not in arrays]
    if missing:
        raise UserError(
            "lacks an input of the model",
            where=str(file),
            found=", ".join(arrays),
            wanted=", ".join(missing),
        )
    return arrays


def _split(arrays: Mapping[str, np.ndarray], specs: Sequence, where: str) -> Iterator[Sample]:
    """Runs of the model's batch size along the first axis; a rest that does not fill one is left out."""
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
        missing = [spec.name for spec in specs if spec.name not in item]
        if missing:
            raise UserError("lacks an input of the model", where=where, wanted=", ".join(missing))
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
    if array.dtype.kind not in "fiub":
        raise UserError(f"{spec.name} does not hold numbers", where=where, found=str(array.dtype))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{spec.name} holds NaN or infinity", where=where)
    return np.ascontiguousarray(array, dtype=spec.dtype)
