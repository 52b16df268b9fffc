# SPDX-License-Identifier: Apache-2.0
"""Replace a block of two layers by a smaller quadratic one, fitted on calibration data to the block's own outputs.

    rewrite: L_2(activation(L_1(x) + b_1)) + b_2  ->  quadratic(x, ...) + c       both dense, or both convolutions

Only where the recipe asks for it (`fit_error`), where the quadratic layer has fewer weights than the block, where its
error on samples that it was not fitted on is at most `fit_error`, and where the model's outputs hold as well: blocks are
given back, the worst first, until the error of the outputs is at most `fit_error` too. Errors are squared and relative to
the variance. A convolution that replaces two has the kernel that sees as much as both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from passes.family import Context
from passes.layers import CONV2D, DENSE, attrs_of, conv2d, is_call, is_const, shape_of
from passes.numpy_images import windows
from passes.quadratic.fit import Neuron, fit_additive, refine, relative_error
from passes.quadratic.operators import quadratic_call
from passes.quadratic.recognize import along_channels
from passes.rewriting import Graph, rewrite_function, rewrite_module
from passes.treatment import Treatment

_ROWS = 8192  # of the calibration data are fitted to, and a third as many tested on
_ROWS_PER_TERM = 2
_ACTIVATIONS = tuple(
    f"relax.{n}" for n in ("nn.relu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "tanh", "sigmoid", "nn.leakyrelu")
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """Two layers with an activation between: their calls, x and the name of the variable that holds the result."""

    first: relax.Call
    second: relax.Call
    x: relax.Expr
    result: str

    @property
    def names(self) -> tuple[str, str]:
        return tuple(attrs_of(c)["name"] for c in (self.first, self.second))

    @property
    def weights(self) -> int:
        return sum(int(np.prod(shape_of(c.args[1]))) for c in (self.first, self.second))

    def window(self) -> dict:
        """Kernel, strides and padding of the convolution that sees what both see."""
        a, b = attrs_of(self.first), attrs_of(self.second)
        (r1, s1), (r2, s2) = shape_of(self.first.args[1])[2:], shape_of(self.second.args[1])[2:]
        (h, w), (top, left, bottom, right) = a["strides"], b["padding"]
        before = [p * s for p, s in zip((top, left, bottom, right), (h, w, h, w))]
        return {
            "kernel": (r1 + (r2 - 1) * h, s1 + (s2 - 1) * w),
            "strides": (h * b["strides"][0], w * b["strides"][1]),
            "padding": tuple(p + q for p, q in zip(a["padding"], before)),
        }


@dataclass(frozen=True)
class Outcome:
    """What became of the blocks: the graph, the fitted ones with their errors, reasons for those that were not replaced."""

    mod: tvm.IRModule
    fitted: Mapping[str, dict]  # layer name -> what to show
    declined: Mapping[str, str]  # layer name -> reason


def find_blocks(mod: tvm.IRModule, asked: Mapping[str, float]) -> list[Block]:
    """The blocks of layers in `asked`, in program order, none sharing a layer."""
    found: list[Block] = []

    def look(value: relax.Expr, graph: Graph) -> None:
        block = match(value, graph)
        taken = {name for b in found for name in b.names}
        if block is not None and set(block.names) <= set(asked) and taken.isdisjoint(block.names):
            found.append(block)

    rewrite_function(mod["main"], (look,))
    return found


def match(value: relax.Expr, graph: Graph) -> Block | None:
    """The block that ends with this value: the second layer, or the constant added to it."""
    second = _layer(value)
    if second is None:
        second = _shifted_layer(value, graph)
    elif any(_is_shift(r) for r in graph.next_readers()):
        return None  # the constant after it belongs to the block
    if second is None or not graph.is_read_once(second.args[0]):
        return None
    activation = graph.definition(second.args[0])
    if not any(is_call(activation, name) for name in _ACTIVATIONS):
        return None
    if not graph.is_read_once(activation.args[0]):
        return None
    inner = graph.definition(activation.args[0])
    first = _layer(inner) or _shifted_layer(inner, graph)
    if first is None or first.op.name != second.op.name or graph.current is None:
        return None
    return Block(first, second, first.args[0], graph.current.name)


def _layer(value: relax.Expr | None) -> relax.Call | None:
    """A dense layer, or a plain convolution."""
    if value is None or not (is_call(value, CONV2D) or is_call(value, DENSE)):
        return None
    if not is_const(value.args[1]):
        return None
    attrs = attrs_of(value)
    plain = attrs.get("groups", 1) == 1 and tuple(attrs.get("dilation", (1, 1))) == (1, 1)
    return value if plain else None


def _is_shift(value: relax.Expr | None) -> bool:
    """Whether a value is a sum with a constant for each channel, or one."""
    if value is None or not is_call(value, "relax.add"):
        return False
    sizes = [int(np.prod(shape_of(a))) for a in value.args if is_const(a)]
    return bool(sizes) and all(size in (1, *shape_of(value)[1:]) for size in sizes)


def _shifted_layer(value: relax.Expr | None, graph: Graph) -> relax.Call | None:
    """The layer to which `value` adds a constant, and which nothing else reads."""
    if not _is_shift(value):
        return None
    inner = next((a for a in value.args if not is_const(a)), None)
    if inner is None or not graph.is_read_once(inner) or shape_of(inner) != shape_of(value):
        return None
    return _layer(graph.definition(inner))


def quadratize(mod: tvm.IRModule, treatments: Mapping[str, Treatment], context: Context) -> Outcome:
    """See the module's docstring; only layers with the parameter `fit_error` are looked at."""
    limits = {
        n: t.parameters["fit_error"] for n, t in treatments.items() if "fit_error" in t.parameters
    }
    if not limits:
        return Outcome(mod, {}, {})
    blocks = find_blocks(mod, limits)
    inside = {name for block in blocks for name in block.names}
    declined = {
        n: "no block of two layers with an activation between that a quadratic layer could replace"
        for n in limits if n not in inside
    }  # fmt: skip
    if context.observe is None:
        reason = "fitting a quadratic layer needs calibration data (--calibration)"
        return Outcome(mod, {}, {**declined, **dict.fromkeys(inside, reason)})
    fitted: dict[str, tuple[Block, Neuron, float]] = {}
    for block in blocks:
        found = _fit(mod, block, min(limits[n] for n in block.names), context)
        if isinstance(found, str):
            declined.update(dict.fromkeys(block.names, found))
        else:
            fitted[block.result] = (block, *found)
    while fitted:
        treated = _replace(mod, fitted)
        limit = min(limits[n] for block, _, _ in fitted.values() for n in block.names)
        error = _output_error(mod, treated, context)
        if error <= limit:
            return Outcome(treated, _shown(fitted, error), declined)
        worst = max(fitted, key=lambda name: fitted[name][2])
        block, _, own = fitted.pop(worst)
        reason = f"fitted with an error of {own:.2%}, but the model's outputs would be off by {error:.2%} (at most {limit:.2%})"
        declined.update(dict.fromkeys(block.names, reason))
    return Outcome(mod, {}, declined)


