# SPDX-License-Identifier: Apache-2.0
"""What the sparse operators mean, in numpy: a sum over the stored blocks, one at a time. Slow, any float dtype."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from passes.max_pooling import largest_reference
from passes.sparse.storage import Packed, pack, positions, unpack


def sparse_dense(attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y[..., o] = sum over the stored weights of w [O, K] at attrs["grain"] of w[o, k] * x[..., k]."""
    return multiply_packed(x, pack(w, attrs["grain"]))


def sparse_conv2d(attrs: dict, x: np.ndarray, w: np.ndarray, *beside: np.ndarray) -> np.ndarray:
    """The convolution of x (attrs["layout"]) with w [O, C/groups, R, S], over its stored weights at attrs["grain"]; of x and
    `beside`, joined along their channels, where there is a second input."""
    x = np.concatenate([x, *beside], axis=3 if attrs["layout"] == "NHWC" else 1)
    return convolve_packed(attrs, x, pack(w, attrs["grain"]))


def pooled_conv2d(attrs: dict, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The maxima over windows of `sparse_conv2d`."""
    return largest_reference(attrs, sparse_conv2d(attrs, x, w))


def transpose(attrs: dict, x: np.ndarray) -> np.ndarray:
    """`kerf.transpose`: the columns of a matrix, its last row repeated where there are more."""
    rows = x.reshape(-1, x.shape[-1])
    last = np.minimum(np.arange(int(attrs["columns"])), len(rows) - 1)
    return rows[last, : int(attrs["rows"])].T[None]


def mean_of_planes(attrs: dict, x: np.ndarray) -> np.ndarray:
    """The mean of the first attrs["pixels"] elements of each plane of x [N, C, >= pixels]: [N, C, 1]."""
    return x[..., : attrs["pixels"]].mean(axis=-1, keepdims=True)


def multiply_packed(x: np.ndarray, packed: Packed) -> np.ndarray:
    """x [..., K] times a packed [O, K], transposed: [..., O]."""
    y = np.zeros((*x.shape[:-1], packed.shape[0]), dtype=x.dtype)
    for o, i, _r, _s, block in stored_blocks(packed):
        inputs, outputs = x[..., i : i + block.shape[1]], slice(o, o + block.shape[0])
        part = block[: y.shape[-1] - o, : inputs.shape[-1], 0, 0].astype(x.dtype)
        y[..., outputs] += inputs @ part.T
    return y


def convolve_packed(attrs: dict, x: np.ndarray, packed: Packed) -> np.ndarray:
    """The convolution with a packed [O, C/groups, R, S]. A block of output channels must lie in one group."""
    channels_last = attrs["layout"] == "NHWC"
    if not channels_last:
        x = x.transpose(0, 2, 3, 1)
    outputs, per_group, height, width = packed.shape
    top, left, bottom, right = attrs["padding"]
    (sh, sw), (dh, dw) = attrs["strides"], attrs["dilation"]
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    out_h = (padded.shape[1] - dh * (height - 1) - 1) // sh + 1
    out_w = (padded.shape[2] - dw * (width - 1) - 1) // sw + 1
    y = np.zeros((x.shape[0], out_h, out_w, outputs), dtype=x.dtype)
    for o, i, r, s, block in stored_blocks(packed):
        rows, columns = min(block.shape[0], outputs - o), min(block.shape[1], per_group - i)
        # A block may span groups (a whole axis of output channels): each group reads its own input channels.
        of_group = outputs // attrs["groups"]
        for first in range(o, o + rows, 1 if attrs["groups"] > 1 else rows):
            count = 1 if attrs["groups"] > 1 else rows
            c = first // of_group * per_group + i
            for down in range(min(block.shape[2], height - r)):
                for over in range(min(block.shape[3], width - s)):
                    part = block[first - o : first - o + count, :columns, down, over].astype(
                        x.dtype
                    )
                    window = padded[
                        :, (r + down) * dh :: sh, (s + over) * dw :: sw, c : c + columns
                    ]
                    y[..., first : first + count] += window[:, :out_h, :out_w] @ part.T
    return y if channels_last else y.transpose(0, 3, 1, 2)


def stored_blocks(packed: Packed) -> Iterator[tuple[int, int, int, int, np.ndarray]]:
    """(output channel, input channel, kernel row, kernel column of its first weight, block [bO, bI, bR, bS])."""
    if packed.grain.of:  # its places are bits: the weights are its blocks
        packed = pack(unpack(packed), "element")
    block = packed.grain.block_shape(packed.shape)
    for position, values in zip(positions(packed), packed.values):
        at = np.unravel_index(position, packed.grain.grid(packed.shape))
        o, i, r, s = (int(a) * b for a, b in zip(at, block))
        yield o, i, r, s, values
