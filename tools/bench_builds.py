# SPDX-License-Identifier: Apache-2.0
"""What `tools/bench_peers.py` builds: every recipe by name, the models they start from, and their artifacts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL, PRUNED, SHAPED = "", ".pruned", ".filter"


@dataclass(frozen=True)
class Build:
    """`options` of `compile-model build`, and the model it starts from: the network itself, the network with 90 % of its
    weights pruned in torch (as ONNX), or a network of the shape that the build `filter` left."""

    options: tuple[str, ...]
    source: str = MODEL

    @property
    def variant(self) -> str:
        """Which variant of the artifact is meant."""
        return "dense" if self.options[1] == "dense" else "compressed"


def _pruned(grain: str, density: float, recipe: tuple[str, ...] = ("--recipe", "sparse")) -> Build:
    return Build((*recipe, "--density", f"{density:g}", "--grain", grain, "--prune"))


_INT8 = ("--recipe", "int8", "--calibration", "random")
BUILDS: Mapping[str, Build] = {
    "dense": Build(("--recipe", "dense")),
    "element": _pruned("element", 0.1),
    "row": _pruned("row", 0.1),
    "kernel": _pruned("kernel", 0.1),
    "out4": _pruned("out:4", 0.1),
    "out8": _pruned("out:8", 0.1),
    "filter": _pruned("filter", 0.7),
    "filter_shape": Build(("--recipe", "dense"), SHAPED),
    "element5": _pruned("element", 0.05),
    "out8_5": _pruned("out:8", 0.05),
    "element50": _pruned("element", 0.5),
    "out4_50": _pruned("out:4", 0.5),
    "out8_50": _pruned("out:8", 0.5),
    "pruned": Build(("--recipe", "sparse"), PRUNED),
    "int8": Build(_INT8),
    "int8_in4": _pruned("in:4", 0.1, _INT8),
    "int8_block4": _pruned("block:4x4", 0.1, _INT8),
}


def artifact_of(build: str, builds: Sequence[str]) -> str:
    """Whose artifact holds a build: every compressed one has the dense variant beside it."""
    whole = [b for b in builds if BUILDS[b].source == MODEL and BUILDS[b].variant == "compressed"]
    return whole[0] if build == "dense" and whole else build


def quantized(onnx: Path) -> Path:
    """Where the int8 form of an ONNX model lies that ONNX Runtime's quantizer makes."""
    return onnx.with_suffix(".int8.onnx")


def pruned_model(name: str, work: Path) -> Path:
    """Where the network pruned in torch lies."""
    return work / name / f"{name}{PRUNED}.onnx"


def prepare(
    name: str,
    work: Path,
    *,
    threads: int,
    keep: bool,
    builds: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Write the network as NAME.pt2, NAME.onnx and its inputs, and build the artifacts below `work`."""
    directory = work / name
    directory.mkdir(parents=True, exist_ok=True)
    files = {s: directory / f"{name}.{s}" for s in ("pt2", "onnx", "npz")}
    if not all(path.exists() for path in files.values()):
        _write_network(name, files)
    if any(b.startswith("int8") for b in builds) and not quantized(files["onnx"]).exists():
        from tools.quantize_onnx import quantize_onnx, random_samples

        quantize_onnx(files["onnx"], quantized(files["onnx"]), random_samples(files["onnx"]))
    artifacts = {artifact_of(b, builds) for b in builds}
    for build in [b for b in BUILDS if b in artifacts]:
        output = directory / build
        if keep and (output / "manifest.json").exists():
            continue
        source = _source(name, work, BUILDS[build].source)
        start = time.perf_counter()
        line = [sys.executable, "-m", "compiler.cli", "build", str(source), "-o", str(output)]
        line += ["--force", "--threads", str(threads), *BUILDS[build].options]
        root = Path(__file__).resolve().parent.parent
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(line, env=environment, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: building {build} failed with exit code {done.returncode}")
        say(f"{name}: built {build} in {time.perf_counter() - start:.0f} s")


def _write_network(name: str, files: Mapping[str, Path]) -> None:
    import numpy as np

    from tools import zoo

    module, example = zoo.build(name)
    zoo.save_pt2(module, example, files["pt2"])
    zoo.save_onnx(module, example, files["onnx"])
    np.savez(files["npz"], *[tensor.numpy() for tensor in example])


def _source(name: str, work: Path, kind: str) -> Path:
    """The model a build starts from, written if it is not there."""
    if kind == PRUNED:
        path = pruned_model(name, work)
        if not path.exists():
            _write_pruned(name, path)
        return path
    path = work / name / f"{name}{kind}.pt2"
    if kind == SHAPED:
        _write_shaped(name, work / name / "filter", path)
    return path


def _write_pruned(name: str, path: Path) -> None:
    """90 % of every layer pruned by magnitude, batch norm measured anew; of an opset that older engines know."""
    import torch

    from compiler.nn.pruning import Pruner
    from tools import zoo

    module, example = zoo.build(name)
    pruner = Pruner(module, "element")
    pruner.prune(0.1)
    pruner.finish()
    if example[0].is_floating_point():
        zoo.calibrate_batch_norm(module, torch.randn(4, *example[0].shape[1:]))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # this exporter is deprecated; the other writes newer opsets only
        torch.onnx.export(module, example, str(path), dynamo=False, opset_version=13)


def _write_shaped(name: str, artifact: Path, path: Path) -> None:
    """The network with every layer, and the norm behind it, made as wide as the layers of an artifact whose filters left."""
    import torch
    from torch import nn

    from compiler.artifact import open_artifact
    from compiler.nn.coupled_filters import norms_behind
    from tools import zoo

    module, example = zoo.build(name)
    norms = norms_behind(module, example)
    for row in open_artifact(artifact).layers:
        found, layer = row["found"], module.get_submodule(row["name"])
        inputs, outputs = (found.get(side, (None, None))[1] for side in ("inputs", "outputs"))
        if inputs is None:
            continue
        if isinstance(layer, nn.Conv2d):
            new = nn.Conv2d(
                inputs, outputs, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                layer.groups, bias=layer.bias is not None,
            )  # fmt: skip
        else:
            new = nn.Linear(inputs, outputs, bias=layer.bias is not None)
        module.set_submodule(row["name"], new)
        if row["name"] in norms:
            module.set_submodule(norms[row["name"]], nn.BatchNorm2d(outputs))
    zoo.randomise(module)
    zoo.calibrate_batch_norm(module, torch.randn(4, *example[0].shape[1:]))
    zoo.save_pt2(module.eval(), example, path)
