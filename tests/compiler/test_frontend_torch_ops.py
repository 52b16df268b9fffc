# SPDX-License-Identifier: Apache-2.0
"""Every ATen converter against torch. The cases of a group share one export; a case that must be refused has its own."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compiler.frontend import import_model
from passes.evaluate import evaluate
from schedules.errors import UnsupportedModel

IMAGE, ROWS, TOKENS = (2, 6, 9, 7), (3, 5, 8), (2, 5)


class Cases(nn.Module):
    """All functions on the same inputs."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, *inputs):
        return tuple(f(*inputs) for f in self.functions)


def check(module: nn.Module, *inputs: torch.Tensor, tolerance: float = 2e-5) -> None:
    imported = import_model(module, example=inputs)
    arrays = [t.numpy() for t in inputs]
    results, expected = evaluate(imported.mod, arrays), imported.reference(arrays)
    assert len(results) == len(expected) == len(imported.outputs)
    for i, (result, wanted, spec) in enumerate(zip(results, expected, imported.outputs)):
        assert result.shape == wanted.shape == spec.shape, i
        assert spec.dtype == wanted.dtype.name, i
        np.testing.assert_allclose(
            result, wanted, rtol=tolerance, atol=tolerance, err_msg=f"case {i}"
        )


def tensor(shape, seed=0, low=None):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values if low is None else values.abs() + low


UNARY = [
    torch.abs, torch.ceil, torch.cos, torch.erf, torch.exp, torch.floor, torch.sigmoid, torch.sin, torch.tan, torch.tanh, torch.trunc, torch.sign,
    torch.atan, torch.cosh, torch.sinh, torch.square, torch.neg, torch.relu, torch.isnan, torch.isinf, torch.isfinite, F.silu, F.gelu, F.mish,
    F.relu6, F.hardtanh, F.hardsigmoid, F.hardswish, F.elu, F.leaky_relu, F.softplus, F.logsigmoid, F.softsign, F.selu, F.celu, torch.expm1,
    lambda x: F.gelu(x, approximate="tanh"), lambda x: F.elu(x, 0.3), lambda x: F.softplus(x, 2.0, 1.0), lambda x: F.leaky_relu(x, 0.2),
    lambda x: x.clamp(-0.3, 0.4), lambda x: x.clamp(min=0.1), lambda x: x.clamp(max=0.2), lambda x: x.clamp_min(0.1), lambda x: x.softmax(1),
    lambda x: x.log_softmax(-1), lambda x: 1 - x, lambda x: x - 2, lambda x: torch.add(x, x, alpha=3), lambda x: torch.sub(x, x * x, alpha=2),
    lambda x: torch.rsub(x, 2, alpha=3), lambda x: x / 3, lambda x: x**2, lambda x: x**3, lambda x: x**4, lambda x: 2**x, lambda x: x > 0,
    lambda x: (x > 0) & (x < 1), lambda x: (x > 0) | ~(x < 1), lambda x: torch.where(x > 0, x, 0.5), lambda x: x.masked_fill(x > 0, -1.0),
    lambda x: (x > 0).float(), lambda x: x.to(torch.int64), lambda x: (x > 0) * x, lambda x: torch.maximum(x, -x), lambda x: torch.floor_divide(x, 0.3),
    lambda x: torch.div(x, 0.3, rounding_mode="trunc"), lambda x: x == x, lambda x: torch.logical_xor(x > 0, x > 1), lambda x: x * 0 + 3, lambda x: (x > 0) * (x < 1), lambda x: (x > 1) + (x < 0),
]  # fmt: skip

POSITIVE = [
    torch.log,
    torch.log1p,
    torch.sqrt,
    torch.rsqrt,
    torch.reciprocal,
    lambda x: x**0.5,
    lambda x: x**-1.5,
    lambda x: x.log2(),
]


def shifted(x):
    """As decoders are given their own tokens: assignments to parts of a tensor."""
    y = x.new_zeros(x.shape)
    y[:, 1:] = x[:, :-1].clone()
    y[:, 0] = 2
    return y


