# SPDX-License-Identifier: Apache-2.0
"""Signs as comparisons: what a chain of elementwise operators with values +-c makes of its input, as thresholds.

A chain is read as a function g of one number per channel, in the graph's own float32 arithmetic. Where its operators are
monotone, the float at which g changes is found by bisection over all floats; on the integer sums of a binary layer g is
evaluated at every integer there can be. Both are exact: no operator is inverted.

    sign(x), and where(x >= 0, 1, -1), of which only the second is +1 at 0
    2 * (x >= 0) - 1;   2 * round(clip((x + 1) / 2, 0, 1)) - 1;   sign(sign(x) + 0.1);   sign(x * scale + shift)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.channel_flow import Uses
from passes.layers import const_array, is_const, shape_of
from passes.numpy_nn import NN_OPERATORS
from passes.numpy_operators import OPERATORS, Numeric
from passes.rewriting import variables

_AS_DECLARED = Numeric("")
# Operators with one result per element of their only operand, or of operands that broadcast.
_RISING = ("relax.nn.relu", "relax.round", "relax.floor", "relax.ceil", "relax.trunc", "relax.sign", "relax.tanh",
           "relax.sigmoid", "relax.clip", "relax.astype")  # fmt: skip
_COMPARISONS = {"relax.greater": 1, "relax.greater_equal": 1, "relax.less": -1, "relax.less_equal": -1}  # fmt: skip
_OTHERS = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide", "relax.maximum", "relax.minimum", "relax.where",
           "relax.negative", "relax.logical_not", "relax.nn.leakyrelu", "relax.nn.prelu", "relax.equal", "relax.not_equal",
           "relax.abs", "relax.logical_and", "relax.logical_or")  # fmt: skip
ELEMENTWISE = frozenset([*_RISING, *_COMPARISONS, *_OTHERS])


@dataclass(frozen=True)
class Plane:
    """One comparison per channel: +1 where (x >= threshold) xor flip, else -1. Thresholds are of x's type."""

    threshold: np.ndarray
    flip: np.ndarray


@dataclass(frozen=True)
class Steps:
    """A function with values +-size: size times the mean of its planes' +-1.

    Two planes differ where the function is 0, which is at the numbers between their thresholds.
    """

    planes: tuple[Plane, ...]
    size: float


@dataclass(frozen=True)
class Chain:
    """The elementwise operators between `root` and `result`, both [N, C, ...] (`axis` 1) or [..., C] (the last)."""

    uses: Uses
    root: relax.Var
    result: relax.Var
    axis: int

    @property
    def channels(self) -> int:
        return shape_of(self.root)[self.axis]

    def inside(self) -> set:
        """The variables between root and result, the result included."""
        found: set = set()
        pending = [self.result]
        while pending:
            var = pending.pop()
            if var in found or var.same_as(self.root):
                continue
            found.add(var)
            pending += variables(self.uses.definitions[var])
        return found

    def is_only_reader(self) -> bool:
        """Whether nothing outside the chain reads its root or what lies between."""
        inside = self.inside()
        between = [self.root, *(v for v in inside if not v.same_as(self.result))]
        return not any(
            v in self.uses.outputs or any(b.var not in inside for b in self.uses.readers.get(v, []))
            for v in between
        )

    def evaluate(self, points: np.ndarray) -> np.ndarray:
        """The result [M, C] at the points [M, C], in the graph's types."""
        rank = len(shape_of(self.root))
        shape = [points.shape[0]] + [1] * (rank - 1)
        shape[self.axis] = points.shape[1]
        known = {self.root: points.reshape(shape)}

        def value(expr):
            if isinstance(expr, relax.Var):
                if expr not in known:
                    known[expr] = call(self.uses.definitions[expr])
                return known[expr]
            if is_const(expr):
                return const_array(expr)
            return expr.value  # a bound of `clip`

        def call(expr):
            name = expr.op.name
            operator = OPERATORS.get(name) or NN_OPERATORS[name]
            found = operator(_AS_DECLARED, expr.attrs, *(value(a) for a in expr.args))
            return np.asarray(found).astype(_AS_DECLARED.dtype(expr.ty.dtype), copy=False)

        with np.errstate(all="ignore"):
            found = np.broadcast_to(value(self.result), shape)
        return found.reshape(points.shape)

    def direction(self) -> np.ndarray | None:
        """Per channel whether the result rises (1) or falls (-1) with the root or is constant (0); None if unknown."""
        known: dict = {self.root: np.ones(self.channels)}

        def of(expr):
            if isinstance(expr, relax.Var):
                if expr not in known:
                    known[expr] = of(self.uses.definitions[expr])
                return known[expr]
            return np.zeros(self.channels) if is_const(expr) else self._direction(expr, of)

        return of(self.result)

    def _direction(self, call: relax.Call, of) -> np.ndarray | None:
        name, args = call.op.name, list(call.args)
        if name in _RISING:
            return of(args[0])
        found = [of(a) for a in args]
        if any(f is None for f in found):
            return None
        if name in ("relax.negative", "relax.logical_not"):
            return -found[0]
        if name == "relax.nn.leakyrelu":
            return found[0] if float(call.attrs.alpha) >= 0 else None
        if name == "relax.nn.prelu":
            return found[0] if is_const(args[1]) and (const_array(args[1]) >= 0).all() else None
        if name in ("relax.add", "relax.maximum", "relax.minimum"):
            return _together(*found)
        if name == "relax.subtract":
            return _together(found[0], -found[1])
        if name in _COMPARISONS:
            return _together(found[0] * _COMPARISONS[name], -found[1] * _COMPARISONS[name])
        if name == "relax.multiply":
            for factor, towards in zip(args[::-1], found):
                if is_const(factor):
                    return towards * np.sign(self._per_channel(factor))
        if name == "relax.divide" and is_const(args[1]):
            return found[0] * np.sign(self._per_channel(args[1]))
        if name == "relax.where" and is_const(args[1]) and is_const(args[2]):
            step = self._per_channel(args[1]).astype(float) - self._per_channel(args[2])
            return found[0] * np.sign(step)
        return None

    def _per_channel(self, constant) -> np.ndarray:
        """A constant as [C] values."""
        return np.broadcast_to(const_array(constant).reshape(-1), (self.channels,))


