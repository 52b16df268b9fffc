# SPDX-License-Identifier: Apache-2.0
"""What would pruning gain? Latency and size at any grain and density, measured before anyone trains."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from compiler.arrays import write_whole
from compiler.environment import describe_environment
from compiler.frontend import import_model
from compiler.what_if_study import LayerPoint, Point, Study
from passes.sparse.grains import Grain
from schedules.errors import UserError
from schedules.target import CpuTarget, parse_target

Progress = Callable[[str], None]
GRAINS = ("element", "row", "kernel", "out:4", "out:8", "filter")
DENSITIES = (0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class WhatIf:
    """`latency_us` and `weights_bytes` of the dense network, and what was found for each point."""

    model: str
    key: str
    latency_us: float
    weights_bytes: int
    points: tuple[Point, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict:
        """See docs/sparsity.md."""
        return {"format": "kerf-what-if", "format_version": 1, **asdict(self)}

    @staticmethod
    def from_json(document: Mapping) -> WhatIf:
        points = tuple(
            Point(**{**p, "layers": tuple(LayerPoint(**layer) for layer in p["layers"])})
            for p in document["points"]
        )
        names = ("model", "key", "latency_us", "weights_bytes", "environment")
        return WhatIf(**{n: document[n] for n in names}, points=points)


def what_if(
    source,
    grains: Sequence[str] = GRAINS,
    densities: Sequence[float] = DENSITIES,
    *,
    points: Sequence[tuple[str, float]] = (),
    example=None,
    inputs: Mapping[str, tuple[int, ...]] | None = None,
    batch: int | None = None,
    target: str | CpuTarget = "native",
    threads: int = 1,
    state: Path | None = None,
    progress: Progress | None = None,
) -> WhatIf:
    """Predict latency and size of a model for every grain and density, or for `points` of both.

    `state`: a JSON file that is written after every point; a run that finds its own points there goes on behind them. N:M
    grains have one density, their own. Raises UserError for an unknown grain, an impossible density, a target that does
    not run here, or a state file that is something else.
    """
    wanted = [p for grain, d in points for p in points_of([grain], [d])] or points_of(
        grains, densities
    )
    cpu = parse_target(target, threads) if isinstance(target, str) else target
    if missing := cpu.missing_on_host():
        raise UserError(
            "cannot be timed here", where=f"target {cpu.name}", found=f"no {', '.join(missing)}"
        )
    say = progress or (lambda _text: None)
    say("importing")
    imported = import_model(source, example=example, inputs=inputs, batch=batch)
    study = Study(imported, cpu, threads)
    name = str(source) if isinstance(source, (str, Path)) else type(source).__name__
    earlier = _read_state(state, study.key)
    known = {(p.grain, p.density): p for p in earlier.points} if earlier else {}
    if earlier and all(point in known for point in wanted):
        return replace(earlier, points=tuple(known[point] for point in wanted))
    say("timing the dense network")
    latency, size = study.measure_dense(earlier.latency_us if earlier else None)
    measured: list[Point] = []
    begun, fresh = time.perf_counter(), 0
    for grain, density in wanted:
        point = known.get((grain, density))
        if point is None:
            say(
                f"{grain} at {density:.3g} ({len(measured) + 1} of {len(wanted)}{_eta(begun, fresh, wanted, known)})"
            )
            point = study.measure(grain, density)
            fresh += 1
        measured.append(point)
        found = WhatIf(
            name, study.key, latency, size, tuple(measured), describe_environment(threads)
        )
        if state is not None:
            others = (p for key, p in known.items() if key not in wanted)
            _write_state(state, replace(found, points=(*found.points, *others)))
    return found


def points_of(grains: Sequence[str], densities: Sequence[float]) -> list[tuple[str, float]]:
    """(grain, density) of every point, in order. Raises UserError."""
    if bad := [d for d in densities if not 0 < d <= 1]:
        raise UserError("density must be in (0, 1]", where="densities", found=str(bad[0]))
    found: list[tuple[str, float]] = []
    for name in grains:
        try:
            grain = Grain.parse(name)
        except ValueError as error:
            raise UserError(str(error), where="grains") from None
        own = [grain.density] if grain.density else densities
        found += [(grain.name, float(d)) for d in own]
    if not found:
        raise UserError("nothing to try", wanted="one grain and one density at least")
    return list(dict.fromkeys(found))


def _eta(begun: float, fresh: int, wanted, known: Mapping) -> str:
    if not fresh:
        return ""
    left = len([p for p in wanted if p not in known]) - fresh
    seconds = (time.perf_counter() - begun) / fresh * left
    return (
        f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
    )


def _read_state(path: Path | None, key: str) -> WhatIf | None:
    """An earlier run on the same model, target and version. Raises UserError for a file of another kind."""
    if path is None or not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = WhatIf.from_json(document) if document["format"] == "kerf-what-if" else None
    except (ValueError, KeyError, TypeError, OSError):
        found = None
    if found is None:
        raise UserError(
            "is not the result of an earlier what-if", where=str(path), todo="Give another file"
        )
    return found if found.key == key else None


def _write_state(path: Path, found: WhatIf) -> None:
    text = json.dumps(found.to_json(), indent=1, default=str) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
