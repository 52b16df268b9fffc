# SPDX-License-Identifier: Apache-2.0
"""Prune a torch network at any grain and fine-tune it: masks, budgets, sensitivity, gradual pruning.

    pruner = Pruner(model, "out:4")
    pruner.prune(0.1)                     # the share of weights to keep: one for all, by layer, or over all layers
    optimizer = ...
    with pruner.attached(optimizer):      # after every step the pruned weights are zero again
        ...                               # train as usual
    pruner.finish()                       # zeros stay in the weights; export the model as it is

The grains are those of the compiler (`passes/sparse/grains.py`); a weight's saliency is |w| unless another score is given,
a grain's the sum of its weights' (Mao et al. 2017, arXiv 1705.08922).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from compiler.nn.coupled_filters import FilterCoupling
from passes.sparse.grains import Grain
from passes.sparse.prune import density_to_keep, kept_by_constraint, most_salient, one_is_kept
from schedules.errors import UserError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
# (weight) -> a score for every weight, of the same shape: the least are pruned.
Score = Callable[[nn.Parameter], torch.Tensor]


def magnitude(weight: nn.Parameter) -> torch.Tensor:
    """|w|"""
    return weight.detach().abs()


def squared(weight: nn.Parameter) -> torch.Tensor:
    """w^2: a grain's saliency is its energy."""
    return weight.detach().square()


def taylor(weight: nn.Parameter) -> torch.Tensor:
    """|w dL/dw|: the first-order change of the loss; needs gradients, so call after `loss.backward()`. Raises UserError."""
    if weight.grad is None:
        raise UserError(
            "a weight has no gradient to score it by", todo="Call loss.backward() before pruning"
        )
    return (weight * weight.grad).detach().abs()


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights can be pruned, by name; of layers that share a weight, the first."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, LAYERS):
            continue
        if not isinstance(module.__dict__.get("_parameters", {}).get("weight"), nn.Parameter):
            raise UserError(
                "its weight is computed by another pruner or parametrization",
                where=f"layer {name}",
                todo="Make it permanent first, for example with torch.nn.utils.prune.remove",
            )
        if id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[name] = module
    return found


