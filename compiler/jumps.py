# SPDX-License-Identifier: Apache-2.0
"""Verify networks that jump: where a float is rounded to a step, the last bit of a sum decides which one.

A kernel and its float64 evaluation may then differ by a whole step, and the layers behind make of it what they will, so
that outputs alone prove nothing: a tolerance wide enough for flipped steps would be wide enough for bugs. The tensors
behind a jump therefore come from the kernels themselves, and each is compared on its own:

    1. the compiled program runs once, and every tensor of steps that its kernels write is kept
    2. the graph is evaluated in numpy; where it rounds to steps, each element must be what rounding the float64 value
       gives, or what it gives after moving that value by no more than the float tolerance: a flip is allowed at a tie,
       by one step, and nowhere else
    3. the evaluation goes on with the kernels' steps, so that what follows is judged on the inputs it really had

Between jumps everything is continuous, and `compiler.comparison`'s tolerance holds: the outputs need no wider one. Sums of
steps are exact integers, so only the handful of float operations before a rounding count.

Which operators jump the families say (`Family.jumps`): elementwise, rising with their first argument, giving integers, a
bit in a uint32 per element (binary), or floats of which some are set to zero (a threshold): of these, zero or not is the
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from compiler.comparison import Steps, magnitude, rounding_tolerance
from compiler.runtime import LoadedModel
from passes.channel_flow import Uses
from passes.layers import is_call, shape_of
from passes.numpy_operators import OPERATORS, Numeric
from passes.rewriting import bindings_of

Reference = Callable[..., np.ndarray]
_TO_FIRST = (0, 3, 1, 2)
# What only moves values: a kernel may round and move at once, and what it rounds then lies in memory only as moved.
_MOVES = ("relax.reshape", "relax.permute_dims", "relax.concat", "relax.squeeze", "relax.expand_dims")  # fmt: skip
_WIDEST_BORDER = 24  # rows or columns, both sides together, that a kernel may put around an image


def jumping_operators() -> frozenset[str]:
    """Names of the operators that round to steps, of all families."""
    from passes import families

    return frozenset(name for family in families() for name in family.jumps)


def jumps_in(mod: tvm.IRModule, names: frozenset[str]) -> bool:
    return any(is_call(b.value, name) for b in bindings_of(mod["main"]) for name in names)


def moved_steps(mod: tvm.IRModule, names: frozenset[str]) -> list[Iterable[np.ndarray]]:
    """For each jump of a graph in program order, what is made of its tensor by moving it: for every such value an array of
    its shape, of positions in the jump's tensor, -1 for elements of other tensors."""
    uses = Uses(mod)
    jumps = [b.var for b in uses.bindings if any(is_call(b.value, n) for n in names)]
    return [_Moved(uses, var) for var in jumps]


@dataclass(frozen=True)
class _Moved:
    """Made anew each time it is gone through: most tensors are found as they are."""

    uses: Uses
    var: relax.Var

    def __iter__(self) -> Iterator[np.ndarray]:
        shape = shape_of(self.var)
        yield from self._behind(self.var, np.arange(math.prod(shape)).reshape(shape))

    def _behind(self, var: relax.Var, at: np.ndarray) -> Iterator[np.ndarray]:
        for reader in self.uses.readers.get(var, ()):
            if any(is_call(reader.value, name) for name in _MOVES):
                there = _positions(reader.value, var, at)
                yield there
                yield from self._behind(reader.var, there)


def _positions(call: relax.Call, var: relax.Var, at: np.ndarray) -> np.ndarray:
    """A moving operator of positions: `at` for `var`, -1 for its other operands."""

    def operand(expr):
        if isinstance(expr, relax.Tuple):
            return tuple(operand(f) for f in expr.fields)
        if isinstance(expr, relax.ShapeExpr):
            return tuple(int(v) for v in expr.values)
        return at if expr.same_as(var) else np.full(shape_of(expr), -1)

    numeric = Numeric("float64")
    return OPERATORS[call.op.name](numeric, call.attrs, *(operand(a) for a in call.args))


def float_jump_sizes(mod: tvm.IRModule, names: frozenset[str]) -> frozenset[int]:
    """Elements of the float tensors that jumping operators of a graph give."""
    calls = [b.value for b in bindings_of(mod["main"]) if any(is_call(b.value, n) for n in names)]
    return frozenset(math.prod(shape_of(c)) for c in calls if "float" in str(c.ty.dtype))


