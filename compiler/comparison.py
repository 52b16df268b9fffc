# SPDX-License-Identifier: Apache-2.0
"""Is the compiled model the model? Two questions, kept apart.

(a) Do the kernels compute what the graph says? Each variant against the float64 evaluation of its
own graph, pruned or
    not, with a tolerance derived from rounding. This must hold: VerificationError stops a build.
    The original framework's own outputs must pass the same check, or the graph is not the model.
(b) How far is each variant from the original model in its own framework? Reported, not judged: a
pruned network is
    another network, and how different it may be is for its user to say.

Tolerance of (a), per output, on the largest difference: the larger of

    8 E          E: what float32 rounding alone does, the largest difference between a plain
                 float32 (numpy) and the float64 evaluation of the graph
    s u n^(1/2)  s: largest magnitude of the output; u = 2^-23; n = sum over layers of a^2 K, with
                 K the length of the layer's sums: the rounding errors of K terms add up like a
                 random walk, and so do those of the layers. a = 1, but 32 for Winograd, whose
                 transforms for F(4x4, 3x3) amplify the error of a product by that much

Integer outputs must be equal wherever the float32 evaluation agrees with the float64 one.

A graph that rounds to steps in between (int8) is cut there: `compiler.jumps` compares every tensor of steps on its own,
element by element, and both evaluations continue with the kernels' steps. What is said above then holds from one cut to
the next, and for the outputs, as it stands. Where floats are compared or rounded in a graph that is not cut there, E is
the most that several evaluations nearby show, and the kernels are also compared one by one: `compiler.float_steps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compiler.artifact import KernelCall, ReferenceRun
from schedules.errors import VerificationError

Arrays = Sequence[np.ndarray]
UNIT = 2.0**-23
SLACK = 8.0
AMPLIFICATION = {"winograd": 32.0}


@dataclass(frozen=True)
class Comparison:
    """Outputs against wanted ones, over all runs and outputs.

    `max_abs` largest difference, infinite where only one of the two is finite; `max_rel` the same
    over the largest magnitude wanted of that output; `cosine` the smallest over runs;
    `top1_agreement` share of rows (last axis) whose largest entry is at the same place, None if
    no output has rows of at least two.
    """

    max_abs: float
    max_rel: float
    cosine: float
    top1_agreement: float | None

    def to_json(self) -> dict:
        return {k: _finite(v) for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Steps:
    """Tensors of steps compared by `compiler.jumps`: how many, their elements, and of those that differ how many lie at a
    tie, where rounding decides, and how many are `wrong`."""

    tensors: int = 0
    elements: int = 0
    ties: int = 0
    wrong: int = 0

    def __add__(self, other: Steps) -> Steps:
        return Steps(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values())))


@dataclass(frozen=True)
class KernelCheck:
    """Question (a) for one variant. `float32_error` is E and `bound` the second term, both of the
    worst output; `steps` what was compared inside the network, None where nothing is rounded to
    steps."""

    max_abs: float
    max_rel: float
    tolerance: float
    float32_error: float
    bound: float
    winograd_kernels: int
    passed: bool
    steps: Steps | None = None

    def to_json(self) -> dict:
        return {k: _finite(v) for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Verification:
    """Answers to both questions by variant; `graph` is the original framework's outputs under (a).

    `kernels` is empty for a target that this machine cannot run. `references` are what was compared
    with, for the artifact.
    """

    runs: int
    kernels: Mapping[str, KernelCheck]
    original: Mapping[str, Comparison]
    graph: KernelCheck | None = None
    references: Sequence[ReferenceRun] = ()

    @property
    def passed(self) -> bool:
        return all(c.passed for c in (*self.kernels.values(), *filter(None, [self.graph])))

    @property
    def delivered(self) -> str:
        """The variant that a user gets by default."""
        return "compressed" if "compressed" in self.original else "dense"

    def to_json(self) -> dict:
        """See docs/report.md; the top level repeats the delivered variant against the original."""
        top = self.original[self.delivered].to_json() if self.original else {}
        return {
            "passed": self.passed,
            "runs": self.runs,
            "variant": self.delivered,
            **top,
            "graph": self.graph.to_json() if self.graph else None,
            "kernels": {name: check.to_json() for name, check in self.kernels.items()},
            "original": {name: found.to_json() for name, found in self.original.items()},
        }


def _finite(value):
    """JSON has no infinity; the largest float64 stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return float(np.finfo("float64").max)
    return value


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest absolute difference; infinite if the shapes, the NaNs or the infinities are not the
    same."""
    if found.shape != wanted.shape:
        return math.inf
    a, b = found.astype("float64"), wanted.astype("float64")
    finite = np.isfinite(a) & np.isfinite(b)
    same = finite | (a == b) | (np.isnan(a) & np.isnan(b))
    if not same.all():
        return math.inf
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0))


def magnitude(array: np.ndarray) -> float:
    """Largest finite absolute value."""
    values = array.astype("float64")
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def compare(found: Sequence[Arrays], wanted: Sequence[Arrays]) -> Comparison:
    """Runs of outputs against runs of wanted outputs."""
    pairs = [(f, w) for fs, ws in zip(found, wanted) for f, w in zip(fs, ws)]
    if not pairs or any(len(fs) != len(ws) for fs, ws in zip(found, wanted)):
        raise VerificationError("the number of outputs differs")
    errors = [difference(f, w) for f, w in pairs]
    relative = [e / m if (m := magnitude(w)) else e for e, (_, w) in zip(errors, pairs)]
    rows = [r for f, w in pairs if (r := _top1(f, w)) is not None]
    agree = float(np.concatenate(rows).mean()) if rows else None
    return Comparison(max(errors), max(relative), min(_cosine(f, w) for f, w in pairs), agree)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return math.nan
    a, b = (np.nan_to_num(v.astype("float64").ravel(), posinf=0, neginf=0) for v in (a, b))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms == 0.0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(np.clip(a @ b / norms, -1, 1))


def _top1(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    if a.ndim < 2 or a.shape[-1] < 2 or a.shape != b.shape or a.dtype.kind != "f":
        return None
    return (a.argmax(-1) == b.argmax(-1)).ravel()


def rounding_terms(lengths: Mapping[str, int], kernels: Sequence[KernelCall]) -> float:
    """`n` of the module's docstring: sum over layers of a^2 K, for K by layer name and the
    kernels that compute them."""
    factor = {layer: AMPLIFICATION.get(k.loops, 1.0) for k in kernels for layer in k.layers}
    return sum(factor.get(layer, 1.0) ** 2 * length for layer, length in lengths.items()) or 1.0


def rounding_tolerance(float32_error: float, scale: float, terms: float) -> float:
    """The tolerance of the module's docstring: E, s and n in this order."""
    return max(SLACK * float32_error, scale * UNIT * math.sqrt(terms))


