# SPDX-License-Identifier: Apache-2.0
"""Verify what was just compiled, and what was built earlier; what to compare with comes from here.

A build is compared on seeded inputs; those, the original framework's outputs and the evaluations of
the graphs are kept in the artifact, so that it can be verified again without the original model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compiler.artifact import Artifact, CompiledVariant, ReferenceRun, read_references
from compiler.comparison import (
    KernelCheck,
    Steps,
    Verification,
    as_arrays,
    check_graph,
    check_kernels,
    compare,
    require_passed,
    rounding_terms,
    verify,
)
from compiler.divergence import find_first_divergence
from compiler.float_steps import FLIPS, compares_floats, farthest, moved
from compiler.jumps import (
    Replay,
    float_jump_sizes,
    jumping_operators,
    jumps_in,
    moved_steps,
    replayed,
    written_tensors,
)
from compiler.runtime import LoadedModel, from_variant, load_variants
from compiler.samples import index_ranges, sample_inputs
from schedules.errors import UserError, VerificationError
from schedules.target import CpuTarget

if TYPE_CHECKING:
    import tvm

    from compiler.frontend import Imported, TensorSpec
    from compiler.pipeline import Graphs

RUNS = 2
SEED = 0


def random_inputs(
    specs: Sequence[TensorSpec], seed: int = SEED, ranges: Mapping[str, int] | None = None
) -> list[np.ndarray]:
    """One input per spec, in order; see `compiler.samples.sample_inputs`."""
    return sample_inputs(specs, seed=seed, runs=1, ranges=ranges)[0]


def verify_build(
    variants: Sequence[CompiledVariant],
    imported: Imported,
    graphs: Graphs,
    target: CpuTarget,
    threads: int = 1,
    samples: Sequence[Sequence[np.ndarray]] = (),
) -> Verification:
    """Verify compiled variants: "dense" computes `graphs.original`, any other `graphs.reference`.

    Raises VerificationError naming the first diverging kernel. For a target that this machine
    cannot run, only the graph is compared with the original model. Inputs are `samples` of the
    user's, if there are any, else random ones.
    """
    inputs = [list(sample) for sample in samples][:RUNS] or sample_inputs(
        imported.inputs, seed=SEED, runs=RUNS, ranges=index_ranges(imported.mod)
    )
    by_name = {v.name: graphs.original if v.name == "dense" else graphs.reference for v in variants}
    lengths = sum_lengths(graphs.original)
    if target.missing_on_host():
        references, _ = evaluate_references(inputs, imported, by_name, {})
        graph = compare_with_framework(references, graphs.original, lengths)
        found = Verification(len(inputs), {}, {}, graph, references)
        require_passed(found)
        return found
    models = {
        v.name: from_variant(v, imported.inputs, imported.outputs, target, threads)
        for v in variants
    }
    references, steps = evaluate_references(inputs, imported, by_name, models)
    _require_finite([run.outputs for run in references])
    found = verify(
        models,
        references,
        lengths=lengths,
        kernels={v.name: v.kernels for v in variants},
        steps=steps,
        graph=compare_with_framework(references, graphs.original, lengths),
    )
    definitions = {v.name: v.unscheduled for v in variants}

    def culprit(name: str) -> str:
        diverging = find_first_divergence(models[name], definitions[name], inputs[0])
        return str(diverging or "every kernel agrees with its definition: an earlier pass is wrong")

    require_passed(found, culprit)
    for name, graph in by_name.items():
        if name in steps:
            continue  # its steps are compared one by one
        if compares_floats(graph):
            _require_kernels(name, models[name], definitions[name], inputs[0])
    return found


def _require_kernels(name: str, model: LoadedModel, definitions, inputs) -> None:
    """That every kernel agrees with its definition, but for a few elements at a threshold."""
    diverging = find_first_divergence(model, definitions, inputs, flips=FLIPS)
    if diverging is not None:
        raise VerificationError(
            f"the {name} variant does not compute what its graph says",
            where=str(diverging),
            todo="This is a bug in Kerf; leaving the layer dense in the recipe may avoid it",
        )


def evaluate_references(
    inputs: Sequence[Sequence[np.ndarray]],
    imported: Imported,
    graphs: Mapping[str, tvm.IRModule],
    models: Mapping[str, LoadedModel],
) -> tuple[list[ReferenceRun], dict[str, Steps]]:
    """What the original framework and numpy, in both precisions, make of `inputs`; and for graphs
    that round to steps how those of the variant in `models` compare (see `compiler.jumps`)."""
    jumping = jumping_operators()
    jumps = {name: jumps_in(graph, jumping) for name, graph in graphs.items()}
    references: list[ReferenceRun] = []
    steps = {name: Steps() for name in graphs if jumps[name] and name in models}
    for arrays in inputs:
        known: dict[int, dict[str, list[np.ndarray]]] = {}  # variants may share one graph
        found = {}
        for name, graph in graphs.items():
            if name in steps:
                found[name], judged = _evaluate_jumping(graph, arrays, models[name], jumping)
                steps[name] += judged
                continue
            if id(graph) not in known:
                known[id(graph)] = _evaluate_both(graph, arrays)
            found[name] = known[id(graph)]
        exact, float32 = (
            {name: found[name][dtype] for name in graphs} for dtype in ("float64", "float32")
        )
        outputs = [np.asarray(o) for o in imported.reference(arrays)]
        references.append(ReferenceRun(arrays, outputs, exact, float32))
    return references, steps


def compare_with_framework(
    references: Sequence[ReferenceRun], graph: tvm.IRModule, lengths: Mapping[str, int]
) -> KernelCheck | None:
    """Whether the imported graph is the model: the framework's outputs against the graph's. What the framework computed
    inside is not known: of a graph that jumps, what rounding alone does to the outputs is found by evaluating it nearby.
    """
    if jumps_in(graph, jumping_operators()):
        found = [_evaluate_both(graph, r.inputs) for r in references]
        references = [
            replace(r, exact={"dense": f["float64"]}, float32={"dense": f["float32"]})
            for r, f in zip(references, found)
        ]
    return check_graph(references, lengths)


def _evaluate_both(graph: tvm.IRModule, arrays: Sequence[np.ndarray]) -> dict:
    from passes.evaluate import evaluate

    jumping, rng = jumping_operators(), np.random.default_rng(0)

    def nearby(reference):
        """An operator that rounds values moved as another order of summation moves them: inputs may be integers."""
        return lambda attrs, x, *rest: reference(attrs, moved(x, rng), *rest)

    def plain(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        own = _references() if inputs is arrays else replayed(_references(), jumping, nearby)
        return evaluate(graph, inputs, dtype="float32", references=own)

    exact = evaluate(graph, arrays, dtype="float64", references=_references())
    jumps = compares_floats(graph) or jumps_in(graph, jumping)
    return {"float64": exact, "float32": farthest(plain, arrays, exact) if jumps else plain(arrays)}


def _evaluate_jumping(
    graph: tvm.IRModule, arrays: Sequence[np.ndarray], model: LoadedModel, jumping: frozenset[str]
) -> tuple[dict, Steps]:
    """As `_evaluate_both`, but from one rounding to steps to the next, on the kernels' own steps."""
    from passes.evaluate import evaluate
    from passes.pool_convolutions import PoolConvolutions

    graph = PoolConvolutions()(graph)  # steps that are pooled in the same kernel lie nowhere
    written = written_tensors(model, arrays, float_jump_sizes(graph, jumping))
    replay = Replay(written, _float_terms(graph), moved_steps(graph, jumping))
    results = {}
    for dtype, wrap in (("float64", replay.exact), ("float32", replay.plain)):
        own = replayed(_references(), jumping, wrap)
        results[dtype] = evaluate(graph, arrays, dtype=dtype, references=own)
    return results, sum(replay.steps, Steps())


