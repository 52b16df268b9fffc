# SPDX-License-Identifier: Apache-2.0
"""Fit quadratic neurons to what a block of layers computes: rows of its input x [M, K] and output y [M, O].

First L x + B x^2 + c by ridge regression, which has a closed form; then (R x + s) (G x + t) + B x^2 + c, started there
(R = L, G = 0, t = 1) and refined by Adam on the squared error. Float64 and float32, numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_RIDGE = 1e-6  # of the mean diagonal of the normal equations
_STEPS, _BATCH, _RATE = 600, 256, 2e-2


@dataclass(frozen=True)
class Neuron:
    """Weights [O, K] by branch, shifts [2, O] where there is a product, constant [O]."""

    weights: Mapping[str, np.ndarray]
    shifts: np.ndarray | None
    constant: np.ndarray

    @property
    def size(self) -> int:
        return sum(w.size for w in self.weights.values())

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The neuron's output [M, O]."""
        w, total = self.weights, self.constant
        if "r" in w:
            total = total + (x @ w["r"].T + self.shifts[0]) * (x @ w["g"].T + self.shifts[1])
        if "l" in w:
            total = total + x @ w["l"].T
        return total + (x * x) @ w["b"].T


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Squared error relative to the variance of what is wanted: 0 is exact, 1 as good as the mean."""
    spread = np.square(wanted - wanted.mean(0)).sum()
    return float(np.square(found - wanted).sum() / max(spread, 1e-30))


def fit_additive(x: np.ndarray, y: np.ndarray) -> Neuron:
    """L x + B x^2 + c of the least squared error."""
    terms = np.concatenate([x, x * x], 1).astype("float64")
    mean, target = terms.mean(0), y.astype("float64")
    constant = target.mean(0)
    centred = terms - mean
    normal = centred.T @ centred
    scale = np.trace(normal) / max(len(normal), 1)
    # Columns differ in size by as much as x and x^2 do: each is penalised in its own.
    penalty = np.diag(np.maximum(np.diag(normal), 1e-9 * max(scale, 1e-30)) * _RIDGE)
    solved = np.linalg.solve(normal + penalty, centred.T @ (target - constant)).T
    inputs = x.shape[1]
    weights = {"l": solved[:, :inputs], "b": solved[:, inputs:]}
    return Neuron(weights, None, constant - solved @ mean)


def refine(start: Neuron, x: np.ndarray, y: np.ndarray, seed: int = 0) -> Neuron:
    """The neuron with a product that `start`, from `fit_additive`, becomes by gradient descent."""
    outputs = len(start.constant)
    spread = np.sqrt(max(float(y.var()), 1e-30))
    names = ("r", "g", "b", "s", "t", "c")
    values = [
        start.weights["l"], np.zeros_like(start.weights["l"]), start.weights["b"],
        np.zeros(outputs), np.ones(outputs), start.constant,
    ]  # fmt: skip
    p = {n: np.array(v, "float32") for n, v in zip(names, values)}
    # Steps in units of each parameter's usual size: y over x, and over x^2.
    size = float(np.sqrt(np.square(x).mean() * x.shape[1])) or 1.0
    rate = {"r": spread / size, "g": 1 / size, "b": spread / size**2, "s": spread, "t": 1.0, "c": spread}  # fmt: skip
    moments = {n: (np.zeros_like(v), np.zeros_like(v)) for n, v in p.items()}
    rng = np.random.default_rng(seed)
    x, y = x.astype("float32"), y.astype("float32")
    for step in range(1, _STEPS + 1):
        rows = rng.integers(0, len(x), min(_BATCH, len(x)))
        gradients = _gradients(p, x[rows], y[rows])
        for name, gradient in gradients.items():
            first, second = moments[name]
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            unbiased = np.sqrt(second / (1 - 0.999**step)) + 1e-12
            pace = _RATE * rate[name] * (1 - step / (_STEPS + 1))
            p[name] -= (pace * first / (1 - 0.9**step) / unbiased).astype("float32")
    return Neuron({b: p[b] for b in "rgb"}, np.stack([p["s"], p["t"]]), p["c"])


def _gradients(p: Mapping[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> dict:
    """Of the mean squared error over the rows."""
    square = x * x
    r, g = x @ p["r"].T + p["s"], x @ p["g"].T + p["t"]
    error = (r * g + square @ p["b"].T + p["c"] - y) / len(x)
    to_r, to_g = error * g, error * r
    return {
        "r": to_r.T @ x, "g": to_g.T @ x, "b": error.T @ square,
        "s": to_r.sum(0), "t": to_g.sum(0), "c": error.sum(0),
    }  # fmt: skip
