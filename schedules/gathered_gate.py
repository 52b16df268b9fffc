# SPDX-License-Identifier: Apache-2.0
"""A gated layer pair for one row of activations, computed where the gate is open.

    Y[o] = sum over the k with G[k] != 0 of G[k] * (S[k] * sum over d of X[d] * U[k, d] + B[k]) * W[k, o]

The non-zeros of G are compacted; rows of U are gathered for their products with X, four side by side, then rows of W are
gathered as in `gathered_rows`. U and W are float32 or int8, converted as they are loaded. Where X holds NaN or an infinity every k is computed, since 0 * inf is NaN; a product
that overflows behind a closed gate is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

from schedules.annotated import Annotated
from schedules.emission import emitting, reduce_lanes, runs_parallel
from schedules.fused import Emission, Fused, annotations
from schedules.row_lists import (
    SLACK,
    Lists,
    Taken,
    close_list,
    compact,
    start_lists,
    store_row_sums,
)
from schedules.target import CpuTarget
from schedules.vector_math import as_float32
from schedules.windows import loop, span, splat

_ROWS = 4  # rows of U multiplied with one pass over X
_CHAINS = 2  # independent partial sums of each


@dataclass(frozen=True)
class Problem(Annotated):
    """X [inputs], G [hidden], Y [outputs]."""

    inputs: int
    hidden: int
    outputs: int


def _round_up(size: int, lanes: int) -> int:
    return -(-size // lanes) * lanes


def pack_weights(
    up: np.ndarray, scale: np.ndarray, bias: np.ndarray, down: np.ndarray, lanes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """up [K, D] and down [O, K] as the kernel reads them: up [K, D'], scale [K], bias [K], down [K, O'], padded to whole
    vectors."""
    hidden, inputs = up.shape
    rows = np.zeros((hidden, _round_up(inputs, lanes)), up.dtype)
    rows[:, :inputs] = up
    columns = np.zeros((hidden, _round_up(down.shape[0], lanes)), down.dtype)
    columns[:, : down.shape[0]] = down.T
    return rows, scale.astype(np.float32), bias.astype(np.float32), columns


def define(shapes: Sequence[Sequence[int]], problem: Problem):
    """te function (x, g, up, scale, bias, down) -> [..., O]: both layers in full. `shapes` are those of x and g, one row each."""
    notes = annotations("gathered_gate", problem=problem.to_dict())
    x_lead, g_lead = ((0,) * (len(shape) - 1) for shape in shapes)

    def gated(x, g, up, scale, bias, down):
        d = te.reduce_axis((0, problem.inputs), "d")
        k = te.reduce_axis((0, problem.hidden), "k")
        product = te.compute(
            (problem.hidden,),
            lambda j: te.sum(x[(*x_lead, d)] * up[j, d].astype("float32"), axis=[d]),
            name="up",
        )
        hidden = te.compute(
            (problem.hidden,),
            lambda j: g[(*g_lead, j)] * (product[j] * scale[j] + bias[j]),
            name="hidden",
        )
        return te.compute(
            (*shapes[1][:-1], problem.outputs),
            lambda *i: te.sum(hidden[k] * down[k, i[-1]].astype("float32"), axis=[k]),
            name="gathered_gate",
            attrs=notes,
        )

    return gated


def schedule(fused: Fused, target: CpuTarget) -> tirx.PrimFunc:
    """The kernel of a fused gated pair."""
    problem = Problem.from_dict(fused.point["problem"])
    with emitting(fused, blocks=3) as (kernel, operands):
        # Without an epilogue the sum also reads what it has so far from the output.
        x, up, gate, scale, bias, *_, down = operands
        _Gated(kernel, fused.shape, problem, target).emit(x, gate, up, scale, bias, down)
    return kernel.func


class _Gated:
    """Emits one kernel."""

    def __init__(
        self, kernel: Emission, shape: tuple[int, ...], problem: Problem, target: CpuTarget
    ):
        self.kernel, self.shape, self.problem, self.target = kernel, shape, problem, target
        self.lanes = target.lanes

    def emit(self, x, gate, up, scale, bias, down) -> None:
        p = self.problem
        row = self._padded(x)
        flat = T.decl_buffer((p.hidden,), "float32", data=gate.data)
        lists = Lists.allocate(1, p.hidden + SLACK)
        count = T.alloc_buffer((1,), "int32")
        start_lists(lists, count)
        with T.If(self._is_finite(row)):
            with T.Then():
                compact(flat, 0, 0, p.hidden, lists, count, self.target)
            with T.Else():
                with T.serial(0, p.hidden) as k:
                    T.buffer_store(lists.index, k, [k])
                    T.buffer_store(lists.value, flat[k], [k])
                T.buffer_store(count, T.int32(p.hidden), [0])
        stop = T.alloc_buffer((1,), "int32")
        T.buffer_store(stop, count[0], [0])
        taken = Taken.of(np.dtype(str(down.dtype)).itemsize)
        close_list(lists, 0, count, max(taken.rows, _ROWS))
        self._multiply_up(lists, count, row, up, scale, bias)
        # What pads the list stays 0, whatever row 0 of U made of it.
        zeros = T.broadcast(T.float32(0), 16)
        T.buffer_store(lists.value, zeros, [T.ramp(stop[0], 1, 16)])
        store_row_sums(
            self.kernel, self.shape, lists, T.Bind(count[0]), p.outputs, taken, down, self.target
        )

    def _padded(self, x):
        """x as a flat buffer of whole vectors, zeros behind it."""
        p, lanes = self.problem, self.lanes
        flat = T.decl_buffer((p.inputs,), "float32", data=x.data)
        rest = p.inputs % lanes
        if not rest:
            return flat
        copy = T.alloc_buffer((_round_up(p.inputs, lanes),), "float32")
        end = p.inputs - rest
        with T.serial(0, p.inputs // lanes) as i:
            T.buffer_store(copy, flat[span(i * lanes, lanes)], [span(i * lanes, lanes)])
        T.buffer_store(copy, splat(T.float32(0), lanes), [span(end, lanes)])
        with T.serial(0, rest) as i:
            T.buffer_store(copy, flat[end + i], [end + i])
        return copy

    def _is_finite(self, row):
        """Whether no exponent of x is all ones."""
        lanes = self.lanes
        largest = T.alloc_buffer((lanes,), "int32")
        whole = span(0, lanes)
        T.buffer_store(largest, splat(T.int32(0), lanes), [whole])
        with T.serial(0, int(row.shape[0]) // lanes) as i:
            bits = tirx.reinterpret(f"int32x{lanes}", row[span(i * lanes, lanes)])
            exponent = tirx.bitwise_and(bits, splat(T.int32(0x7F800000), lanes))
            T.buffer_store(largest, tirx.max(largest[whole], exponent), [whole])
        top = reduce_lanes(T.bind(largest[whole]), tirx.max)
        return top < T.int32(0x7F800000)

    def _multiply_up(self, lists: Lists, count, row, up, scale, bias) -> None:
        """value *= scale[index] * (x . up[index]) + bias[index] for every entry of the list."""
        p, lanes = self.problem, self.lanes
        groups = T.Bind(tirx.floordiv(count[0], _ROWS))
        vectors = int(row.shape[0]) // lanes
        chains = min(_CHAINS, vectors)
        with loop(groups, runs_parallel(self.target, p.hidden, p.inputs * p.hidden)) as group:
            indices = [T.Bind(lists.index[group * _ROWS + r]) for r in range(_ROWS)]
            sums = [[T.alloc_buffer((lanes,), "float32") for _ in range(chains)] for _ in indices]
            whole = span(0, lanes)
            for bank in sums:
                for register in bank:
                    T.buffer_store(register, splat(T.float32(0), lanes), [whole])

            def step(i, chain: int) -> None:
                at = span(i * lanes, lanes)
                value = T.bind(row[at])
                for k, bank in zip(indices, sums):
                    register = bank[chain]
                    T.buffer_store(
                        register, register[whole] + value * as_float32(up[k, at]), [whole]
                    )

            with T.serial(0, vectors // chains) as i:
                for chain in range(chains):
                    step(i * chains + chain, chain)
            for i in range(vectors // chains * chains, vectors):
                step(i, 0)
            for r, (k, bank) in enumerate(zip(indices, sums)):
                total = bank[0][whole]
                for register in bank[1:]:
                    total = total + register[whole]
                at = group * _ROWS + r
                product = reduce_lanes(T.bind(total), lambda a, b: a + b)
                factor = product * scale[k] + bias[k]
                T.buffer_store(lists.value, lists.value[at] * factor, [at])