@dataclass(frozen=True)
class Composed:
    """`then` of what `first` gives, elementwise: what integer thresholds are found of where max pooling lies between them."""

    first: Chain
    then: Chain

    def evaluate(self, points: np.ndarray) -> np.ndarray:
        """As `Chain.evaluate`."""
        return self.then.evaluate(self.first.evaluate(points))


def _together(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """The direction of a sum of two: known where they do not oppose each other."""
    return None if (a * b < 0).any() else np.sign(a + b)


def chains(uses: Uses, result: relax.Var, axis: int) -> Iterator[Chain]:
    """Chains that end in `result`, the shortest first, as far up as everything depends on one variable elementwise."""
    order = {b.var: i for i, b in enumerate(uses.bindings)}  # the graph's inputs come before
    open_, done = {result}, set()
    while open_:
        last = max(open_, key=lambda var: order.get(var, -1))
        if len(open_) == 1 and not last.same_as(result) and shape_of(last) == shape_of(result):
            yield Chain(uses, last, result, axis)
        value = uses.definitions.get(last)
        if not _is_elementwise(value, shape_of(result), axis):
            return
        open_.discard(last)
        done.add(last)
        open_ |= {v for v in variables(value) if v not in done}


def _is_elementwise(value, shape: tuple[int, ...], axis: int) -> bool:
    if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
        return False
    if value.op.name not in ELEMENTWISE or shape_of(value) != shape:
        return False
    constants = [a for a in value.args if is_const(a)]
    slopes = value.op.name == "relax.nn.prelu"
    if slopes and int(value.attrs.axis) % len(shape) != axis:
        return False
    return slopes or all(_is_per_channel(shape_of(c), len(shape), axis) for c in constants)


def _is_per_channel(constant: tuple[int, ...], rank: int, axis: int) -> bool:
    """Whether a constant that broadcasts to `rank` axes varies along the channels only."""
    full = (1,) * (rank - len(constant)) + tuple(constant)
    return all(size == 1 or i == axis for i, size in enumerate(full))


def float_steps(chain: Chain) -> Steps | None:
    """The thresholds of a chain from a float32 root; None if it is not monotone, or has more values than two and 0."""
    if str(chain.root.ty.dtype) != "float32":
        return None
    rising = chain.direction()
    if rising is None:
        return None
    channels = chain.channels
    rising = np.where(rising == 0, 1, rising)

    def at(keys: np.ndarray) -> np.ndarray:
        return chain.evaluate(_floats(keys)[None])[0].astype(np.float64) * rising

    ends = _keys(np.array([-np.inf, np.inf], np.float32))
    first, last = (at(np.full(channels, end)) for end in ends)
    size = np.abs(last)
    if not _is_size(size) or not _is_size(np.abs(first)) or size[0] != abs(first[0]):
        return None
    above = _first_key(lambda keys: at(keys) > -size, ends, channels)
    full = _first_key(lambda keys: at(keys) >= size, ends, channels)
    between = above < full
    if between.any():
        low, high = at(above), at(np.maximum(full - 1, ends[0]))
        if (low[between] != 0).any() or (high[between] != 0).any():
            return None
    flip = rising < 0
    planes = [Plane(_thresholds(keys, ends[1]), flip) for keys in (above, full)]
    return Steps(tuple(planes if between.any() else planes[:1]), float(size[0]))


def _is_size(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all() and values[0] > 0 and (values == values[0]).all())


def _keys(floats: np.ndarray) -> np.ndarray:
    """float32 as int64 in the same order, -0 just below 0."""
    bits = floats.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)


