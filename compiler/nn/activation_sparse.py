# SPDX-License-Identifier: Apache-2.0
"""MLPs whose hidden activations become mostly zero, in torch (Peng et al. 2023, arXiv 2309.03004).

    JSReLU(x) = x + x^2 / 2 for x >= 0, else 0                 JSReLU'(x) = (1 + x) [x >= 0]
    DB-MLP    y = W2 act(W1 (x + d[t]) + b1) + b2              d [tokens, width]: the zeroth bias, placement "input"
              y = W2 act(W1 x + b1) + b2 + d[t]                placement "output"

After every optimizer step the zeroth bias is clipped to |d| <= 0.1 |scale| of the LayerNorm before it, and that scale
is kept at |scale| >= 1 (from scratch) or >= min(step / uplift_steps, 1) (fine-tuning). A trained network is switched
over by `make_activation_sparse`, which changes nothing until `FineTuning` begins to mix: (1 - k) act + k JSReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

PLACEMENTS = ("input", "output")
ZERO = 1e-6  # what counts as zero: |h| <= ZERO


def j_squared_relu(x: torch.Tensor) -> torch.Tensor:
    """x + x^2 / 2 for x >= 0, else 0; the gradient at 0 is 1. NaN stays NaN."""
    positive = x.clamp(min=0)  # its gradient at 0 is 1, relu's is 0
    return positive + 0.5 * positive * positive


class JSquaredReLU(nn.Module):
    """See `j_squared_relu`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return j_squared_relu(x)


class MixedActivation(nn.Module):
    """(1 - k) `base`(x) + k JSReLU(x): exactly `base` at k = 0, exactly JSReLU at k = 1. `k` is saved with the module."""

    def __init__(self, base: nn.Module, k: float = 0.0):
        super().__init__()
        self.base, self.k = base, float(k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.k == 0:
            return self.base(x)
        if self.k == 1:
            return j_squared_relu(x)
        return (1 - self.k) * self.base(x) + self.k * j_squared_relu(x)

    def get_extra_state(self) -> dict:
        return {"k": self.k}

    def set_extra_state(self, state: dict) -> None:
        self.k = float(state["k"])


class ZerothBiasLinear(nn.Linear):
    """A linear layer with a zeroth bias `zeroth_bias` [tokens, width], a row for each token position, zero at first.

    x [..., T, in_features] with T <= `tokens`; the row is added to the input ("input", width = in_features) or to the
    output ("output", width = out_features). `sequence`: tokens per sequence where the model hands them over as the rows
    [B * sequence, in_features]. Raises ValueError for more tokens than rows.
    """

    def __init__(
        self, in_features: int, out_features: int, tokens: int, *, placement: str = "input",
        bias: bool = True, sequence: int | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias)
        if placement not in PLACEMENTS:
            raise ValueError(f"placement is {placement!r}, not {' or '.join(PLACEMENTS)}")
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}, less than 1")
        self.placement, self.sequence = placement, sequence
        width = in_features if placement == "input" else out_features
        self.zeroth_bias = nn.Parameter(torch.zeros(tokens, width))

    @staticmethod
    def from_linear(
        linear: nn.Linear, tokens: int, placement: str, sequence: int | None = None
    ) -> ZerothBiasLinear:
        """The same layer, with `linear`'s own parameters and a zeroth bias of zeros."""
        made = ZerothBiasLinear(
            linear.in_features, linear.out_features, tokens,
            placement=placement, bias=linear.bias is not None, sequence=sequence,
        )  # fmt: skip
        made.weight, made.bias = linear.weight, linear.bias
        made.zeroth_bias.data = made.zeroth_bias.data.to(linear.weight)
        return made.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.placement == "input":
            return F.linear(self._add(x), self.weight, self.bias)
        return self._add(F.linear(x, self.weight, self.bias))

    def _add(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[-2] if self.sequence is None else self.sequence
        if rows > self.zeroth_bias.shape[0]:
            raise ValueError(
                f"{rows} tokens, but the zeroth bias has rows for {self.zeroth_bias.shape[0]}"
            )
        d = self.zeroth_bias[:rows]
        if self.sequence is None:
            return x + d
        return (x.reshape(-1, rows, x.shape[-1]) + d).reshape(x.shape)

    def extra_repr(self) -> str:
        tokens = self.zeroth_bias.shape[0]
        return f"{super().extra_repr()}, tokens={tokens}, placement={self.placement}"


class RestrictedLayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * scale over the last axis: a LayerNorm without a bias and with |scale| bounded.

    `restrict_scale` keeps the bound after each optimizer step: called by `FineTuning`, or by a training from scratch.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, self.eps)