def _shown(fitted: Mapping, error: float) -> dict[str, dict]:
    shown = {}
    for block, neuron, own in fitted.values():
        facts = {
            "fit_error": round(own, 6), "output_error": round(error, 6),
            "weights": f"{block.weights} -> {neuron.size}",
        }  # fmt: skip
        shown.update(dict.fromkeys(block.names, facts))
    return shown


def _fit(
    mod: tvm.IRModule, block: Block, limit: float, context: Context
) -> tuple[Neuron, float] | str:
    """The smallest neuron that holds the limit and its error on held-out rows, or why there is none."""
    outputs = shape_of(block.second.args[1])[0]
    inputs = shape_of(block.first.args[1])[1]
    if is_call(block.first, CONV2D):
        inputs *= int(np.prod(block.window()["kernel"]))
    sizes = {form: len(form) * inputs * outputs for form in ("bl", "rgb")}
    small = [form for form, size in sizes.items() if size < block.weights]
    if not small:
        return f"a quadratic layer would have {sizes['bl']} weights, the block has {block.weights}"
    x, y, test_x, test_y = _rows(mod, block, context)
    if len(x) < _ROWS_PER_TERM * (2 * inputs + 1) or not len(test_x):
        return f"{len(x)} rows of calibration data for {2 * inputs + 1} coefficients of each output"
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return "its inputs or outputs on the calibration data are not finite"
    neuron = fit_additive(x, y)
    errors = {"bl": relative_error(neuron(test_x), test_y)}
    if errors["bl"] <= limit:
        return neuron, errors["bl"]
    if "rgb" in small:
        neuron = refine(neuron, x, y)
        errors["rgb"] = relative_error(neuron(test_x), test_y)
        if errors["rgb"] <= limit:
            return neuron, errors["rgb"]
    figures = ", ".join(f"{error:.2%} with {sizes[form]} weights" for form, error in errors.items())
    return f"a quadratic layer fits with an error of {figures} (at most {limit:.2%}; the block has {block.weights})"


