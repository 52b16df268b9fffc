# SPDX-License-Identifier: Apache-2.0
"""Whole builds of tiny networks: imported, compressed, compiled, verified, written, loaded and run.

The driver itself verifies every build against the original framework and float64 evaluations, so a
build that returns has computed the right thing; these tests check that it did what was asked too.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

import compiler
from compiler.recipe import Recipe, Rule
from schedules.errors import ArtifactError
from schedules.target import detect_host, parse_target, usable_cores

torch = pytest.importorskip("torch")

NETWORKS = (
    "resnet18", "resnet50", "vgg16", "mobilenetv2", "regnet_y", "convnext_t", "efficientnet_b0", "vit_s16", "bert", "gpt2", "lstm",
)  # fmt: skip
GRAINS = ("out:4", "out:8", "out:16", "element")
slow = pytest.mark.slow


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """`saved(network, format, batch=1)`: the file of a tiny network, exported once."""
    folder = tmp_path_factory.mktemp("networks")

    def save(network: str, suffix: str, batch: int = 1) -> Path:
        zoo = _zoo()
        path = folder / f"{network}-{batch}.{suffix}"
        if not path.exists():
            module, example = zoo.build(network, tiny=True, batch=batch)
            {"pt2": zoo.save_pt2, "onnx": zoo.save_onnx}[suffix](module, example, path)
        return path

    return save


def _zoo():
    pytest.importorskip("transformers")
    folder = str(Path(__file__).resolve().parents[2] / "tools")
    sys.path.insert(0, folder)
    try:
        import zoo
    finally:
        sys.path.remove(folder)
    return zoo


@pytest.fixture
def every_grain(monkeypatch):
    """A recipe that prunes every layer to a tenth, grains in turn, and runs each sparse kernel there
    is: tiny layers would all be declined as too slow."""
    from compiler import driver
    from passes.treatment import Treatment

    treat = importlib.import_module("passes.sparse.treat")
    monkeypatch.setattr(treat, "_HOPELESS", float("inf"))

    def resolve(_recipe, names):
        return {
            name: Treatment("sparse", {"density": 0.1, "grain": GRAINS[i % len(GRAINS)]}, True)
            for i, name in enumerate(dict.fromkeys(names))
        }

    monkeypatch.setattr(driver, "resolve", resolve)
    return Recipe("every grain", (Rule("*", "sparse", {"density": 0.1}, True),))


def treatments(artifact) -> set:
    return {row["treatment"] for row in artifact.layers}


def build(source, path, **options):
    """The artifact of a build, which must run from its directory to finite outputs."""
    artifact = compiler.compile_model(source, output=path, choose="asked", **options)
    model = compiler.load(path, threads=options.get("threads", 1))
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal(s.shape).astype(s.dtype)
        if s.dtype.startswith("float")
        else rng.integers(0, 2, s.shape).astype(s.dtype)
        for s in artifact.inputs
    ]
    outputs = model(*arrays)
    for spec, output in zip(artifact.outputs, outputs if isinstance(outputs, tuple) else [outputs]):
        assert output.shape == tuple(spec.shape) and np.isfinite(output).all()
    return artifact


def runnable(target: str) -> bool:
    return not parse_target(target, 1).missing_on_host()


FAST = {("lstm", "onnx")}


@pytest.mark.parametrize(
    "network, suffix",
    [
        pytest.param(n, s, marks=() if (n, s) in FAST else slow)
        for n in NETWORKS
        for s in ("pt2", "onnx")
    ],
)
def test_dense(saved, tmp_path, network, suffix):
    artifact = build(saved(network, suffix), tmp_path / "out")
    assert treatments(artifact) == {"dense"}


@pytest.mark.parametrize(
    "network, threads",
    [
        pytest.param(n, t, marks=() if (n, t) == ("vgg16", 1) else slow)
        for n in NETWORKS
        for t in (1, 2)
    ],
)
def test_sparse(saved, tmp_path, every_grain, network, threads):
    if threads > usable_cores():
        pytest.skip(f"needs {threads} cores")
    artifact = build(saved(network, "pt2"), tmp_path / "out", recipe=every_grain, threads=threads)
    assert "sparse" in treatments(artifact)
    kernels = {kernel.loops for kernel in artifact.variant("compressed").kernels}
    assert kernels & {"sparse_planes", "sparse_windows"}


@slow
@pytest.mark.parametrize("network", ["vit_s16", "resnet18", "lstm", "efficientnet_b0"])
def test_several_images_at_once(saved, tmp_path, every_grain, network):
    artifact = build(saved(network, "pt2", batch=2), tmp_path / "out", recipe=every_grain)
    assert artifact.inputs[0].shape[0] == 2


@slow
@pytest.mark.parametrize("target", ["avx2", "generic"])
@pytest.mark.parametrize("network", ["resnet18", "vit_s16", "regnet_y", "bert", "lstm"])
def test_narrower_targets(saved, tmp_path, every_grain, network, target):
    if not runnable(target):
        pytest.skip(f"this CPU cannot run {target}")
    artifact = build(saved(network, "pt2"), tmp_path / "out", recipe=every_grain, target=target)
    assert artifact.target.name == target


@slow
@pytest.mark.parametrize("network", ["resnet18", "vgg16"])
def test_winograd_never(saved, tmp_path, network):
    from compiler.recipe import load_recipe

    recipe = load_recipe("dense", winograd="never")
    artifact = build(saved(network, "pt2"), tmp_path / "out", recipe=recipe)
    assert "winograd" not in {kernel.loops for kernel in artifact.variant("dense").kernels}


class Small(torch.nn.Module):
    """A convolution and a dense layer; `outputs(y)` makes of the latter's result what is returned."""

    def __init__(self, outputs=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 12)
        self.outputs = outputs

    def forward(self, x):
        return self.outputs(self.head(self.conv(x).relu().mean((2, 3))))