def _references() -> dict:
    from passes import families

    return {name: f for family in families() for name, f in family.references.items()}


# Float operations from an exact integer sum to its rounding: conversion, multiplication, residual, activation.
_EPILOGUE_TERMS = 16.0


def _float_terms(graph: tvm.IRModule) -> float:
    """`rounding_terms` of the layers that sum floats; integer sums are exact."""
    return sum(sum_lengths(graph).values()) + _EPILOGUE_TERMS


def sum_lengths(mod: tvm.IRModule) -> dict[str, int]:
    """The number of terms in the sums of each named layer."""
    from passes.treat_layers import layers_of

    return {layer.name: math.prod(layer.weight.shape[1:]) for layer in layers_of(mod)}


def verify_artifact(
    artifact: Artifact, inputs: Mapping[str, np.ndarray] | None = None
) -> Verification:
    """Verify an artifact: on the inputs it was built with, or on `inputs` by name.

    The latter asks the original model, whose file must be where it was. Raises VerificationError,
    and UserError if there is nothing to compare with.
    """
    models = load_variants(artifact, list(artifact.variants), artifact.target.threads)
    rows = [r for r in artifact.layers if r.get("weight_shape")]
    lengths = {r["name"]: math.prod(r["weight_shape"][1:]) for r in rows}
    kernels = {name: info.kernels for name, info in artifact.variants.items()}
    if inputs is None:
        references = read_references(artifact)
        if not references:
            raise UserError(
                "holds no reference outputs", where=str(artifact.path), todo="Give --input"
            )
        found = verify(models, references, lengths=lengths, kernels=kernels)
    else:
        found = _verify_on(artifact, models, inputs, lengths, kernels)
    require_passed(found)
    return found


