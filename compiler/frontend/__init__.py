# SPDX-License-Identifier: Apache-2.0
"""Front ends: a trained model (ONNX, torch.export, nn.Module) to Relax, every layer keeping its model name.

Right or refused: operators are imported by converters that are tested against the framework, everything else is
reported at once by `UnsupportedModel`; result shapes are compared with what the framework inferred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schedules.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    import tvm

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model: its name there, static shape and numpy dtype name."""

    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Imported:
    """A model as Relax and as itself.

    `mod["main"]` takes `inputs` in order and returns one tensor, or a tuple if there are several `outputs`. Weights are
    constants, float32, NCHW; convolutions and matrix products with constant weights are `kerf.conv2d` / `kerf.dense`.
    `reference(arrays)` runs the original framework on the inputs in order and returns the outputs in order.
    `notes` tell the user what the import changed or assumed.
    """

    mod: tvm.IRModule
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    source_kind: str  # "onnx", "pt2", "exported_program" or "module"
    reference: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    notes: Sequence[str] = field(default_factory=tuple)


def import_model(
    source: Any,
    *,
    example: Any = None,
    inputs: Mapping[str, Shape] | None = None,
    batch: int | None = None,
) -> Imported:
    """Import `source`: a path (.onnx, .pt2), an `onnx.ModelProto`, an `ExportedProgram` or an `nn.Module`.

    `example` (a module's inputs: a tensor, a tuple or a dict by argument name) is needed for an `nn.Module` only.
    `inputs` gives shapes by input name where the model leaves dimensions open; `batch` sets the first dimension of
    every input that leaves it open (and, for a module, of every example input that shares the first one's).

    Raises ModelError for a model that cannot be read or does not fit these arguments, UnsupportedModel for one that
    uses operators without a converter (all of them are listed).
    """
    if batch is not None and batch < 1:
        raise ModelError("the batch must be positive", found=str(batch))
    options = {"shapes": dict(inputs or {}), "batch": batch}
    if isinstance(source, (str, Path)):
        return _import_file(Path(source), options)
    kind = _kind_of(source)
    if kind == "onnx":
        from compiler.frontend.onnx_model import import_onnx

        return import_onnx(source, where="the ONNX model", **options)
    from compiler.frontend.torch_model import import_exported, import_module

    if kind == "module":
        return import_module(source, example, **options)
    if kind == "exported_program":
        return import_exported(source, where="the exported program", kind=kind, **options)
    raise ModelError(
        "not a model",
        found=type(source).__name__,
        wanted="a .onnx or .pt2 path, an ExportedProgram, or an nn.Module",
    )


def _kind_of(source: Any) -> str:
    """By the names of its classes, so that neither torch nor onnx is imported to find out."""
    for base in type(source).__mro__:
        root, name = base.__module__.partition(".")[0], base.__name__
        if (root, name) == ("torch", "Module"):
            return "module"
        if (root, name) == ("torch", "ExportedProgram"):
            return "exported_program"
        if name == "ModelProto" and root == "onnx":
            return "onnx"
    return "unknown"


def _import_file(path: Path, options: dict) -> Imported:
    if not path.exists():
        raise ModelError("no such file", where=str(path))
    if path.is_dir():
        raise ModelError("a directory, not a model file", where=str(path), wanted=".onnx or .pt2")
    if path.suffix == ".onnx":
        from compiler.frontend.onnx_model import import_onnx, load_onnx

        return import_onnx(load_onnx(path), where=str(path), **options)
    if path.suffix == ".pt2":
        from compiler.frontend.torch_archive import load_archive
        from compiler.frontend.torch_model import import_exported

        return import_exported(load_archive(path), where=str(path), kind="pt2", **options)
    todo = (
        "Export it with torch.export.save or torch.onnx.export."
        if path.suffix in (".pt", ".pth", ".bin")
        else ""
    )
    raise ModelError(
        "unknown kind of model file",
        where=str(path),
        found=path.suffix or "no suffix",
        wanted=".onnx or .pt2",
        todo=todo,
    )


__all__ = ["Imported", "TensorSpec", "import_model"]
