# SPDX-License-Identifier: Apache-2.0
"""Binary layers against their equations, the optimizer against a plain restatement of its own, and training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from compiler.nn.binary import (
    BinaryBlock,
    BinaryConv2d,
    BinaryLinear,
    RPReLU,
    RSign,
    SecondOrderFilter,
    exact_sign,
    parameter_groups,
    sign,
)


def test_the_sign_of_zero_is_plus_one():
    x = torch.tensor([-0.0, 0.0, 1e-30, -1e-30, float("inf"), float("-inf"), float("nan")])
    assert exact_sign(x).tolist() == [1, 1, 1, -1, 1, -1, -1]
    assert sign(x.requires_grad_()).tolist() == [1, 1, 1, -1, 1, -1, -1]


@pytest.mark.parametrize(
    ("gradient", "wanted"),
    [("clip", [0, 1, 1, 1, 1, 1, 0]), ("piecewise", [0, 0, 1, 2, 1.5, 0, 0])],
)
def test_gradients_of_sign(gradient, wanted):
    x = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.25, 1.0, 1.01], requires_grad=True)
    (sign(x, gradient) * 3).sum().backward()
    assert x.grad.tolist() == [3 * w for w in wanted]


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="gradient is 'relu'"):
        sign(torch.zeros(1), "relu")
    with pytest.raises(ValueError, match="scale is 'max'"):
        BinaryLinear(3, 4, scale="max")
    with pytest.raises(ValueError, match="pad_value is 2"):
        BinaryConv2d(3, 4, 3, pad_value=2)
    with pytest.raises(ValueError, match="4 channels cannot be repeated to 6"):
        BinaryBlock(4, 6)
    with pytest.raises(ValueError, match="alpha is 0"):
        SecondOrderFilter([nn.Parameter(torch.ones(1))], gamma=0.1, alpha=0)


@pytest.mark.parametrize("pad_value", [0, 1, -1])
def test_convolution_is_exact(pad_value, rng):
    layer = BinaryConv2d(6, 4, 3, stride=2, padding=1, groups=2, pad_value=pad_value)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = 0
    x = torch.from_numpy(np.where(rng.random((2, 6, 7, 5)) < 0.5, -1.0, 1.0)).float()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=pad_value)
    w = layer.weight.detach().numpy()
    signs, scale = np.where(w >= 0, 1.0, -1.0), np.abs(w).mean((1, 2, 3), dtype="float64")
    y = layer(x).detach().numpy()
    for o in range(4):
        g = slice(o // 2 * 3, o // 2 * 3 + 3)
        for i in range(4):
            for j in range(3):
                window = padded[:, g, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                wanted = (window * signs[o]).sum((1, 2, 3)) * scale[o]
                np.testing.assert_allclose(y[:, o, i, j], wanted, rtol=1e-6)


def test_latent_weights_learn_where_they_are_not_clipped():
    layer = BinaryLinear(3, 1, scale="none")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -1.0, 1.5]]))
    layer(torch.tensor([[1.0, -1.0, 1.0]])).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, -1.0, 0.0]]
    assert torch.equal(layer(torch.ones(1, 3)), torch.tensor([[1.0]]))


def test_rsign_and_rprelu():
    threshold, activation = RSign(2), RPReLU(2, slope=0.5)
    with torch.no_grad():
        threshold.shift.copy_(torch.tensor([0.5, -2.0]))
        activation.shift_in.copy_(torch.tensor([0.0, 1.0]))
        activation.shift_out.copy_(torch.tensor([10.0, 0.0]))
    x = torch.tensor([[[-0.5, -0.6]], [[2.0, 1.9]]]).permute(1, 0, 2)  # [1, 2, 2]
    assert threshold(x).tolist() == [[[1, -1], [1, -1]]]
    y = activation(torch.tensor([[[-2.0, 3.0], [-3.0, 1.0]]]))
    assert y.tolist() == [[[9.0, 13.0], [-1.0, 2.0]]]


def test_groups_hold_every_parameter_once():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), BinaryBlock(4, 8, stride=2))
    groups = parameter_groups(model)
    assert [p.shape for p in groups.binary] == [(8, 4, 3, 3)]
    assert len(groups.norm) == 4
    everything = [*groups.binary, *groups.norm, *groups.real]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))


def gradients(rng, steps: int, size: int) -> np.ndarray:
    """Gradients that wander, so that weights flip now and then."""
    return 0.1 * np.cumsum(rng.standard_normal((steps, size)), 0) + rng.standard_normal(
        (steps, size)
    )


def run_filter(w0: np.ndarray, grads: np.ndarray, **hyper) -> tuple[np.ndarray, SecondOrderFilter]:
    """The signs after every step."""
    weight = nn.Parameter(torch.tensor(w0, dtype=torch.float64))
    optimizer = SecondOrderFilter([weight], **hyper)
    signs = []
    for grad in grads:
        weight.grad = torch.tensor(grad)
        optimizer.step()
        signs.append(weight.detach().numpy().copy())
    return np.array(signs), optimizer


def run_latent_sgd(w0, grads, lr: float, decay: float, gamma: float) -> np.ndarray:
    """The signs of latent weights: w <- (1 - lr decay) w - lr m."""
    w, m, signs = w0.astype("float64").copy(), np.zeros_like(w0, dtype="float64"), []
    for grad in grads:
        m = (1 - gamma) * m + gamma * grad
        w = (1 - lr * decay) * w - lr * m
        signs.append(np.where(w >= 0, 1.0, -1.0))
    return np.array(signs)


@pytest.mark.parametrize(("init", "total"), [(0.0, None), (0.3, None), (0.3, 150)])
def test_optimizer_follows_its_equations(init, total, rng):
    w0, grads = rng.standard_normal(50), gradients(rng, 200, 50)
    signs, optimizer = run_filter(w0, grads, gamma=0.1, alpha=0.02, init=init, total_steps=total)
    b, m, v = np.where(w0 >= 0, 1.0, -1.0), np.zeros(50), -init * w0
    flips = []
    for t, grad in enumerate(grads):
        alpha = 0.02 if total is None else 0.02 * max(0.0, 1 - t / total)
        m = 0.9 * m + 0.1 * grad
        v = (1 - alpha) * v + alpha * m
        flip = v * b > 0
        b = np.where(flip, -b, b)
        flips.append(flip.mean())
        assert np.array_equal(signs[t], b), t
    np.testing.assert_allclose(optimizer.flip_history, flips)
    assert optimizer.flip_rate == flips[-1] and 0 < np.mean(flips) < 0.2
    if total is not None:  # at alpha 0 nothing flips
        assert not any(flips[total:]) and any(flips[total - 60 : total])


def test_filter_is_latent_sgd_with_alpha_lr_times_decay(rng):
    w0, grads = rng.standard_normal(40), gradients(rng, 2000, 40)
    lr, decay, gamma = 0.25, 0.0625, 0.1
    latent = run_latent_sgd(w0, grads, lr, decay, gamma)
    filtered, _ = run_filter(w0, grads, gamma=gamma, alpha=lr * decay, init=decay)
    assert np.array_equal(latent, filtered)
    assert (np.diff(latent, axis=0) != 0).sum() > 100
    other, _ = run_filter(w0, grads, gamma=gamma, alpha=2 * lr * decay, init=decay)
    assert not np.array_equal(latent, other)


def test_latent_learning_rate_alone_does_not_matter(rng):
    """lr and decay only as their product, once the start is forgotten: signs agree from any lr."""
    grads = gradients(rng, 600, 40)
    start = np.zeros(40)
    first = run_latent_sgd(start, grads, 0.25, 0.0625, 0.1)
    assert np.array_equal(first, run_latent_sgd(start, grads, 2.0, 0.0078125, 0.1))


def test_without_decay_only_init_over_learning_rate_matters(rng):
    w0, grads = rng.standard_normal(40), gradients(rng, 600, 40)
    signs = run_latent_sgd(w0, grads, 0.5, 0.0, 0.1)
    assert np.array_equal(signs, run_latent_sgd(4 * w0, grads, 2.0, 0.0, 0.1))
    assert not np.array_equal(signs, run_latent_sgd(4 * w0, grads, 0.5, 0.0, 0.1))


def test_optimizer_state_is_saved_and_restored(rng):
    w0, grads = rng.standard_normal(20), gradients(rng, 60, 20)
    hyper = {"gamma": 0.2, "alpha": 0.05, "total_steps": 60}
    whole, _ = run_filter(w0, grads, **hyper)
    half, optimizer = run_filter(w0, grads[:30], **hyper)
    weight = nn.Parameter(torch.tensor(half[-1]))
    resumed = SecondOrderFilter([weight], **hyper)
    resumed.load_state_dict(optimizer.state_dict())
    for grad, wanted in zip(grads[30:], whole[30:]):
        weight.grad = torch.tensor(grad)
        resumed.step()
        assert np.array_equal(weight.detach().numpy(), wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"out_channels": 8, "stride": 2},
        pytest.param(
            {"out_channels": 6, "shortcut": "conv", "scale": "none"}, marks=pytest.mark.slow
        ),
    ],
)
def test_blocks_export(settings, agrees_when_exported, rng):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), BinaryBlock(4, **settings), nn.Flatten(), nn.LazyLinear(12), RSign(12), BinaryLinear(12, 5)
    )  # fmt: skip
    x = torch.from_numpy(rng.standard_normal((2, 3, 9, 7))).float()
    model(x)  # statistics of the norms, and the lazy layer's size
    agrees_when_exported(model, x)


@pytest.mark.slow
def test_digits_within_two_points_of_the_float_twin():
    pytest.importorskip("sklearn")
    from tools import binary_digits

    data, accuracy = binary_digits.Digits.load(), {}
    for name, (binary, _, scale) in binary_digits.NETWORKS.items():
        model, accuracy[name], gradient_filter = binary_digits.train(name, data)
        if gradient_filter is not None:
            history = gradient_filter.flip_history
            assert np.mean(history[-20:]) < np.mean(history[:40])
        if binary and scale == "none":
            for weight in parameter_groups(model).binary:
                assert set(weight.detach().unique().tolist()) == {-1.0, 1.0}
    assert accuracy["float"] > 97
    assert min(accuracy.values()) > accuracy["float"] - 2, accuracy
