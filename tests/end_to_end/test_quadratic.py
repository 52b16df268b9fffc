# SPDX-License-Identifier: Apache-2.0
"""A quadratic network from torch to an artifact: every neuron in one kernel, the predictions torch's."""

from __future__ import annotations

import numpy as np
import pytest

import compiler
from compiler.recipe import Recipe, Rule

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def network():
    from torch import nn

    from compiler.nn.quadratic import QuadraticConv2d, QuadraticLinear

    torch.manual_seed(0)
    model = nn.Sequential(
        QuadraticConv2d(8, 32, 3, padding=1, branch_norm=True), nn.BatchNorm2d(32), nn.ReLU(),
        QuadraticConv2d(32, 24, 3, 2, 1, kind="t4"), nn.ReLU(),
        QuadraticConv2d(24, 24, 3, padding=1), nn.Flatten(), QuadraticLinear(24 * 64, 10),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
        for _ in range(2):
            model(torch.randn(8, 8, 16, 16))  # statistics of the norms
        for name in ("g", "b"):  # a neuron as it starts: linear
            getattr(model[5], name).weight.zero_()
    return model.eval()


def test_whole_build(network, tmp_path):
    x = torch.randn(1, 8, 16, 16)
    recipe = Recipe("quadratic", (Rule("*", "quadratic"),))
    artifact = compiler.compile_model(
        network, (x,), recipe=recipe, output=tmp_path / "q", choose="asked"
    )
    rows = {row["name"]: row for row in artifact.layers}
    assert {row["treatment"] for row in rows.values()} == {"quadratic"}
    assert rows["0.r"]["found"]["quadratic"] == "rgb" and rows["3.g"]["found"]["quadratic"] == "rg"
    assert rows["5.g"]["found"]["quadratic"].startswith("linear")
    loops = [k["loops"] for k in artifact.manifest["variants"]["compressed"]["kernels"]]
    assert sum(name.startswith("quadratic") for name in loops) >= 3
    with torch.no_grad():
        wanted = network(x).numpy()
    found = compiler.load(tmp_path / "q")(x.numpy())
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def _transposed_images():
    from torch import nn

    from compiler.nn.quadratic import QuadraticConvTranspose2d

    return nn.Sequential(
        QuadraticConvTranspose2d(5, 7, 4, 2, 1), nn.ReLU(),
        QuadraticConvTranspose2d(7, 3, 3, 2, 1, output_padding=1, kind="t4"),
    )  # fmt: skip


def _transposed_sequences():
    """Behind a flattening, and behind one another: the square is taken of a tensor that was reshaped, and of one that
    phases were put together to."""
    from torch import nn

    from compiler.nn.quadratic import QuadraticConvTranspose1d

    return nn.Sequential(
        nn.Flatten(2), QuadraticConvTranspose1d(5, 7, 4, 2, 1), nn.ReLU(),
        QuadraticConvTranspose1d(7, 3, 3, 2, 1),
    )  # fmt: skip


TRANSPOSED = {
    "images": (_transposed_images, ["0.r rgb", "0.g rgb", "0.b rgb", "2.r rg", "2.g rg"]),
    "sequences": (_transposed_sequences, [f"{i}.{branch} rgb" for i in (1, 3) for branch in "rgb"]),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_neurons(name, tmp_path):
    """The phases of transposed convolutions form neurons in one kernel each, interleaved behind it."""
    make, forms = TRANSPOSED[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    x = torch.randn(1, 5, 6, 5)
    recipe = Recipe("quadratic", (Rule("*", "quadratic"),))
    artifact = compiler.compile_model(
        model, (x,), recipe=recipe, output=tmp_path / "t", choose="asked"
    )
    found = [f"{row['name']} {row['found']['quadratic']}" for row in artifact.layers]
    assert sorted(found) == sorted(forms)
    loops = [k["loops"] for k in artifact.manifest["variants"]["compressed"]["kernels"]]
    assert "contraction" not in loops and "winograd" not in loops
    with torch.no_grad():
        wanted = model(x).numpy()
    found = compiler.load(tmp_path / "t")(x.numpy())
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_bytes_of_a_flattened_square(tmp_path):
    """int8: the square of a flattened image is written where the image lies, and verified there; beyond the range that
    was calibrated it saturates."""
    from torch import nn

    from compiler.nn.quadratic import QuadraticLinear

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), QuadraticLinear(8 * 36, 5)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    samples = np.random.default_rng(0).standard_normal((32, 4, 6, 6)).astype("float32")
    np.savez(tmp_path / "samples.npz", input=samples)
    recipe = Recipe("int8", (Rule("*", "int8"),))
    artifact = compiler.compile_model(
        model, (torch.from_numpy(samples[:1]),), recipe=recipe, output=tmp_path / "q",
        choose="asked", calibration=tmp_path / "samples.npz",
    )  # fmt: skip
    assert {row["treatment"] for row in artifact.layers} == {"int8"}
    steps = artifact.manifest["verify"]["kernels"]["compressed"]["steps"]
    assert steps["tensors"] == 6 and steps["wrong"] == 0  # 3 for each of 2 samples
    loaded = compiler.load(tmp_path / "q")
    with torch.no_grad():
        wanted = model(torch.from_numpy(samples[:1])).numpy()
    found = loaded(samples[:1])
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    far = loaded(1e30 * np.abs(samples[:1]))
    np.testing.assert_array_equal(far, loaded(1e25 * np.abs(samples[:1])))
    assert np.isfinite(far).all()
