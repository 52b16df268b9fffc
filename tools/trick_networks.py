# SPDX-License-Identifier: Apache-2.0
"""Small networks, each built to need one trick of int8 quantization. `tools/ablation.py tricks` shows what each is worth.

Run through the numpy references, without kernels. The figure is the power of the float32 outputs over that of their
difference, in decibels, averaged over output channels, so that no channel drowns another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from passes import families
from passes.evaluate import evaluate
from passes.family import Context
from passes.layers import conv2d
from passes.samples import Layers, graph
from passes.treat_layers import layers_of, treat_layers
from passes.treatment import Treatment
from schedules.target import detect_host

op = relax.op
# Everything off, so that a row shows its own trick only.
NONE = {
    "observer": "min_max",
    "per_channel": True,
    "symmetric": False,
    "equalize": False,
    "bias_correction": False,
}


@dataclass(frozen=True)
class Case:
    """A network, samples of its input, and the parameters without and with the trick, both beyond `NONE`.

    `spike` is a value that a single input has once in all calibration data, and never again.
    """

    make: Callable[[np.random.Generator], tvm.IRModule]
    sample: Callable[[np.random.Generator], np.ndarray]
    trick: Mapping[str, object]
    without: Mapping[str, object] = field(default_factory=dict)
    spike: float = 0.0


def _normal(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.standard_normal(shape).astype("float32")


def _weights(rng: np.random.Generator, *shape: int, rows=1.0, columns=1.0) -> relax.Expr:
    """Normal numbers, output channels times `rows`, input channels times `columns`."""
    w = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    along = (1,) * (len(shape) - 2)
    w = w * np.reshape(rows, (-1, 1, *along)) * np.reshape(columns, (1, -1, *along))
    return relax.const(w.astype("float32"))


def _octaves(rng: np.random.Generator, count: int) -> np.ndarray:
    return 2.0 ** rng.uniform(-5, 5, count)


def _wild_rows(layers: Layers, x):
    return layers.dense(
        "a", x, 24, weight=_weights(layers.rng, 24, 32, rows=_octaves(layers.rng, 24))
    )


def _plain(layers: Layers, x):
    return layers.dense("a", x, 24)


def _on_a_grid(layers: Layers, x):
    """Weights that bytes hold exactly: only activations are rounded."""
    w = layers.rng.integers(-127, 128, (24, 32))
    w[:, 0] = 127
    return layers.dense("a", x, 24, weight=relax.const((w / 700).astype("float32")))


def _outlier_in_weight(layers: Layers, x):
    """One of half a million weights is four times as large as the others, and its input hardly ever there."""
    w = np.clip(layers.rng.standard_normal((512, 1024)), -4, 4) / 32
    w[3, 7] = 0.5
    return layers.dense("a", x, 512, weight=relax.const(w.astype("float32")))


def _rare_input(rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal((8, 1024))
    x[:, 7] *= 1e-3
    return x.astype("float32")


def _mobile(layers: Layers, x):
    """1x1, depthwise, 1x1 with ReLU6 between, channels large in one layer and small in the next: the same function."""
    rng, emit = layers.rng, layers.emit
    s, t = _octaves(rng, 16), _octaves(rng, 16)
    clamp = lambda y: emit(op.minimum(emit(op.nn.relu(y)), relax.const(np.float32(1e4))))  # noqa: E731
    y = clamp(layers.conv2d("a", x, 16, 1, weight=_weights(rng, 16, 4, 1, 1, rows=s)))
    w = _weights(rng, 16, 1, 3, 3, rows=t / s)
    y = clamp(emit(conv2d(y, w, name="b", groups=16, padding=(1, 1, 1, 1))))
    return layers.conv2d("c", y, 8, 1, weight=_weights(rng, 8, 16, 1, 1, columns=1 / t))


def _high_bias(layers: Layers, x):
    """Channels that vary little around a large value: it, not what varies, fills the bytes."""
    y = layers.emit(op.nn.relu(layers.dense("a", x, 24, shift=40.0)))
    return layers.dense("b", y, 16)


def _pixels(layers: Layers, x):
    mean = relax.const(np.array([123.0, 117, 104], "float32").reshape(1, 3, 1, 1))
    deviation = relax.const(np.array([58.0, 57, 2], "float32").reshape(1, 3, 1, 1))
    y = layers.emit(op.divide(layers.emit(op.subtract(x, mean)), deviation))
    return layers.conv2d(
        "a", y, 8, 1, weight=_weights(layers.rng, 8, 3, 1, 1, columns=[1, 1, 0.03])
    )


def _norm_with_outliers(layers: Layers, x):
    gamma, beta = layers.rng.uniform(0.7, 1.3, 32), layers.rng.standard_normal(32)
    gamma[[3, 19]] = 80
    scale, shift = (relax.const(v.astype("float32")) for v in (gamma, beta))
    y = layers.emit(op.nn.layer_norm(x, scale, shift, axes=[-1]))
    columns = np.where(gamma > 10, 1 / 80, 1.0)
    return layers.dense("a", y, 24, weight=_weights(layers.rng, 24, 32, columns=columns))


def _same_sign(layers: Layers, x):
    """Few distinct weights, all of which round the same way: their errors add up to a shift of every output."""
    w = layers.rng.choice([0.30, 1.0], (24, 64), p=[0.97, 0.03]) * 1.003
    return layers.dense("a", x, 24, weight=relax.const(w.astype("float32")))


def _coarse(layers: Layers, x):
    """Steps too coarse for most outputs, as one of them has weights thirty times as large."""
    rows = np.where(np.arange(24) == 0, 30, 1)
    return layers.dense("a", x, 24, weight=_weights(layers.rng, 24, 64, rows=rows))


def _correlated(rng: np.random.Generator) -> np.ndarray:
    basis = np.random.default_rng(5).standard_normal((3, 64))
    return (rng.standard_normal((16, 3)) @ basis).astype("float32")


def _ruined(layers: Layers, x):
    """The second layer takes differences of what is almost equal, so that a step of its input is all there is."""
    y = layers.emit(op.nn.relu(layers.dense("a", x, 24, shift=1.0)))
    w = layers.rng.standard_normal((24, 24)) / 5
    w -= w.mean(axis=1, keepdims=True)
    y = layers.emit(op.add(y, relax.const(np.float32(300.0))))
    return layers.dense("c", layers.dense("b", y, 24, weight=relax.const(w.astype("float32"))), 16)


CASES: Mapping[str, Case] = {
    "per_channel": Case(graph((8, 32), _wild_rows), _normal(8, 32), {}, {"per_channel": False}),
    "asymmetric activations": Case(
        graph((8, 32), _on_a_grid), lambda rng: rng.uniform(-0.2, 4, (8, 32)).astype("float32"),
        {}, {"symmetric": True},
    ),
    "observer=mse": Case(graph((64, 512), _plain), _normal(64, 512), {"observer": "mse"}, spike=10.0),
    "observer=moving_average": Case(
        graph((64, 512), _plain), _normal(64, 512), {"observer": "moving_average"}, spike=10.0
    ),
    "observer=percentile": Case(
        graph((64, 512), _plain), _normal(64, 512), {"observer": "percentile"}, spike=10.0
    ),
    "observer=entropy": Case(
        graph((64, 512), _plain), _normal(64, 512), {"observer": "entropy"}, spike=10.0
    ),
    "clip_weights": Case(
        graph((8, 1024), _outlier_in_weight), _rare_input,
        {"per_channel": False, "clip_weights": True}, {"per_channel": False},
    ),
    "equalize, with ReLU6": Case(graph((2, 4, 6, 6), _mobile), _normal(2, 4, 6, 6), {"equalize": True}),
    "absorb_biases": Case(graph((8, 32), _high_bias), _normal(8, 32), {"absorb_biases": True}),
    "fold_input_normalization": Case(
        graph((1, 3, 8, 8), _pixels), lambda rng: rng.integers(0, 256, (1, 3, 8, 8)).astype("float32"),
        {"fold_input_normalization": True},
    ),
    "smooth=0.5": Case(graph((8, 32), _norm_with_outliers), _normal(8, 32), {"smooth": 0.5}),
    "bias_correction": Case(
        graph((8, 64), _same_sign), lambda rng: (5 + rng.standard_normal((8, 64)) / 4).astype("float32"),
        {"bias_correction": True},
    ),
    "rounding=reconstruct": Case(
        graph((16, 64), _coarse), _correlated,
        {"per_channel": False, "rounding": "reconstruct"}, {"per_channel": False},
    ),
    "keep_float=1": Case(graph((8, 32), _ruined), _normal(8, 32), {"keep_float": 1}),
}  # fmt: skip


def gain(case: Case, seed: int = 0) -> tuple[float, float]:
    """Decibels without and with the trick, on samples that calibration did not see."""
    mod = case.make(np.random.default_rng(seed))
    draw = np.random.default_rng(seed + 1)
    seen, unseen = ([case.sample(draw) for _ in range(8)] for _ in range(2))
    if case.spike:
        seen[-1][(0,) * seen[-1].ndim] = case.spike
    context = Context(detect_host(), _observe_on(seen))
    names = [layer.name for layer in layers_of(mod)]
    wanted = np.concatenate([_rows(_run(mod, x)) for x in unseen])
    found = []
    for parameters in ({**NONE, **case.without}, {**NONE, **case.trick}):
        treated = treat_layers(mod, dict.fromkeys(names, Treatment("int8", parameters)), context)
        outputs = np.concatenate([_rows(_run(treated.treated, x)) for x in unseen])
        signal, noise = (wanted**2).mean(axis=0), ((outputs - wanted) ** 2).mean(axis=0)
        found.append(float(np.mean(10 * np.log10(signal / np.maximum(noise, 1e-12 * signal)))))
    return found[0], found[1]


def _rows(y: np.ndarray) -> np.ndarray:
    """One row per pixel or token, a column per output channel, float64."""
    y = y.astype("float64")
    return (
        np.moveaxis(y, 1, -1).reshape(-1, y.shape[1]) if y.ndim == 4 else y.reshape(-1, y.shape[-1])
    )


def _references() -> dict:
    return {name: f for family in families() for name, f in family.references.items()}


def _run(mod: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    return evaluate(mod, [x], dtype="float32", references=_references())[0]


def _observe_on(samples: Sequence[np.ndarray]):
    def observe(mod, names, further=None) -> Iterator[Mapping[str, np.ndarray]]:
        params = [p.name for p in mod["main"].params]
        for x in samples:
            given = [x, *(further or {}).values()]
            values = {n: a for n, a in zip(params, given) if n in names}

            def keep(name, array, values=values):
                if name in names:
                    values[name] = array

            evaluate(mod, given, dtype="float32", references=_references(), observe=keep)
            yield values

    return observe