def _verify_on(
    artifact: Artifact, models: Mapping[str, LoadedModel], inputs: Mapping, lengths, kernels
) -> Verification:
    """Variants against the original framework on given inputs.

    There is no float64 evaluation here: a variant of the same weights may differ from the original
    by the rounding of both, so by twice the bound, or as much as they differed when it was built.
    """
    found = {name: [list(model.run(inputs).values())] for name, model in models.items()}
    arrays = [np.asarray(inputs[spec.name]) for spec in artifact.inputs]
    original = [as_arrays(original_model(artifact).reference(arrays))]
    _require_finite(original)
    checks = {}
    for name, outputs in found.items():
        if name == "dense" or _computes_the_original(artifact, name, lengths):
            terms = 4 * rounding_terms(lengths, kernels[name])
            checks[name] = check_kernels(outputs, original, original, terms, kernels[name])
    return Verification(1, checks, {name: compare(o, original) for name, o in found.items()})


def _require_finite(runs: Sequence[Sequence[np.ndarray]]) -> None:
    """Raise UserError where the original model gives nothing but NaN and infinity: equal to that proves nothing."""
    floats = [a for outputs in runs for a in outputs if a.dtype.kind == "f" and a.size]
    if floats and not any(np.isfinite(a).any() for a in floats):
        raise UserError(
            "nothing finite comes out, so that there is nothing to compare",
            where="the original model",
            todo="Look for infinite weights, or give inputs that the model is made for",
        )


def _computes_the_original(artifact: Artifact, name: str, lengths: Mapping[str, int]) -> bool:
    """Whether a variant's graph is the original's function, up to rounding: pruning and quantization make it another."""
    if any(row.get("pruned") for row in artifact.layers):
        return False
    references = read_references(artifact)
    if not all({"dense", name} <= set(r.exact) for r in references):
        return True
    dense, own = ([r.exact[n] for r in references] for n in ("dense", name))
    plain = [r.float32["dense"] for r in references]
    return check_kernels(own, dense, plain, rounding_terms(lengths, ())).passed


def original_model(artifact: Artifact) -> Imported:
    """The model an artifact was built from, imported again; UserError if it is not there
    unchanged."""
    from compiler.frontend import import_model

    source = artifact.manifest.get("source", {})
    path = source.get("path")
    if not path or not Path(path).is_file():
        raise UserError(
            "the original model is not there to compare with",
            where=str(artifact.path),
            found=path or "built from a module in memory",
            todo="Without --input the answers stored at build time are used",
        )
    digest = source.get("sha256")
    if digest and hashlib.sha256(Path(path).read_bytes()).hexdigest() != digest:
        raise UserError("the original model was changed since the build", where=str(path))
    shapes = {spec.name: spec.shape for spec in artifact.inputs}
    imported = import_model(path, inputs=shapes)
    if [s.shape for s in imported.inputs] != list(shapes.values()):
        raise VerificationError("the original model now has other inputs", where=str(path))
    return imported
