# SPDX-License-Identifier: Apache-2.0
"""ONNX operators that move, select or reduce, to Relax. See `onnx_ops` for what a converter is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax
from tvm.relax import op

from compiler.frontend.picking import pad_with_own, pick, written_into
from compiler.frontend.support import Refused, constant, dtype_of
from passes.layers import is_const, shape_of

if TYPE_CHECKING:
    from compiler.frontend.onnx_convert import Converter


def _same(c: Converter, x: relax.Expr, *_unused: Any) -> relax.Expr:
    return x


def _dropout(c: Converter, x: relax.Expr, *_unused: Any) -> list[relax.Expr]:
    mode = c.array(2) if len(c.node.input) > 2 else None
    if any(c.node.output[1:]) or (mode is not None and bool(mode)):
        raise Refused("training mode")
    return [x]


def _to_shape(c: Converter, x: relax.Expr, *_unused: Any) -> relax.Expr:
    """To the shape that ONNX inferred; what the operator calls it does not matter."""
    if 0 in c.shape():
        raise Refused("an empty tensor")
    return op.reshape(x, c.shape())


def _expand(c: Converter, x: relax.Expr, _shape: Any) -> relax.Expr:
    return op.broadcast_to(x, c.shape())


def _transpose(c: Converter, x: relax.Expr) -> relax.Expr:
    return op.permute_dims(x, list(c.attr("perm") or reversed(range(len(shape_of(x))))))


def _concat(c: Converter, *parts: relax.Expr) -> relax.Expr:
    axis = c.attr("axis") % len(shape_of(parts[0]))
    kept = [p for p in parts if shape_of(p)[axis]]
    return kept[0] if len(kept) == 1 else op.concat(kept, axis)


def _cut(c: Converter, x: relax.Expr, axis: int, start: int, end: int, step: int = 1) -> relax.Expr:
    return c.emit(op.strided_slice(x, [axis], [start], [end], [step]))


def _split(c: Converter, x: relax.Expr, *_unused: Any) -> list[relax.Expr]:
    axis = c.attr("axis", 0) % len(shape_of(x))
    extent, count = shape_of(x)[axis], len(c.node.output)
    sizes = c.operand("split", 1)
    if sizes is None:
        each = -(-extent // count)
        sizes = [min(each, extent - i * each) for i in range(count)]
    if sum(sizes) != extent or min(sizes) < 1:
        raise Refused(f"parts of {sizes} of an axis of {extent}")
    ends = np.cumsum(sizes).tolist()
    return [_cut(c, x, axis, end - size, end) for size, end in zip(sizes, ends)]


def _slice(c: Converter, x: relax.Expr, *_unused: Any) -> relax.Expr:
    starts, ends = c.operand("starts", 1), c.operand("ends", 2)
    axes = c.operand("axes", 3) or list(range(len(starts)))
    steps = c.operand("steps", 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps):
        axis %= len(shape_of(x))
        extent = shape_of(x)[axis]
        positions = range(extent)[slice(_bounded(start), _bounded(end), step)]
        if not len(positions):
            raise Refused("an empty tensor")
        if len(positions) == extent and step == 1:
            continue
        if step < 0:  # reversed, then from the front
            x = c.emit(op.flip(x, axis))
            positions = range(extent)[extent - 1 - positions[0] : extent - positions[-1] : -step]
        x = _cut(c, x, axis, positions[0], positions[-1] + 1, abs(step))
    return x


def _bounded(value: int) -> int | None:
    """Exporters write the largest and smallest integers for "to the end"."""
    return max(min(int(value), 2**31), -(2**31))


def _indices(c: Converter, indices: relax.Expr, extent: int) -> relax.Expr:
    """Counted from the front: ONNX counts negative ones from the end, Relax reads out of bounds."""
    if is_const(indices):
        array = indices.value.numpy()
        if array.size and not (-extent <= array.min() and array.max() < extent):
            raise Refused(f"an index out of range for an axis of {extent}")
        return constant(np.where(array < 0, array + extent, array).astype(array.dtype))
    dtype = dtype_of(indices)
    below = op.less(indices, constant(np.array(0, dtype)))
    return c.emit(op.where(below, op.add(indices, constant(np.array(extent, dtype))), indices))


def _gather(c: Converter, x: relax.Expr, indices: relax.Expr) -> relax.Expr:
    axis = c.attr("axis", 0) % len(shape_of(x))
    indices = _indices(c, indices, shape_of(x)[axis])
    if is_const(indices) and not shape_of(indices):
        index = int(indices.value.numpy())
        return op.squeeze(_cut(c, x, axis, index, index + 1), [axis])
    # "clip" keeps an index that is out of range inside the tensor; the default reads whatever lies behind it.
    return op.take(x, indices, axis=axis, mode="clip")


def _gather_nd(c: Converter, x: relax.Expr, indices: relax.Expr) -> relax.Expr:
    """Indices into the leading axes, along the last axis of `indices`."""
    if c.attr("batch_dims", 0):
        raise Refused("batch dimensions")
    last = len(shape_of(indices)) - 1
    parts = []
    for axis in range(shape_of(indices)[last]):
        if is_const(indices):
            part = constant(indices.value.numpy()[..., axis])
        else:
            part = c.emit(op.squeeze(_cut(c, indices, last, axis, axis + 1), [last]))
        parts.append(_indices(c, part, shape_of(x)[axis]))
    return op.take(x, parts[0], axis=0, mode="clip") if len(parts) == 1 else op.index_tensor(x, parts)  # fmt: skip


def _gather_elements(c: Converter, x: relax.Expr, indices: relax.Expr) -> relax.Expr:
    axis = c.attr("axis", 0) % len(shape_of(x))
    if any(i != d for a, (i, d) in enumerate(zip(shape_of(indices), shape_of(x))) if a != axis):
        raise Refused("indices that do not span the whole tensor")
    return op.gather_elements(x, _indices(c, indices, shape_of(x)[axis]), axis)


def _scatter(c: Converter, x: relax.Expr, _indices: Any, values: relax.Expr) -> relax.Expr:
    """Values at constant indices: into the leading axes, or (ScatterElements) along one."""
    if c.attr("reduction", "none") != "none":
        raise Refused(f"reduction {c.attr('reduction')}")
    indices, shape = c.array(1), shape_of(x)
    places = np.arange(math.prod(shape)).reshape(shape)
    if c.node.op_type == "ScatterND":
        at, extents = tuple(np.moveaxis(indices, -1, 0)), shape[: indices.shape[-1]]
    else:
        axis = c.attr("axis", 0) % len(shape)
        at = tuple(np.indices(indices.shape))
        at, extents = (*at[:axis], indices, *at[axis + 1 :]), shape
    for index, extent in zip(at, extents):
        if index.size and not (-extent <= index.min() and index.max() < extent):
            raise Refused(f"an index out of range for an axis of {extent}")
    return written_into(c, x, values, places[at])


def _pad(c: Converter, x: relax.Expr, *_unused: Any) -> relax.Expr:
    rank = len(shape_of(x))
    pads = c.operand("pads", 1)
    axes = c.operand("axes", 3) or list(range(rank))
    low, high = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        low[axis % rank], high[axis % rank] = pads[i], pads[i + len(axes)]
    mode = c.attr("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap") or min(*low, *high) < 0:
        raise Refused(f"mode {mode}, or negative padding")
    if mode in ("edge", "wrap"):
        for axis, widths in enumerate(zip(low, high)):
            x = pad_with_own(c, x, axis, widths, mode)
        return x
    value = c.array(2) if len(c.node.input) > 2 else None
    fill = float(c.attr("value", 0.0)) if value is None else float(value.reshape(-1)[0])
    widths = [v for pair in zip(low, high) for v in pair]
    if not any(widths):
        return x
    return op.nn.pad(x, widths, mode, fill) if mode == "constant" else op.nn.pad(x, widths, mode)


def _tile(c: Converter, x: relax.Expr, _repeats: Any) -> relax.Expr:
    for axis, count in enumerate(c.operand("repeats", 1)):
        x = x if count == 1 else c.emit(op.concat([x] * int(count), axis))
    return x


def _reduce(function: Callable) -> Callable:
    def convert(c: Converter, x: relax.Expr, _axes: Any = None) -> relax.Expr:
        axes, keepdims = c.operand("axes", 1), bool(c.attr("keepdims", 1))
        if not axes:
            if c.attr("noop_with_empty_axes", 0):
                return x
            axes = range(len(shape_of(x)))
        return function(x, sorted(a % len(shape_of(x)) for a in axes), keepdims=keepdims)

    return convert


def _l2(x: relax.Expr, axes: list[int], keepdims: bool) -> relax.Expr:
    return op.sqrt(op.sum(op.multiply(x, x), axes, keepdims=keepdims))


def _sum_of_squares(x: relax.Expr, axes: list[int], keepdims: bool) -> relax.Expr:
    return op.sum(op.multiply(x, x), axes, keepdims=keepdims)


def _l1(x: relax.Expr, axes: list[int], keepdims: bool) -> relax.Expr:
    return op.sum(op.abs(x), axes, keepdims=keepdims)


def _argument(function: Callable) -> Callable:
    def convert(c: Converter, x: relax.Expr) -> relax.Expr:
        if c.attr("select_last_index", 0):
            raise Refused("select_last_index")
        return function(
            x, c.attr("axis", 0) % len(shape_of(x)), keepdims=bool(c.attr("keepdims", 1))
        )

    return convert


def _cumsum(c: Converter, x: relax.Expr, _axis: relax.Expr) -> relax.Expr:
    if c.attr("reverse", 0):
        raise Refused("reverse")
    return op.cumsum(
        x, int(c.array(1).reshape(-1)[0]) % len(shape_of(x)), exclusive=bool(c.attr("exclusive", 0))
    )


def _trilu(c: Converter, x: relax.Expr, _k: Any = None) -> relax.Expr:
    diagonal = 0 if c.array(1) is None else int(c.array(1).reshape(-1)[0])
    return op.triu(x, diagonal) if c.attr("upper", 1) else op.tril(x, diagonal)


def _depth_to_space(c: Converter, x: relax.Expr) -> relax.Expr:
    n, channels, height, width = shape_of(x)
    b = c.attr("blocksize")
    if c.attr("mode", "DCR") == "DCR":
        shape, axes = (n, b, b, channels // b**2, height, width), [0, 3, 4, 1, 5, 2]
    else:
        shape, axes = (n, channels // b**2, b, b, height, width), [0, 1, 4, 2, 5, 3]
    return op.reshape(c.emit(op.permute_dims(c.emit(op.reshape(x, shape)), axes)), c.shape())


def _space_to_depth(c: Converter, x: relax.Expr) -> relax.Expr:
    n, channels, height, width = shape_of(x)
    b = c.attr("blocksize")
    split = c.emit(op.reshape(x, (n, channels, height // b, b, width // b, b)))
    return op.reshape(c.emit(op.permute_dims(split, [0, 3, 5, 1, 2, 4])), c.shape())


# `coordinate_transformation_mode`: (position in the result, size, size of the result, scale) -> position before.
_POSITIONS = {
    "asymmetric": lambda at, size, out, scale: at / scale,
    "half_pixel": lambda at, size, out, scale: (at + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda at, size, out, scale: (at + 0.5) / scale - 0.5 if out > 1 else 0 * at,
    "align_corners": lambda at, size, out, scale: at * (size - 1) / max(out - 1, 1),
}  # fmt: skip
_ROUNDINGS = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
}


def _nearest(
    c: Converter, x: relax.Expr, sizes: tuple[int, int], scales: list[float] | None, coordinates: str, rounding: str
) -> relax.Expr:  # fmt: skip
    if coordinates not in _POSITIONS or rounding not in _ROUNDINGS:
        raise Refused(f"nearest with {coordinates} coordinates, {rounding}")
    for axis, out in enumerate(sizes, 2):
        size = shape_of(x)[axis]
        scale = scales[axis - 2] if scales else out / size
        if coordinates == "align_corners" and abs(scale * size - out) > 1e-4:
            raise Refused("scales that do not give whole numbers of pixels")
        at = _ROUNDINGS[rounding](_POSITIONS[coordinates](np.arange(out), size, out, scale))
        x = pick(c, x, axis, np.clip(at, 0, size - 1).astype("int64"))
    return x


def _resize(c: Converter, x: relax.Expr, *_unused: Any) -> relax.Expr:
    mode, coordinates = (
        c.attr("mode", "nearest"),
        c.attr("coordinate_transformation_mode", "half_pixel"),
    )
    (n, channels, height, width), (n2, channels2, new_height, new_width) = shape_of(x), c.shape()
    if (n, channels) != (n2, channels2) or c.attr("antialias", 0):
        raise Refused("a change of batch or channels, or antialiasing")
    scales = c.array(2) if len(c.node.input) > 2 else None
    scales = None if scales is None or not scales.size else [float(v) for v in scales[2:]]
    if mode == "nearest":
        rounding = c.attr("nearest_mode", "round_prefer_floor")
        return _nearest(c, x, (new_height, new_width), scales, coordinates, rounding)
    allowed = {
        "half_pixel": "half_pixel",
        "pytorch_half_pixel": "half_pixel",
        "align_corners": "align_corners",
    }
    if (
        mode != "linear"
        or coordinates not in allowed
        or (coordinates == "pytorch_half_pixel" and 1 in (new_height, new_width))
    ):
        raise Refused(f"mode {mode} with {coordinates} coordinates")
    if scales and any(
        abs(s * i - o) > 1e-4 for s, i, o in zip(scales, (height, width), (new_height, new_width))
    ):
        raise Refused("scales that do not give whole numbers of pixels")
    return op.image.resize2d(
        x,
        (new_height, new_width),
        layout="NCHW",
        method="linear",
        coordinate_transformation_mode=allowed[coordinates],
    )


CONVERTERS: dict[str, Callable] = {
    "Identity": _same, "Dropout": _dropout, "Reshape": _to_shape, "Flatten": _to_shape, "Squeeze": _to_shape, "Unsqueeze": _to_shape,
    "Expand": _expand, "Transpose": _transpose, "Concat": _concat, "Split": _split, "Slice": _slice, "Gather": _gather,
    "GatherElements": _gather_elements, "GatherND": _gather_nd, "Pad": _pad, "Tile": _tile, "CumSum": _cumsum, "Trilu": _trilu, "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth, "Resize": _resize, "ArgMax": _argument(op.argmax), "ArgMin": _argument(op.argmin),
    "ReduceMean": _reduce(op.mean), "ReduceSum": _reduce(op.sum), "ReduceMax": _reduce(op.max), "ReduceMin": _reduce(op.min),
    "ReduceL2": _reduce(_l2), "ReduceL1": _reduce(_l1), "ReduceSumSquare": _reduce(_sum_of_squares),
    "ScatterND": _scatter, "ScatterElements": _scatter,
}  # fmt: skip
