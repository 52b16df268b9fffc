# SPDX-License-Identifier: Apache-2.0
"""Relax's general tensor operators in numpy: elementwise, reductions, shapes, indexing, creation.

Every entry of `OPERATORS` is `(numeric, attributes, *arguments) -> array`. Shapes arrive as tuples,
constants of the expression language (a bound of `clip`, an end of `arange`) as Python numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from passes.numpy_indexing import INDEXING_OPERATORS
from passes.rewriting import axes_of, ints


@dataclass(frozen=True)
class Numeric:
    """How floats are computed: in `floats` whatever the graph says, or as the graph says when it is
    empty.
    """

    floats: str = "float64"

    def dtype(self, declared) -> np.dtype:
        name = str(declared)
        if name == "bool":
            return np.dtype(bool)
        return (
            np.dtype(self.floats)
            if self.floats and name.startswith(("float", "bfloat"))
            else np.dtype(name)
        )


def erf(x: np.ndarray) -> np.ndarray:
    """The error function to float64 accuracy, by `math.erf` element by element."""
    return np.vectorize(math.erf, otypes=[x.dtype])(x) if x.size else x


def _unary(function):
    return lambda _n, _a, x: function(x)


def _divide(_n, _a, x, y):
    if np.issubdtype(np.result_type(x, y), np.integer):  # towards zero, as in C
        quotient = np.floor_divide(x, y)
        return quotient + ((quotient < 0) & (quotient * y != x))
    return np.divide(x, y)


def sigmoid(x: np.ndarray) -> np.ndarray:
    # Each branch only sees arguments for which exp cannot overflow.
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def _round(_n, _a, x):
    return np.rint(x)  # to even, as torch and ONNX


def _clip(_n, _a, x, low, high):
    # minimum and maximum hand NaN on, as torch's clamp does.
    return (
        np.minimum(np.maximum(x, np.asarray(low, x.dtype)), np.asarray(high, x.dtype))
        if _is_float(x)
        else np.clip(x, low, high)
    )


def _is_float(x: np.ndarray) -> bool:
    return np.issubdtype(x.dtype, np.floating)


def _reduce(function):
    def apply(_n, attrs, x):
        return function(x, axis=tuple(axes_of(attrs.axis, x.ndim)), keepdims=bool(attrs.keepdims))

    return apply


def _arg(function):
    def apply(_n, attrs, x):
        axis = None if attrs.axis is None else int(attrs.axis)
        return function(x, axis=axis, keepdims=bool(attrs.keepdims))

    return apply


def _scan(function):
    def apply(numeric, attrs, x):
        dtype = numeric.dtype(attrs.dtype) if attrs.dtype is not None else x.dtype
        x = x.astype(np.int64) if dtype.kind == "b" else x.astype(dtype)
        axis = 0 if attrs.axis is None else int(attrs.axis)
        x = x.reshape(-1) if attrs.axis is None else x
        result = function(x, axis=axis)
        if attrs.exclusive:
            result = np.roll(result, 1, axis)
            index = [slice(None)] * x.ndim
            index[axis] = 0
            result[tuple(index)] = 0 if function is np.cumsum else 1
        return result

    return apply


def _permute(_n, attrs, x):
    return x.transpose(None if attrs.axes is None else ints(attrs.axes))


def _expand_dims(_n, attrs, x):
    rank = x.ndim + len(ints(attrs.axis))
    return np.expand_dims(x, tuple(a % rank for a in ints(attrs.axis)))


def _squeeze(_n, attrs, x):
    return np.squeeze(
        x, None if attrs.axis is None else tuple(a % x.ndim for a in ints(attrs.axis))
    )


def _concat(_n, attrs, parts):
    return np.concatenate(parts, axis=0 if attrs.axis is None else int(attrs.axis))


def _split(_n, attrs, x):
    sections = attrs.indices_or_sections
    if hasattr(sections, "__len__"):
        return tuple(np.split(x, ints(sections), axis=int(attrs.axis)))
    # Sections of ceil(size / n) elements, the last one shorter.
    size, count = x.shape[int(attrs.axis)], int(sections)
    step = -(-size // count)
    return tuple(np.split(x, list(range(step, size, step))[: count - 1], axis=int(attrs.axis)))


def _where(_n, _a, condition, x, y):
    return np.where(condition.astype(bool), x, y)


def _pad(_n, attrs, x):
    widths = ints(attrs.pad_width)
    pairs = list(zip(widths[::2], widths[1::2]))
    mode = str(attrs.pad_mode)
    if mode == "constant":
        return np.pad(x, pairs, constant_values=float(attrs.pad_value))
    return np.pad(
        x,
        pairs,
        mode={"reflect": "reflect", "replicate": "edge", "edge": "edge", "circular": "wrap"}[mode],
    )


def _repeat(_n, attrs, x):
    return np.repeat(x, int(attrs.repeats), None if attrs.axis is None else int(attrs.axis))


def _arange(numeric, attrs, start, end, step):
    return np.arange(start, end, step).astype(numeric.dtype(attrs.dtype))


def _full(numeric, attrs, shape, value):
    return np.full(shape, value, numeric.dtype(attrs.dtype) if attrs.dtype is not None else None)


def _filled(value):
    return lambda numeric, attrs, shape: np.full(shape, value, numeric.dtype(attrs.dtype))


def _eye(numeric, attrs, rows, columns, offset):
    return np.eye(int(rows), int(columns), int(offset), dtype=numeric.dtype(attrs.dtype))


def _matmul(_n, _a, x, y):
    return np.matmul(x, y)


def _einsum(_n, attrs, parts):
    return np.einsum(str(attrs.subscripts), *parts, optimize=True)


def _meshgrid(_n, attrs, parts):
    return tuple(
        np.meshgrid(*parts, indexing="ij" if attrs.indexing is None else str(attrs.indexing))
    )


def _logical(function):
    return lambda _n, _a, *args: function(*[np.asarray(a).astype(bool) for a in args])


def _variance(x, axis, keepdims):
    return np.var(x, axis=axis, keepdims=keepdims)


UNARY = {
    "abs": np.abs,
    "acos": np.arccos,
    "acosh": np.arccosh,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "exp": np.exp,
    "floor": np.floor,
    "log": np.log,
    "negative": np.negative,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
    "trunc": np.trunc,
    "sign": np.sign,
    "erf": erf,
    "sigmoid": sigmoid,
    "isfinite": np.isfinite,
    "isinf": np.isinf,
    "isnan": np.isnan,
    "bitwise_not": np.invert,
}
BINARY = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "power": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "floor_divide": np.floor_divide,
    "floor_mod": np.mod,
    "mod": np.fmod,
    "atan2": np.arctan2,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "left_shift": np.left_shift,
    "right_shift": np.right_shift,
    "log_add_exp": np.logaddexp,
}
REDUCTIONS = {
    "sum": np.sum,
    "mean": np.mean,
    "prod": np.prod,
    "max": np.max,
    "min": np.min,
    "variance": _variance,
    "std": np.std,
}

OPERATORS = {
    **INDEXING_OPERATORS,
    **{f"relax.{name}": _unary(function) for name, function in UNARY.items()},
    **{
        f"relax.{name}": (lambda f: lambda _n, _a, x, y: f(x, y))(function)
        for name, function in BINARY.items()
    },
    **{f"relax.{name}": _reduce(function) for name, function in REDUCTIONS.items()},
    "relax.logical_and": _logical(np.logical_and),
    "relax.logical_or": _logical(np.logical_or),
    "relax.logical_xor": _logical(np.logical_xor),
    "relax.logical_not": _logical(np.logical_not),
    "relax.divide": _divide,
    "relax.rsqrt": lambda _n, _a, x: 1 / np.sqrt(x),
    "relax.round": _round,
    "relax.clip": _clip,
    "relax.ewise_fma": lambda _n, _a, x, y, z: x * y + z,
    "relax.argmax": _arg(np.argmax),
    "relax.argmin": _arg(np.argmin),
    "relax.cumsum": _scan(np.cumsum),
    "relax.cumprod": _scan(np.cumprod),
    "relax.permute_dims": _permute,
    "relax.reshape": lambda _n, _a, x, shape: x.reshape(shape),
    "relax.flatten": lambda _n, _a, x: x.reshape(-1),
    "relax.nn.batch_flatten": lambda _n, _a, x: x.reshape(x.shape[0], -1),
    "relax.expand_dims": _expand_dims,
    "relax.squeeze": _squeeze,
    "relax.broadcast_to": lambda _n, _a, x, shape: np.broadcast_to(x, shape),
    "relax.concat": _concat,
    "relax.stack": lambda _n, a, parts: np.stack(parts, 0 if a.axis is None else int(a.axis)),
    "relax.split": _split,
    "relax.where": _where,
    "relax.nn.pad": _pad,
    "relax.repeat": _repeat,
    "relax.tile": lambda _n, a, x: np.tile(x, ints(a.repeats)),
    "relax.flip": lambda _n, a, x: np.flip(x, int(a.axis)),
    "relax.tril": lambda _n, _a, x, k: np.tril(x, int(k)),
    "relax.triu": lambda _n, _a, x, k: np.triu(x, int(k)),
    "relax.arange": _arange,
    "relax.full": _full,
    "relax.full_like": lambda _n, _a, x, value: np.full_like(x, value),
    "relax.zeros": _filled(0),
    "relax.ones": _filled(1),
    "relax.zeros_like": lambda _n, _a, x: np.zeros_like(x),
    "relax.ones_like": lambda _n, _a, x: np.ones_like(x),
    "relax.eye": _eye,
    "relax.astype": lambda numeric, attrs, x: _cast(x, numeric.dtype(attrs.dtype)),
    "relax.wrap_param": lambda numeric, attrs, x: _cast(x, numeric.dtype(attrs.dtype)),
    "relax.matmul": _matmul,
    "relax.outer": lambda _n, _a, x, y: np.outer(x, y),
    "relax.einsum": _einsum,
    "relax.meshgrid": _meshgrid,
    "relax.shape_of": lambda _n, _a, x: tuple(x.shape),
    "relax.shape_to_tensor": lambda _n, _a, shape: np.asarray(shape, "int64"),
    "relax.size": lambda _n, _a, x: np.asarray(x.size, "int64"),
}


def _cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return x.astype(dtype)
