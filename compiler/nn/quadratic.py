# SPDX-License-Identifier: Apache-2.0
"""Quadratic neurons in torch, as linear layers and convolutions of one and two dimensions, plain and transposed.

A neuron is r * g + q, where r, g, q are linear in x or in x * x; the activation comes after it. With W. the branches'
weights and b., c their constants (`kind=`):

    "fan"        (Wr x + br) (Wg x + bg) + Wb x^2 + c      Fan et al. 2023
    "t2"         Wb x^2 + c                                T2 of the zoo in QuadraLib (Xu et al. 2022)
    "t3"         (Wr x + br)^2                             T3
    "t4"         (Wr x + br) (Wg x + bg)                   T4
    "t2_4"       (Wr x + br) (Wg x + bg) + Wg x^2          T2&4, one weight in two places
    "quadralib"  (Wr x + br) (Wg x + bg) + Wb x + c        QuadraLib's own
    "compact"    (Wr x) (Wg x + bg) + Wr x + c             Bu and Karpatne 2021

Initialisation: Wr as torch initialises the linear layer, Wg = 0, bg = 1 ("compact": 0), Wb = 0, c = 0, so that a
network starts as the linear one; "t2" and "t3", which contain no linear layer, start as torch's. With `branch_norm`
each branch has a batch norm of its own, and it is the norms of g and of the branch b that start at scale 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class _Kind:
    """Which branches have weights; what is added to the product: the branch that gives it, and what that reads."""

    weights: tuple[str, ...]
    product: tuple[str, str] | None
    added: str | None = None
    of_square: bool = False


KINDS = {
    "fan": _Kind(("r", "g", "b"), ("r", "g"), "b", True),
    "t2": _Kind(("b",), None, "b", True),
    "t3": _Kind(("r",), ("r", "r")),
    "t4": _Kind(("r", "g"), ("r", "g")),
    "t2_4": _Kind(("r", "g"), ("r", "g"), "g", True),
    "quadralib": _Kind(("r", "g", "b"), ("r", "g"), "b"),
    "compact": _Kind(("r", "g"), ("r", "g"), "r"),
}


class _LinearMap:
    """x [..., I], w [O, I] -> x w^T."""

    def apply(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w)

    def gradients(
        self, grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, needs: tuple
    ) -> tuple:
        """With respect to x and w, where needed."""
        return (
            grad @ w if needs[0] else None,
            grad.reshape(-1, w.shape[0]).T @ x.reshape(-1, w.shape[1]) if needs[1] else None,
        )

    def constant(self, b: torch.Tensor, rank: int) -> torch.Tensor:
        return b


@dataclass(frozen=True)
class _ConvolutionMap:
    """x [N, I, ...], w in torch's layout -> convolution, or transposed convolution."""

    stride: tuple
    padding: tuple
    dilation: tuple
    transposed: bool
    output_padding: tuple
    groups: int

    def apply(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.convolution(x, w, None, *self._geometry)

    def gradients(
        self, grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, needs: tuple
    ) -> tuple:
        found = torch.ops.aten.convolution_backward(
            grad.contiguous(), x, w, None, *self._geometry, [*needs, False]
        )
        return found[:2]

    def constant(self, b: torch.Tensor, rank: int) -> torch.Tensor:
        return b.reshape(-1, *[1] * (rank - 2))

    @property
    def _geometry(self) -> tuple:
        return (
            self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups,
        )  # fmt: skip


class _Neuron(torch.autograd.Function):
    """r * g + q that keeps x and the weights alone for backward, where r and g (not q) are computed once more.

    Autograd on the plain expression keeps x, x * x, r and g. Constants br, bg, c come as tensors or None.
    """

    @staticmethod
    def forward(ctx, linear, kind: _Kind, x, wr, wg, wb, br, bg, c):
        ctx.linear, ctx.kind = linear, kind
        weights = {"r": wr, "g": wg, "b": wb}
        ctx.save_for_backward(x, wr, wg, wb, br, bg)
        ctx.has_c = c is not None
        y = None
        if kind.product is not None:
            branch = _branches(linear, kind, x, weights, {"r": br, "g": bg})
            y = branch[kind.product[0]] * branch[kind.product[1]]
        if kind.added is not None:
            q = linear.apply(x * x if kind.of_square else x, weights[kind.added])
            y = q if y is None else y.add_(q)
        return y if c is None else y + linear.constant(c, y.ndim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        linear, kind = ctx.linear, ctx.kind
        x, wr, wg, wb, br, bg = ctx.saved_tensors
        weights, constants = {"r": wr, "g": wg, "b": wb}, {"r": br, "g": bg}
        needs = dict(zip(("x", "r", "g", "b", "br", "bg", "c"), ctx.needs_input_grad[2:]))
        found: dict = {}

        def add(key: str, value) -> None:
            if value is not None:
                found[key] = value if key not in found else found[key] + value

        def through(name: str, upstream, source, factor=None) -> None:
            dx, dw = linear.gradients(upstream, source, weights[name], (needs["x"], needs[name]))
            add("x", dx if factor is None or dx is None else dx * factor)
            add(name, dw)

        if kind.product is not None:
            branch = _branches(linear, kind, x, weights, constants)
            r, g = kind.product
            upstream = {r: grad * branch[g]} if r != g else {r: 2 * grad * branch[r]}
            if r != g:
                upstream[g] = grad * branch[r]
            for name, value in upstream.items():
                through(name, value, x)
                if needs[f"b{name}"]:
                    add(f"b{name}", _sum_channels(linear, value))
        if kind.added is not None:
            source, factor = (x * x, 2 * x) if kind.of_square else (x, None)
            through(kind.added, grad, source, factor)
        if ctx.has_c and needs["c"]:
            add("c", _sum_channels(linear, grad))
        return None, None, *(found.get(k) for k in ("x", "r", "g", "b", "br", "bg", "c"))


def _branches(linear, kind: _Kind, x, weights: dict, constants: dict) -> dict:
    """The factors of the product, by name."""
    found = {}
    for name in dict.fromkeys(kind.product):
        y, constant = linear.apply(x, weights[name]), constants[name]
        found[name] = y if constant is None else y + linear.constant(constant, y.ndim)
    return found


def _sum_channels(linear, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of a constant per output channel."""
    axis = grad.ndim - 1 if isinstance(linear, _LinearMap) else 1
    return grad.sum([i for i in range(grad.ndim) if i != axis])


class _Quadratic(nn.Module):
    """A neuron of any kind around the linear layers that `make(bias)` returns."""

    def __init__(
        self,
        kind: str,
        bias: bool,
        make: Callable[[bool], nn.Module],
        norm: Callable[[], nn.Module] | None,
        save_memory: bool,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, not one of {', '.join(KINDS)}")
        self.kind, self.save_memory = kind, save_memory
        spec = KINDS[kind]
        # g always has its constant, which holds the 1 that makes the neuron a linear layer at first.
        constants = {"r": bias and kind != "compact", "g": True, "b": bias}
        for name in spec.weights:
            self.add_module(name, make(constants[name] and norm is None))
            if norm is not None:
                self.add_module(f"norm_{name}", norm())
        self.constant = None
        if kind == "compact" and bias:
            self.constant = nn.Parameter(torch.zeros(_channels(self.r)))
        self._initialise(spec, norm is not None)

    @torch.no_grad()
    def _initialise(self, spec: _Kind, with_norm: bool) -> None:
        if "r" in spec.weights and self.r.bias is not None:
            self.r.bias.zero_()
        if "g" in spec.weights:
            one = 0.0 if self.kind == "compact" else 1.0
            scale, shift = (
                (self.norm_g.weight, self.norm_g.bias)
                if with_norm
                else (self.g.weight, self.g.bias)
            )
            scale.zero_()
            shift.fill_(one)
        if "b" in spec.weights and self.kind != "t2":
            (self.norm_b.weight if with_norm else self.b.weight).zero_()
        if "b" in spec.weights and self.b.bias is not None:
            self.b.bias.zero_()

    def extra_repr(self) -> str:
        return f"kind={self.kind}"

    def _branch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = getattr(self, name)(x)
        norm = getattr(self, f"norm_{name}", None)
        return y if norm is None else norm(y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spec = KINDS[self.kind]
        if self._recomputes(x):
            return self._neuron(x, spec)
        branch = {name: self._branch(name, x) for name in dict.fromkeys(spec.product or ())}
        y = None
        if spec.product is not None:
            y = branch[spec.product[0]] * branch[spec.product[1]]
        if spec.added is not None:
            q = self._added(spec, x, branch)
            y = q if y is None else y + q
        if self.constant is not None:
            y = y + self._map().constant(self.constant, y.ndim)
        return y

    def _added(self, spec: _Kind, x: torch.Tensor, branch: dict) -> torch.Tensor:
        if spec.added in branch and not spec.of_square:
            return branch[spec.added]
        if spec.added in branch:  # the weight of a factor once more, without its constant
            return self._map().apply(x * x, getattr(self, spec.added).weight)
        return self._branch(spec.added, x * x if spec.of_square else x)

    def _recomputes(self, x: torch.Tensor) -> bool:
        """Whether this call keeps memory for a backward pass that a recomputation would save."""
        trains = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        plain = not hasattr(self, f"norm_{KINDS[self.kind].weights[0]}")
        return self.save_memory and trains and plain and not torch.compiler.is_compiling()

    def _neuron(self, x: torch.Tensor, spec: _Kind) -> torch.Tensor:
        def part(name: str, what: str):
            return getattr(getattr(self, name, None), what, None)

        c = self.constant if self.constant is not None else part("b", "bias")
        return _Neuron.apply(
            self._map(), spec, x,
            part("r", "weight"), part("g", "weight"), part("b", "weight"),
            part("r", "bias"), part("g", "bias"), c,
        )  # fmt: skip

    def _map(self):
        layer = getattr(self, KINDS[self.kind].weights[0])
        if isinstance(layer, nn.Linear):
            return _LinearMap()
        return _ConvolutionMap(
            layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups
        )  # fmt: skip


def _channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


class _LastAxisNorm(nn.BatchNorm1d):
    """Batch norm over the last axis of x [..., C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)


class QuadraticLinear(_Quadratic):
    """x [..., in_features] -> [..., out_features]; `kind`, `branch_norm` as the module's docstring says.

    `bias=False` leaves out the constants of r and b. `save_memory` recomputes r and g in backward (see `_Neuron`);
    it has no effect with `branch_norm`.
    """

    def __init__(
        self, in_features: int, out_features: int, *, kind: str = "fan", bias: bool = True,
        branch_norm: bool = False, save_memory: bool = True,
    ):  # fmt: skip
        norm = (lambda: _LastAxisNorm(out_features)) if branch_norm else None
        super().__init__(
            kind, bias, lambda b: nn.Linear(in_features, out_features, b), norm, save_memory
        )


class _QuadraticConvolution(_Quadratic):
    """Arguments of torch's own class (zero padding only) and of `QuadraticLinear`."""

    layer: type
    norm: type

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0, *,
        kind: str = "fan", bias: bool = True, branch_norm: bool = False, save_memory: bool = True,
        **geometry,
    ):  # fmt: skip
        def make(with_bias: bool) -> nn.Module:
            return self.layer(
                in_channels, out_channels, kernel_size, stride, padding, bias=with_bias, **geometry
            )

        if geometry.get("padding_mode", "zeros") != "zeros":
            raise ValueError(f"padding_mode is {geometry['padding_mode']!r}, not 'zeros'")
        norm = (lambda: self.norm(out_channels)) if branch_norm else None
        super().__init__(kind, bias, make, norm, save_memory)


class QuadraticConv1d(_QuadraticConvolution):
    """x [N, I, L] -> [N, O, L']."""

    layer, norm = nn.Conv1d, nn.BatchNorm1d


class QuadraticConv2d(_QuadraticConvolution):
    """x [N, I, H, W] -> [N, O, H', W']."""

    layer, norm = nn.Conv2d, nn.BatchNorm2d


class QuadraticConvTranspose1d(_QuadraticConvolution):
    """x [N, I, L] -> [N, O, L'], transposed."""

    layer, norm = nn.ConvTranspose1d, nn.BatchNorm1d


class QuadraticConvTranspose2d(_QuadraticConvolution):
    """x [N, I, H, W] -> [N, O, H', W'], transposed."""

    layer, norm = nn.ConvTranspose2d, nn.BatchNorm2d


def relinear_groups(
    model: nn.Module,
    lr: float,
    *,
    factor_g: float = 1e-3,
    factor_b: float = 1e-3,
    shrink: float = 0.0,
) -> list[dict]:
    """Parameter groups of ReLinear training (Fan et al.) for a torch optimizer: linear, g and b parameters.

    The quadratic terms learn more slowly, at lr * factor (1e-5 to 0.03 in the source), or are pulled back to the
    linear network by `shrink` as their weight decay (on weights alone, not on the constants, for bg belongs at 1).
    Empty groups are left out.
    """
    slow: dict[nn.Parameter, tuple[str, bool]] = {}
    for module in model.modules():
        if isinstance(module, _Quadratic) and "r" in KINDS[module.kind].weights:
            for name in ("g", "b", "norm_g", "norm_b"):
                for kind, parameter in getattr(module, name, nn.Module()).named_parameters():
                    slow[parameter] = (name[-1], kind == "weight")
    groups = [{"params": [p for p in model.parameters() if p not in slow], "lr": lr}]
    for branch, factor in (("g", factor_g), ("b", factor_b)):
        for is_weight in (True, False):
            params = [p for p, found in slow.items() if found == (branch, is_weight)]
            decay = {"weight_decay": shrink} if shrink else {}
            groups.append({"params": params, "lr": lr * factor, **(decay if is_weight else {})})
    return [group for group in groups if group["params"]]