class Pruner:
    """Masks over the weights of a model at one grain.

    `skip`: names of layers to leave whole (the first convolution is the most sensitive). `score`: see `Score`. With
    `example`, a tuple of inputs, filters are pruned as the network allows: channels that a residual sum couples go
    together, those of the output stay, and the biases and norms behind a pruned filter are zero as well, so that the
    compiler can remove it. Raises UserError for an unknown layer or grain.
    """

    def __init__(
        self,
        model: nn.Module,
        grain: str | Grain = "element",
        *,
        skip: Sequence[str] = (),
        score: Score = magnitude,
        example: tuple | None = None,
    ):
        try:
            self.grain = Grain.parse(grain)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.model, self.score = model, score
        layers = prunable(model)
        if unknown := [name for name in skip if name not in layers]:
            raise UserError("no such layer to skip", found=unknown[0], wanted=_some(layers))
        self.layers = {name: m for name, m in layers.items() if name not in skip}
        if not self.layers:
            raise UserError("nothing to prune", wanted="a model with convolution or linear layers")
        self.masks: dict[str, torch.Tensor] = {}
        self.notes: list[str] = []
        coupled = example is not None and self.grain.name == "filter"
        self.coupling = FilterCoupling.of(model, example) if coupled else None

    @property
    def densities(self) -> dict[str, float]:
        """Share of weights that the masks keep, by layer."""
        return {name: float(mask.float().mean()) for name, mask in self.masks.items()}

    def prune(
        self, density: float | Mapping[str, float] | None = None, scope: str = "layer"
    ) -> None:
        """Keep the share `density` of the most salient grains, and set the rest to zero.

        `scope="layer"`: of each layer, by name where `density` is a mapping (others stay as they are). `scope="global"`:
        over all layers, grains compared by their saliency per weight. N:M grains have their own density. At least one
        grain of a layer is kept; `notes` says where that was needed. Raises UserError for scores that are NaN, unknown
        layers and impossible densities.
        """
        if scope not in ("layer", "global"):
            raise UserError("unknown scope", found=repr(scope), wanted="layer or global")
        budgets = self._budgets(density)
        scores = {name: self._scores(name) for name in budgets}
        if self.coupling is not None:
            kept = self.coupling.keep({n: s.reshape(-1) for n, s in scores.items()}, budgets)
            kept = {name: keep.reshape(scores[name].shape) for name, keep in kept.items()}
        elif scope == "global" and not self.grain.of:
            kept = self._keep_globally(scores, density)
        else:
            kept = {name: self._keep(name, s, budgets[name]) for name, s in scores.items()}
        for name, keep in kept.items():
            shape = _shape(self.layers[name].weight)
            mask = self.grain.spread(keep, shape).reshape(self.layers[name].weight.shape)
            self.set_mask(name, torch.from_numpy(np.array(mask)))

    def set_mask(self, name: str, mask: torch.Tensor) -> None:
        """Use a mask of one's own, True or non-zero where weights stay. Raises UserError if its shape is not the weight's."""
        if name not in self.layers:
            raise UserError("no such layer", found=name, wanted=_some(self.layers))
        weight = self.layers[name].weight
        if mask.shape != weight.shape:
            raise UserError(
                "mask and weight differ in shape",
                where=f"layer {name}",
                found=str(tuple(mask.shape)),
                wanted=str(tuple(weight.shape)),
            )
        self.masks[name] = mask.to(device=weight.device, dtype=torch.bool)
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set what is masked to zero."""
        for name, mask in self.masks.items():
            # Not a product: 0 * NaN is NaN.
            self.layers[name].weight.masked_fill_(~mask, 0)
        if self.coupling is not None:
            self.coupling.silence(self.model, self.masks)

    @contextmanager
    def attached(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within the block every step of the optimizer ends with `apply`: neither momentum nor weight decay revives."""
        hook = optimizer.register_step_post_hook(lambda *_: self.apply())
        try:
            yield
        finally:
            hook.remove()
            self.apply()

    def revived(self) -> list[str]:
        """The layers that hold weights other than zero where their mask has none."""
        return [
            name
            for name, mask in self.masks.items()
            if bool((self.layers[name].weight.detach()[~mask] != 0).any())
        ]

    def finish(self) -> nn.Module:
        """The model, its pruned weights zero; it holds no trace of the pruner and can be exported."""
        self.apply()
        return self.model

    def _budgets(self, density) -> dict[str, float]:
        given = density if isinstance(density, Mapping) else dict.fromkeys(self.layers, density)
        if unknown := [name for name in given if name not in self.layers]:
            raise UserError("no such layer", found=unknown[0], wanted=_some(self.layers))
        try:
            return {name: density_to_keep(self.grain, value) for name, value in given.items()}
        except ValueError as error:
            raise UserError(str(error)) from None

    def _scores(self, name: str) -> np.ndarray:
        """float64 saliency by grain [*grid]; of N:M by weight."""
        weight = self.layers[name].weight
        score = self.score(weight).detach().double().cpu().numpy()
        if score.shape != tuple(weight.shape):
            raise UserError(
                "scores and weight differ in shape", where=f"layer {name}",
                found=str(score.shape), wanted=str(tuple(weight.shape)),
            )  # fmt: skip
        saliency = self.grain.blocks(score.reshape(_shape(weight))).sum(axis=(4, 5, 6, 7))
        if np.isnan(saliency).any():
            raise UserError("NaN scores have no order to prune by", where=f"layer {name}")
        return saliency

    def _keep(self, name: str, scores: np.ndarray, density: float) -> np.ndarray:
        if self.grain.of:
            return kept_by_constraint(scores, self.grain)
        if round(density * scores.size) < 1:
            self._note(name, density, scores.size)
        return most_salient(scores, density)

    def _keep_globally(self, scores: Mapping[str, np.ndarray], density) -> dict[str, np.ndarray]:
        if isinstance(density, Mapping):
            raise UserError("a global budget is one number", found="a mapping", wanted="a number")
        sizes = {n: self.grain.size(_shape(self.layers[n].weight)) for n in scores}
        flat = np.concatenate([s.reshape(-1) / sizes[n] for n, s in scores.items()])
        weight = np.concatenate([np.full(s.size, sizes[n]) for n, s in scores.items()])
        order = np.argsort(-flat, kind="stable")
        chosen = np.zeros(flat.size, bool)
        chosen[order[np.cumsum(weight[order]) <= max(density * weight.sum(), weight[order[0]])]] = (
            True
        )
        kept, first = {}, 0
        for name, score in scores.items():
            keep = chosen[first : first + score.size].reshape(score.shape)
            first += score.size
            if not keep.any():
                self._note(name, density, score.size)
                keep = most_salient(score, 0.0)
            kept[name] = keep
        return kept

    def _note(self, name: str, density: float, grains: int) -> None:
        self.notes.append(f"layer {name}: {one_is_kept(self.grain, grains, density)}")


