# SPDX-License-Identifier: Apache-2.0
"""Relax's indexing and ordering operators in numpy: slices, gathers, scatters, sorts.

Entries of `INDEXING_OPERATORS` are `(numeric, attributes, *arguments) -> array`.
"""

from __future__ import annotations

import numpy as np

from schedules.errors import KerfError


def _strided_slice(_n, _attrs, x, axes, begin, end, strides=None):
    index = [slice(None)] * x.ndim
    for i, (axis, b, e) in enumerate(zip(axes, begin, end)):
        step = int(strides[i]) if strides else 1
        size = x.shape[axis]
        b, e = (v + size if v < 0 else v for v in (int(b), int(e)))
        if step > 0:
            index[axis] = slice(min(max(b, 0), size), min(max(e, 0), size), step)
        else:
            b, e = min(max(b, -1), size - 1), min(max(e, -1), size - 1)
            index[axis] = slice(b, None if e < 0 else e, step)
    return x[tuple(index)]


def _take(_n, attrs, x, indices):
    if attrs.axis is None:
        x, axis = x.reshape(-1), 0
    else:
        axis = int(attrs.axis)
    indices = np.asarray(indices)
    size = x.shape[axis]
    mode = str(attrs.mode)
    if mode == "wrap":
        indices = indices % size
    elif mode == "clip":
        indices = np.clip(indices, 0, size - 1)
    elif mode == "nan":
        inside = (indices >= -size) & (indices < size)
        taken = np.take(x, np.where(inside, indices, 0), axis=axis)
        shape = [1] * axis + list(indices.shape) + [1] * (x.ndim - axis - 1)
        return np.where(inside.reshape(shape), taken, np.nan)
    return np.take(x, indices, axis=axis)


def _index_tensor(_n, _a, x, indices):
    return x[tuple(indices)]


def _gather_elements(_n, attrs, x, indices):
    axis = int(attrs.axis)
    return np.take_along_axis(x, np.where(indices < 0, indices + x.shape[axis], indices), axis)


def _gather_nd(_n, attrs, x, indices):
    batch = int(attrs.batch_dims)
    if batch > 1:
        raise KerfError("no numpy reference", found="relax.gather_nd with more than one batch axis")
    if batch:
        return np.stack([_gather_nd_flat(a, i) for a, i in zip(x, indices)])
    return _gather_nd_flat(x, indices)


def _gather_nd_flat(x, indices):
    return x[tuple(np.moveaxis(indices, -1, 0))]


def _scatter_elements(_n, attrs, x, indices, updates):
    axis, result = int(attrs.axis), x.copy()
    where = list(np.indices(indices.shape))
    where[axis] = np.where(indices < 0, indices + x.shape[axis], indices)
    reduction = str(attrs.reduction)
    if reduction == "update":
        result[tuple(where)] = updates
        return result
    {"add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum}[reduction].at(
        result, tuple(where), updates
    )
    return result


def _scatter_nd(_n, attrs, x, indices, updates):
    result, where = x.copy(), tuple(np.moveaxis(indices, -1, 0))
    reduction = str(attrs.reduction)
    if reduction == "update":
        result[where] = updates
        return result
    {"add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum}[reduction].at(
        result, where, updates
    )
    return result


def _slice_scatter(_n, attrs, x, source, start, end, step):
    result, index = x.copy(), [slice(None)] * x.ndim
    index[int(attrs.axis)] = slice(int(start), int(end), int(step))
    result[tuple(index)] = source
    return result


def _sort(_n, attrs, x):
    ascending = np.sort(x, axis=int(attrs.axis))
    return np.flip(ascending, int(attrs.axis)) if attrs.descending else ascending


def _argsort(_n, attrs, x):
    axis = int(attrs.axis)
    if not attrs.descending:
        return np.argsort(x, axis=axis, kind="stable")
    size = x.shape[axis]  # stable among equals in descending order as well
    return size - 1 - np.flip(np.argsort(np.flip(x, axis), axis=axis, kind="stable"), axis)


def _topk(numeric, attrs, x):
    axis, k = int(attrs.axis) % x.ndim, int(attrs.k)
    if k < 1:
        k = x.shape[axis]
    flipped = np.flip(x, axis)
    if attrs.largest:
        order = x.shape[axis] - 1 - np.flip(np.argsort(flipped, axis=axis, kind="stable"), axis)
    else:
        order = np.argsort(x, axis=axis, kind="stable")
    order = np.take(order, range(k), axis=axis)
    values = np.take_along_axis(x, order, axis)
    order = order.astype(numeric.dtype(attrs.dtype))
    return {"both": (values, order), "values": values, "indices": order}[str(attrs.ret_type)]


def _one_hot(_n, attrs, indices, on, off):
    depth = int(attrs.depth)
    rows = np.where(np.arange(depth) == indices[..., None], on, off)
    return np.moveaxis(rows, -1, int(attrs.axis))


INDEXING_OPERATORS = {
    "relax.strided_slice": _strided_slice,
    "relax.take": _take,
    "relax.one_hot": _one_hot,
    "relax.index_tensor": _index_tensor,
    "relax.gather_elements": _gather_elements,
    "relax.gather_nd": _gather_nd,
    "relax.scatter_elements": _scatter_elements,
    "relax.scatter_nd": _scatter_nd,
    "relax.slice_scatter": _slice_scatter,
    "relax.sort": _sort,
    "relax.argsort": _argsort,
    "relax.topk": _topk,
}
