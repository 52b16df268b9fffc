# SPDX-License-Identifier: Apache-2.0
"""Relax's image operators in numpy: convolution, transposed convolution, pooling, resizing.

Entries of `IMAGE_OPERATORS` are `(numeric, attributes, *arguments) -> array`; `conv2d` is the
reference of `kerf.conv2d`, `(attributes, x, w) -> array`.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from passes.rewriting import ints

# One im2col matrix holds at most this many values; larger outputs are computed in slabs of rows.
_COLUMNS_LIMIT = 1 << 23


def windows(
    x: np.ndarray, kernel, strides, dilation, fill=0.0, padding=(0, 0, 0, 0), ceil_mode=False
) -> np.ndarray:
    """[N, C, H, W] -> a view [N, C, OH, OW, R, S] of the padded input."""
    top, left, bottom, right = padding
    size = (x.shape[2] + top + bottom, x.shape[3] + left + right)
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
    if ceil_mode:
        # A window may start inside the input or its leading padding only, as in torch and ONNX.
        extra = []
        for total, e, s, lead, inside in zip(size, extent, strides, (top, left), x.shape[2:]):
            count = -(-(total - e) // s) + 1
            if (count - 1) * s >= inside + lead:
                count -= 1
            extra.append(max(0, (count - 1) * s + e - total))
        bottom, right = bottom + extra[0], right + extra[1]
    if any((top, left, bottom, right)):
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(x, tuple(extent), axis=(2, 3))
    return view[:, :, :: strides[0], :: strides[1], :: dilation[0], :: dilation[1]]


def convolve(x, w, strides, padding, dilation, groups) -> np.ndarray:
    """Direct 2-D convolution of x [N, C, H, W] with w [O, C/groups, R, S]."""
    n = x.shape[0]
    o, per_group = w.shape[:2]
    view = windows(x, w.shape[2:], strides, dilation, padding=padding)
    oh, ow = view.shape[2:4]
    out = np.empty((n, groups, o // groups, oh, ow), x.dtype)
    if per_group == 1:  # depthwise: one multiplication per tap beats a matrix product of one row
        view = (
            view.reshape(n, groups, 1, oh, ow, *w.shape[2:])
            if o == groups
            else np.expand_dims(view, 2)
        )
        kernel = w.reshape(1, groups, o // groups, 1, 1, *w.shape[2:])
        out[...] = 0
        for r, s in np.ndindex(*w.shape[2:]):
            out += view[..., r, s] * kernel[..., r, s]
        return out.reshape(n, o, oh, ow)
    taps = per_group * w.shape[2] * w.shape[3]
    kernel = w.reshape(groups, o // groups, taps)
    rows = max(1, _COLUMNS_LIMIT // max(1, taps * ow))
    for b in range(n):
        for g in range(groups):
            part = view[b, g * per_group : (g + 1) * per_group]
            for start in range(0, oh, rows):
                slab = part[:, start : start + rows]
                columns = slab.transpose(0, 3, 4, 1, 2).reshape(taps, -1)
                out[b, g, :, start : start + rows] = (kernel[g] @ columns).reshape(
                    o // groups, -1, ow
                )
    return out.reshape(n, o, oh, ow)


def conv2d(attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Reference of `kerf.conv2d`: x in the layout the attributes name, w [O, C/groups, R, S]."""
    last = attrs["layout"] == "NHWC"
    x = x.transpose(0, 3, 1, 2) if last else x
    y = convolve(x, w, attrs["strides"], attrs["padding"], attrs["dilation"], attrs["groups"])
    return y.transpose(0, 2, 3, 1) if last else y


def _relax_conv2d(_n, attrs, x, w):
    w = w.transpose([str(attrs.kernel_layout).index(k) for k in "OIHW"])
    common = {
        "strides": ints(attrs.strides),
        "padding": _padding(attrs.padding, 2),
        "dilation": ints(attrs.dilation),
    }
    return conv2d({**common, "groups": int(attrs.groups), "layout": str(attrs.data_layout)}, x, w)


