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
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.artifact import Artifact, CompiledVariant
from compiler.artifact_writer import check_output, write_artifact
from compiler.choice import revert, slower_layers, slower_network, time_variants
from compiler.linker import require_linker
from compiler.recipe import Recipe, load_recipe, resolve, validate
from compiler.thread_pool import check_threads
from passes.treatment import Decision, Treatment
from schedules.errors import ModelError, UserError
from schedules.target import CpuTarget, detect_host, parse_target

if TYPE_CHECKING:
    import tvm

    from compiler.accuracy import Accuracy, Evaluation
    from compiler.calibration import Calibration
    from compiler.code_generation import GeneratedCode
    from compiler.observe import Observer
    from compiler.pipeline import Graphs
    from passes.family import Context

Progress = Callable[[str], None]
CHOICES = ("measured", "asked")


@dataclass(frozen=True)
class BuildOptions:
    """What to build. `choose` is "measured" (time both, keep the faster) or "asked" (what the recipe says, slower or not).
    What is compiled with the same `code` shares kernels."""

    recipe: Recipe
    target: CpuTarget
    threads: int = 1
    choose: str = "measured"
    calibration: Calibration | None = None
    observe: Observer | None = None
    evaluation: Evaluation | None = None
    max_drop: float | None = None
    code: GeneratedCode | None = None

    @property
    def context(self) -> Context:
        """What the families may know beyond the graph."""
        from passes.family import Context

        return Context(self.target, self.observe)

    def calibrated(self, calibration: Calibration) -> BuildOptions:
        """These options with data to observe graphs on."""
        from compiler.observe import Observer

        observe = Observer(calibration, self.target, self.code)
        return replace(self, calibration=calibration, observe=observe)


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
    preprocess: str | None = None,
    evaluation=None,
    max_drop: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Import, compress, compile, verify and write a model; returns the artifact.

    `calibration` are samples of the inputs for the families that measure activations: a `.npz` file, a directory, an
    iterable, or "random" (see `compiler.calibration`); `preprocess` is what is done to images (see `compiler.images`).
    `evaluation` are samples to measure accuracy on, of the same kinds, with labels if a `.npz` file has them; with
    `max_drop`, in points of top-1, layers go back to float32 until no more than that is lost (see `compiler.accuracy`).

    Without `output` the artifact lives in a temporary directory for as long as the returned object does. Raises
    `KerfError`; nothing is written unless verification passes.
    """
    say = _timed(progress or (lambda _text: None))
    if choose not in CHOICES:
        raise UserError(
            "unknown way to choose", where="choose", found=repr(choose), wanted=" or ".join(CHOICES)
        )
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

    from compiler.code_generation import GeneratedCode
    from compiler.frontend import import_model

    options = BuildOptions(recipe, cpu, threads, choose, code=GeneratedCode())

    say("importing")
    imported = import_model(source, example=example, inputs=inputs, batch=batch)
    options = with_calibration(options, imported, calibration, preprocess, say)
    if evaluation is not None or max_drop is not None:
        options = with_evaluation(options, evaluation, max_drop, imported)
    say("simplifying the graph")
    original, treatments = prepare(imported.mod, options)
    variants, graphs, decisions = compile_variants(original, treatments, imported, options, say)
    accuracy = None
    if options.evaluation is not None:
        (variants, graphs, decisions), accuracy = hold_accuracy(
            (variants, graphs, decisions), original, treatments, imported, options, say
        )

    from compiler import verify

    say("verifying")
    samples = options.calibration.samples() if options.calibration else ()
    proof = verify.verify_build(
        variants, imported, graphs, options.target, threads, list(islice(samples, verify.RUNS))
    )
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
            "notes": [*imported.notes, *graphs.notes, *_warnings(options)],
            "calibration": dict(options.calibration.description) if options.calibration else None,
        },
        references=proof.references,
        accuracy=accuracy.to_json() if accuracy else None,
        force=force,
    )
    if scratch is not None:
        weakref.finalize(artifact, scratch.cleanup)
    say("done")
    return artifact


def _warnings(options: BuildOptions) -> list[str]:
    description = options.calibration.description if options.calibration else {}
    return [str(description["warning"])] if "warning" in description else []


def with_calibration(
    options: BuildOptions, imported, source, preprocess: str | None, say: Progress
) -> BuildOptions:
    """The options with samples to observe graphs on. Raises UserError for a preprocessing of no samples."""
    if source is None:
        if preprocess is None:
            return options
        raise UserError(
            "says how calibration images are prepared, and there are none",
            where="--preprocess",
            todo="Give --calibration DIRECTORY",
        )
    from compiler.calibration import load_calibration
    from compiler.samples import index_ranges

    loaded = load_calibration(source, imported.inputs, preprocess, index_ranges(imported.mod))
    if warning := loaded.description.get("warning"):
        say(f"warning: {warning}")
    return options.calibrated(loaded)


def with_evaluation(options: BuildOptions, source, max_drop, imported) -> BuildOptions:
    """The options with data to measure accuracy on. Raises UserError for data or a limit that make no sense."""
    from compiler.accuracy import check_alike, check_labels, load_evaluation

    if source is None:
        raise UserError(
            "a limit needs data to measure on", where="--max-drop", todo="Give --eval FILE.npz"
        )
    if max_drop is not None and not max_drop >= 0:
        raise UserError("must be 0 or more", where="--max-drop", found=str(max_drop))
    if options.target.missing_on_host():
        raise UserError("cannot be measured for another machine", where="--eval")
    found = load_evaluation(source, imported.inputs)
    check_labels(found, imported.outputs[0])
    if options.calibration is not None:
        check_alike(options.calibration, found, imported.inputs)
    return replace(options, evaluation=found, max_drop=max_drop)


def hold_accuracy(
    compiled, original: tvm.IRModule, treatments, imported, options: BuildOptions, say: Progress
) -> tuple[tuple, Accuracy]:
    """What `compile_variants` made, or the first of fewer bytes that stays within `max_drop`; and its accuracy."""
    from compiler import accuracy
    from compiler.observe import Observer
    from compiler.runtime import from_variant

    dense = compiled[0][0]

    def model(variant: CompiledVariant):
        return from_variant(
            variant, imported.inputs, imported.outputs, options.target, options.threads
        )

    def measure(made) -> Accuracy:
        say("measuring accuracy")
        return accuracy.measure_accuracy(model(dense), model(made[0][-1]), options.evaluation)

    def rebuild(wanted):
        say("compiling with more layers in float32")
        return compile_variants(
            original, wanted, imported, replace(options, choose="asked"), say, dense
        )

    if options.max_drop is None:
        made, found = compiled, measure(compiled)
    else:
        taken = {d.layer for d in compiled[2] if d.treatment != "dense"}
        kept = {d.layer: treatments[d.layer].of(d.asked) for d in compiled[2] if d.layer in taken}
        made, found = accuracy.hold(compiled, kept, rebuild, measure, options.max_drop)
    if made is not compiled:
        before = {d.layer: d for d in compiled[2]}
        back = [d.layer for d in made[2] if d.treatment == "dense" and d.layer in taken]
        # What was never asked of the rebuild keeps its own reason.
        decisions = [d if d.layer in taken else before[d.layer] for d in made[2]]
        made = (*made[:2], decisions)
        found = replace(found, kept_float=tuple(back))
    graphs = made[1]
    if graphs.floats is not None:
        observe = Observer(options.evaluation.inputs, options.target, options.code)
        errors = accuracy.tensor_errors(graphs.floats, graphs.reference, observe)
        found = replace(found, tensors=errors)
        if any(d.pruned for d in made[2]):
            stage = accuracy.measure_pruned(
                model(dense), graphs.floats, observe, options.evaluation
            )
            found = replace(found, stages=(stage,))
    return made, found


def prepare(mod: tvm.IRModule, options: BuildOptions) -> tuple[tvm.IRModule, dict[str, Treatment]]:
    """The canonical graph of an imported module, and what the recipe asks of each of its layers. Raises ModelError for
    weights that are not finite: whatever is made of them, no comparison shows that it is right."""
    import numpy as np

    from compiler import pipeline
    from passes.treat_layers import layers_of

    original = pipeline.canonicalize(mod)
    for layer in layers_of(original):
        if bad := layer.weight.size - int(np.isfinite(layer.weight).sum()):
            raise ModelError(
                "its weight holds infinity or NaN",
                where=f"layer {layer.name}",
                found=f"{bad} of {layer.weight.size} values",
            )
    if options.recipe.winograd == "never":
        original = pipeline.forbid_winograd(original)
    return original, resolve(options.recipe, [layer.name for layer in layers_of(original)])


def compile_variants(
    original: tvm.IRModule,
    treatments: Mapping[str, Treatment],
    imported,
    options: BuildOptions,
    say: Progress,
    dense: CompiledVariant | None = None,
) -> tuple[list[CompiledVariant], Graphs, list[Decision]]:
    """The dense variant, the compressed one if any layer stays treated, their graphs, and the decision for every layer.

    A `dense` variant that was compiled before is used again.
    """
    from compiler import pipeline
    from compiler.pipeline import Graphs
    from passes.pool_convolutions import left_apart
    from passes.treat_layers import treat_layers

    def compile_one(name: str, mod: tvm.IRModule) -> CompiledVariant:
        fused = pipeline.fuse_graph(pipeline.lay_out(mod), options.target)
        return pipeline.compile_graph(name, fused, options.target, progress=say, code=options.code)

    def graphs_of(found) -> Graphs:
        notes = (*found.notes, *left_apart(found.treated))
        return Graphs(original, found.reference, found.floats, notes)

    context = options.context
    say("treating layers")  # before anything is compiled: what a family refuses is known at once
    found = treat_layers(original, treatments, context)
    decisions = found.decisions
    if dense is None:
        say("compiling the dense variant")
        dense = compile_one("dense", original)
    if found.changes_anything:
        say("compiling the compressed variant")
        compressed = compile_one("compressed", found.treated)
        if options.choose == "asked" or options.target.missing_on_host():
            return [dense, compressed], graphs_of(found), decisions
        slower: dict[str, str] = {}
        # Layer by layer first; then what is left must pay as a whole.
        for too_slow in (slower_layers, slower_network):
            say("timing every layer, dense beside compressed")
            times = time_variants(
                dense, compressed, imported, options.target, options.threads, options.calibration
            )
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
    return [dense, compressed], graphs_of(found), decisions


def layer_row(decision: Decision) -> dict:
    """A decision as the manifest and the report hold it."""
    return {
        "name": decision.layer,
        "operator": decision.operator,
        "weight_shape": list(decision.weight_shape),
        "asked": decision.asked,
        "treatment": decision.treatment,
        "declined": decision.declined,
        "passed_on": dict(decision.passed_on),
        "found": dict(decision.found),
        "parameters": dict(decision.parameters),
        "pruned": decision.pruned,
    }


def _timed(progress: Progress) -> Progress:
    """`progress` with the seconds since the build began in front of each line."""
    start = time.perf_counter()
    return lambda text: progress(f"[{time.perf_counter() - start:5.1f} s] {text}")
