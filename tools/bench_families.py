# SPDX-License-Identifier: Apache-2.0
"""Kernels and small networks of a family beside Kerf's own dense ones: the figures of the family's document.

    python tools/bench_families.py activation-sparse --json figures.json --markdown figures.md

All variants of a case run in turns in one process, run by run. Their weights come from memory, as in a network: copies
take turns, and before one is used again the others have passed through the caches. Results are added to the JSON file case by case; what is there already is skipped,
so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    import numpy as np
    import tvm

    from compiler.artifact import CompiledVariant

# Subcommand -> the module whose `cases()` gives what to measure.
FAMILIES = {
    "activation-sparse": "tools.bench_activation_sparse",
    "binary": "tools.bench_binary",
    "quadratic": "tools.bench_quadratic",
}
_COLD_BYTES = 64 << 20  # more than caches hold


@dataclass(frozen=True)
class Measured:
    """What a case runs: canonical graphs by variant, `base` first, and inputs by label, each of them a row of figures.

    `notes` is shown with the case: what was decided or measured on the way. `peers` are other engines on the same inputs,
    functions that return the outputs; they have their weights once, so that Kerf's variants should not be `cold` then.
    """

    graphs: Mapping[str, tvm.IRModule]
    inputs: Mapping[str, Sequence[np.ndarray]]
    notes: Mapping[str, object] = field(default_factory=dict)
    peers: Mapping[str, Callable[[], Sequence]] = field(default_factory=dict)
    cold: bool = True


@dataclass(frozen=True)
class Case:
    """`make()` builds it, when its turn comes; `wanted` is the largest share of the base's time, by variant."""

    name: str
    make: Callable[[], Measured]
    wanted: Mapping[str, float] = field(default_factory=dict)


