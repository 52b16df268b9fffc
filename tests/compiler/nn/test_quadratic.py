# SPDX-License-Identifier: Apache-2.0
"""Quadratic neurons: their equations, where they start, gradients, memory, and export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiler.nn.quadratic import (
    KINDS,
    QuadraticConv1d,
    QuadraticConv2d,
    QuadraticConvTranspose1d,
    QuadraticConvTranspose2d,
    QuadraticLinear,
    relinear_groups,
)

LAYERS = {
    "linear": (lambda **k: QuadraticLinear(5, 3, **k), (2, 4, 5), F.linear, {}),
    "conv1d": (
        lambda **k: QuadraticConv1d(4, 6, 3, 2, 1, groups=2, **k), (2, 4, 7),
        F.conv1d, {"stride": 2, "padding": 1, "groups": 2},
    ),
    "conv2d": (
        lambda **k: QuadraticConv2d(2, 3, 3, padding=2, dilation=2, **k), (2, 2, 7, 5),
        F.conv2d, {"padding": 2, "dilation": 2},
    ),
    "transposed1d": (
        lambda **k: QuadraticConvTranspose1d(3, 2, 3, 2, **k), (2, 3, 4), F.conv_transpose1d, {"stride": 2},
    ),
    "transposed2d": (
        lambda **k: QuadraticConvTranspose2d(3, 2, 3, 2, 1, output_padding=1, **k), (1, 3, 4, 3),
        F.conv_transpose2d, {"stride": 2, "padding": 1, "output_padding": 1},
    ),
}  # fmt: skip


def made(layer: str, seed: int = 0, **settings) -> tuple[nn.Module, torch.Tensor]:
    """The layer with every parameter random, in float64, and an input."""
    torch.manual_seed(seed)
    make, shape, _, _ = LAYERS[layer]
    module = make(**settings).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module, torch.randn(shape, dtype=torch.float64)


def by_equation(layer: str, kind: str, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The docstring's table, spelled with torch's functions."""
    _, shape, function, geometry = LAYERS[layer]

    def f(name: str, value):
        return function(value, getattr(module, name).weight, None, **geometry)

    def constant(tensor):
        if tensor is None:
            return 0
        return tensor if layer == "linear" else tensor.reshape(-1, *[1] * (len(shape) - 2))

    def bias(name: str):
        return constant(getattr(module, name).bias)

    if kind == "t2":
        return f("b", x**2) + bias("b")
    r = f("r", x) + bias("r")
    if kind == "t3":
        return r**2
    g = f("g", x) + bias("g")
    rest = {
        "fan": lambda: f("b", x**2) + bias("b"),
        "t4": lambda: 0,
        "t2_4": lambda: f("g", x**2),
        "quadralib": lambda: f("b", x) + bias("b"),
        "compact": lambda: f("r", x) + constant(module.constant),
    }
    return r * g + rest[kind]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_is_its_equation_with_exact_gradients(layer, kind):
    module, x = made(layer, kind=kind)
    x.requires_grad_()
    wanted = by_equation(layer, kind, module, x)
    torch.testing.assert_close(module(x), wanted)  # the path that saves memory
    with torch.no_grad():
        torch.testing.assert_close(module(x), wanted)  # the path that is exported
    inputs = [x, *module.parameters()]
    mine = torch.autograd.grad(module(x).sin().sum(), inputs)
    theirs = torch.autograd.grad(wanted.sin().sum(), inputs)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    module, x = made("conv2d", kind=kind)
    names = [n for n, _ in module.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values)), (x,))

    inputs = [x[:1, :, :4, :3].contiguous(), *(p.detach() for p in module.parameters())]
    assert torch.autograd.gradcheck(run, [i.requires_grad_() for i in inputs])


