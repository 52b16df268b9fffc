# SPDX-License-Identifier: Apache-2.0
"""Run built models: `load(path)` gives a callable on arrays. Needs neither torch nor onnx."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from compiler.arrays import ALIGNMENT
from compiler.artifact import (
    Artifact,
    CompiledVariant,
    KernelCall,
    open_artifact,
    read_constants,
)
from compiler.frontend import TensorSpec
from compiler.linker import require_linker
from compiler.thread_pool import check_threads, prepare_thread_pool, use_threads
from schedules.errors import ArtifactError, UserError
from schedules.target import CpuTarget

_CPU = 1  # DLPack's kDLCPU


class LoadedModel:
    """A runnable variant: `model(x, ...)` in the model's order, `model.run({name: array})` by name.

    Inputs are numpy arrays or CPU objects with DLPack. They are used where they lie if they are
    contiguous, writable and aligned to their elements (to 64 bytes where kernels need it, see
    `CompiledVariant.input_alignment`), else copied into a buffer of the model's. Results are numpy arrays of their own
    memory. Calls from
    several threads run one after another.
    """

    def __init__(
        self,
        module: Any,
        constants: Sequence[tvm.runtime.Tensor],
        *,
        variant: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        kernels: Sequence[KernelCall] = (),
        threads: int = 1,
        parallel: bool = False,
        input_alignment: int = ALIGNMENT,
    ):
        self.variant = variant
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.kernels = tuple(kernels)
        self.kernel_names = frozenset(k.function for k in self.kernels)
        self.threads = threads
        self._parallel = parallel
        self._vm = relax.VirtualMachine(module, tvm.cpu())
        self._main = self._vm["main"]
        self._constants = tvm_ffi.Array(list(constants))
        self._arguments = (self._constants,) if len(constants) else ()
        self._dtypes = [np.dtype(s.dtype) for s in self.inputs]
        self._alignments = [max(input_alignment, dtype.itemsize) for dtype in self._dtypes]
        self._staging: list = [None] * len(self.inputs)
        self._lock = threading.Lock()
        self._aliased: tuple[bool, ...] | None = None

    def __call__(self, *arrays: Any) -> np.ndarray | tuple[np.ndarray, ...]:
        """One array, or a tuple if the model has several outputs. Raises UserError for inputs
        that do not fit."""
        if len(arrays) != len(self.inputs):
            raise UserError(
                "wrong number of inputs",
                where=f"model {self.variant}",
                found=str(len(arrays)),
                wanted=f"{len(self.inputs)}: " + ", ".join(map(describe_spec, self.inputs)),
            )
        with self._lock:
            tensors = [self._bind(i, array) for i, array in enumerate(arrays)]
            results = self._collect(self.invoke(tensors), tensors)
        return results[0] if len(results) == 1 else results

    def run(self, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs by name for inputs by name. Raises UserError for an unknown or missing name."""
        names = [s.name for s in self.inputs]
        unknown, missing = (
            [n for n in arrays if n not in names],
            [n for n in names if n not in arrays],
        )
        if unknown or missing:
            what = f"unknown input {unknown[0]!r}" if unknown else f"missing input {missing[0]!r}"
            raise UserError(
                what,
                where=f"model {self.variant}",
                found=", ".join(map(str, arrays)) or "no inputs",
                wanted=", ".join(map(describe_spec, self.inputs)),
            )
        results = self(*(arrays[n] for n in names))
        results = results if isinstance(results, tuple) else (results,)
        return {s.name: r for s, r in zip(self.outputs, results)}

    def bind(self, arrays: Sequence[Any]) -> list[tvm.runtime.Tensor]:
        """Inputs as tensors that `invoke` takes, checked; they may share the model's buffers."""
        return [self._bind(i, array) for i, array in enumerate(arrays)]

    def invoke(self, tensors: Sequence[tvm.runtime.Tensor]) -> Any:
        """The raw call of the compiled program: no checks, no conversion of results."""
        if self._parallel:
            use_threads(self.threads)
        return self._main(*tensors, *self._arguments)

    @contextmanager
    def instrumented(self, callback: Callable) -> Iterator[None]:
        """Within the block `callback(function, name, before, result, *arguments)` sees every call
        of the program."""
        self._vm.set_instrument(callback)
        try:
            yield
        finally:
            self._vm.set_instrument(None)

    def _bind(self, index: int, value: Any) -> tvm.runtime.Tensor:
        spec = self.inputs[index]
        if isinstance(value, np.ndarray):
            if value.shape != spec.shape or value.dtype != self._dtypes[index]:
                raise self._misfit(spec, value.shape, value.dtype)
            tensor = self._shared(index, value)
            return self._stage(index, value) if tensor is None else tensor
        if isinstance(value, tvm_ffi.core.Tensor):
            tensor = value
        elif hasattr(value, "__dlpack__"):
            tensor = self._import(spec, value)
        else:
            raise UserError(
                "not an array",
                where=f"input {spec.name!r}",
                found=type(value).__name__,
                wanted="a numpy array or a CPU tensor with DLPack",
            )
        if tuple(tensor.shape) != spec.shape or str(tensor.dtype) != spec.dtype:
            raise self._misfit(spec, tuple(tensor.shape), tensor.dtype)
        shared = self._shared(index, value)
        return self._stage(index, np.from_dlpack(tensor)) if shared is None else shared

    def _import(self, spec: TensorSpec, value: Any) -> tvm.runtime.Tensor:
        device = value.__dlpack_device__()
        if device[0] != _CPU:
            raise UserError(
                "not in the CPU's memory",
                where=f"input {spec.name!r}",
                found=f"DLPack device {device}",
                todo="Move it with .cpu()",
            )
        try:
            return tvm_ffi.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError) as error:
            raise UserError(
                f"cannot be shared: {error}",
                where=f"input {spec.name!r}",
                todo="Pass .detach() of a tensor that requires gradients",
            ) from None

    def _shared(self, index: int, value: Any) -> tvm.runtime.Tensor | None:
        """The value where it lies, if kernels may read it there."""
        try:
            return tvm_ffi.from_dlpack(
                value, require_alignment=self._alignments[index], require_contiguous=True
            )
        except (BufferError, RuntimeError):
            return None  # numpy's error for read-only arrays; the others' for the rest

    def _misfit(self, spec: TensorSpec, shape: tuple, dtype: Any) -> UserError:
        found = describe_spec(TensorSpec(spec.name, tuple(shape), str(dtype)))
        what = "wrong shape" if tuple(shape) != spec.shape else "wrong dtype"
        return UserError(
            what, where=f"input {spec.name!r}", found=found, wanted=describe_spec(spec)
        )

    def _stage(self, index: int, value: np.ndarray) -> tvm.runtime.Tensor:
        if self._staging[index] is None:
            spec = self.inputs[index]
            tensor = tvm.runtime.empty(spec.shape, spec.dtype)
            self._staging[index] = (tensor, np.from_dlpack(tensor))
        tensor, view = self._staging[index]
        np.copyto(view, value)
        return tensor

    def _collect(self, result: Any, tensors: Sequence) -> tuple[np.ndarray, ...]:
        fields = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        arrays = tuple(np.from_dlpack(f) for f in fields)
        if (
            self._aliased is None
        ):  # a fixed property of the program: the result may be an input or a constant
            owned = [np.from_dlpack(t) for t in [*tensors, *self._constants]]
            self._aliased = tuple(any(np.may_share_memory(a, o) for o in owned) for a in arrays)
        if any(self._aliased):
            return tuple(a.copy() if aliased else a for a, aliased in zip(arrays, self._aliased))
        return arrays