def _floats(keys: np.ndarray) -> np.ndarray:
    bits = np.where(keys < 0, (-(keys + 1)) | 0x80000000, keys)
    return bits.astype(np.uint32).view(np.float32)


def _first_key(reached, ends: np.ndarray, channels: int) -> np.ndarray:
    """Per channel the first key at which `reached` holds, one past the last if nowhere."""
    low = np.full(channels, ends[0] - 1)  # not reached
    high = np.full(channels, ends[1] + 1)  # reached, or past the end
    while (high - low > 1).any():
        middle = (low + high) // 2
        middle = np.clip(middle, ends[0], ends[1])
        holds = reached(middle)
        open_ = high - low > 1
        high = np.where(open_ & holds, middle, high)
        low = np.where(open_ & ~holds, middle, low)
    return high


def byte_plane(plane: Plane, values: np.ndarray) -> Plane:
    """`plane`, of float32 numbers, on the bytes that stand for them: byte b for values[b], [256] in rising order."""
    reached = np.searchsorted(values, np.nan_to_num(plane.threshold, nan=np.inf), "left")
    # A byte has no threshold beyond all bytes: what none reaches all reach, and the other way about.
    never = reached == len(values)
    return Plane(np.where(never, 0, reached).astype(np.uint8), plane.flip ^ never)


def _thresholds(keys: np.ndarray, last: int) -> np.ndarray:
    """float32 thresholds; NaN, which nothing reaches, for keys past the last."""
    values = _floats(np.minimum(keys, last))
    return np.where(keys > last, np.float32(np.nan), values).astype(np.float32)


def integer_steps(
    chain: Chain | Composed, scale: np.ndarray, largest: int, parity: int | None
) -> Steps | str:
    """The integer thresholds of a chain whose root is float32(sum) * scale[channel], |sum| <= largest.

    `parity`: of all sums there can be, None if both. A message if the chain is no single step.
    """
    sums = np.arange(-largest, largest + 1, dtype=np.int32)
    reachable = sums if parity is None else sums[(sums - parity) % 2 == 0]
    roots = reachable.astype(np.float32)[:, None] * scale.astype(np.float32)
    values = chain.evaluate(np.ascontiguousarray(roots))
    size = float(np.abs(values).max(initial=0.0))
    if not size or not np.isfinite(values).all() or not np.isin(np.abs(values), (0.0, size)).all():
        return "what lies between has other values than two"
    zeros = (values == 0).any(0)
    if zeros.any():
        return f"the sign is 0 at a sum that occurs, in channel {int(zeros.argmax())}"
    high = values > 0
    changes = (high[1:] != high[:-1]).sum(0)
    if (changes > 1).any():
        channel = int((changes > 1).argmax())
        return (
            f"the sign changes {int(changes[channel])} times as the sum grows, in channel {channel}"
        )
    flip = high[0] & ~high[-1]
    differs = high != high[:1]  # from the first row on which the sign changes
    at = np.where(differs.any(0), differs.argmax(0), 0)
    threshold = reachable[at]
    threshold = np.where(changes > 0, threshold, np.where(high[0], -largest, largest + 1))
    return Steps((Plane(threshold.astype(np.int32), flip),), size)