MOVING = [
    lambda x: x[:, -1], lambda x: x[..., -2], lambda x: x[-1], lambda x: x[:, 1:-1], lambda x: x[:, ::2], lambda x: x[:, -3:], lambda x: x[:, :100],
    lambda x: x.transpose(1, -1), lambda x: x.permute(2, 0, 3, 1), lambda x: x.flatten(1), lambda x: x.unflatten(1, (2, -1)), lambda x: x.reshape(2, -1),
    lambda x: x.unsqueeze(1), lambda x: x[:, :1].squeeze(1), lambda x: torch.cat([x, x * 2], 1), lambda x: torch.stack([x, -x], 2), lambda x: x.chunk(3, 1)[1],
    lambda x: x.split([1, 2, 3], 1)[2], lambda x: x.split(4, 1)[1], lambda x: x.unbind(2)[-1], lambda x: x.expand(2, 2, *x.shape[1:]) if x.shape[0] == 1 else x[:1].expand(3, -1, -1, -1),
    lambda x: x.repeat(1, 2, 1, 1), lambda x: torch.roll(x, 2, 1), lambda x: torch.roll(x, (1, -2), (2, 3)), lambda x: x.flip(2), lambda x: F.pad(x, (1, 2, 0, 3)),
    lambda x: F.pad(x, (-1, 2), value=0.5), lambda x: x.tril(), lambda x: x.triu(1), lambda x: F.pixel_shuffle(x[:, :4], 2), lambda x: x.movedim(1, -1).contiguous(),
    lambda x: x.index_select(1, torch.tensor([0, 3, 3])), lambda x: x[:, torch.tensor([0, -1, 2])], lambda x: x[torch.tensor([0, -1]), torch.tensor([2, -2])],
    lambda x: torch.gather(x, 3, torch.arange(3).expand(2, 6, 9, 3)), lambda x: torch.ones_like(x) * x, lambda x: torch.full_like(x, 2.0) + x, lambda x: x.narrow(1, 2, 3),
    lambda x: torch.einsum("nchw,ncHw->nhH", x, x), lambda x: torch.zeros(3) + x[0, 0, 0, 0], lambda x: x.view(2, 6, -1).mT,
    shifted, lambda x: x.slice_scatter(x[:, :2] * 2, 1, -4, 5, 2), lambda x: x.select_scatter(x[..., 0], 3, -2),
    lambda x: torch.zeros_like(x).copy_(x[:, :1]), lambda x: F.unfold(x[:, :, :8, :6], (2, 3), stride=(2, 3)), lambda x: F.fold(x.reshape(2, 54, 7)[:, :12], (3, 14), (3, 2), stride=(3, 2)),
]  # fmt: skip

REDUCING = [
    lambda x: x.mean(), lambda x: x.mean((2, 3)), lambda x: x.mean(1, keepdim=True), lambda x: x.sum(), lambda x: x.sum(-1), lambda x: x.amax((2, 3)), lambda x: x.amin(1),
    lambda x: x.max(1).values, lambda x: x.min(1, keepdim=True).values, lambda x: x.max(), lambda x: x.var(1), lambda x: x.var((2, 3), unbiased=False),
    lambda x: x.std(1), lambda x: x.argmax(1), lambda x: x.argmin(-1, keepdim=True), lambda x: x.argmax(), lambda x: x.cumsum(1), lambda x: x.norm(dim=1),
    lambda x: torch.logsumexp(x, 1), lambda x: F.normalize(x, dim=1), lambda x: (x > 0).sum(1), lambda x: x.any(1) if x.dtype == torch.bool else x.sum((0, 1)),
]  # fmt: skip

POOLING = [
    lambda x: F.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), lambda x: F.max_pool2d(x, (2, 3), (1, 2)),
    lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), lambda x: F.max_pool2d(x, 2, 1, dilation=2), lambda x: F.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 3, 2, 1),
    lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True), lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda x: F.adaptive_avg_pool2d(x, (3, 7)), lambda x: F.adaptive_avg_pool2d(x, (4, 2)), lambda x: F.interpolate(x, scale_factor=2.0), lambda x: F.interpolate(x, size=(18, 14)),
    lambda x: F.adaptive_max_pool2d(x, 1), lambda x: F.adaptive_max_pool2d(x, (3, 7)), lambda x: F.interpolate(x, size=(13, 4)), lambda x: F.interpolate(x, scale_factor=2.05), lambda x: F.interpolate(x, scale_factor=(1.7, 0.6)),
    lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), lambda x: F.interpolate(x, size=(5, 11), mode="bilinear", align_corners=True),
    lambda x: F.interpolate(x, size=(4, 3), mode="bilinear"), lambda x: F.max_pool2d(x, 2)[:, -1],
]  # fmt: skip


@pytest.mark.parametrize(
    ("functions", "example"),
    [
        (UNARY, tensor(IMAGE)),
        (POSITIVE, tensor(IMAGE, low=0.1)),
        (MOVING, tensor(IMAGE)),
        (REDUCING, tensor(IMAGE)),
        (POOLING, tensor(IMAGE)),
    ],
    ids=["elementwise", "positive", "moving", "reducing", "pooling"],
)
def test_functions_of_one_tensor(functions, example):
    check(Cases(functions), example)