IMAGE = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3, 9, 9)).astype("float32"))

# What an epilogue, a scan or several outputs must survive: 12 columns are no multiple of a register.
TAILS = {
    "two outputs": lambda y: (y.relu(), y.sum(1)),
    "one tensor twice": lambda y: (y, y),
    "truth values": lambda y: y > 0,
    "truth values as numbers": lambda y: (y > 0).long(),
    "masks": lambda y: torch.where((y > 0) & ~(y > 1), y, -0.5 * y),
    "cumulative sum": lambda y: y.cumsum(1),
    "cumulative sum of columns, then more": lambda y: y.cumsum(0).relu() + 1,
}


@pytest.mark.parametrize(
    "tail", [t if t in ("two outputs", "masks") else pytest.param(t, marks=slow) for t in TAILS]
)
def test_module_in_memory(tail):
    module = Small(TAILS[tail]).eval()
    artifact = compiler.compile_model(module, (IMAGE,))
    found = compiler.load(artifact.path)(IMAGE.numpy())
    with torch.no_grad():
        wanted = module(IMAGE)
    found, wanted = (r if isinstance(r, tuple) else (r,) for r in (found, wanted))
    assert len(found) == len(wanted) == len(artifact.outputs)
    for got, expected in zip(found, wanted):
        assert got.dtype == expected.numpy().dtype
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)


class Tokens(torch.nn.Module):
    """Embedded tokens under a mask: integer and truth-value inputs, and an integer output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(20, 16)
        self.layer = torch.nn.Linear(16, 8)

    def forward(self, tokens, mask):
        return self.layer(self.embedding(tokens) * mask.float().unsqueeze(-1)), mask.sum(1)


def test_integer_inputs():
    example = (torch.randint(20, (2, 6)), torch.randint(2, (2, 6)).bool())
    artifact = compiler.compile_model(Tokens().eval(), example)
    assert [spec.dtype for spec in artifact.inputs] == ["int64", "bool"]
    found, count = compiler.load(artifact.path)(*(e.numpy() for e in example))
    with torch.no_grad():
        wanted, wanted_count = Tokens().eval()(*example)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(count, wanted_count.numpy())


def test_layers_that_all_decline_say_why():
    recipe = Recipe("unpruned", (Rule("*", "sparse", {"grain": "out:4"}),))
    artifact = compiler.compile_model(Small().eval(), (IMAGE,), recipe=recipe, choose="asked")
    assert treatments(artifact) == {"dense"}
    assert [row["asked"] for row in artifact.layers] == ["sparse", "sparse"]
    assert all("no zeros" in row["declined"] for row in artifact.layers)
    assert list(artifact.variants) == ["dense"]


def test_archive_for_another_architecture(tmp_path):
    other = "generic" if detect_host().arch == "aarch64" else "aarch64"
    path = tmp_path / "out"
    artifact = compiler.compile_model(Small().eval(), (IMAGE,), target=other, output=path)
    assert artifact.target.name == other
    assert (path / artifact.variant("dense").library).name == "dense.tar"
    assert (path / "dense.tar").stat().st_size > 0
    with pytest.raises(ArtifactError, match="this machine lacks"):
        compiler.load(path)
