# SPDX-License-Identifier: Apache-2.0
"""One point of a what-if study: the network with random masks of a grain, treated, compiled and timed as a build would do it.

The whole network is compiled, because what lies between layers counts as well: it shrinks where filters leave, and moves
data where sparse and dense layers meet. It runs beside the dense network in alternating runs, layers that are slower than
their dense kernels go back to them as in a build, and what that gives back is taken from the network's time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from compiler import __version__, pipeline
from compiler.artifact import CompiledVariant
from compiler.choice import Times, layers_together, slower_layers
from compiler.code_generation import GeneratedCode
from compiler.profile import kernel_times, layer_sums, total_us
from compiler.runtime import LoadedModel, from_variant
from compiler.storage import store
from compiler.verify import random_inputs
from passes.family import Context, Layer
from passes.layers import attrs_of, const_array, is_call, is_const, shape_of
from passes.rewriting import bindings_of, constant
from passes.sparse.grains import Grain
from passes.sparse.prune_filters import prune_filters
from passes.sparse.rewrite import rewrite
from passes.sparse.storage import storage_bytes
from passes.treat_layers import layers_of, rewrite_layers
from passes.treatment import Decision, Treatment
from schedules.errors import UserError
from schedules.target import CpuTarget

SLOWER = "measured slower than its dense kernel"
# Two patterns of one kernel format whose layers differ by no more than this in what they store take the same time.
_ALIKE = 0.05
# Of networks that take less there are hundreds of whole runs.
_SMALL_US = 5000.0


@dataclass(frozen=True)
class LayerPoint:
    """One layer at one point. `us` predicted within the network, as a build keeps it; `ratio` of the treated layer to the
    dense one, None where it is not treated; `declined` why it stays dense."""

    name: str
    us: float
    bytes: int
    ratio: float | None
    declined: str = ""

    @property
    def treated(self) -> bool:
        return self.ratio is not None and not self.declined


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
        """Layers that a build keeps treated."""
        return sum(layer.treated for layer in self.layers)


@dataclass(frozen=True)
class _Timing:
    """A treated network beside the dense one: times of all kernels and by layer ("dense", "compressed"), of whole runs, and
    the bytes of constants."""

    times: Times
    whole: Mapping[str, float]
    weights_bytes: int
    layer_bytes: Mapping[str, int]


class Study:
    """A model with random weights, its dense program, and the means to measure a point."""

    def __init__(self, imported, target: CpuTarget, threads: int):
        self.imported, self.target, self.threads = imported, target, threads
        self.code = GeneratedCode()
        random = np.random.default_rng(0)
        self.mod = rewrite_layers(
            pipeline.canonicalize(imported.mod),
            lambda call: _with_weight(call, random.standard_normal(shape_of(call.args[1]))),
        )
        kernels = [_signature(c) for c in layer_calls(self.mod).values()]
        if not kernels:
            raise UserError("nothing to prune", wanted="a model with convolution or linear layers")
        text = json.dumps([kernels, target.to_json(), threads, __version__], default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.arrays = random_inputs(imported.inputs)
        self.timed: list[tuple[dict[str, tuple[str, float]], _Timing]] = []

    def measure_dense(self, earlier: float | None) -> tuple[float, int]:
        """Latency of the whole dense network in microseconds, and the bytes of its constants. Where an `earlier` run
        measured another latency, its stands, and times are scaled to it: points are compared with one another."""
        whole = self._compiled("dense", self.mod)
        self.dense = self._loaded(whole)
        times, _ = kernel_times({"dense": self.dense}, self.arrays, runs=20, seconds=4.0)
        self.layer_us = layer_sums(self.dense.kernels, times["dense"])
        measured = total_us({"dense": self.dense}, self.arrays, seconds=2.0)["dense"]
        self.latency = measured if earlier is None else earlier
        self.layer_bytes = _bytes_by_layer(whole)
        self.weights_bytes = sum(self.layer_bytes.values())
        return self.latency, self.weights_bytes

    def measure(self, grain: str, density: float) -> Point:
        masked = masked_at(self.mod, Grain.parse(grain), density)
        asked = {layer.name: Treatment("sparse") for layer in layers_of(masked)}
        done = rewrite(masked, asked, Context(self.target))
        # What filters leave is stored without indices.
        kept = layers_of(done.treated if grain == "filter" else masked)
        stored = sum(_stored(layer, grain) for layer in kept)
        if all(d.treatment == "dense" for d in done.decisions):
            layers = tuple(self._layer(d, None, back=False) for d in done.decisions)
            return Point(grain, density, self.latency, self.weights_bytes, stored, layers)
        found = self._timing(done.treated)
        back = slower_layers(found.times, done.decisions)
        ratio = _ratio_of_networks(found, back)
        if ratio >= 1:  # a build would keep nothing
            ratio, back = 1.0, dict.fromkeys(asked, "")
        layers = tuple(self._layer(d, found, d.layer in back) for d in done.decisions)
        added = sum(self.layer_bytes.get(name, 0) - found.layer_bytes.get(name, 0) for name in back)
        return Point(
            grain,
            density,
            self.latency * ratio,
            found.weights_bytes + added if ratio < 1 else self.weights_bytes,
            stored,
            layers,
        )

    def _layer(self, decision: Decision, found: _Timing | None, back: bool) -> LayerPoint:
        name = decision.layer
        us, size = self.layer_us.get(name, 0.0), self.layer_bytes.get(name, 0)
        if found is None or decision.treatment == "dense":
            return LayerPoint(name, us, size, None, decision.declined or "")
        before, after = (found.times.layers[v].get(name, 0.0) for v in ("dense", "compressed"))
        ratio = after / before if before > 0 else 1.0  # over before the clock can tell
        if back:
            return LayerPoint(name, us, size, ratio, SLOWER)
        return LayerPoint(name, us * ratio, found.layer_bytes.get(name, 0), ratio)

    def _timing(self, treated: tvm.IRModule) -> _Timing:
        """Of a treated graph; grains that run in one kernel format with as many non-zeros are compiled and timed once."""
        kernels = {name: (_signature(c), _stored_share(c)) for name, c in layer_calls(treated).items()}  # fmt: skip
        for known, timing in self.timed:
            if _alike(known, kernels):
                return timing
        variant = self._compiled("compressed", treated)
        models = {"dense": self.dense, "compressed": self._loaded(variant)}
        us, _ = kernel_times(models, self.arrays, runs=20, seconds=4.0)
        layers = {name: layer_sums(model.kernels, us[name]) for name, model in models.items()}
        sizes = _bytes_by_layer(variant)
        timing = _Timing(
            Times(
                {name: sum(values) for name, values in us.items()},
                layers,
                together=layers_together(variant.kernels),
            ),
            total_us(models, self.arrays, seconds=2.0),
            sum(sizes.values()),
            sizes,
        )
        self.timed.append((kernels, timing))
        return timing

    def _compiled(self, name: str, mod: tvm.IRModule) -> CompiledVariant:
        graph = pipeline.fuse_graph(pipeline.lay_out(mod), self.target)
        return pipeline.compile_graph(name, graph, self.target, code=self.code)

    def _loaded(self, variant: CompiledVariant) -> LoadedModel:
        return from_variant(
            variant, self.imported.inputs, self.imported.outputs, self.target, self.threads
        )


def _ratio_of_networks(found: _Timing, back: Mapping[str, str]) -> float:
    """The treated network's time over the dense one's, with the layers `back` on their dense kernels again.

    Of a small network from whole runs, which hold what lies between kernels; of a large one, where they are too few for a
    steady median and kernels are nearly all, from the medians by kernel.
    """
    layers = found.times.layers
    given = sum(layers["compressed"].get(n, 0.0) - layers["dense"].get(n, 0.0) for n in back)
    total = found.whole if found.whole["dense"] < _SMALL_US else found.times.total
    return (total["compressed"] - given) / total["dense"]


def masked_at(mod: tvm.IRModule, grain: Grain, density: float) -> tvm.IRModule:
    """`mod` with a random mask of this grain and density on the weight of every layer that stays non-zero."""
    random = np.random.default_rng(1)
    if grain.name == "filter":
        # The weights are random already: filters leave as a build would let them.
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


def layer_calls(mod: tvm.IRModule) -> dict[str, relax.Call]:
    """The calls of named layers with one activation and a constant weight, by name."""
    names = [f"kerf.{kind}{layer}" for kind in ("", "sparse_") for layer in ("conv2d", "dense")]
    calls = [b.value for b in bindings_of(mod["main"])]
    return {
        attrs_of(c)["name"]: c
        for c in calls
        if any(is_call(c, name) for name in names) and is_const(c.args[1])
    }


def _with_weight(call: relax.Call, weight: np.ndarray) -> relax.Call:
    args = [call.args[0], constant(weight.astype("float32"))]
    return relax.Call(call.op, args, call.attrs, call.ty_args, ret_ty=call.ty)


def _signature(call: relax.Call) -> str:
    """Calls with the same signature take the same time if they store as much."""
    attrs = sorted((k, v) for k, v in attrs_of(call).items() if k != "name")
    return repr((call.op.name, shape_of(call.args[0]), shape_of(call.args[1]), attrs))


def _stored_share(call: relax.Call) -> float:
    weight = const_array(call.args[1])
    return float(np.count_nonzero(weight) / weight.size)


def _alike(one: Mapping[str, tuple[str, float]], other: Mapping[str, tuple[str, float]]) -> bool:
    return one.keys() == other.keys() and all(
        kernel == other[name][0] and abs(share - other[name][1]) <= _ALIKE * share
        for name, (kernel, share) in one.items()
    )


def _bytes_by_layer(variant: CompiledVariant) -> dict[str, int]:
    """Of the constants of each layer, as an artifact holds them."""
    sizes: dict[str, int] = {}
    for name, made in zip(variant.constant_names, variant.made_of):
        layer = name.rpartition("/")[0]
        sizes[layer] = sizes.get(layer, 0) + store(*made).nbytes
    return sizes


def _stored(layer: Layer, grain: str) -> int:
    if grain == "filter":
        return layer.weight.nbytes
    parsed, weight = Grain.parse(grain), layer.weight
    return round(storage_bytes(weight.shape, parsed, float(parsed.pattern(weight).mean())))