def test_gradients_only_where_asked():
    module, x = made("linear", kind="fan")
    module.g.weight.requires_grad_(False)
    module(x).sum().backward()
    assert module.g.weight.grad is None and x.grad is None
    assert module.r.weight.grad is not None and module.g.bias.grad is not None


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"t2", "t3"}))
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_new_neuron_is_linear(layer, kind, bias):
    torch.manual_seed(1)
    make, shape, function, geometry = LAYERS[layer]
    module, x = make(kind=kind, bias=bias), torch.randn(shape)
    torch.testing.assert_close(module(x), function(x, module.r.weight, None, **geometry))


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_with_norms_a_new_neuron_is_linear_too(layer):
    make, shape, function, geometry = LAYERS[layer]
    module, x = make(kind="fan", branch_norm=True), torch.randn(shape)
    wanted = module.norm_r(function(x, module.r.weight, None, **geometry))
    torch.testing.assert_close(module(x), wanted)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def kept_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes of activations that autograd keeps from forward to backward."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x.requires_grad_())
    return sum(kept.values())


def test_memory_kept_for_backward():
    """The plain neuron keeps x, x * x, r and g, this one x: a quarter for as many outputs as inputs."""
    x = torch.randn(64, 256)
    saving, plain = (QuadraticLinear(256, 256, save_memory=s) for s in (True, False))
    assert kept_bytes(saving, x) == 64 * 256 * 4
    assert kept_bytes(plain, x) == 4 * 64 * 256 * 4


def test_relinear_groups():
    model = nn.Sequential(
        QuadraticConv2d(1, 2, 3), nn.Flatten(), QuadraticLinear(8, 3, branch_norm=True), QuadraticLinear(3, 2, kind="t2")
    )  # fmt: skip
    groups = relinear_groups(model, 0.1, factor_g=0.01, factor_b=0.001, shrink=0.5)
    rates = {id(p): (g["lr"], g.get("weight_decay")) for g in groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    conv, dense, last = model[0], model[2], model[3]
    assert rates[id(conv.r.weight)] == rates[id(dense.norm_r.bias)] == (0.1, None)
    assert rates[id(last.b.weight)] == (0.1, None)  # all there is in it
    assert rates[id(conv.g.weight)] == rates[id(dense.norm_g.weight)] == (0.001, 0.5)
    assert rates[id(conv.g.bias)] == (0.001, None)
    assert rates[id(conv.b.weight)] == (0.0001, 0.5)
    torch.optim.SGD(groups, lr=0.1)  # accepted as they are


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="kind is 't9'"):
        QuadraticLinear(2, 2, kind="t9")
    with pytest.raises(ValueError, match="padding_mode is 'reflect'"):
        QuadraticConv2d(2, 2, 3, padding=1, padding_mode="reflect")


QUICK = (("linear", False), ("conv2d", True))  # the others take as long and add little


class AllKinds(nn.Module):
    """One layer of each kind, each reading x."""

    def __init__(self, make, **settings):
        super().__init__()
        self.layers = nn.ModuleList(make(kind=kind, **settings) for kind in KINDS)

    def forward(self, x):
        return torch.cat([layer(x).relu().flatten(1) for layer in self.layers], 1)


@pytest.mark.parametrize(
    ("layer", "branch_norm"),
    [
        pytest.param(layer, norm, marks=() if (layer, norm) in QUICK else pytest.mark.slow)
        for layer in LAYERS
        for norm in (False, True)
    ],
)
def test_every_kind_exports(layer, branch_norm, agrees_when_exported):
    torch.manual_seed(2)
    make, shape, _, _ = LAYERS[layer]
    model = AllKinds(make, branch_norm=branch_norm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model(torch.randn(8, *shape[1:]))
    agrees_when_exported(model, torch.randn(shape))


def test_layers_keep_their_names(agrees_when_exported):
    from tests.compiler.test_frontend import layers

    torch.manual_seed(3)
    model = nn.Sequential(QuadraticLinear(8, 6), nn.ReLU(), QuadraticLinear(6, 4, kind="t4"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    for imported in agrees_when_exported(model, torch.randn(3, 8)):
        assert sorted(layers(imported)) == ["0.b", "0.g", "0.r", "2.g", "2.r"]