def run(case: Case, *, seconds: float, runs: int) -> dict:
    """One case's figures: a row per input."""
    from compiler.measure import pinned
    from schedules.target import detect_host

    target = detect_host()
    made = case.make()
    variants = {name: _compiled(name, graph, target) for name, graph in made.graphs.items()}
    size = sum(c.nbytes for c in next(iter(variants.values())).constants)
    copies = max(2, -(-_COLD_BYTES // size)) if made.cold else 1
    specs = _specs(next(iter(made.graphs.values())))
    models = _models(variants, copies, specs)
    rows = []
    with pinned(1):
        for label, arrays in made.inputs.items():
            found = _row(models, made.peers, arrays, seconds=seconds, runs=runs)
            rows.append({"input": label, **found})
    return {
        "case": case.name,
        "base": next(iter(made.graphs)),
        "wanted": dict(case.wanted),
        "notes": dict(made.notes),
        "rows": rows,
    }


def _compiled(name: str, graph: tvm.IRModule, target):
    from compiler.pipeline import compile_graph, fuse_graph, lay_out

    return compile_graph(name, fuse_graph(lay_out(graph), target), target)


def _models(
    variants: Mapping[str, CompiledVariant], copies: int, specs: tuple[list, list]
) -> dict[str, list]:
    """So many models of each variant, with the code of one and weights of their own.

    Made in turns: where in memory weights lie can change their time by several percent, and so does it for all alike.
    """
    import tvm

    from compiler.runtime import LoadedModel

    code = {name: variant.executable.jit() for name, variant in variants.items()}
    inputs, outputs = specs
    made: dict[str, list] = {name: [] for name in variants}
    for _ in range(copies):
        for name, variant in variants.items():
            weights = [tvm.runtime.tensor(c) for c in variant.constants]
            made[name].append(
                LoadedModel(
                    code[name], weights, variant=variant.name, inputs=inputs, outputs=outputs,
                    kernels=variant.kernels,
                )
            )  # fmt: skip
    return made


def _specs(graph: tvm.IRModule) -> tuple[list, list]:
    """The inputs and the one output of a graph."""
    from compiler.frontend import TensorSpec
    from passes.layers import shape_of

    main = graph["main"]
    inputs = [TensorSpec(p.name, shape_of(p), str(p.ty.dtype)) for p in main.params]
    result = main.body.body
    return inputs, [TensorSpec("y", shape_of(result), str(result.ty.dtype))]


def _row(
    models: Mapping[str, list],
    peers: Mapping[str, Callable],
    arrays: Sequence[np.ndarray],
    *,
    seconds: float,
    runs: int,
) -> dict:
    """Latency of every variant, its share of the base's, and how far its result is from the base's."""
    import numpy as np

    results = {name: np.asarray(copies[0](*arrays)) for name, copies in models.items()}
    results |= {name: np.asarray(call()[0]) for name, call in peers.items()}
    calls = {
        name: [functools.partial(model.invoke, model.bind(arrays)) for model in copies]
        for name, copies in models.items()
    }
    calls |= {name: [call] for name, call in peers.items()}
    latency = measure(calls, seconds=seconds, runs=runs)
    base = next(iter(models))
    norm = float(np.linalg.norm(results[base])) or 1.0
    return {
        "latency_ms": {name: found.to_json() for name, found in latency.items()},
        "ratios": ratios_to(base, latency),
        "difference": {n: float(np.linalg.norm(y - results[base])) / norm for n, y in results.items()},
    }  # fmt: skip


def measure(calls: Mapping[str, list[Callable]], *, seconds: float, runs: int) -> dict:
    """Latencies of what runs in turns, copies of each too: `runs` at least, and `seconds` in all."""
    from compiler.measure import Latency

    names = list(calls)
    rounds: dict[str, list[list[float]]] = {name: [] for name in names}
    done, stop = 0, time.perf_counter() + seconds
    while done <= runs or time.perf_counter() < stop:
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            call = calls[name][done % len(calls[name])]
            start = time.perf_counter_ns()
            call()
            took = time.perf_counter_ns() - start
            if done:  # the first run finds its code for the first time
                rounds[name].append([took / 1e6])
        done += 1
    return {name: Latency.of(found) for name, found in rounds.items()}


def ratios_to(base: str, latency: Mapping) -> dict[str, dict]:
    """Each variant's share of the base's median, with its 95 % interval."""
    from compiler.measure import ratio

    return {
        name: ratio(found, latency[base]).to_json()
        for name, found in latency.items()
        if name != base
    }


def add_case(path: Path, found: dict, environment: dict) -> list[dict]:
    """Put a case into the JSON file, whole or not at all; returns all cases."""
    cases = [c for c in read_cases(path) if c["case"] != found["case"]] + [found]
    partial = path.with_name(f".{path.name}.partial")
    content = {"format": "kerf-families", "format_version": 1, "environment": environment}
    partial.write_text(json.dumps({**content, "cases": cases}, indent=1) + "\n")
    os.replace(partial, path)
    return cases


def read_cases(path: Path) -> list[dict]:
    """The cases of an earlier run; none if the file does not exist."""
    return json.loads(path.read_text())["cases"] if path.exists() else []


def markdown(cases: Sequence[dict], environment: dict) -> str:
    """A table per set of variants, a line per case and input, and where it was measured."""
    lines: list[str] = []
    for variants, group in itertools.groupby(
        cases, key=lambda c: (c["base"], *c["rows"][0]["ratios"])
    ):
        base, *others = variants
        heads = [f"{name} / {base}" for name in others]
        lines += [
            "",
            "| | input | " + f"{base} us | " + " | ".join(heads) + " | wanted | difference |",
        ]
        lines.append("| --- | --- | ---: |" + " --- |" * (len(heads) + 2))
        for case in group:
            for row in case["rows"]:
                lines.append(_line(case, row, base, others))
    notes = [f"- {c['case']}: {_spelled(c['notes'])}" for c in cases if c["notes"]]
    lines += ["", *notes, ""] if notes else [""]
    lines.append("Medians; ratios with their 95 % interval; * interquartile range beyond 10 %.")
    cpu = environment["cpu"]["model"]
    lines.append(f"{cpu}, 1 thread, commit {environment['git_commit']}, {environment['date']}.")
    return "\n".join(lines).lstrip("\n") + "\n"


def _line(case: dict, row: dict, base: str, others: Sequence[str]) -> str:
    found = row["latency_ms"][base]
    cells = [case["name"] if "name" in case else case["case"], row["input"]]
    cells.append(f"{found['median'] * 1e3:.0f}{'*' if found['noisy'] else ''}")
    for name in others:
        r, noisy = row["ratios"][name], row["latency_ms"][name]["noisy"]
        cells.append(f"{r['median']:.3f} ({r['low']:.3f}-{r['high']:.3f}){'*' if noisy else ''}")
    cells.append(", ".join(f"{n} {w:g}" for n, w in case["wanted"].items()))
    cells.append(", ".join(f"{row['difference'][n]:.1g}" for n in others))
    return "| " + " | ".join(cells) + " |"


def _spelled(notes: Mapping) -> str:
    return ", ".join(
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in notes.items()
    )


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--json", type=Path, default=Path("figures.json"), help="added to")
    parser.add_argument("--markdown", type=Path, help="the tables")
    parser.add_argument("--only", default="", help="regular expression of the cases to run")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--seconds", type=float, default=4.0, help="to measure each input")
    parser.add_argument("--runs", type=int, default=30, help="of each variant at least")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    cases = importlib.import_module(FAMILIES[options.family]).cases()
    chosen = [c for c in cases if re.search(options.only, c.name)]
    if options.list:
        print("\n".join(c.name for c in chosen))
        return
    from compiler.environment import describe_environment

    environment = describe_environment(1, [])
    done = {c["case"] for c in read_cases(options.json)}
    for case in chosen:
        if case.name in done:
            log(f"{case.name}: already in {options.json}")
            continue
        log(case.name)
        found = run(case, seconds=options.seconds, runs=options.runs)
        add_case(options.json, found, environment)
    order = {c.name: i for i, c in enumerate(cases)}
    found = sorted(
        (c for c in read_cases(options.json) if c["case"] in order), key=lambda c: order[c["case"]]
    )
    text = markdown(found, environment)
    if options.markdown is not None:
        options.markdown.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