@torch.no_grad()
def restrict_scale(scale: torch.Tensor, floor: float = 1.0, *, from_scratch: bool = False) -> None:
    """Raise |scale| to `floor` in place, keeping its sign (0 counts as positive); from scratch, scale itself."""
    if from_scratch:
        scale.clamp_(min=floor)
    else:
        scale.copy_(torch.where(scale < 0, -1.0, 1.0) * scale.abs().clamp(min=floor))


class DBMLP(nn.Module):
    """`act(x W1^T + b1) W2^T + b2` with a zeroth bias; x [..., T, width] -> [..., T, width], T <= `tokens`."""

    def __init__(
        self, width: int, hidden: int, tokens: int, *, placement: str = "input",
        activation: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        at_input = placement != "output"

        def linear(inputs: int, outputs: int, with_bias: bool) -> nn.Linear:
            if not with_bias:
                return nn.Linear(inputs, outputs)
            return ZerothBiasLinear(inputs, outputs, tokens, placement=placement)

        self.fc1 = linear(width, hidden, at_input)
        self.activation = JSquaredReLU() if activation is None else activation
        self.fc2 = linear(hidden, width, not at_input)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


@torch.no_grad()
def clip_zeroth_bias(layer: ZerothBiasLinear, scale: torch.Tensor, share: float = 0.1) -> None:
    """|d| <= share * |scale|; `scale` [width] is the LayerNorm's before the MLP."""
    bound = share * scale.abs()
    layer.zeroth_bias.clamp_(min=-bound, max=bound)


@dataclass(frozen=True)
class SparseMlp:
    """One MLP of a network: its name, the modules that hold `up`, `activation`, `down` by name, and its LayerNorm's."""

    name: str
    up: str
    activation: str
    down: str
    norm: str


# Classes of `transformers` (and DBMLP's own pattern) by name: up, activation, down within the module, and the norm that
# feeds the MLP; a leading ".." is the module's parent. `rows`: tokens arrive as rows of a matrix.
_KNOWN = {
    "ViTMLP": ("fc1", "activation_fn", "fc2", "..layernorm_after"),
    "T5DenseActDense": ("wi", "act", "wo", "..layer_norm"),
    "T5DenseGatedActDense": ("wi_0", "act", "wo", "..layer_norm"),
    "OPTDecoderLayer": ("fc1", "activation_fn", "fc2", "final_layer_norm"),
    "BertLayer": (
        "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", "attention.output.LayerNorm",
    ),
}  # fmt: skip
_ROWS = frozenset({"OPTDecoderLayer"})


def find_mlps(model: nn.Module) -> Iterator[SparseMlp]:
    """The MLPs of the transformer classes that are known (BERT, ViT, T5, OPT of `transformers`), in module order."""

    def path(name: str, part: str) -> str:
        if part.startswith(".."):
            name, part = name.rpartition(".")[0], part[2:]
        return f"{name}.{part}" if name else part

    for name, module in model.named_modules():
        if (parts := _KNOWN.get(type(module).__name__)) is not None:
            yield SparseMlp(name, *(path(name, part) for part in parts))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def make_activation_sparse(
    model: nn.Module,
    *,
    tokens: int | None = None,
    placement: str | None = "input",
    sequence: int | None = None,
) -> list[SparseMlp]:
    """Give every known MLP of `model` a mixed activation and, where `placement` is not None, a zeroth bias, in place.

    The model computes exactly what it did before until `FineTuning` changes it; parameters keep their names. `tokens`:
    rows of the zeroth biases, the longest sequence. `sequence`: tokens per sequence, wanted for models that flatten
    batch and tokens before the MLP (OPT). Raises ValueError where no MLP is found or one of these is missing.
    """
    mlps = list(find_mlps(model))
    if not mlps:
        raise ValueError(
            f"no known MLP in {type(model).__name__}; known are {', '.join(sorted(_KNOWN))}"
        )
    if placement is not None and tokens is None:
        raise ValueError("a zeroth bias needs tokens=, the longest sequence")
    for mlp in mlps:
        _replace(model, mlp.activation, MixedActivation(model.get_submodule(mlp.activation)))
        if placement is None:
            continue
        flattened = type(model.get_submodule(mlp.name)).__name__ in _ROWS
        if flattened and sequence is None:
            raise ValueError(f"{mlp.name} hands over its tokens as rows; say sequence=")
        where = mlp.up if placement == "input" else mlp.down
        linear = model.get_submodule(where)
        _replace(
            model, where,
            ZerothBiasLinear.from_linear(linear, tokens, placement, sequence if flattened else None),
        )  # fmt: skip
    return mlps


def restrict_layer_norms(model: nn.Module, mlps: list[SparseMlp]) -> list[str]:
    """Take the bias out of the LayerNorm before each MLP, into the first layer's; the names of the restricted norms.

    Only where the norm feeds the MLP alone (ViT; OPT with norms first); a norm without a bias (T5's) is restricted as
    it is, one that others read too (BERT's) is left out. The model's function changes by rounding alone.
    """
    done = []
    for mlp in mlps:
        module, norm = model.get_submodule(mlp.name), model.get_submodule(mlp.norm)
        first = getattr(module, "do_layer_norm_before", True)
        if type(module).__name__ == "BertLayer" or not first or norm.weight is None:
            continue
        if getattr(norm, "bias", None) is not None:
            made = RestrictedLayerNorm(norm.normalized_shape[-1], norm.eps)
            made.weight = norm.weight
            up = model.get_submodule(mlp.up)
            moved = up.weight.detach() @ norm.bias.detach()
            up.bias = nn.Parameter(moved if up.bias is None else up.bias.detach() + moved)
            _replace(model, mlp.norm, made)
        done.append(mlp.norm)
    return done


@dataclass
class FineTuning:
    """What changes with the step: call `step()` after each `optimizer.step()`.

    k of every mixed activation goes from 0 to 1 in `mixing_steps`; the scale of every norm in `restricted` (see
    `restrict_layer_norms`) is raised to min(step / uplift_steps, 1); every zeroth bias is clipped to `share` of the
    scale of the norm before it.
    """

    model: nn.Module
    mlps: list[SparseMlp]
    mixing_steps: int
    uplift_steps: int = 0
    restricted: Sequence[str] = ()
    share: float = 0.1
    done: int = field(default=0)

    def step(self) -> None:
        """Count one step and apply what it asks for."""
        self.done += 1
        k = min(1.0, self.done / self.mixing_steps) if self.mixing_steps else 1.0
        floor = min(1.0, self.done / self.uplift_steps) if self.uplift_steps else 1.0
        for mlp in self.mlps:
            activation = self.model.get_submodule(mlp.activation)
            if isinstance(activation, MixedActivation):
                activation.k = k
            norm = self.model.get_submodule(mlp.norm)
            if mlp.norm in self.restricted:
                restrict_scale(norm.weight, floor)
            for path in (mlp.up, mlp.down):
                layer = self.model.get_submodule(path)
                if (
                    isinstance(layer, ZerothBiasLinear)
                    and getattr(norm, "weight", None) is not None
                ):
                    clip_zeroth_bias(layer, norm.weight, self.share)


@dataclass
class _Meter:
    zeros: int = 0
    values: int = 0
    used: torch.Tensor | None = None


class SparsityMeter:
    """Counts zeros in what modules return: `with SparsityMeter(modules) as meter: model(x)`.

    `modules` maps names to modules (`SparsityMeter.of(model)` takes every JSquaredReLU and MixedActivation). Over
    everything seen: `sparsity(name)` is the share of values with |h| <= 1e-6, `density(name)` the rest, and
    `union(name)` the share of hidden units (the last axis) that were not zero for every token.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = dict(modules)
        self._meters = {name: _Meter() for name in self.modules}
        self._handles: list = []

    @staticmethod
    def of(model: nn.Module) -> SparsityMeter:
        kinds = (JSquaredReLU, MixedActivation)
        return SparsityMeter({n: m for n, m in model.named_modules() if isinstance(m, kinds)})

    def __enter__(self) -> SparsityMeter:
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._hook(self._meters[name])))
        return self

    def __exit__(self, *_exception) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, meter: _Meter) -> Callable:
        @torch.no_grad()
        def count(_module, _inputs, output: torch.Tensor) -> None:
            zero = output.abs() <= ZERO
            meter.zeros += int(zero.sum())
            meter.values += zero.numel()
            used = (~zero).reshape(-1, zero.shape[-1]).any(0)
            meter.used = used if meter.used is None else meter.used | used

        return count

    def sparsity(self, name: str) -> float:
        meter = self._meters[name]
        return meter.zeros / meter.values if meter.values else float("nan")

    def density(self, name: str) -> float:
        return 1 - self.sparsity(name)

    def union(self, name: str) -> float:
        used = self._meters[name].used
        return float("nan") if used is None else float(used.float().mean())