def _padding(values, spatial: int) -> list[int]:
    values = ints(values)
    return values if len(values) == 2 * spatial else values * (2 * spatial // len(values))


def _relax_conv1d(_n, attrs, x, w):
    left, right = _padding(attrs.padding, 1)
    y = convolve(
        x[:, :, None],
        w[:, :, None],
        (1, ints(attrs.strides)[0]),
        (0, left, 0, right),
        (1, ints(attrs.dilation)[0]),
        int(attrs.groups),
    )
    return y[:, :, 0]


def _transposed(x, w, strides, padding, dilation, groups, output_padding) -> np.ndarray:
    """Transposed convolution of x [N, C, H, W] with w [C, O/groups, R, S]: spread the input,
    convolve with the mirror.
    """
    n, c, h, width = x.shape
    spread = np.zeros((n, c, (h - 1) * strides[0] + 1, (width - 1) * strides[1] + 1), x.dtype)
    spread[:, :, :: strides[0], :: strides[1]] = x
    per_group, r, s = w.shape[1:]
    mirrored = (
        w[:, :, ::-1, ::-1].reshape(groups, c // groups, per_group, r, s).transpose(0, 2, 1, 3, 4)
    )
    edges = (dilation[0] * (r - 1), dilation[1] * (s - 1))
    around = [
        edges[0] - padding[0],
        edges[1] - padding[1],
        edges[0] - padding[2] + output_padding[0],
        edges[1] - padding[3] + output_padding[1],
    ]
    crop = [max(0, -a) for a in around]
    y = convolve(
        spread,
        mirrored.reshape(groups * per_group, c // groups, r, s),
        (1, 1),
        [max(0, a) for a in around],
        dilation,
        groups,
    )
    return y[:, :, crop[0] : y.shape[2] - crop[2], crop[1] : y.shape[3] - crop[3]]


def depth_to_space(attrs: dict, x: np.ndarray) -> np.ndarray:
    """`kerf.depth_to_space`: x and the result in attrs["layout"]."""
    last = attrs["layout"] == "NHWC"
    x = x.transpose(0, 3, 1, 2) if last else x
    (sh, sw), (top, left), (height, width) = attrs["block"], attrs["crop"], attrs["size"]
    n, channels, h, w = x.shape
    y = x.reshape(n, attrs["groups"], sh, sw, -1, h, w).transpose(0, 1, 4, 5, 2, 6, 3)
    y = y.reshape(n, channels // (sh * sw), h * sh, w * sw)
    y = y[:, :, top : top + height, left : left + width]
    return y.transpose(0, 2, 3, 1) if last else y


def _relax_conv2d_transpose(_n, attrs, x, w):
    return _transposed(
        x,
        w,
        ints(attrs.strides),
        _padding(attrs.padding, 2),
        ints(attrs.dilation),
        int(attrs.groups),
        ints(attrs.output_padding),
    )


def _relax_conv1d_transpose(_n, attrs, x, w):
    left, right = _padding(attrs.padding, 1)
    y = _transposed(
        x[:, :, None],
        w[:, :, None],
        (1, ints(attrs.strides)[0]),
        (0, left, 0, right),
        (1, ints(attrs.dilation)[0]),
        int(attrs.groups),
        (0, ints(attrs.output_padding)[0]),
    )
    return y[:, :, 0]


def _pool2d(reduce_max: bool):
    def apply(_n, attrs, x):
        last = str(attrs.layout) == "NHWC"
        x = x.transpose(0, 3, 1, 2) if last else x
        kernel, strides, dilation = ints(attrs.pool_size), ints(attrs.strides), ints(attrs.dilation)
        padding, ceil = _padding(attrs.padding, 2), bool(attrs.ceil_mode)
        if reduce_max:
            lowest = np.iinfo(x.dtype).min if np.issubdtype(x.dtype, np.integer) else -np.inf
            y = windows(x, kernel, strides, dilation, lowest, padding, ceil).max((4, 5))
        else:
            total = windows(x, kernel, strides, dilation, 0, padding, ceil).sum((4, 5))
            ones = np.ones((1, 1, *x.shape[2:]), x.dtype)
            if attrs.count_include_pad:  # explicit padding counts, what ceil_mode adds does not
                top, left, bottom, right = padding
                ones = np.pad(
                    ones, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=1
                )
                padding = [0, 0, 0, 0]
            counts = windows(ones, kernel, strides, dilation, 0, padding, ceil).sum((4, 5))
            counts = counts[:, :, : total.shape[2], : total.shape[3]]
            y = total / counts
        return y.transpose(0, 2, 3, 1) if last else y

    return apply


def _pool1d(reduce_max: bool):
    pool = _pool2d(reduce_max)

    def apply(numeric, attrs, x):
        left, right = _padding(attrs.padding, 1)
        two = SimpleNamespace(
            layout="NCHW",
            pool_size=(1, ints(attrs.pool_size)[0]),
            strides=(1, ints(attrs.strides)[0]),
            dilation=(1, ints(attrs.dilation)[0]),
            padding=(0, left, 0, right),
            ceil_mode=attrs.ceil_mode,
            count_include_pad=attrs.count_include_pad,
        )
        return pool(numeric, two, x[:, :, None])[:, :, 0]

    return apply


def _adaptive_avg_pool(spatial: int):
    def apply(_n, attrs, x):
        last = str(attrs.layout).endswith("C")
        x = np.moveaxis(x, -1, 1) if last else x
        sizes = ints(attrs.output_size) if attrs.output_size is not None else list(x.shape[2:])
        sizes = sizes * spatial if len(sizes) != spatial else sizes
        for axis, count in enumerate(sizes, start=2):
            size = x.shape[axis]
            spans = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
            x = np.concatenate(
                [np.take(x, range(a, b), axis).mean(axis, keepdims=True) for a, b in spans], axis
            )
        return np.moveaxis(x, 1, -1) if last else x

    return apply


def _pixel_shuffle(_n, attrs, x):
    r = int(attrs.upscale_factor)
    n, c, h, w = x.shape
    return (
        x.reshape(n, c // (r * r), r, r, h, w)
        .transpose(0, 1, 4, 2, 5, 3)
        .reshape(n, c // (r * r), h * r, w * r)
    )


def _source(mode: str, size: int, wanted: int) -> np.ndarray:
    """Where output positions lie in the input, by ONNX's names of the conventions."""
    out = np.arange(wanted, dtype="float64")
    if mode == "asymmetric":
        return out * size / wanted
    if mode == "align_corners":
        return out * (size - 1) / (wanted - 1) if wanted > 1 else out * 0
    if mode == "pytorch_half_pixel" and wanted == 1:
        return out * 0
    return (out + 0.5) * size / wanted - 0.5


def _interpolate(x, axis: int, wanted: int, attrs) -> np.ndarray:
    """One axis resized; the methods are separable."""
    size, method = x.shape[axis], str(attrs.method)
    at = _source(str(attrs.coordinate_transformation_mode), size, wanted)
    if method == "nearest_neighbor":
        rounding = str(attrs.rounding_method)
        picked = {"floor": np.floor, "ceil": np.ceil, "round": lambda v: np.floor(v + 0.5)}.get(
            rounding, lambda v: np.ceil(v - 0.5)
        )(at)
        return np.take(x, np.clip(picked, 0, size - 1).astype(int), axis)
    low = np.floor(at)
    shape = [1] * x.ndim
    shape[axis] = wanted
    if method == "linear":
        taps = [(0, 1 - (at - low)), (1, at - low)]
    else:
        a, t = float(attrs.cubic_alpha), at - low
        near = lambda d: ((a + 2) * d - (a + 3)) * d * d + 1  # noqa: E731
        far = lambda d: ((d - 5) * d + 8) * d * a - 4 * a  # noqa: E731
        taps = [(-1, far(t + 1)), (0, near(t)), (1, near(1 - t)), (2, far(2 - t))]
    parts = [
        np.take(x, np.clip(low + k, 0, size - 1).astype(int), axis)
        * weight.reshape(shape).astype(x.dtype)
        for k, weight in taps
    ]
    return sum(parts[1:], parts[0])


def _resize2d(_n, attrs, x, size):
    first = 1 if str(attrs.layout) == "NHWC" else 2
    return _interpolate(_interpolate(x, first, size[0], attrs), first + 1, size[1], attrs)


IMAGE_OPERATORS = {
    "relax.nn.conv1d": _relax_conv1d,
    "relax.nn.conv2d": _relax_conv2d,
    "relax.nn.conv1d_transpose": _relax_conv1d_transpose,
    "relax.nn.conv2d_transpose": _relax_conv2d_transpose,
    "relax.nn.max_pool2d": _pool2d(True),
    "relax.nn.avg_pool2d": _pool2d(False),
    "relax.nn.max_pool1d": _pool1d(True),
    "relax.nn.avg_pool1d": _pool1d(False),
    "relax.nn.adaptive_avg_pool1d": _adaptive_avg_pool(1),
    "relax.nn.adaptive_avg_pool2d": _adaptive_avg_pool(2),
    "relax.nn.pixel_shuffle": _pixel_shuffle,
    "relax.image.resize2d": _resize2d,
}
