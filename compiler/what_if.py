# SPDX-License-Identifier: Apache-2.0
"""What would pruning gain? Latency and size at any grain and density, measured before anyone trains.

Every layer gets a random mask of the grain, and the graph is treated as a build would treat it. Of layers that lower to the
same kernel one is compiled, all of one point in a single program without the rest of the network, and timed beside its dense
kernel in alternating runs. A layer's predicted time is its dense time within the whole network times that ratio, at most 1:
a build keeps the faster. What belongs to no layer is taken as it is, so that a network which loses most of its filters is
faster than predicted.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from compiler import __version__, pipeline
from compiler.arrays import write_whole
from compiler.environment import describe_environment
from compiler.frontend import TensorSpec, import_model
from compiler.profile import kernel_times, layer_sums, total_us
from compiler.runtime import LoadedModel, from_variant
from compiler.verify import random_inputs
from passes.family import Context, Layer
from passes.layers import attrs_of, const_array, is_call, is_const, shape_of
from passes.rewriting import bindings_of, constant
from passes.sparse.grains import Grain
from passes.sparse.prune_filters import prune_filters
from passes.sparse.rewrite import rewrite
from passes.sparse.storage import storage_bytes
from passes.treat_layers import layers_of, rewrite_layers
from passes.treatment import Treatment
from schedules.errors import UserError
from schedules.target import CpuTarget, parse_target

Progress = Callable[[str], None]
GRAINS = ("element", "row", "kernel", "out:4", "out:8", "filter")
DENSITIES = (0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class LayerPoint:
    """One layer at one point. `us` predicted within the network, the faster of dense and treated; `ratio` of the treated
    kernel to the dense one, None where the layer is not treated, for the reason in `declined`."""

    name: str
    us: float
    bytes: int
    ratio: float | None
    declined: str = ""


@dataclass(frozen=True)
class Point:
    """One grain and density: the network's predicted latency, the bytes of its constants as an artifact holds them, and
    those of its weights in the compact storage of `passes/sparse/storage.py`."""

    grain: str
    density: float
    latency_us: float
    weights_bytes: int
    storage_bytes: int
    layers: tuple[LayerPoint, ...]

    @property
    def treated(self) -> int:
        """Layers that are faster treated than dense."""
        return sum(layer.ratio is not None and layer.ratio < 1 for layer in self.layers)


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
    example=None,
    inputs: Mapping[str, tuple[int, ...]] | None = None,
    batch: int | None = None,
    target: str | CpuTarget = "native",
    threads: int = 1,
    state: Path | None = None,
    progress: Progress | None = None,
) -> WhatIf:
    """Predict latency and size of a model for every grain and density.

    `state`: a JSON file that is written after every point; a run that finds its own points there goes on behind them. N:M
    grains have one density, their own. Raises UserError for an unknown grain, an impossible density, a target that does
    not run here, or a state file that is something else.
    """
    wanted = points_of(grains, densities)
    cpu = parse_target(target, threads) if isinstance(target, str) else target
    if missing := cpu.missing_on_host():
        raise UserError("cannot be timed here", where=f"target {cpu.name}", found=f"no {missing}")
    say = progress or (lambda _text: None)
    say("importing")
    imported = import_model(source, example=example, inputs=inputs, batch=batch)
    study = _Study(pipeline.canonicalize(imported.mod), imported, cpu, threads)
    name = str(source) if isinstance(source, (str, Path)) else type(source).__name__
    earlier = _read_state(state, study.key)
    known = {(p.grain, p.density): p for p in earlier.points} if earlier else {}
    if earlier and all(point in known for point in wanted):
        return replace(earlier, points=tuple(known[point] for point in wanted))
    say("timing the dense network")
    latency, size = study.measure_dense(earlier.latency_us if earlier else None)
    points: list[Point] = []
    begun, fresh = time.perf_counter(), 0
    for grain, density in wanted:
        point = known.get((grain, density))
        if point is None:
            say(
                f"{grain} at {density:.3g} ({len(points) + 1} of {len(wanted)}{_eta(begun, fresh, wanted, known)})"
            )
            point = study.measure(grain, density)
            fresh += 1
        points.append(point)
        found = WhatIf(name, study.key, latency, size, tuple(points), describe_environment(threads))
        if state is not None:
            others = (p for key, p in known.items() if key not in wanted)
            _write_state(state, replace(found, points=(*found.points, *others)))
    return found


def points_of(grains: Sequence[str], densities: Sequence[float]) -> list[tuple[str, float]]:
    """(grain, density) of every point, in order. Raises UserError."""
    if bad := [d for d in densities if not 0 < d <= 1]:
        raise UserError("density must be in (0, 1]", found=str(bad[0]))
    found: list[tuple[str, float]] = []
    for name in grains:
        try:
            grain = Grain.parse(name)
        except ValueError as error:
            raise UserError(str(error)) from None
        own = [grain.density] if grain.density else densities
        found += [(grain.name, float(d)) for d in own]
    if not found:
        raise UserError("nothing to try", wanted="one grain and one density at least")
    return list(dict.fromkeys(found))


class _Study:
    """The model, its dense times, and the means to measure a point."""

    def __init__(self, mod: tvm.IRModule, imported, target: CpuTarget, threads: int):
        self.imported, self.target, self.threads = imported, target, threads
        random = np.random.default_rng(0)
        self.mod = rewrite_layers(
            mod, lambda call: _with_weight(call, random.standard_normal(shape_of(call.args[1])))
        )
        self.dense_calls = layer_calls(pipeline.lay_out(self.mod))
        if not self.dense_calls:
            raise UserError("nothing to prune", wanted="a model with convolution or linear layers")
        text = json.dumps([[_signature(c) for c in self.dense_calls.values()], target.to_json(), threads, __version__], default=str)  # fmt: skip
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.bench: _Bench | None = None
        self.timed: dict[tuple, tuple[float, int]] = {}

    def measure_dense(self, earlier: float | None) -> tuple[float, int]:
        """Latency of the whole dense network in microseconds, and the bytes of its constants. Where an `earlier` run
        measured another latency, its stands, and times are scaled to it: points are compared with one another."""
        whole = pipeline.compile_graph(
            "dense", pipeline.fuse_graph(pipeline.lay_out(self.mod), self.target), self.target
        )
        model = from_variant(
            whole, self.imported.inputs, self.imported.outputs, self.target, self.threads
        )
        arrays = random_inputs(self.imported.inputs)
        times, _ = kernel_times({"dense": model}, arrays, runs=20, seconds=4.0)
        self.layer_us = layer_sums(model.kernels, times["dense"])
        self.kernels_us = sum(times["dense"])
        self.latency = total_us({"dense": model}, arrays, seconds=2.0)["dense"]
        if earlier is not None:
            self.latency = earlier
        self.weights_bytes = sum(c.nbytes for c in whole.constants)
        self.layer_bytes = _bytes_by_layer(whole)
        self.bench = _Bench.of("dense", self.dense_calls, self.target, self.threads)
        return self.latency, self.weights_bytes

    def measure(self, grain: str, density: float) -> Point:
        masked = masked_at(self.mod, Grain.parse(grain), density)
        asked = dict.fromkeys(self.dense_calls, Treatment("sparse"))
        done = rewrite(masked, asked, Context(self.target))
        reasons = {d.layer: d.declined or "" for d in done.decisions}
        calls = layer_calls(pipeline.lay_out(done.treated))
        changed = {
            n: c for n, c in calls.items() if _signature(c) != _signature(self.dense_calls[n])
        }
        keys = {n: _timing_key(c, self.dense_calls[n]) for n, c in changed.items()}
        if new := {n: c for n, c in changed.items() if keys[n] not in self.timed}:
            bench = _Bench.of("treated", new, self.target, self.threads)
            self.timed |= {keys[n]: found for n, found in bench.against(self.bench).items()}
        ratios = {n: self.timed[key][0] for n, key in keys.items()}
        sizes = {n: self.timed[key][1] for n, key in keys.items()}
        layers = []
        for name, dense_us in self.layer_us.items():
            ratio, dense_bytes = ratios.get(name), self.layer_bytes[name]
            wins = ratio is not None and ratio < 1
            us, size = (dense_us * ratio, sizes[name]) if wins else (dense_us, dense_bytes)
            layers.append(
                LayerPoint(name, us, size, ratio, "" if wins or ratio else reasons.get(name, ""))
            )
        saved = sum(self.layer_us[p.name] - p.us for p in layers)
        smaller = sum(self.layer_bytes[p.name] - p.bytes for p in layers)
        stored = sum(_stored(layer, grain) for layer in layers_of(masked))
        return Point(
            grain,
            density,
            self.latency * (1 - saved / self.kernels_us),
            self.weights_bytes - smaller,
            stored,
            tuple(layers),
        )


@dataclass(frozen=True)
class _Bench:
    """One program of layers alone, each with a bias and a ReLU behind it; `of_layer` gives the one that stands for a layer."""

    name: str
    model: LoadedModel
    of_layer: Mapping[str, str]
    bytes: Mapping[str, int]

    @staticmethod
    def of(name: str, calls: Mapping[str, relax.Call], target: CpuTarget, threads: int) -> _Bench:
        first: dict[str, str] = {}
        of_layer = {
            layer: first.setdefault(_signature(call), layer) for layer, call in calls.items()
        }
        mod = program_of([calls[layer] for layer in dict.fromkeys(of_layer.values())])
        variant = pipeline.compile_graph(name, pipeline.fuse_graph(mod, target), target)
        specs = [TensorSpec(p.name, shape_of(p), "float32") for p in mod["main"].params]
        out = [TensorSpec(f"y{i}", (), "float32") for i in range(len(specs))]
        return _Bench(
            name,
            from_variant(variant, specs, out, target, threads),
            of_layer,
            _bytes_by_layer(variant),
        )

    def against(self, dense: _Bench) -> dict[str, tuple[float, int]]:
        """Of every layer here: its time over that of its dense kernel, and the bytes of its constants."""
        models = {b.name: b.model for b in (dense, self)}
        arrays = {name: random_inputs(model.inputs) for name, model in models.items()}
        times, _ = kernel_times(models, arrays, runs=15, seconds=6.0)
        us = {name: layer_sums(model.kernels, times[name]) for name, model in models.items()}
        return {
            layer: (
                _ratio(us[self.name][own], us[dense.name][dense.of_layer[layer]]),
                self.bytes[own],
            )
            for layer, own in self.of_layer.items()
        }


def _ratio(us: float, dense_us: float) -> float:
    """Of two times; 1 where the dense kernel is over before the clock can tell."""
    return us / dense_us if dense_us > 0 else 1.0


def masked_at(mod: tvm.IRModule, grain: Grain, density: float) -> tvm.IRModule:
    """`mod` with a random mask of this grain and density on the weight of every layer that stays non-zero."""
    random = np.random.default_rng(1)
    if (
        grain.name == "filter"
    ):  # the weights are random already: filters leave as a build would let them
        return prune_filters(mod, {layer.name: density for layer in layers_of(mod)})

    def mask(call: relax.Call) -> relax.Call:
        weight = const_array(call.args[1])
        kept = random.random(grain.grid(weight.shape))
        if grain.of:
            groups = random.random(grain.groups_of(weight).shape)
            chosen = np.argsort(np.argsort(groups, axis=-1), axis=-1) < grain.keep
            cut = Grain((1, grain.of, 1, 1))
            whole = cut.join(chosen.reshape(*chosen.shape[:4], 1, grain.of, 1, 1), weight.shape)
        else:
            count = max(1, round(density * kept.size))
            limit = np.partition(kept.reshape(-1), count - 1)[count - 1]
            whole = grain.spread(kept <= limit, weight.shape)
        return _with_weight(call, np.where(whole, weight, 0))

    return rewrite_layers(mod, mask)


def _with_weight(call: relax.Call, weight: np.ndarray) -> relax.Call:
    args = [call.args[0], constant(weight.astype("float32"))]
    return relax.Call(call.op, args, call.attrs, call.ty_args, ret_ty=call.ty)


def layer_calls(mod: tvm.IRModule) -> dict[str, relax.Call]:
    """The calls of named layers with one activation and a constant weight, by name."""
    calls = [b.value for b in bindings_of(mod["main"])]
    return {
        attrs_of(c)["name"]: c
        for c in calls
        if any(is_call(c, f"kerf.{kind}{layer}") for kind in ("", "sparse_") for layer in ("conv2d", "dense"))
        and is_const(c.args[1])
    }  # fmt: skip


def _signature(call: relax.Call) -> str:
    """Calls with the same signature take the same time, whatever their weights."""
    attrs = {k: v for k, v in attrs_of(call).items() if k != "name"}
    return repr(
        (call.op.name, shape_of(call.args[0]), shape_of(call.args[1]), sorted(attrs.items()))
    )


def _timing_key(call: relax.Call, dense: relax.Call) -> tuple:
    """Grains that run in the same kernel format with as many non-zeros are timed once: the kernel is the same, and where in
    a row of blocks its non-zeros lie makes no difference that could be measured."""
    stored = np.count_nonzero(const_array(call.args[1])) / const_array(call.args[1]).size
    return _signature(call), _signature(dense), float(f"{stored:.1e}")


def program_of(calls: Sequence[relax.Call]) -> tvm.IRModule:
    """A program that computes these layers from inputs of their own, channels last, each with a bias and a ReLU."""
    inputs = [relax.Var(f"x{i}", call.args[0].ty) for i, call in enumerate(calls)]
    bb = relax.BlockBuilder()
    with bb.function("main", inputs):
        with bb.dataflow():
            results = []
            for call, x in zip(calls, inputs):
                y = bb.emit(relax.Call(call.op, [x, *list(call.args)[1:]], attrs=call.attrs))
                bias = np.linspace(-1, 1, shape_of(y)[-1], dtype="float32")
                results.append(
                    bb.emit(relax.op.nn.relu(bb.emit(relax.op.add(y, relax.const(bias)))))
                )
            out = bb.emit_output(relax.Tuple(results))
        bb.emit_func_output(out)
    return bb.get()


def _bytes_by_layer(variant) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, array in zip(variant.constant_names, variant.constants):
        layer = name.rpartition("/")[0]
        sizes[layer] = sizes.get(layer, 0) + array.nbytes
    return sizes


def _stored(layer: Layer, grain: str) -> int:
    parsed, weight = Grain.parse(grain), layer.weight
    return round(storage_bytes(weight.shape, parsed, float(parsed.pattern(weight).mean())))


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