def written_tensors(
    model: LoadedModel, inputs: Sequence[np.ndarray], float_sizes: frozenset[int] = frozenset()
) -> list[np.ndarray]:
    """Copies of the integer tensors that kernels write in one run, in call order, and of the float ones of these sizes."""
    kept: list[np.ndarray] = []

    def is_kept(tensor: tvm.runtime.Tensor) -> bool:
        if str(tensor.dtype).startswith(("uint", "int")):
            return True
        return str(tensor.dtype) == "float32" and math.prod(tensor.shape) in float_sizes

    def watch(_function, name, before, _result, *arguments):
        if not before and name in model.kernel_names:
            tensors = [a for a in arguments if isinstance(a, tvm.runtime.Tensor)]
            if tensors and is_kept(tensors[-1]):
                kept.append(tensors[-1].numpy().copy())
        return 0

    tensors = model.bind(inputs)
    with model.instrumented(watch):
        model.invoke(tensors)
    return kept


@dataclass
class Replay:
    """References of jumping operators that continue with the kernels' tensors, for two evaluations of one graph: in
    float64 first, which finds the tensor of each jump, then in float32, which shows how far rounding may move a value.

    `terms` as in `compiler.comparison.rounding_terms`, of what is still summed in floats; `moved` is what `moved_steps` gives.
    """

    written: Sequence[np.ndarray]
    terms: float
    moved: Sequence[Iterable[np.ndarray]] = ()
    _taken: list[np.ndarray | None] = field(default_factory=list)
    _exact: list[tuple[Reference, dict, np.ndarray]] = field(default_factory=list)
    _next: int = 0
    steps: list[Steps] = field(default_factory=list)

    def exact(self, reference: Reference) -> Reference:
        """Of an operator, in the float64 evaluation."""

        def step(attrs: dict, x: np.ndarray, *rest: np.ndarray) -> np.ndarray:
            wanted = reference(attrs, x, *rest)
            number = len(self._taken)
            moved = self.moved[number] if number < len(self.moved) else ()
            found = closest(self.written, wanted, moved)
            self._taken.append(found)
            self._exact.append((lambda at: reference(attrs, at, *rest), attrs, x))
            return wanted if found is None else found

        return step

    def plain(self, _reference: Reference) -> Reference:
        """Of an operator, in the float32 evaluation that follows."""

        def step(_attrs: dict, x: np.ndarray, *_rest: np.ndarray) -> np.ndarray:
            again, _, exact = self._exact[self._next]
            found = self._taken[self._next]
            self._exact[self._next] = (again, {}, np.empty(0))  # activations are large
            self._next += 1
            wanted = again(exact)
            self.steps.append(_judge(again, exact, x, found, wanted, self.terms))
            return wanted if found is None else found

        return step