class Layers(nn.Module):
    """Layers with weights, each on its own slice of the inputs."""

    def __init__(self):
        super().__init__()
        self.images = nn.ModuleList([
            nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, (3, 1), stride=2, padding=(2, 0)), nn.Conv2d(6, 12, 3, groups=6, dilation=2, bias=False),
            nn.Conv2d(6, 4, 3, padding="same", groups=2), nn.Conv2d(6, 4, 4, padding="same"), nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False),
            nn.GroupNorm(3, 6), nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), nn.PReLU(6), nn.PReLU(),
            nn.Dropout(), nn.Upsample(scale_factor=3), nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 4, 1)), nn.PixelUnshuffle(1),
        ])  # fmt: skip
        self.rows = nn.ModuleList([
            nn.Linear(8, 4), nn.Linear(8, 4, bias=False), nn.LayerNorm(8), nn.LayerNorm((5, 8)), nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8),
            nn.RMSNorm(8, eps=1e-3), nn.Conv1d(5, 4, 3, padding=1), nn.Conv1d(5, 10, 3, stride=2, groups=5, dilation=2), nn.BatchNorm1d(5), nn.ConvTranspose1d(5, 3, 3, 2),
        ])  # fmt: skip
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_()

    def forward(self, image, rows, tokens):
        return (
            *[m(image) for m in self.images],
            *[m(rows) for m in self.rows],
            self.embedding(tokens),
        )


def test_layers():
    torch.manual_seed(0)
    check(Layers().eval(), tensor(IMAGE), tensor(ROWS), torch.randint(11, TOKENS), tolerance=1e-4)


def attention(mask=None, causal=False, scale=None):
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale
    )


ATTENTION = [
    attention(), attention(causal=True), attention(scale=0.3), attention(torch.ones(7, 7, dtype=torch.bool).tril()), attention(torch.ones(7, 7, dtype=torch.bool)),
    attention(torch.tensor([True] * 5 + [False] * 2)[None, None, None, :]), attention(torch.linspace(-1, 1, 49).reshape(1, 1, 7, 7)),
    lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :4], v[:, :, :4]),
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=(k[..., 0] > -9)[:, :, None, :]), lambda q, k, v: torch.matmul(q, k.mT).softmax(-1) @ v,
    lambda q, k, v: torch.bmm(q[0], k[0].mT), lambda q, k, v: torch.baddbmm(v[0, :, :4, :], q[0, :, :4], k[0, :, :4], beta=0.5, alpha=2),
]  # fmt: skip


def test_attention():
    shape = (2, 3, 7, 4)
    check(Cases(ATTENTION), tensor(shape, 1), tensor(shape, 2), tensor(shape, 3))


def test_attention_stays_one_operator_and_a_causal_mask_is_recognised():
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    imported = import_model(
        Cases([attention(mask)]), example=tuple(tensor((2, 3, 7, 4), i) for i in range(3))
    )
    text = imported.mod.script(show_meta=False)
    assert "R.nn.attention(" in text and "TopLeft" in text


class Integers(nn.Module):
    def forward(self, tokens, x):
        mask = (tokens > 3).float()
        return (
            tokens + 1, tokens * 2 - 3, F.one_hot(tokens, 11), x[torch.arange(2), tokens[:, -1] * 0 - 1], tokens[:, -1],
            (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1), x / tokens.unsqueeze(-1).clamp(min=1), tokens > 2.5, tokens.float() / 2, tokens / 4,
            torch.where(tokens > 3, tokens, 0), tokens == tokens.flip(1),
        )  # fmt: skip


def test_integer_inputs():
    check(Integers(), torch.randint(11, TOKENS), tensor((2, 5, 8)))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent(kind, bidirectional):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = kind(8, 6, 2, batch_first=True, bidirectional=bidirectional)

        def forward(self, x):
            y, state = self.cells(x)
            return (y[:, -1], y, *(state if isinstance(state, tuple) else (state,)))

    torch.manual_seed(0)
    check(Recurrent().eval(), tensor((2, 4, 8)))


class Grid(nn.Module):
    def forward(self, x, grid):
        return F.grid_sample(x, grid, align_corners=False)


def refused(function, *inputs: torch.Tensor) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        import_model(
            function if isinstance(function, nn.Module) else Cases([function]), example=inputs
        )
    return str(caught.value)


def test_refuses_what_has_no_converter_all_at_once():
    message = refused(lambda x: torch.sort(x, 1)[0] + torch.special.bessel_j0(x), tensor(IMAGE))
    assert "2 operators have no converter" in message
    assert "sort" in message and "bessel_j0" in message


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: x[x > 0].sum(), "depends on data"),
        (lambda x: F.conv3d(x[None], torch.ones(1, 2, 2, 2, 2)), "3 spatial dimensions"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[1].float(), "does not compute"),
        (lambda x: x.max(1).indices, "does not compute"),
        (lambda x: x.double().sum(), "float64|wrong type"),
        (lambda x: F.adaptive_max_pool2d(x, (2, 7)), "different sizes"),
        (lambda x: x.half().float(), "float16"),
        (lambda x: F.unfold(x, 3), "patches that overlap"),
    ],
)
def test_refuses(function, says):
    message = refused(function, tensor(IMAGE))
    assert re.search(says, message), message


def test_refuses_grid_sample_or_is_right():
    assert "grid_sampler_2d" in refused(Grid(), tensor((1, 2, 4, 4)), tensor((1, 3, 3, 2)))
