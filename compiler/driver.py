# SPDX-License-Identifier: Apache-2.0
"""Build: from a model to a proven artifact. Each step either happens or says why not.

Per layer the faster of dense and compressed runs: both variants are timed layer by layer in one process, and a layer
whose compressed kernel is not faster goes back to its dense one.
"""

from __future__ import annotations

import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.artifact import Artifact, CompiledVariant
from compiler.artifact_writer import check_output, write_artifact
from compiler.choice import revert, slower_layers, slower_network, time_variants
from compiler.linker import require_linker
from compiler.recipe import Recipe, load_recipe, resolve, validate
from compiler.thread_pool import check_threads
from passes.treatment import Decision, Treatment
from schedules.target import CpuTarget, detect_host, parse_target

if TYPE_CHECKING:
    import tvm

    from compiler.calibration import Calibration
    from compiler.pipeline import Graphs
    from passes.family import Context

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BuildOptions:
    """What to build. `choose` is "measured" (time both, keep the faster) or "asked" (what the recipe says, slower or not)."""

    recipe: Recipe
    target: CpuTarget
    threads: int = 1
    choose: str = "measured"
    calibration: Calibration | None = None

    @property
    def context(self) -> Context:
        """What the families may know beyond the graph."""
        from compiler.observe import Observer
        from passes.family import Context

        observe = Observer(self.calibration, self.target) if self.calibration else None
        return Context(self.target, observe)


def build(
    source,
    output: str | Path | None = None,
    *,
    example=None,
    recipe: str | Path | Recipe = "dense",
    target: str | CpuTarget = "native",
    inputs: Mapping[str, tuple[int, ...]] | None = None,
    batch: int | None = None,
    threads: int = 1,
    choose: str = "measured",
    records: str | Path | None = None,
    calibration=None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Import, compress, compile, verify and write a model; returns the artifact.

    `calibration` are samples of the inputs for the families that measure activations: a `.npz` file, a directory, an
    iterable, or "random" (see `compiler.calibration`).

    Without `output` the artifact lives in a temporary directory for as long as the returned object does. Raises
    `KerfError`; nothing is written unless verification passes.
    """
    say = _timed(progress or (lambda _text: None))
    if output is not None:
        check_output(output, force)
    cpu = parse_target(target, threads) if isinstance(target, str) else target
    if not cpu.missing_on_host():
        check_threads(threads)  # what is built is run here to verify it
    if records is not None:
        from schedules.records import Records

        found = Records.open(records)
        cpu = cpu.with_records(found)
        if ignored := found.ignored_for(cpu):
            say(ignored)
    if cpu.arch == detect_host().arch:
        require_linker()
    recipe = load_recipe(recipe)
    validate(recipe)
    options = BuildOptions(recipe, cpu, threads, choose)

    from compiler.frontend import import_model

    say("importing")
    imported = import_model(source, example=example, inputs=inputs, batch=batch)
    if calibration is not None:
        from compiler.calibration import load_calibration

        options = replace(options, calibration=load_calibration(calibration, imported.inputs))
    say("simplifying the graph")
    original, treatments = prepare(imported.mod, options)
    variants, graphs, decisions = compile_variants(original, treatments, imported, options, say)

    from compiler import verify

    say("verifying")
    proof = verify.verify_build(variants, imported, graphs, options.target, threads)
    scratch = None if output is not None else tempfile.TemporaryDirectory(prefix="kerf-")
    say("writing")
    artifact = write_artifact(
        output if output is not None else Path(scratch.name) / "model",
        variants,
        inputs=imported.inputs,
        outputs=imported.outputs,
        target=cpu,
        recipe=recipe.to_json(),
        layers=[layer_row(d) for d in decisions],
        verification=proof.to_json(),
        source={
            "kind": imported.source_kind,
            "path": str(source) if isinstance(source, (str, Path)) else "",
            "notes": list(imported.notes),
            "calibration": dict(options.calibration.description) if options.calibration else None,
        },
        references=proof.references,
        force=force,
    )
    if scratch is not None:
        weakref.finalize(artifact, scratch.cleanup)
    say("done")
    return artifact


def prepare(mod: tvm.IRModule, options: BuildOptions) -> tuple[tvm.IRModule, dict[str, Treatment]]:
    """The canonical graph of an imported module, and what the recipe asks of each of its layers."""
    from compiler import pipeline
    from passes.treat_layers import layers_of

    original = pipeline.canonicalize(mod)
    if options.recipe.winograd == "never":
        original = pipeline.forbid_winograd(original)
    return original, resolve(options.recipe, [layer.name for layer in layers_of(original)])


def compile_variants(
    original: tvm.IRModule,
    treatments: Mapping[str, Treatment],
    imported,
    options: BuildOptions,
    say: Progress,
) -> tuple[list[CompiledVariant], Graphs, list[Decision]]:
    """The dense variant, the compressed one if any layer stays treated, their graphs, and the decision for every layer."""
    from compiler import pipeline
    from compiler.pipeline import Graphs
    from passes.treat_layers import treat_layers

    def compile_one(name: str, mod: tvm.IRModule) -> CompiledVariant:
        return pipeline.compile_graph(
            name, pipeline.fuse_graph(pipeline.lay_out(mod), options.target), options.target
        )

    say("compiling the dense variant")
    dense = compile_one("dense", original)
    context = options.context
    found = treat_layers(original, treatments, context)
    decisions = found.decisions
    if found.changes_anything:
        say("compiling the compressed variant")
        compressed = compile_one("compressed", found.treated)
        if options.choose == "asked" or options.target.missing_on_host():
            return [dense, compressed], Graphs(original, found.reference), decisions
        slower: dict[str, str] = {}
        # Layer by layer first; then what is left must pay as a whole.
        for too_slow in (slower_layers, slower_network):
            say("timing every layer, dense beside compressed")
            times = time_variants(dense, compressed, imported, options)
            more = too_slow(times, decisions) or slower_network(times, decisions)
            if not more:
                break
            slower |= more
            kept = {n: t for n, t in treatments.items() if n not in slower}
            found = treat_layers(original, kept, context)
            decisions = [revert(old, new, slower) for old, new in zip(decisions, found.decisions)]
            if not found.changes_anything:
                break
            say(f"compiling again with {len(slower)} layers dense")
            compressed = compile_one("compressed", found.treated)
    if not found.changes_anything:
        return [dense], Graphs(original, original), decisions
    return [dense, compressed], Graphs(original, found.reference), decisions


def layer_row(decision: Decision) -> dict:
    """A decision as the manifest and the report hold it."""
    return {
        "name": decision.layer,
        "operator": decision.operator,
        "weight_shape": list(decision.weight_shape),
        "asked": decision.asked,
        "treatment": decision.treatment,
        "declined": decision.declined,
        "found": dict(decision.found),
        "parameters": dict(decision.parameters),
        "pruned": decision.pruned,
    }


def _timed(progress: Progress) -> Progress:
    """`progress` with the seconds since the build began in front of each line."""
    start = time.perf_counter()
    return lambda text: progress(f"[{time.perf_counter() - start:5.1f} s] {text}")