@dataclass(frozen=True)
class Sensitivity:
    """The metric of the whole network with one layer pruned: by layer and density. `baseline`: nothing pruned."""

    baseline: float
    metric: Mapping[str, Mapping[float, float]]

    def budgets(self, tolerance: float) -> dict[str, float]:
        """Per layer the least density whose metric is at most `tolerance` below the baseline; 1 where none is."""
        return {
            name: min((d for d, m in by.items() if m >= self.baseline - tolerance), default=1.0)
            for name, by in self.metric.items()
        }


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    grain: str | Grain = "element",
    densities: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
    *,
    skip: Sequence[str] = (),
    score: Score = magnitude,
) -> Sensitivity:
    """Prune one layer at a time, without fine-tuning, and evaluate the whole network (larger is better).

    The model is as it was afterwards, bit for bit. An N:M grain is scanned at its own density.
    """
    baseline = float(evaluate(model))
    pruner = Pruner(model, grain, skip=skip, score=score)
    scanned = (pruner.grain.density,) if pruner.grain.of else tuple(densities)
    metric: dict[str, dict[float, float]] = {}
    for name, layer in pruner.layers.items():
        saved = layer.weight.detach().clone()
        for density in scanned:
            try:
                pruner.prune({name: density})
                metric.setdefault(name, {})[density] = float(evaluate(model))
            finally:
                pruner.masks.clear()
                with torch.no_grad():
                    layer.weight.copy_(saved)
    return Sensitivity(baseline, metric)


def gradual(density: float, rounds: int) -> list[float]:
    """Densities of `rounds` prunings from 1 to `density`: fast first, then slowly (Zhu and Gupta 2017, arXiv 1710.01878)."""
    return [density + (1 - density) * (1 - (i + 1) / rounds) ** 3 for i in range(rounds)]


def prune_and_fine_tune(
    pruner: Pruner,
    density: float | Mapping[str, float] | None,
    train: Callable[[Pruner], None],
    *,
    rounds: int = 1,
    scope: str = "layer",
) -> nn.Module:
    """Prune in `rounds` steps and call `train(pruner)` after each; 1 round is one-shot pruning. Returns the model.

    `train` uses `pruner.attached(optimizer)`. Raises UserError if it revived pruned weights because it did not.
    """
    if rounds < 1:
        raise UserError("rounds must be 1 at least", found=str(rounds))
    for i in range(rounds):
        pruner.prune(_at_round(density, i, rounds), scope)
        train(pruner)
        if revived := pruner.revived():
            raise UserError(
                "training revived pruned weights", where=f"layer {revived[0]}",
                todo="Step the optimizer inside `with pruner.attached(optimizer):`",
            )  # fmt: skip
    return pruner.finish()


def _at_round(density, i: int, rounds: int):
    if density is None:
        return None
    if isinstance(density, Mapping):
        return {name: gradual(d, rounds)[i] for name, d in density.items()}
    return gradual(density, rounds)[i]


def _shape(weight: torch.Tensor) -> tuple[int, ...]:
    """A weight's shape as the compiler has it: a Conv1d is a Conv2d of height 1."""
    shape = tuple(weight.shape)
    return (*shape[:2], 1, shape[2]) if len(shape) == 3 else shape


def _some(names) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")
