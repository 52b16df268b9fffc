# SPDX-License-Identifier: Apache-2.0
"""Other engines on the same model, for comparison: ONNX Runtime, OpenVINO, PyTorch (eager), on
the CPU in float32."""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler.artifact import Artifact
from schedules.errors import UserError


@dataclass(frozen=True)
class Peer:
    """`call()` runs the model once on the inputs it was opened with and returns the outputs in
    order."""

    name: str
    version: str
    call: Callable[[], list[np.ndarray]]


def open_peers(
    artifact: Artifact,
    names: Sequence[str],
    inputs: Sequence[Any],
    threads: int,
    module: Any = None,
) -> dict[str, Peer]:
    """The peers `names` on the model the artifact was built from, or on `module`, a torch module.

    Raises UserError for an unknown name, an engine that is not installed or a model that is gone.
    """
    unknown = [n for n in names if n not in OPENERS]
    if unknown:
        raise UserError(
            "unknown engine", where="--against", found=unknown[0], wanted=", ".join(OPENERS)
        )
    if not names:
        return {}
    packages = {name: _require(name) for name in names}
    source = None if module is not None else _source(artifact)
    arrays = [np.asarray(a) for a in inputs]
    with tempfile.TemporaryDirectory() as scratch:
        if source is None or source.suffix != ".onnx":
            if module is None and {"torch", "onnxruntime", "openvino"} & set(names):
                _require("torch")
                module = load_program(source)
            onnx = export_onnx(module, arrays, Path(scratch)) if set(names) - {"torch"} else None
        else:
            onnx = source
            if "torch" in names:
                raise UserError(
                    "torch cannot run an ONNX model", where="--against", found="torch",
                    todo="Build from the .pt2 file",
                )  # fmt: skip
        names_of = [s.name for s in artifact.inputs]
        return {
            name: OPENERS[name](
                packages[name],
                module if name == "torch" else onnx,
                dict(zip(names_of, arrays)),
                threads,
            )
            for name in names
        }


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            "is not installed", where=f"--against {name}", todo=f"pip install {name}"
        ) from None


def _source(artifact: Artifact) -> Path:
    path = artifact.manifest.get("source", {}).get("path")
    if not path or not Path(path).is_file():
        raise UserError(
            "the original model, which the other engines would run, is not there",
            where=str(artifact.path), found=path or "built from a module in memory",
        )  # fmt: skip
    return Path(path)


def load_program(path: Path) -> Any:
    """The module in a torch.export archive."""
    import torch

    return torch.export.load(path).module()


def export_onnx(module: Any, arrays: Sequence[np.ndarray], scratch: Path) -> Path:
    """`module` as an ONNX file with static shapes, by torch's own exporter."""
    import torch

    path = scratch / "peer.onnx"
    examples = tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own dependencies
        torch.onnx.export(module, examples, str(path), dynamo=True, verbose=False)
    return path


def open_onnxruntime(
    package: Any, path: Path, inputs: Mapping[str, np.ndarray], threads: int
) -> Peer:
    """ONNX Runtime's CPU provider with all graph optimisations."""
    options = package.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = package.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # By position: an exporter of a torch module may have named the inputs otherwise.
    feed = {i.name: a for i, a in zip(session.get_inputs(), _ordered(session, inputs))}
    return Peer("onnxruntime", package.__version__, lambda: session.run(None, feed))


def _ordered(session: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    names = [i.name for i in session.get_inputs()]
    return [inputs[n] for n in names] if set(names) == set(inputs) else list(inputs.values())


def open_openvino(package: Any, path: Path, inputs: Mapping[str, np.ndarray], threads: int) -> Peer:
    """OpenVINO's CPU plug-in: latency, one stream, float32 (its default may be bfloat16)."""
    core = package.Core()
    model = core.read_model(str(path))
    names = [i.get_any_name() for i in model.inputs]
    arrays = [inputs[n] for n in names] if set(names) == set(inputs) else list(inputs.values())
    model.reshape({i: list(a.shape) for i, a in enumerate(arrays)})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    for i, array in enumerate(arrays):
        request.set_input_tensor(i, package.Tensor(np.ascontiguousarray(array)))
    count = len(model.outputs)

    def call() -> list[np.ndarray]:
        request.infer()
        return [request.get_output_tensor(i).data for i in range(count)]

    return Peer("openvino", package.__version__.split("-")[0], call)


def open_torch(package: Any, module: Any, inputs: Mapping[str, np.ndarray], threads: int) -> Peer:
    """PyTorch, eager."""
    package.set_num_threads(threads)
    tensors = [package.from_numpy(np.ascontiguousarray(a)) for a in inputs.values()]

    def call() -> list[np.ndarray]:
        with package.inference_mode():
            found = module(*tensors)
        found = found if isinstance(found, (tuple, list)) else [found]
        return [t.numpy() for t in found]

    return Peer("torch", package.__version__, call)


OPENERS: Mapping[str, Callable[..., Peer]] = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "torch": open_torch,
}
