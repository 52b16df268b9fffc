# SPDX-License-Identifier: Apache-2.0
"""ONNX layers (products, convolutions, norms, pooling) to Relax. See `onnx_ops` for what a converter is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from tvm import relax
from tvm.relax import op

from compiler.frontend.picking import join_patches
from compiler.frontend.support import Refused, constant, number
from passes.layers import is_const, shape_of

if TYPE_CHECKING:
    from compiler.frontend.onnx_convert import Converter


def _gemm(c: Converter, a: relax.Expr, b: relax.Expr, bias: relax.Expr | None = None) -> relax.Expr:
    alpha, beta = c.attr("alpha", 1.0), c.attr("beta", 1.0)
    a = c.emit(op.permute_dims(a)) if c.attr("transA", 0) else a
    b = c.emit(op.permute_dims(b)) if c.attr("transB", 0) else b
    product = c.emit(op.matmul(a, b))
    product = product if alpha == 1 else c.emit(op.multiply(product, number(alpha, product)))
    if bias is None or beta == 0:
        return product
    return op.add(product, bias if beta == 1 else op.multiply(bias, number(beta, product)))


def _padding(
    c: Converter, spatial: tuple, kernel: list, strides: list, dilations: list
) -> list[int]:
    """Zeros before each axis, then after each."""
    rank, mode = len(spatial), c.attr("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(c.attr("pads") or [0] * 2 * rank)
    if mode == "VALID":
        return [0] * 2 * rank
    before, after = [], []
    for size, k, s, d in zip(spatial, kernel, strides, dilations):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return before + after


def _geometry(c: Converter, x: relax.Expr, kernel: list[int]) -> tuple[list, list, list]:
    rank = len(kernel)
    strides, dilations = (
        list(c.attr("strides") or [1] * rank),
        list(c.attr("dilations") or [1] * rank),
    )
    return strides, dilations, _padding(c, shape_of(x)[2:], kernel, strides, dilations)


def _conv(
    c: Converter, x: relax.Expr, weight: relax.Expr, bias: relax.Expr | None = None
) -> relax.Expr:
    rank = len(shape_of(x)) - 2
    if rank not in (1, 2):
        raise Refused(f"a convolution with {rank} spatial dimensions; wanted 1 or 2")
    strides, dilations, padding = _geometry(c, x, list(shape_of(weight)[2:]))
    function = {1: op.nn.conv1d, 2: op.nn.conv2d}[rank]
    result = c.emit(
        function(
            x,
            weight,
            strides=strides,
            padding=padding,
            dilation=dilations,
            groups=c.attr("group", 1),
        )
    )
    return result if bias is None else op.add(result, _per_channel(bias, rank))


def _per_channel(bias: relax.Expr, rank: int) -> relax.Expr:
    shape = (1, shape_of(bias)[0], *[1] * rank)
    return (
        constant(bias.value.numpy().reshape(shape)) if is_const(bias) else op.reshape(bias, shape)
    )


def _conv_transpose(
    c: Converter, x: relax.Expr, weight: relax.Expr, bias: relax.Expr | None = None
) -> relax.Expr:
    rank = len(shape_of(x)) - 2
    strides, dilations, padding = _geometry(c, x, list(shape_of(weight)[2:]))
    if (
        rank not in (1, 2)
        or any(d != 1 for d in dilations)
        or c.attr("auto_pad", "NOTSET") != "NOTSET"
        or "output_shape" in c.attributes
    ):
        raise Refused(
            "a transposed convolution with dilation, automatic padding or more than 2 spatial dimensions"
        )
    function = {1: op.nn.conv1d_transpose, 2: op.nn.conv2d_transpose}[rank]
    extra = list(c.attr("output_padding") or [0] * rank)
    result = c.emit(
        function(
            x,
            weight,
            strides=strides,
            padding=padding,
            output_padding=extra,
            groups=c.attr("group", 1),
        )
    )
    return result if bias is None else op.add(result, _per_channel(bias, rank))


def _batch_norm(c: Converter, x, scale, bias, mean, variance) -> relax.Expr:
    if c.attr("training_mode", 0) or len([o for o in c.node.output if o]) > 1:
        raise Refused("training mode")
    result = c.emit(
        op.nn.batch_norm(
            x, scale, bias, mean, variance, axis=1, epsilon=c.attr("epsilon", 1e-5), training=False
        )
    )
    return relax.TupleGetItem(result, 0)


def _layer_norm(
    c: Converter, x: relax.Expr, scale: relax.Expr, bias: relax.Expr | None = None
) -> list:
    if any(c.node.output[1:]):
        raise Refused("the mean or the deviation is used")
    rank = len(shape_of(x))
    axes = list(range(c.attr("axis", -1) % rank, rank))
    extent = tuple(shape_of(x)[a] for a in axes)
    if shape_of(scale) != extent or (bias is not None and shape_of(bias) != extent):
        raise Refused("a scale or bias that broadcasts")
    bias = constant(np.zeros(extent, "float32")) if bias is None else bias
    return [
        op.nn.layer_norm(
            x, scale, bias, axes=[a - rank for a in axes], epsilon=c.attr("epsilon", 1e-5)
        )
    ]


def _instance_norm(c: Converter, x: relax.Expr, scale: relax.Expr, bias: relax.Expr) -> relax.Expr:
    channels, axes = shape_of(x)[1], list(range(2, len(shape_of(x))))
    return op.nn.group_norm(
        x,
        scale,
        bias,
        num_groups=channels,
        channel_axis=1,
        axes=axes,
        epsilon=c.attr("epsilon", 1e-5),
    )


def _group_norm(c: Converter, x: relax.Expr, scale: relax.Expr, bias: relax.Expr) -> relax.Expr:
    if shape_of(scale) != (shape_of(x)[1],):
        raise Refused("one scale per group")
    axes = list(range(2, len(shape_of(x))))
    return op.nn.group_norm(
        x,
        scale,
        bias,
        num_groups=c.attr("num_groups"),
        channel_axis=1,
        axes=axes,
        epsilon=c.attr("epsilon", 1e-5),
    )


def _max_pool(c: Converter, x: relax.Expr) -> list:
    if any(c.node.output[1:]) or len(shape_of(x)) not in (3, 4) or c.attr("storage_order", 0):
        raise Refused("indices, or an input that is not [N, C, L] or [N, C, H, W]")
    kernel = list(c.attr("kernel_shape"))
    strides, dilations, padding = _geometry(c, x, kernel)
    padding = _fitted(c, x, kernel, strides, dilations, padding)
    return [_pooled(c, op.nn.max_pool2d, x, kernel, strides, dilations, padding)]


def _average_pool(c: Converter, x: relax.Expr) -> relax.Expr:
    kernel = list(c.attr("kernel_shape"))
    strides, dilations, padding = _geometry(c, x, kernel)
    if len(shape_of(x)) not in (3, 4) or any(d != 1 for d in dilations):
        raise Refused("dilation, or an input that is not [N, C, L] or [N, C, H, W]")
    counted = bool(c.attr("count_include_pad", 0)) and any(padding)
    fitted = _fitted(c, x, kernel, strides, dilations, padding)
    if counted and fitted != padding:
        raise Refused("ceil_mode with counted padding")
    return _pooled(
        c, op.nn.avg_pool2d, x, kernel, strides, dilations, fitted, count_include_pad=counted
    )


def _pooled(
    c: Converter, pool: Callable, x, kernel: list, strides: list, dilations: list, padding: list, **more
) -> relax.Expr:  # fmt: skip
    """Pooling over the one or two axes behind the channels; rows are images of height 1."""
    row = len(kernel) == 1
    if row:
        x, kernel, strides, dilations = c.emit(op.expand_dims(x, 2)), [1, *kernel], [1, *strides], [1, *dilations]  # fmt: skip
        padding = [0, padding[0], 0, padding[1]]
    found = pool(x, kernel, strides=strides, padding=padding, dilation=dilations, ceil_mode=False, **more)  # fmt: skip
    return op.squeeze(c.emit(found), [2]) if row else found


def _fitted(
    c: Converter, x, kernel: list, strides: list, dilations: list, padding: list[int]
) -> list[int]:
    """Padding at the end that gives the inferred size, so that ceil_mode is not needed."""
    if not c.attr("ceil_mode", 0):
        return padding
    ends = []
    for size, out, k, s, d, before in zip(
        shape_of(x)[2:], c.shape()[2:], kernel, strides, dilations, padding
    ):
        end = (out - 1) * s + d * (k - 1) + 1 - size - before
        if (out - 1) * s >= size + before:
            raise Refused("a last window that lies in the padding")
        ends.append(max(end, 0))
    return [*padding[: len(kernel)], *ends]


def _global_pool(function: Callable) -> Callable:
    return lambda c, x: function(x, list(range(2, len(shape_of(x)))), keepdims=True)


def _col2im(c: Converter, x: relax.Expr, *_sizes: relax.Expr) -> relax.Expr:
    size, kernel = ([int(v) for v in c.array(i)] for i in (1, 2))
    if len(size) != 2:
        raise Refused(f"patches of {len(size)} spatial dimensions")
    placed = c.attr("strides") or [1, 1], c.attr("pads") or (), c.attr("dilations") or ()
    return join_patches(c, x, size, kernel, *placed)


CONVERTERS: dict[str, Callable] = {
    "Col2Im": _col2im,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool(op.mean),
    "GlobalMaxPool": _global_pool(op.max),
}
