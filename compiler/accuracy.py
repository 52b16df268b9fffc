# SPDX-License-Identifier: Apache-2.0
"""What compression costs in accuracy, on the user's evaluation data, and how to hold a limit.

    top-1          share of rows whose largest output is the label, of both variants; without labels, share of rows where
                   both agree
    cosine, SQNR   of the outputs, and of every tensor that lies in bytes, against the dense variant; SQNR is the power of
                   the dense values over that of the difference, in decibels
    drop           points (hundredths) of top-1 lost: of accuracy with labels, of agreement without. Outputs that are no
                   rows of classes lose 100 * (1 - cosine)

`hold` keeps the layers whose bytes cost most, measured one by one, in float32 until the drop is within a limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compiler.arrays import read_npz
from compiler.calibration import (
    LABELS,
    Calibration,
    Sample,
    cut_samples,
    inputs_of,
    load_calibration,
)
from passes.treatment import Treatment
from schedules.errors import UserError

if TYPE_CHECKING:
    import tvm

    from compiler.frontend import TensorSpec
    from passes.family import Observe

NO_NOISE = 999.0  # decibels, where there is none at all


@dataclass(frozen=True)
class Evaluation:
    """Samples of the inputs, each with its rows' labels, or None where there are none."""

    samples: Callable[[], Iterator[tuple[Sample, np.ndarray | None]]]
    description: Mapping[str, object] = field(default_factory=dict)

    @property
    def inputs(self) -> Calibration:
        """The samples alone, to observe graphs on."""
        return Calibration(lambda: (s for s, _ in self.samples()), self.description)


def load_evaluation(source, specs: Sequence) -> Evaluation:
    """From a `.npz` file: the inputs by name, samples along the first axis, and optionally `labels`, one class per row.

    Anything else that `load_calibration` takes is evaluation data without labels. Raises UserError.
    """
    if isinstance(source, Evaluation):
        return source
    if not isinstance(source, (str, Path)) or Path(source).suffix != ".npz":
        found = load_calibration(source, specs)
        return Evaluation(lambda: ((s, None) for s in found.samples()), found.description)
    arrays = read_npz(Path(source))
    labels = arrays.pop(LABELS, None)
    samples = list(cut_samples(arrays, specs, str(source)))
    if not samples:
        raise UserError("holds no samples that fill a run", where=str(source))
    cut: list[np.ndarray | None] = [None] * len(samples)
    if labels is not None:
        of_each = len(inputs_of(arrays, specs, str(source))[specs[0].name])
        cut = _cut_labels(labels, len(samples), of_each, specs, str(source))
    description = {"kind": "file", "path": str(source), "samples": len(samples)}
    return Evaluation(lambda: zip(samples, cut), {**description, "labels": labels is not None})


def _cut_labels(
    labels: np.ndarray, count: int, wanted: int, specs: Sequence, where: str
) -> list[np.ndarray]:
    """Labels, `wanted` in all, for `count` runs."""
    rows = specs[0].shape[0] if specs[0].shape else 1
    if labels.dtype.kind not in "iu" or labels.shape != (wanted,):
        raise UserError(
            "labels do not fit",
            where=where,
            found=f"{labels.dtype}[{','.join(map(str, labels.shape))}]",
            wanted=f"{wanted} class numbers",
        )
    return [labels[i * rows : (i + 1) * rows] for i in range(count)]


@dataclass(frozen=True)
class TensorError:
    """One tensor in bytes against the dense variant's floats; `layers` are those whose results it holds."""

    tensor: str
    layers: tuple[str, ...]
    cosine: float
    sqnr_db: float


@dataclass(frozen=True)
class Stage:
    """The network behind one step of its compression, the next not yet taken: as `Accuracy`, for what is computed then."""

    name: str
    top1: float | None
    agreement: float | None
    cosine: float
    sqnr_db: float
    drop: float


