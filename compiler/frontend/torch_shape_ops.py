# SPDX-License-Identifier: Apache-2.0
"""ATen operators that move, select, reduce or create, to Relax. See `torch_ops` for what a converter is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op

from compiler.frontend.picking import pad_with_own, pick, written_into
from compiler.frontend.support import Refused, constant, dtype_of, is_bool
from passes.layers import shape_of

if TYPE_CHECKING:
    from compiler.frontend.torch_convert import Converter


def _result_shape(c: Converter) -> tuple[int, ...]:
    return tuple(int(d) for d in c.node.meta["val"].shape)


def _same(c: Converter, x: relax.Expr, *_unused: Any) -> relax.Expr:
    return x


def _cast(c: Converter, x: relax.Expr, *_unused: Any) -> relax.Expr:
    return c.cast(x, c.dtype)


def _reshape(c: Converter, x: relax.Expr, *_unused: Any) -> relax.Expr:
    """To the shape torch inferred, which holds no -1 and no 0 with another meaning."""
    if 0 in _result_shape(c):
        raise Refused("an empty tensor")
    return op.reshape(x, _result_shape(c))


def _expand(c: Converter, x: relax.Expr, *_unused: Any) -> relax.Expr:
    return op.broadcast_to(x, _result_shape(c))


def _transpose(c: Converter, x: relax.Expr, first: int, second: int) -> relax.Expr:
    axes = list(range(len(shape_of(x))))
    axes[first], axes[second] = axes[second], axes[first]
    return op.permute_dims(x, axes)


def _permute(c: Converter, x: relax.Expr, axes: list[int]) -> relax.Expr:
    return op.permute_dims(x, [a % len(axes) for a in axes])


def _cat(c: Converter, tensors: list, axis: int = 0) -> relax.Expr:
    # torch lets an empty one-dimensional tensor take part in any concatenation.
    parts = [c.cast(t, c.dtype) for t in tensors if shape_of(t) != (0,)]
    return parts[0] if len(parts) == 1 else op.concat(parts, axis)


def _stack(c: Converter, tensors: list, axis: int = 0) -> relax.Expr:
    axis %= len(_result_shape(c))
    return op.concat([c.emit(op.expand_dims(c.cast(t, c.dtype), axis)) for t in tensors], axis)


def _slice_axis(x: relax.Expr, axis: int, start: int, end: int, step: int = 1) -> relax.Expr:
    return op.strided_slice(x, [axis], [start], [end], [step])


def _slice(
    c: Converter,
    x: relax.Expr,
    axis: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> relax.Expr:
    axis %= len(shape_of(x))
    start, end, step = slice(start, end, step).indices(shape_of(x)[axis])
    if (start, end, step) == (0, shape_of(x)[axis], 1):
        return x
    if end <= start:
        raise Refused("an empty tensor")
    return _slice_axis(x, axis, start, end, step)


def _select(c: Converter, x: relax.Expr, axis: int, index: int) -> relax.Expr:
    if not isinstance(index, int):
        raise Refused("an index that is computed")
    axis, index = axis % len(shape_of(x)), index % shape_of(x)[axis]
    return op.squeeze(c.emit(_slice_axis(x, axis, index, index + 1)), [axis])


def _unbind(c: Converter, x: relax.Expr, axis: int = 0) -> list[relax.Expr]:
    return [c.emit(_select(c, x, axis, i)) for i in range(shape_of(x)[axis])]


def _split(c: Converter, x: relax.Expr, sizes: int | list[int], axis: int = 0) -> list[relax.Expr]:
    axis %= len(shape_of(x))
    extent = shape_of(x)[axis]
    if isinstance(sizes, int):
        sizes = [min(sizes, extent - start) for start in range(0, extent, sizes)]
    ends = np.cumsum(sizes)
    return [c.emit(_slice_axis(x, axis, int(e) - s, int(e))) for e, s in zip(ends, sizes)]


def _squeeze(c: Converter, x: relax.Expr, *_unused: Any) -> relax.Expr:
    return op.reshape(x, _result_shape(c))


def _getitem(c: Converter, items: tuple, index: int) -> relax.Expr:
    if items[index] is None:
        raise Refused("a result that inference does not compute")
    return items[index]


def _reduce(function: Callable) -> Callable:
    def convert(
        c: Converter, x: relax.Expr, axes: Any = None, keepdims: bool = False, **_unused: Any
    ) -> relax.Expr:
        axes = None if axes in (None, []) else [axes] if isinstance(axes, int) else list(axes)
        return function(c.cast(x, c.dtype), axes, keepdims=keepdims)

    return lambda c, *arguments: convert(c, *arguments[:3])


def _reduce_all(function: Callable) -> Callable:
    return lambda c, x, *_unused: function(c.cast(x, c.dtype), None, keepdims=False)


def _extremum_axis(function: Callable) -> Callable:
    """max.dim and min.dim: the values; their indices only if nobody asks for them."""

    def convert(c: Converter, x: relax.Expr, axis: int, keepdims: bool = False) -> tuple:
        return c.emit(function(x, [axis], keepdims=keepdims)), None

    return convert


def _variance(
    c: Converter, x: relax.Expr, axes: Any = None, correction: Any = None, keepdims: bool = False
) -> relax.Expr:
    axes = list(range(len(shape_of(x)))) if axes in (None, []) else list(axes)
    count = int(np.prod([shape_of(x)[a] for a in axes]))
    correction = 1 if correction is None else correction
    if count <= correction:
        raise Refused(f"a variance of {count} values with correction {correction}")
    mean = c.emit(op.mean(x, axes, keepdims=True))
    centred = c.emit(op.subtract(x, mean))
    total = op.sum(op.multiply(centred, centred), axes, keepdims=keepdims)
    return op.multiply(total, c.cast(1 / (count - correction), c.dtype))


def _std(c: Converter, *arguments: Any) -> relax.Expr:
    return op.sqrt(_variance(c, *arguments))


def _argument(function: Callable) -> Callable:
    def convert(
        c: Converter, x: relax.Expr, axis: int | None = None, keepdims: bool = False
    ) -> relax.Expr:
        if axis is None:
            return function(op.reshape(x, (int(np.prod(shape_of(x))),)), 0, keepdims=False)
        return function(x, axis, keepdims=keepdims)

    return convert


def _where(c: Converter, condition: relax.Expr, a: Any, b: Any) -> relax.Expr:
    return op.where(condition, c.cast(a, c.dtype), c.cast(b, c.dtype))


def _masked_fill(c: Converter, x: relax.Expr, mask: relax.Expr, value: Any) -> relax.Expr:
    return op.where(mask, c.cast(value, c.dtype), x)


def _full_like(c: Converter, x: relax.Expr, value: Any, *_unused: Any) -> relax.Expr:
    return constant(np.full(shape_of(x), value, c.dtype))


def _filled_like(value: int) -> Callable:
    return lambda c, x, *_unused: _full_like(c, x, value)


def _index_select(c: Converter, x: relax.Expr, axis: int, indices: relax.Expr) -> relax.Expr:
    return op.take(
        x, _normalised(c, indices, shape_of(x)[axis]), axis=axis % len(shape_of(x)), mode="clip"
    )


def _normalised(c: Converter, indices: relax.Expr, extent: int) -> relax.Expr:
    """Indices counted from the front: torch counts a negative one from the end, Relax reads out of bounds."""
    if isinstance(indices, tvm.ir.expr.GenericConst):
        array = indices.value.numpy()
        if array.size and not (-extent <= array.min() and array.max() < extent):
            raise Refused(f"an index out of range for an axis of {extent}")
        return constant(np.where(array < 0, array + extent, array).astype(array.dtype))
    dtype = dtype_of(indices)
    return c.emit(
        op.where(
            op.less(indices, c.cast(0, dtype)), op.add(indices, c.cast(extent, dtype)), indices
        )
    )


def _index(c: Converter, x: relax.Expr, indices: list) -> relax.Expr:
    """x[indices]: one tensor on any axis, or tensors on the leading axes."""
    used = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if any(is_bool(i) for _, i in used):
        raise Refused("a mask as an index: the size of the result depends on data")
    if len(used) == 1:
        axis, index = used[0]
        return op.take(x, _normalised(c, index, shape_of(x)[axis]), axis=axis, mode="clip")
    if [axis for axis, _ in used] != list(range(len(used))):
        raise Refused("several index tensors on axes that are not the leading ones")
    return op.index_tensor(x, [_normalised(c, i, shape_of(x)[axis]) for axis, i in used])


def _copy(c: Converter, x: relax.Expr, values: relax.Expr, *_unused: Any) -> relax.Expr:
    return op.broadcast_to(c.cast(values, dtype_of(x)), shape_of(x))


def _scatter(key: Callable) -> Callable:
    """x with `values` where `key(axis's arguments)` indexes an axis."""

    def convert(
        c: Converter, x: relax.Expr, values: relax.Expr, axis: int = 0, *where: Any
    ) -> relax.Expr:
        places = np.arange(math.prod(shape_of(x))).reshape(shape_of(x))
        places = places[(slice(None),) * (axis % places.ndim) + (key(*where),)]
        return written_into(c, x, c.cast(values, dtype_of(x)), places)

    return convert


def _gather(
    c: Converter, x: relax.Expr, axis: int, indices: relax.Expr, _sparse: bool = False
) -> relax.Expr:
    axis %= len(shape_of(x))
    if any(i != d for a, (i, d) in enumerate(zip(shape_of(indices), shape_of(x))) if a != axis):
        raise Refused("indices that do not span the whole tensor")
    return op.gather_elements(x, indices, axis)


def _pad(c: Converter, x: relax.Expr, padding: list[int], value: Any = 0) -> relax.Expr:
    rank = len(shape_of(x))
    pairs = [(0, 0)] * (rank - len(padding) // 2) + [
        (padding[i], padding[i + 1]) for i in range(len(padding) - 2, -1, -2)
    ]
    for axis, (low, high) in enumerate(pairs):
        if low < 0 or high < 0:  # a negative padding crops
            x = c.emit(_slice_axis(x, axis, max(-low, 0), shape_of(x)[axis] - max(-high, 0)))
    widths = [max(p, 0) for pair in pairs for p in pair]
    return x if not any(widths) else op.nn.pad(x, widths, "constant", float(value))


def _pad_mode(
    c: Converter, x: relax.Expr, padding: list[int], mode: str = "constant", value: Any = None
) -> relax.Expr:
    if mode == "constant":
        return _pad(c, x, padding, value or 0)
    for i in range(0, len(padding), 2):
        axis = len(shape_of(x)) - 1 - i // 2
        named = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}[mode]
        x = pad_with_own(c, x, axis, tuple(padding[i : i + 2]), named)
    return x


def _norm(
    c: Converter,
    x: relax.Expr,
    order: Any = 2,
    axes: Any = None,
    keepdims: bool = False,
    _dtype: Any = None,
) -> relax.Expr:
    axes = list(range(len(shape_of(x)))) if axes in (None, []) else list(axes)
    if order == 1:
        return op.sum(op.abs(x), axes, keepdims=keepdims)
    if order == 2:
        return op.sqrt(op.sum(op.multiply(x, x), axes, keepdims=keepdims))
    if order == float("inf"):
        return op.max(op.abs(x), axes, keepdims=keepdims)
    raise Refused(f"a norm of order {order}")


def _any(c: Converter, x: relax.Expr, axes: Any = None, keepdims: bool = False) -> relax.Expr:
    axes = None if axes in (None, []) else [axes] if isinstance(axes, int) else list(axes)
    truth = x if is_bool(x) else c.emit(op.not_equal(x, c.cast(0, dtype_of(x))))
    return op.astype(
        c.emit(op.max(c.emit(op.astype(truth, "int32")), axes, keepdims=keepdims)), "bool"
    )


def _flip(c: Converter, x: relax.Expr, axes: list[int]) -> relax.Expr:
    for axis in axes:
        x = c.emit(op.flip(x, axis % len(shape_of(x))))
    return x


def _roll(c: Converter, x: relax.Expr, shifts: list[int], axes: list[int]) -> relax.Expr:
    if len(axes) != len(shifts):
        raise Refused("a roll of the flattened tensor")
    for shift, axis in zip(shifts, axes):
        axis %= len(shape_of(x))
        cut = -shift % shape_of(x)[axis]
        if cut:
            parts = [_slice_axis(x, axis, cut, shape_of(x)[axis]), _slice_axis(x, axis, 0, cut)]
            x = c.emit(op.concat([c.emit(p) for p in parts], axis))
    return x


def _repeat(c: Converter, x: relax.Expr, repeats: list[int]) -> relax.Expr:
    if len(repeats) > len(shape_of(x)):
        x = c.emit(op.reshape(x, (*[1] * (len(repeats) - len(shape_of(x))), *shape_of(x))))
    for axis, count in enumerate(repeats):
        x = x if count == 1 else c.emit(op.concat([x] * count, axis))
    return x


def _triangle(function: Callable) -> Callable:
    return lambda c, x, diagonal=0: function(x, diagonal)


def _cumsum(c: Converter, x: relax.Expr, axis: int, _dtype: Any = None) -> relax.Expr:
    return op.cumsum(c.cast(x, c.dtype), axis % max(len(shape_of(x)), 1), c.dtype)


def _pixel_shuffle(c: Converter, x: relax.Expr, factor: int) -> relax.Expr:
    n, channels, height, width = shape_of(x)
    split = c.emit(op.reshape(x, (n, channels // factor**2, factor, factor, height, width)))
    moved = c.emit(op.permute_dims(split, [0, 1, 4, 2, 5, 3]))
    return op.reshape(moved, (n, channels // factor**2, height * factor, width * factor))


def _nearest(c: Converter, x: relax.Expr, _size: Any, scales: Any = None) -> relax.Expr:
    for axis, out in enumerate(_result_shape(c)[2:], 2):
        size = shape_of(x)[axis]
        # In float32, and for one and two by sizes alone, as torch computes it.
        by_sizes = not scales or out in (size, 2 * size)
        step = np.float32(size / out if by_sizes else 1 / scales[axis - 2])
        source = np.floor(np.arange(out, dtype="float32") * step).astype("int64")
        x = pick(c, x, axis, np.minimum(source, size - 1))
    return x


def _bilinear(
    c: Converter, x: relax.Expr, size: Any, align_corners: bool, scales: Any = None
) -> relax.Expr:
    height, width = _result_shape(c)[2:]
    if scales and any(
        abs(s * i - o) > 1e-6 for s, i, o in zip(scales, shape_of(x)[2:], (height, width))
    ):
        raise Refused("a scale factor that does not give a whole number of pixels")
    mode = "align_corners" if align_corners else "half_pixel"
    return op.image.resize2d(
        x, (height, width), layout="NCHW", method="linear", coordinate_transformation_mode=mode
    )


def _one_hot(c: Converter, x: relax.Expr, classes: int = -1) -> relax.Expr:
    depth = _result_shape(c)[-1]
    positions = constant(np.arange(depth, dtype="int64"))
    return op.astype(op.equal(op.expand_dims(x, -1), positions), c.dtype)


_REDUCTIONS: dict[str, Callable] = {
    "mean.dim": _reduce(op.mean), "mean.default": _reduce_all(op.mean), "sum.dim_IntList": _reduce(op.sum), "sum.default": _reduce_all(op.sum),
    "amax.default": _reduce(op.max), "amin.default": _reduce(op.min), "max.dim": _extremum_axis(op.max), "min.dim": _extremum_axis(op.min),
    "max.default": _reduce_all(op.max), "min.default": _reduce_all(op.min), "var.correction": _variance, "std.correction": _std,
    "argmax.default": _argument(op.argmax), "argmin.default": _argument(op.argmin), "cumsum.default": _cumsum,
    "linalg_vector_norm.default": _norm, "any.dims": _any, "any.dim": _any, "any.default": _any,
}  # fmt: skip

CONVERTERS: dict[str, Callable] = {
    **_REDUCTIONS,
    **{name: _same for name in (
        "clone.default", "alias.default", "detach.default", "contiguous.default", "lift_fresh_copy.default", "dropout.default", "lift_fresh.default",
    )},
    **{name: _cast for name in ("_to_copy.default", "to.dtype", "type_as.default", "to.dtype_layout")},
    **{name: _reshape for name in (
        "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int", "unsqueeze.default", "view_as.default",
        "reshape_as.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "_reshape_alias.default",
    )},
    **{name: _expand for name in ("expand.default", "broadcast_to.default", "expand_as.default")},
    "transpose.int": _transpose, "permute.default": _permute, "t.default": lambda c, x: op.permute_dims(x),
    "cat.default": _cat, "stack.default": _stack, "slice.Tensor": _slice, "select.int": _select, "unbind.int": _unbind,
    "split.Tensor": _split, "split_with_sizes.default": _split, "getitem": _getitem,
    "where.self": _where, "where.ScalarOther": _where, "where.ScalarSelf": _where, "where.Scalar": _where,
    "masked_fill.Scalar": _masked_fill, "masked_fill.Tensor": _masked_fill,
    "full_like.default": _full_like, "zeros_like.default": _filled_like(0), "ones_like.default": _filled_like(1),
    "index_select.default": _index_select, "index.Tensor": _index, "gather.default": _gather, "constant_pad_nd.default": _pad, "pad.default": _pad_mode,
    "flip.default": _flip, "roll.default": _roll, "repeat.default": _repeat, "tril.default": _triangle(op.tril), "triu.default": _triangle(op.triu),
    "pixel_shuffle.default": _pixel_shuffle, "upsample_nearest2d.vec": _nearest, "upsample_bilinear2d.vec": _bilinear,
    "one_hot.default": _one_hot, "copy.default": _copy, "slice_scatter.default": _scatter(lambda *ends: slice(*ends or (None,))),
    "select_scatter.default": _scatter(lambda index: index),
}  # fmt: skip
