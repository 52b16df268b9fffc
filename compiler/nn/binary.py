# SPDX-License-Identifier: Apache-2.0
"""Binary networks in torch: layers whose weights and inputs are +-1, and the optimizer without latent weights.

    sign(x) = +1 if x >= 0 else -1

everywhere: of activations, of weights, of zero and of -0 (+1), of NaN (-1). Outside training every module is the plain
operators that this line says, so an exported graph holds `where(x >= 0, 1, -1)` and convolutions with +-1 constants.

Gradients of sign, which has none (`gradient=`):

    "clip"       dy/dx = 1 where |x| <= 1, else 0                     (straight-through; Hubara et al. 2016)
    "piecewise"  dy/dx = 2 - 2 |x| where |x| < 1, else 0              (Bi-Real net, Liu et al. 2018; ReActNet 2020)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

GRADIENTS = ("clip", "piecewise")
SCALES = ("mean", "none")


def exact_sign(x: torch.Tensor) -> torch.Tensor:
    """+1 where x >= 0, else -1, in x's dtype; no gradient."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, gradient: str) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return exact_sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        (x,) = ctx.saved_tensors
        size = x.abs()
        if ctx.gradient == "clip":
            return grad * (size <= 1), None
        return grad * (2 - 2 * size).clamp(min=0), None


def sign(x: torch.Tensor, gradient: str = "piecewise") -> torch.Tensor:
    """`exact_sign(x)` with one of the module's `GRADIENTS`. Raises ValueError for another."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient is {gradient!r}, not one of {', '.join(GRADIENTS)}")
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return exact_sign(x)
    return _Sign.apply(x, gradient)


def _per_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """values [C] against x [N, C, ...] or, for a matrix, [N, C]."""
    return values.reshape(-1, *[1] * (x.ndim - 2))


class RSign(nn.Module):
    """y = sign(x + shift), `shift` [channels] learned: the threshold of each channel is -shift (ReActNet).

    x [N, channels, ...].
    """

    def __init__(self, channels: int, gradient: str = "piecewise"):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.gradient = gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sign(x + _per_channel(self.shift, x), self.gradient)


class RPReLU(nn.Module):
    """y = prelu(x + shift_in, slope) + shift_out, all three [channels] and learned (ReActNet). x [N, channels, ...]."""

    def __init__(self, channels: int, slope: float = 0.25):
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels))
        self.shift_out = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), float(slope)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.prelu(x + _per_channel(self.shift_in, x), self.slope)
        return y + _per_channel(self.shift_out, x)


def _check_scale(scale: str) -> str:
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}, not one of {', '.join(SCALES)}")
    return scale


class BinaryConv2d(nn.Conv2d):
    """y[:, o] = s[o] * conv2d(x, sign(weight))[:, o] for x of +-1, without a bias.

    `scale`: "mean" is s[o] = mean |weight[o]|, a constant to the gradient (XNOR-net's scaling of latent weights; 1 for
    weights that are +-1 themselves); "none" is s = 1. The weight's gradient is the straight-through one, since a
    weight of +-1 must receive it. `pad_value`: what lies beyond the border, 0, +1 or -1; 0 is no binary value there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        scale: str = "mean",
        pad_value: float = 0.0,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False
        )
        if pad_value not in (0, 1, -1):
            raise ValueError(f"pad_value is {pad_value}, not 0, 1 or -1")
        self.scale, self.pad_value = _check_scale(scale), float(pad_value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = self.padding
        if self.pad_value and any(padding):
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=self.pad_value)
            padding = (0, 0)
        weight = sign(self.weight, "clip")
        y = F.conv2d(x, weight, None, self.stride, padding, self.dilation, self.groups)
        return y if self.scale == "none" else y * _mean_size(self.weight).reshape(-1, 1, 1)


class BinaryLinear(nn.Linear):
    """y[..., o] = s[o] * (x @ sign(weight).T)[..., o] for x of +-1, without a bias; `scale` as in `BinaryConv2d`."""

    def __init__(self, in_features: int, out_features: int, *, scale: str = "mean"):
        super().__init__(in_features, out_features, bias=False)
        self.scale = _check_scale(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, sign(self.weight, "clip"))
        return y if self.scale == "none" else y * _mean_size(self.weight)


def _mean_size(weight: torch.Tensor) -> torch.Tensor:
    """mean |weight| per output channel, without a gradient."""
    return weight.detach().abs().flatten(1).mean(1)