def describe_spec(spec: TensorSpec) -> str:
    """`x float32[1,3,224,224]`"""
    return f"{spec.name} {spec.dtype}[{','.join(map(str, spec.shape))}]"


def load(path: str | Path, variant: str = "compressed", threads: int = 1) -> LoadedModel:
    """The runnable `variant` of the artifact at `path`, using `threads` threads.

    Raises ArtifactError for a damaged artifact or one built for another CPU, UserError for an
    unknown variant.
    """
    return load_variants(open_artifact(path), [variant], threads)[variant]


def load_variants(
    artifact: Artifact, names: Sequence[str], threads: int = 1
) -> dict[str, LoadedModel]:
    """Several variants at once, sharing the memory of the constants they have in common."""
    artifact.check_host()
    check_threads(threads, artifact.target.threads)
    prepare_thread_pool()
    infos = {name: artifact.variant(name) for name in names}
    constants = read_constants(artifact, list(infos.values()), tvm.runtime.tensor)
    models: dict[str, LoadedModel] = {}
    for name, info in infos.items():
        same = next((n for n, i in infos.items() if n in models and i.name == info.name), None)
        models[name] = (
            models[same]
            if same
            else LoadedModel(
                _open_library(artifact.path / info.library),
                [constants[key] for key in info.constants],
                variant=info.name,
                inputs=artifact.inputs,
                outputs=artifact.outputs,
                kernels=info.kernels,
                threads=threads,
                parallel=artifact.target.threads > 1,
                input_alignment=info.input_alignment,
            )
        )
    return models


def _open_library(path: Path) -> Any:
    try:
        if path.suffix == ".so":
            return tvm_ffi.load_module(_spelled_by_file(path.resolve()))
        return tvm.runtime.load_module(str(path.resolve()))  # links an archive first
    except (RuntimeError, OSError, ValueError) as error:
        raise ArtifactError(
            f"cannot be loaded: {str(error).strip().splitlines()[-1]}",
            where=str(path),
            wanted="the library that build wrote",
            todo="An archive (.tar) must first be linked on its own machine",
        ) from None


def _spelled_by_file(path: Path) -> str:
    """A path to the same file, spelled after its inode: the system's loader does not look at a path again under which it
    has a library, though the file was replaced since, as a rebuilt artifact's is."""
    steps = "".join("./" if bit == "1" else "/" for bit in f"{path.stat().st_ino:b}")
    return f"{path.parent}/{steps}{path.name}"


def from_variant(
    variant: CompiledVariant,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    target: CpuTarget,
    threads: int = 1,
) -> LoadedModel:
    """A compiled variant as a runnable model, without writing it anywhere."""
    check_threads(threads, target.threads)
    prepare_thread_pool()
    return LoadedModel(
        variant.executable.jit(fcompile=require_linker()),
        [tvm.runtime.tensor(c) for c in variant.constants],
        variant=variant.name,
        inputs=inputs,
        outputs=outputs,
        kernels=variant.kernels,
        threads=threads,
        parallel=target.threads > 1,
        input_alignment=variant.input_alignment,
    )