@dataclass(frozen=True)
class Accuracy:
    """See the module's docstring. `tensors` are the worst first; `kept_float` the layers that a limit made float32;
    `stages` what came before where layers are pruned and then quantized."""

    rows: int
    agreement: float | None
    dense_top1: float | None
    compressed_top1: float | None
    cosine: float
    sqnr_db: float
    drop: float
    max_drop: float | None = None
    kept_float: tuple[str, ...] = ()
    tensors: tuple[TensorError, ...] = ()
    stages: tuple[Stage, ...] = ()
    data: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict:
        return _finite(asdict(self))


def _finite(value):
    """JSON has no infinity; `NO_NOISE` stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(NO_NOISE, value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


class _Signal:
    """Sums of products of two streamed tensors."""

    def __init__(self) -> None:
        self.aa = self.ab = self.bb = self.noise = 0.0

    def add(self, wanted: np.ndarray, found: np.ndarray) -> None:
        a, b = (v.astype("float64").reshape(-1) for v in (wanted, found))
        self.aa += float(a @ a)
        self.ab += float(a @ b)
        self.bb += float(b @ b)
        self.noise += float((a - b) @ (a - b))

    @property
    def cosine(self) -> float:
        norms = math.sqrt(self.aa * self.bb)
        return self.ab / norms if norms else float(self.aa == self.bb)

    @property
    def sqnr_db(self) -> float:
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.aa / self.noise) if self.aa else -math.inf


def check_labels(evaluation: Evaluation, output: TensorSpec) -> None:
    """That labels, where there are any, are classes of the rows of the model's first output. Raises UserError."""
    *rows, classes = output.shape or (0,)
    for _, labels in evaluation.samples():
        if labels is None:
            continue
        if len(output.shape) < 2 or classes < 2:
            found, wanted = f"{output.name} {'x'.join(map(str, output.shape))}", "rows of classes"
        elif len(labels) != math.prod(rows):
            found, wanted = f"{len(labels)} labels of a sample", str(math.prod(rows))
        elif not 0 <= labels.min() <= labels.max() < classes:
            found, wanted = f"classes {labels.min()} to {labels.max()}", f"0 to {classes - 1}"
        else:
            continue
        raise UserError("labels do not fit the model's outputs", found=found, wanted=wanted)


def measure_accuracy(dense, compressed, evaluation: Evaluation) -> Accuracy:
    """Both variants, callables on arrays, on every sample. Labels must fit (`check_labels`)."""
    signal = _Signal()
    agree, right, rows = 0, [0, 0], 0
    classes = labelled = False
    for sample, labels in evaluation.samples():
        found = [_first(model(*sample)) for model in (dense, compressed)]
        signal.add(*found)
        if found[0].ndim < 2 or found[0].shape[-1] < 2:
            continue
        classes = True
        best = [f.reshape(-1, f.shape[-1]).argmax(axis=-1) for f in found]
        rows += len(best[0])
        agree += int((best[0] == best[1]).sum())
        if labels is not None:
            labelled = True
            right = [r + int((b == labels).sum()) for r, b in zip(right, best)]
    agreement = agree / rows if classes else None
    top1 = [r / rows for r in right] if labelled else [None, None]
    if labelled:
        drop = 100 * (top1[0] - top1[1])
    else:
        drop = 100 * (1 - (agreement if classes else signal.cosine))
    return Accuracy(
        rows, agreement, *top1, signal.cosine, signal.sqnr_db, drop, data=evaluation.description
    )


def measure_pruned(dense, pruned: tvm.IRModule, observe: Observe, evaluation: Evaluation) -> Stage:
    """The pruned network in float32, the graph that was then quantized, against the dense variant."""
    result = pruned["main"].body.body
    name = getattr(result, "fields", [result])[0].name
    outputs = (values[name] for values in observe(pruned, [name]))
    found = measure_accuracy(dense, lambda *_: next(outputs), evaluation)
    of = (found.compressed_top1, found.agreement, found.cosine, found.sqnr_db, found.drop)
    return Stage("pruned", *of)


def _first(result) -> np.ndarray:
    return result[0] if isinstance(result, tuple) else result