class BinaryBlock(nn.Module):
    """y = RPReLU(BN(conv(RSign(x))) + shortcut(x)): one binary convolution with a real-valued shortcut around it.

    x [N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)] for 3x3 (padding 1) and 1x1
    kernels. The shortcut is x; averaged over stride x stride windows where `stride` is not 1; and where the number of
    channels changes, repeated (`shortcut="repeat"`, ReActNet: no weights, a whole multiple only) or through a
    real 1x1 convolution and BN (`shortcut="conv"`, Bi-Real net).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        scale: str = "mean",
        shortcut: str = "repeat",
        gradient: str = "piecewise",
    ):
        super().__init__()
        if shortcut not in ("repeat", "conv"):
            raise ValueError(f"shortcut is {shortcut!r}, not repeat or conv")
        if shortcut == "repeat" and out_channels % in_channels:
            raise ValueError(
                f"{in_channels} channels cannot be repeated to {out_channels}; use shortcut='conv'"
            )
        self.binarize = RSign(in_channels, gradient)
        self.conv = BinaryConv2d(
            in_channels, out_channels, kernel_size,
            stride=stride, padding=kernel_size // 2, scale=scale,
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(out_channels)
        # Ceil, as a padded convolution of this stride counts; windows beyond the border count what is there.
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        self.stride, self.repeats = stride, out_channels // in_channels
        self.project = None
        if in_channels != out_channels and shortcut == "conv":
            self.project = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.activation = RPReLU(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        around = self.pool(x) if self.stride != 1 else x
        if self.project is not None:
            around = self.project(around)
        elif self.repeats > 1:
            around = torch.cat([around] * self.repeats, 1)
        return self.activation(self.norm(self.conv(self.binarize(x))) + around)


@dataclass(frozen=True)
class ParameterGroups:
    """The parameters of a network by what trains them: weights of binary layers, of normalisations, and the rest."""

    binary: list[nn.Parameter]
    norm: list[nn.Parameter]
    real: list[nn.Parameter]


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """Every parameter of `model` once, in its group."""
    kinds: dict[nn.Parameter, str] = {}
    for module in model.modules():
        kind = "norm" if isinstance(module, _NORMS) else "real"
        for name, parameter in module.named_parameters(recurse=False):
            binary = isinstance(module, (BinaryConv2d, BinaryLinear)) and name == "weight"
            kinds.setdefault(parameter, "binary" if binary else kind)
    return ParameterGroups(
        *(
            [p for p, kind in kinds.items() if kind == wanted]
            for wanted in ("binary", "norm", "real")
        )
    )


class SecondOrderFilter(torch.optim.Optimizer):
    """Trains binary weights b = +-1 by filtering their gradients twice, without latent weights.

        b <- sign(b),  m <- 0,  v <- -init * w0                           w0: the weight as it was before sign
        m <- (1 - gamma) m + gamma * gradient
        v <- (1 - alpha_t) v + alpha_t * m,     alpha_t = alpha * (1 - t / total_steps)
        flip b where v * b > 0

    (Quist, Li, van Gemert 2023.) The same signs as SGD on latent weights w = -v / decay with learning rate lr, weight
    decay `decay` and momentum 1 - gamma (dampened by the same), where alpha = lr * decay and init = decay. `init`
    0, the default, starts from rest; only its size against alpha matters. `total_steps` None keeps alpha as it is.

    `flip_rate` is the share of the binary weights that the last step flipped, `flip_history` that of every step.
    """

    def __init__(
        self,
        params: Iterable,
        *,
        gamma: float,
        alpha: float,
        init: float = 0.0,
        total_steps: int | None = None,
    ):
        for name, value in (("gamma", gamma), ("alpha", alpha)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} is {value}, not in (0, 1]")
        if init < 0:
            raise ValueError(f"init is {init}, less than 0")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}, less than 1")
        defaults = {"gamma": gamma, "alpha": alpha, "init": init, "total_steps": total_steps}
        super().__init__(params, defaults)
        self.flip_history: list[float] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                self._start(parameter, group["init"])

    @property
    def flip_rate(self) -> float:
        """Share of weights flipped by the last step; NaN before the first."""
        return self.flip_history[-1] if self.flip_history else float("nan")

    @torch.no_grad()
    def _start(self, parameter: nn.Parameter, init: float) -> None:
        self.state[parameter] = {
            "step": 0,
            "m": torch.zeros_like(parameter),
            "v": -init * parameter,
        }
        parameter.copy_(exact_sign(parameter))

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step on every weight that has a gradient; returns the loss if `closure` computes one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        flipped, total = 0, 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    flipped += self._update(parameter, group)
                    total += parameter.numel()
        self.flip_history.append(flipped / total if total else 0.0)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict) -> int:
        """Filter, flip; the number of weights flipped."""
        state = self.state[parameter]
        alpha, steps = group["alpha"], group["total_steps"]
        if steps is not None:
            alpha *= max(0.0, 1 - state["step"] / steps)
        state["step"] += 1
        m, v = state["m"], state["v"]
        m.mul_(1 - group["gamma"]).add_(parameter.grad, alpha=group["gamma"])
        v.mul_(1 - alpha).add_(m, alpha=alpha)
        flip = v * parameter > 0
        parameter.copy_(torch.where(flip, -parameter, parameter))
        return int(flip.sum())
