# SPDX-License-Identifier: Apache-2.0
"""Programs quantized by torch's PT2E flow: imported as torch computes them, then on bytes with their own scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from compiler.frontend import import_model
from compiler.frontend.torch_quantization import register_operators
from compiler.pipeline import canonicalize
from passes import families
from passes.evaluate import evaluate
from passes.quantized.take_imported import take_imported
from passes.treat_layers import layers_of
from passes.treatment import Treatment
from schedules.errors import UnsupportedModel

REFERENCES = {name: f for family in families() for name, f in family.references.items()}


def run(mod, x):
    return evaluate(mod, [x], dtype="float32", references=REFERENCES)[0]


class Written(nn.Module):
    """What convert_pt2e leaves: integer weights, and operators around every layer."""

    def __init__(self, activation=torch.uint8, limits=(0, 255)):
        super().__init__()
        register_operators()
        generator = torch.Generator().manual_seed(0)
        self.activation, self.limits = activation, limits
        integers = torch.randint(-127, 128, (6, 3, 3, 3), generator=generator, dtype=torch.int8)
        self.register_buffer("_frozen_param0", integers)
        self.register_buffer("scale0", torch.rand(6, generator=generator) / 100 + 0.001)
        self.register_buffer("zero0", torch.zeros(6, dtype=torch.int64))
        self.register_buffer("_frozen_param1", integers[:5, 0, :2].reshape(5, 6).contiguous())
        self.conv = nn.Module()
        self.conv.bias = nn.Parameter(torch.rand(6, generator=generator))
        self.fc = nn.Module()
        self.fc.bias = nn.Parameter(torch.rand(5, generator=generator))

    def rounded(self, x, scale, zero_point):
        of = (scale, zero_point, *self.limits, self.activation)
        q = torch.ops.quantized_decomposed.quantize_per_tensor.default(x, *of)
        return torch.ops.quantized_decomposed.dequantize_per_tensor.default(q, *of)

    def forward(self, x):
        library = torch.ops.quantized_decomposed
        w0 = library.dequantize_per_channel.default(
            self._frozen_param0, self.scale0, self.zero0, 0, -128, 127, torch.int8
        )
        w1 = library.dequantize_per_tensor.default(
            self._frozen_param1, 0.004, 0, -128, 127, torch.int8
        )
        low = self.limits[0]
        x = self.rounded(x, 0.03, (self.limits[0] + self.limits[1] + 1) // 2)
        y = torch.relu(torch.nn.functional.conv2d(x, w0, self.conv.bias, padding=1))
        y = self.rounded(y, 0.05, low).mean(dim=(2, 3))
        return torch.nn.functional.linear(self.rounded(y, 0.03, low), w1, self.fc.bias)


@pytest.mark.parametrize(
    ("activation", "limits"),
    [(torch.uint8, (0, 255)), (torch.int8, (-128, 127)), (torch.uint8, (0, 127))],
    ids=["uint8", "int8", "seven bits"],
)
def test_a_quantized_program_runs_on_its_own_integers(rng, tmp_path, activation, limits):
    module = Written(activation, limits).eval()
    program = torch.export.export(module, (torch.zeros(1, 3, 7, 6),))
    torch.export.save(program, tmp_path / "model.pt2")
    imported = import_model(tmp_path / "model.pt2")
    mod = canonicalize(imported.mod)
    assert [layer.name for layer in layers_of(mod)] == ["conv", "fc"]
    taken = take_imported(mod, {name: Treatment("int8") for name in ("conv", "fc")})
    assert not any(d.declined for d in taken.decisions)
    for _ in range(4):
        x = rng.standard_normal((1, 3, 7, 6)).astype("float32") * 2
        wanted = imported.reference([x])[0]
        size = np.abs(wanted).max()
        assert np.abs(run(mod, x) - wanted).max() < 1e-6 * size
        assert np.abs(run(taken.treated, x) - wanted).max() < 0.02 * size


def test_a_scale_that_is_computed_is_refused():
    class Dynamic(nn.Module):
        def forward(self, x):
            of = (x.abs().max() / 127, torch.tensor(0), -128, 127, torch.int8)
            q = torch.ops.quantized_decomposed.quantize_per_tensor.tensor(x, *of)
            return torch.ops.quantized_decomposed.dequantize_per_tensor.tensor(q, *of)

    register_operators()
    with pytest.raises(UnsupportedModel, match="scale"):
        import_model(Dynamic(), example=(torch.zeros(2, 3),))


def test_what_torchao_writes(rng, tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.point, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8 * 9, 10)

        def forward(self, x):
            x = torch.relu(self.conv(x))
            x = torch.relu(self.point(torch.relu(self.depthwise(x))) + x)
            return self.fc(torch.max_pool2d(x, 2).flatten(1))

    torch.manual_seed(0)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    example = (torch.randn(1, 3, 8, 8),)
    prepared = prepare_pt2e(torch.export.export(Net().eval(), example).module(), quantizer)
    for _ in range(8):
        prepared(torch.randn(1, 3, 8, 8))
    imported = import_model(torch.export.export(convert_pt2e(prepared), example))
    mod = canonicalize(imported.mod)
    names = [layer.name for layer in layers_of(mod)]
    assert names == ["conv", "depthwise", "point", "fc"]
    taken = take_imported(mod, {name: Treatment("int8") for name in names})
    assert not any(d.declined for d in taken.decisions)
    for _ in range(3):
        x = rng.standard_normal((1, 3, 8, 8)).astype("float32")
        wanted = imported.reference([x])[0]
        assert np.abs(run(taken.treated, x) - wanted).max() < 0.02 * np.abs(wanted).max()