def tensor_errors(
    floats: tvm.IRModule, treated: tvm.IRModule, observe: Observe
) -> tuple[TensorError, ...]:
    """Every tensor of `treated` that lies in bytes against what it holds in the graph `floats`, the worst SQNR first."""
    from passes.layers import attrs_of, is_call
    from passes.quantized.operators import QUANTIZE
    from passes.rewriting import bindings_of

    known = {b.var.name for b in bindings_of(floats["main"])}
    known |= {p.name for p in floats["main"].params}
    bytes_of = {}
    for binding in bindings_of(treated["main"]):
        if is_call(binding.value, QUANTIZE):
            attrs = attrs_of(binding.value)
            if attrs.get("of") in known:
                bytes_of[binding.var.name] = attrs
    signals = {name: _Signal() for name in bytes_of}
    names = list(dict.fromkeys(a["of"] for a in bytes_of.values()))
    for wanted, found in zip(observe(floats, names), observe(treated, list(bytes_of))):
        for name, attrs in bytes_of.items():
            steps = found[name].astype("float64") - attrs["zero_point"]
            signals[name].add(wanted[attrs["of"]], steps * attrs["step"])
    layers = _layers_behind(floats, names)
    errors = [
        TensorError(a["of"], layers[a["of"]], signals[n].cosine, signals[n].sqnr_db)
        for n, a in bytes_of.items()
    ]
    return tuple(sorted(errors, key=lambda e: e.sqnr_db))


def _layers_behind(mod: tvm.IRModule, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The layers whose results, through elementwise operators, make up each variable."""
    from passes.channel_flow import Uses
    from passes.layers import attrs_of, is_layer
    from passes.quantized.plan_bytes import is_elementwise, tensors

    uses = Uses(mod)

    def behind(var) -> tuple[str, ...]:
        value = uses.definitions.get(var)
        if is_layer(value):
            return (attrs_of(value)["name"],)
        if not is_elementwise(value):
            return ()
        return tuple(n for operand in tensors(value) for n in behind(operand))

    found = {v.name: behind(v) for v in uses.definitions if v.name in set(names)}
    return {name: found.get(name, ()) for name in names}


def check_alike(calibration: Calibration, evaluation: Evaluation, specs: Sequence) -> None:
    """Raise UserError if the two can hardly have been prepared the same way: an input's spread differs eightfold."""
    spreads = []
    for samples in (calibration.samples(), evaluation.inputs.samples()):
        sizes = [[float(np.std(a)) for a in sample] for _, sample in zip(range(8), samples)]
        spreads.append(np.mean(sizes, axis=0))
    for spec, a, b in zip(specs, *spreads):
        if spec.dtype.startswith("float") and min(a, b) > 0 and max(a, b) > 8 * min(a, b):
            raise UserError(
                f"{spec.name} was not prepared alike in calibration and evaluation data",
                found=f"standard deviations of {a:.3g} and {b:.3g}",
                todo="Both must be preprocessed as the network's inputs will be",
            )


def hold(
    first,
    treatments: Mapping[str, Treatment],
    build: Callable[[Mapping[str, Treatment]], tuple],
    measure: Callable[..., Accuracy],
    max_drop: float,
):
    """The first of ever less quantized builds whose drop is within `max_drop`, and its accuracy.

    `first` is the build of `treatments`; `build(treatments)` makes another and `measure(build)` its accuracy. The family's
    parameter `keep_float` says how many of the most sensitive layers stay float32: doubled until the limit holds, then the
    fewest that do are found by halving. With none left in bytes, what is lost is lost by other families.
    """
    found = measure(first)
    able = [n for n, t in treatments.items() if t.family == "int8"]
    if found.drop <= max_drop or not able:
        return first, replace(found, max_drop=max_drop)
    tried = {0: (first, found)}

    def attempt(count: int) -> bool:
        wanted = {
            n: replace(t, parameters={**t.parameters, "keep_float": count})
            if t.family == "int8"
            else t
            for n, t in treatments.items()
        }
        made = build(wanted)
        tried[count] = (made, measure(made))
        return tried[count][1].drop <= max_drop

    low, high = 0, 1
    while high < len(able) and not attempt(high):
        low, high = high, high * 2
    high = min(high, len(able))
    if high not in tried:
        attempt(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if attempt(middle) else (middle, high)
    made, accuracy = tried[high]
    return made, replace(accuracy, max_drop=max_drop)
