# SPDX-License-Identifier: Apache-2.0
"""Which layers stay compressed: those that prove faster on this machine than their dense kernels.

Layers are timed in alternating runs of the dense and the compressed variant. What remains must also be faster as a
whole: conversions between dense and compressed layers belong to no layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from compiler.artifact import CompiledVariant, KernelCall
from passes.treatment import Decision

if TYPE_CHECKING:
    from compiler.calibration import Calibration
    from compiler.frontend import Imported
    from schedules.target import CpuTarget


@dataclass(frozen=True)
class Times:
    """Median microseconds of both variants: of all kernels, by layer, and of every other kernel that works for some
    layers alone, with these. `together` are the layers of each compressed kernel that computes several, its time in equal
    shares."""

    total: Mapping[str, float]
    layers: Mapping[str, Mapping[str, float]]
    served: Mapping[str, Sequence[tuple[Sequence[str], float]]] = field(default_factory=dict)
    together: Sequence[Sequence[str]] = ()

    def of(self, variant: str, layers: Sequence[str]) -> float:
        """What these layers take, with the kernels that work for no others: a square, a conversion."""
        own = sum(self.layers[variant].get(name, 0.0) for name in layers)
        return own + sum(
            us for names, us in self.served.get(variant, ()) if set(names) <= set(layers)
        )


def time_variants(
    dense: CompiledVariant,
    compressed: CompiledVariant,
    imported: Imported,
    target: CpuTarget,
    threads: int,
    calibration: Calibration | None = None,
) -> Times:
    """Time "dense" and "compressed" kernel by kernel in alternating runs."""
    from compiler.profile import kernel_times, layer_sums
    from compiler.runtime import from_variant
    from compiler.verify import random_inputs

    models = {
        v.name: from_variant(v, imported.inputs, imported.outputs, target, threads)
        for v in (dense, compressed)
    }
    # Where times depend on the values, as they do with zeros among activations, the user's own count.
    inputs = random_inputs(imported.inputs, seed=0)
    if calibration is not None:
        inputs = next(iter(calibration.samples()))
    times, _ = kernel_times(models, inputs, runs=20, seconds=4.0)
    return Times(
        {name: sum(us) for name, us in times.items()},
        {name: layer_sums(model.kernels, times[name]) for name, model in models.items()},
        {
            name: [(k.serves, us) for k, us in zip(model.kernels, times[name]) if k.serves]
            for name, model in models.items()
        },
        layers_together(compressed.kernels),
    )


def layers_together(kernels: Sequence[KernelCall]) -> list[Sequence[str]]:
    """The layers of each kernel that computes several."""
    return [k.layers for k in kernels if len(k.layers) > 1]


def slower_layers(times: Times, decisions: Sequence[Decision]) -> dict[str, str]:
    """The compressed layers that are not faster than their dense kernels, each with the reason to show.

    Layers of one unit (see `Decision.unit`), and those that one kernel computes, stand or fall together.
    """
    slower = {}
    for unit, members in _units(decisions, times.together).items():
        names = [d.layer for d in members]
        before, after = (times.of(variant, names) for variant in ("dense", "compressed"))
        if before and after and after >= before:
            whole = f" ({unit} as a whole)" if len(names) > 1 else ""
            reason = f"{members[0].treatment} took {after:.0f} us{whole}, dense {before:.0f} us"
            slower.update(dict.fromkeys(names, reason))
    return slower


def slower_network(times: Times, decisions: Sequence[Decision]) -> dict[str, str]:
    """All compressed layers if the network as a whole is not faster than the dense one, else none."""
    before, after = times.total["dense"], times.total["compressed"]
    if after < before:
        return {}
    reason = f"with the conversions between layers the network took {after:.0f} us, dense {before:.0f} us"
    return {d.layer: reason for d in decisions if d.treatment != "dense"}


def _units(
    decisions: Sequence[Decision], together: Sequence[Sequence[str]]
) -> dict[str, list[Decision]]:
    """The compressed layers by what stands or falls together."""
    members = [d for d in decisions if d.treatment != "dense"]
    unit = {d.layer: d.unit or d.layer for d in members}
    for names in together:
        joined = [unit[name] for name in names if name in unit]
        unit = {name: joined[0] if of in joined else of for name, of in unit.items()}
    units: dict[str, list[Decision]] = {}
    for decision in members:
        units.setdefault(unit[decision.layer], []).append(decision)
    return units


def revert(old: Decision, new: Decision, slower: Mapping[str, str]) -> Decision:
    """The decision after timing: as it is now; for what was slower, dense with the times as the reason."""
    if old.layer not in slower:
        return new
    return replace(
        new, asked=old.asked, parameters=old.parameters, declined=slower[old.layer],
        passed_on=old.passed_on,
    )  # fmt: skip