def _judge(
    again: Reference,
    exact: np.ndarray,
    plain: np.ndarray,
    found: np.ndarray | None,
    wanted: np.ndarray,
    terms: float,
) -> Steps:
    """How one tensor of steps compares: `exact` and `plain` are the values before rounding in both precisions."""
    if found is None:
        return Steps(1, wanted.size, 0, wanted.size)
    differ = _differ(found, wanted)
    if not differ.any() and found.dtype.kind != "f":
        return Steps(1, wanted.size, 0, 0)
    error = np.abs(plain.astype("float64") - exact)
    moved = rounding_tolerance(
        float(error[np.isfinite(error)].max(initial=0.0)), magnitude(exact), terms
    )
    low, high = again(exact - moved), again(exact + moved)
    if (
        found.dtype == np.uint32
    ):  # signs, a bit each: of those that differ, the ones that no move would turn
        found, wanted, low, high = (_bits(words) for words in (found, wanted, low, high))
        differ = found != wanted
        wrong = int(np.count_nonzero(differ & (low == high)))
    else:
        wrong = int(np.count_nonzero((found < low) | (found > high)))
    return Steps(1, wanted.size, max(0, int(np.count_nonzero(differ)) - wrong), wrong)


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which elements lie on different steps."""
    return (a == 0) != (b == 0) if a.dtype.kind == "f" else a != b


def _bits(words: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8))


def closest(
    written: Sequence[np.ndarray], wanted: np.ndarray, moved: Iterable[np.ndarray] = ()
) -> np.ndarray | None:
    """The tensor, in `wanted`'s layout, that differs from it in the fewest elements; None if none is of its kind.

    Kernels hold images channels last, and their names say nothing about the graph's variables; what a tensor holds does.
    Where none holds all of it, it is looked for among what is made of it, see `moved_steps`.
    """
    best, fewest = None, wanted.size + 1

    def look(candidates: Iterable[np.ndarray]) -> None:
        nonlocal best, fewest
        for candidate in candidates:
            differing = int(np.count_nonzero(_differ(candidate, wanted)))
            if differing < fewest:
                best, fewest = candidate, differing

    def alike(tensor: np.ndarray) -> bool:
        return tensor.dtype == wanted.dtype or tensor.dtype.kind == wanted.dtype.kind == "f"

    written = [t for t in written if alike(t)]
    look(c for t in written for c in _layouts(t, wanted.shape))
    for at in moved if fewest else ():
        look(_moved_back(c, at, wanted.shape) for t in written for c in _layouts(t, at.shape))
    return best


def _moved_back(moved: np.ndarray, at: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor whose elements lie in `moved` where `at` holds their positions."""
    own = at >= 0
    found = np.empty(math.prod(shape), moved.dtype)
    found[at[own]] = moved[own]
    return found.reshape(shape)


def _layouts(tensor: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """What of a tensor could be one of `shape`: itself, channels last (with unused channels at the end, within a border,
    or flattened), a matrix with unused columns, in planes of several channels (with unused ones at the end), flattened."""
    found = []
    if tensor.ndim == 4:
        images, planes, pixels, together = tensor.shape
        in_planes = len(shape) > 1 and (images, pixels) == (shape[0], math.prod(shape[2:]))
        if in_planes and 0 <= planes * together - shape[1] < together:
            channels = tensor.transpose(0, 1, 3, 2).reshape(images, -1, pixels)
            found.append(channels[:, : shape[1]].reshape(shape))
        if (images, planes * together, pixels) == (1, shape[-1], math.prod(shape[:-1])):
            found.append(tensor.transpose(0, 2, 1, 3).reshape(shape))
    if tensor.ndim == 4 and len(shape) == 4:
        moved = tensor.transpose(_TO_FIRST)
        spare = [have - wanted for have, wanted in zip(moved.shape[2:], shape[2:])]
        if moved.shape[:2] == shape[:2] and any(spare) and min(spare) >= 0:
            if max(spare) <= _WIDEST_BORDER:
                for top, left in np.ndindex(spare[0] + 1, spare[1] + 1):
                    found.append(moved[:, :, top : top + shape[2], left : left + shape[3]])
        if moved.shape[::2] == shape[::2] and moved.shape[3] == shape[3]:
            found += _without_spare_channels(moved, shape[1])
    elif len(shape) > 1 and tensor.shape[:-1] == shape[:-1] and tensor.shape[-1] > shape[-1]:
        found.append(tensor[..., : shape[-1]])
    elif len(shape) == 4 and tensor.ndim < 4 and tensor.size == math.prod(shape):
        last = (shape[0], *shape[2:], shape[1])
        found += [tensor.reshape(last).transpose(_TO_FIRST), tensor.reshape(shape)]
    if tensor.size == math.prod(shape) and (tensor.shape == shape or not found):
        found.append(tensor.reshape(shape))
    return found


def _without_spare_channels(image: np.ndarray, channels: int) -> list[np.ndarray]:
    """The first `channels` of an image [N, C, H, W], or the first of each group of them, for any number of groups."""
    n, have, h, w = image.shape
    if have <= channels:
        return [image] if have == channels else []
    found = []
    for groups in (g for g in range(1, channels + 1) if channels % g == 0 and have % g == 0):
        each = image.reshape(n, groups, have // groups, h, w)[:, :, : channels // groups]
        found.append(each.reshape(n, channels, h, w))
    return found


def replayed(
    references: Mapping[str, Reference], names: frozenset[str], wrap: Callable
) -> dict[str, Reference]:
    """`references` with those of jumping operators wrapped."""
    return {n: wrap(r) if n in names else r for n, r in references.items()}
