# SPDX-License-Identifier: Apache-2.0
"""Small graphs that a family treats or declines: what the tests that every family must pass run over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.layers import conv2d, dense, register
from passes.treatment import Treatment


@dataclass(frozen=True)
class Sample:
    """`graph(rng)` makes a canonical graph, NCHW; `asked` is what is asked of its layers.

    The family takes all of them, or, where `declines` is given, none, each for a reason that this regular expression
    finds.
    """

    name: str
    graph: Callable[[np.random.Generator], tvm.IRModule]
    asked: Mapping[str, Treatment]
    declines: str | None = None


class Layers:
    """Layers with random weights, emitted one after the other."""

    def __init__(self, builder: relax.BlockBuilder, rng: np.random.Generator):
        self.builder, self.rng = builder, rng

    def emit(self, value: relax.Expr) -> relax.Var:
        return self.builder.emit(value)

    def constant(self, *shape: int, shift: float = 0.0) -> relax.Expr:
        """Normal numbers around `shift`, scaled by the length of a sum over all but the first axis."""
        scale = np.sqrt(max(1, int(np.prod(shape[1:]))))
        return relax.const((self.rng.standard_normal(shape) / scale + shift).astype("float32"))

    def dense(self, name: str, x: relax.Expr, outputs: int, *, weight=None, shift: float = 0.0):
        """A dense layer with a bias around `shift`."""
        if weight is None:
            weight = self.constant(outputs, int(x.ty.shape[-1]))
        y = self.emit(dense(x, weight, name=name))
        return self.emit(relax.op.add(y, self.constant(outputs, shift=shift)))

    def conv2d(self, name: str, x: relax.Expr, outputs: int, kernel: int = 3, *, weight=None):
        """A convolution of stride 1 that keeps the size, with a bias."""
        if weight is None:
            weight = self.constant(outputs, int(x.ty.shape[1]), kernel, kernel)
        padding = [kernel // 2] * 4
        y = self.emit(conv2d(x, weight, name=name, padding=padding))
        return self.emit(relax.op.add(y, self.constant(1, outputs, 1, 1)))


def graph(shape: tuple[int, ...], body: Callable[[Layers, relax.Var], relax.Expr]):
    """`Sample.graph` of a network with one float32 input of `shape` that computes `body(layers, x)`."""

    def make(rng: np.random.Generator) -> tvm.IRModule:
        register()
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType(shape, "float32"))
        with builder.function("main", [x]):
            with builder.dataflow():
                result = builder.emit_output(body(Layers(builder, rng), x))
            builder.emit_func_output(result)
        return builder.get()

    return make