def _rows(mod: tvm.IRModule, block: Block, context: Context) -> tuple:
    """x and y as rows, of three quarters of the samples, and of the others."""
    names = [block.x.name, block.result]
    samples = list(context.observe(mod, names))
    rng, parts = np.random.default_rng(0), ([], [])
    most = max(1, _ROWS // max(1, len(samples)))
    for i, sample in enumerate(samples):
        x, y = _as_rows(block, *(np.asarray(sample[n]) for n in names))
        chosen = rng.permutation(len(x))[:most]
        parts[i % 4 == 3].append((x[chosen], y[chosen]))
    empty = (np.zeros((0, 1)), np.zeros((0, 1)))
    return tuple(
        np.concatenate([each[k] for each in part or [empty]]) for part in parts for k in (0, 1)
    )


def _as_rows(block: Block, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if is_call(block.first, DENSE):
        return x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    w = block.window()
    seen = windows(x, w["kernel"], w["strides"], (1, 1), padding=w["padding"])
    n, _, oh, ow = seen.shape[:4]
    rows = seen.transpose(0, 2, 3, 1, 4, 5).reshape(n * oh * ow, -1)
    return rows, y.transpose(0, 2, 3, 1).reshape(n * oh * ow, -1)


def _replace(mod: tvm.IRModule, fitted: Mapping[str, tuple]) -> tvm.IRModule:
    """`mod` with every fitted block's result computed by its neuron."""

    def rule(value: relax.Expr, graph: Graph) -> relax.Expr | None:
        if graph.current is None or graph.current.name not in fitted:
            return None
        block = match(value, graph)
        own, neuron, _ = fitted[graph.current.name]
        if block is None or block.names != own.names:
            return None
        return _call(block, neuron)

    return rewrite_module(mod, lambda func: rewrite_function(func, (rule,)))


def _call(block: Block, neuron: Neuron) -> relax.Expr:
    like, weights = block.first, neuron.weights
    outputs = len(neuron.constant)
    if is_call(like, CONV2D):
        w, (_, channels, _, _) = block.window(), shape_of(like.args[1])
        shape = (outputs, channels, *w["kernel"])
        weights = {b: v.reshape(shape) for b, v in weights.items()}
        blank = relax.const(np.zeros(shape, "float32"))
        like = conv2d(block.x, blank, name="", strides=w["strides"], padding=w["padding"])
    else:
        blank = relax.const(np.zeros((outputs, shape_of(like.args[1])[1]), "float32"))
        like = relax.Call(like.op, [block.x, blank], like.attrs)
    like = relax.BlockBuilder().normalize(like)
    call = quadratic_call(like, block.x, weights, neuron.shifts, block.names)
    return relax.op.add(call, along_channels(neuron.constant, like))


def _output_error(before: tvm.IRModule, after: tvm.IRModule, context: Context) -> float:
    """The largest relative error of an output of the model over the calibration data."""
    results = []
    for mod in (before, after):
        body = mod["main"].body.body
        fields = list(body.fields) if isinstance(body, relax.Tuple) else [body]
        names = [f.name for f in fields]
        samples = list(context.observe(mod, names))
        results.append([np.stack([np.asarray(s[n], "float64") for s in samples]) for n in names])
    return max(
        relative_error(found.reshape(len(found), -1), wanted.reshape(len(wanted), -1))
        for wanted, found in zip(*results)
    )