def check_kernels(
    found: Sequence[Arrays],
    exact: Sequence[Arrays],
    float32: Sequence[Arrays],
    terms: float,
    kernels: Sequence[KernelCall] = (),
    steps: Steps | None = None,
) -> KernelCheck:
    """Question (a): `found` by the kernels, `exact` in float64, `float32` by plain float32."""
    rows = []
    for fs, es, ps in zip(found, exact, float32, strict=True):
        for f, e, p in zip(fs, es, ps, strict=True):
            scale, plain = magnitude(e), difference(p, e)
            # If float32 is not even finite where float64 is, it says nothing about rounding.
            plain = plain if math.isfinite(plain) else 0.0
            bound = scale * UNIT * math.sqrt(terms) if e.dtype.kind == "f" else 0.0
            error, tolerance = difference(f, e), max(SLACK * plain, bound)
            relative = error / scale if scale else error
            rows.append((error, relative, tolerance, plain, bound, error <= tolerance))
    # The worst is the one closest to, or furthest over, its tolerance.
    worst = max(rows, key=lambda r: (not r[5], r[0] / r[2] if r[2] else r[0]))
    winograd = sum(k.loops == "winograd" for k in kernels)
    passed = all(r[5] for r in rows) and not (steps and steps.wrong)
    return KernelCheck(*worst[:5], winograd, passed, steps)


def verify(
    run: Mapping[str, Callable[..., Any]],
    references: Sequence[ReferenceRun],
    *,
    lengths: Mapping[str, int],
    kernels: Mapping[str, Sequence[KernelCall]],
    steps: Mapping[str, Steps] | None = None,
    graph: KernelCheck | None = None,
) -> Verification:
    """Both questions for every variant in `run`, callables on arrays such as `LoadedModel`.

    `lengths` gives the length of each layer's sums, `steps` what `compiler.jumps` found inside a
    variant, `graph` how the original framework's outputs compare. Nothing is raised: see
    `require_passed`.
    """
    original = [r.outputs for r in references]
    checks, distances = {}, {}
    for name, call in run.items():
        found = [as_arrays(call(*r.inputs)) for r in references]
        exact, float32 = [r.exact[name] for r in references], [r.float32[name] for r in references]
        used = kernels.get(name, ())
        checks[name] = check_kernels(
            found, exact, float32, rounding_terms(lengths, used), used, (steps or {}).get(name)
        )
        distances[name] = compare(found, original)
    return Verification(len(references), checks, distances, graph, tuple(references))


def check_graph(
    references: Sequence[ReferenceRun], lengths: Mapping[str, int]
) -> KernelCheck | None:
    """Whether the graph is the model: the original framework's outputs against the dense
    graph's."""
    if not all("dense" in r.exact for r in references):
        return None
    exact, float32 = ([getattr(r, k)["dense"] for r in references] for k in ("exact", "float32"))
    return check_kernels(
        [r.outputs for r in references], exact, float32, rounding_terms(lengths, ())
    )


def as_arrays(result: Any) -> list[np.ndarray]:
    """A model's result, one array or several, as a list."""
    return [np.asarray(r) for r in (result if isinstance(result, (tuple, list)) else (result,))]


def require_passed(found: Verification, culprit: Callable[[str], str] | None = None) -> None:
    """Raise VerificationError for the first variant that failed; `culprit(variant)` names the
    layer that diverges."""
    if found.graph is not None and not found.graph.passed:
        raise VerificationError(
            "the imported graph is not the model: the original framework's outputs differ from its",
            **_excess(found.graph),
            todo="This is a bug in Kerf's import of this model",
        )
    for name, check in found.kernels.items():
        if not check.passed:
            raise VerificationError(
                f"the {name} variant does not compute what its graph says",
                where=culprit(name) if culprit else "",
                **(_excess(check) if not (check.steps and check.steps.wrong) else _wrong(check)),
                todo="This is a bug in Kerf; leaving the layer dense in the recipe may avoid it",
            )


def _wrong(check: KernelCheck) -> dict[str, str]:
    steps = check.steps
    return {
        "found": f"{steps.wrong} of {steps.elements} values rounded to another step than theirs",
        "wanted": "none but at ties",
    }


def _excess(check: KernelCheck) -> dict[str, str]:
    return {
        "found": f"a difference of {check.max_abs:.3g} ({check.max_rel:.3g} of the largest value)",
        "wanted": f"at most {check.tolerance:.3g}",
    }
