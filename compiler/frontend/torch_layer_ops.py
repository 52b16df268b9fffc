# SPDX-License-Identifier: Apache-2.0
"""ATen layers (products, convolutions, norms, attention, pooling) to Relax. See `torch_ops` for what a converter is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op

from compiler.frontend.picking import cut_patches, join_patches
from compiler.frontend.support import Refused, constant, is_bool
from passes.layers import shape_of

if TYPE_CHECKING:
    from compiler.frontend.torch_convert import Converter


def _linear(c: Converter, x: relax.Expr, weight: relax.Expr, bias: relax.Expr | None) -> relax.Expr:
    result = c.emit(op.matmul(x, op.permute_dims(weight)))
    return result if bias is None else op.add(result, bias)


def _addmm(
    c: Converter, bias: Any, a: relax.Expr, b: relax.Expr, beta: Any, alpha: Any
) -> relax.Expr:
    if beta != 1 or alpha != 1:
        raise Refused("beta or alpha other than 1")
    return op.add(c.emit(op.matmul(a, b)), bias)


def _baddbmm(
    c: Converter, bias: Any, a: relax.Expr, b: relax.Expr, beta: Any, alpha: Any
) -> relax.Expr:
    product = c.emit(op.matmul(a, b))
    scaled = product if alpha == 1 else op.multiply(product, c.cast(alpha, c.dtype))
    return (
        scaled
        if beta == 0
        else op.add(scaled, bias if beta == 1 else op.multiply(bias, c.cast(beta, c.dtype)))
    )


def _convolution(
    c, x, weight, bias, stride, padding, dilation, transposed=False, output_padding=(), groups=1
) -> relax.Expr:
    rank = len(shape_of(x)) - 2
    if rank not in (1, 2) or len(shape_of(weight)) != rank + 2:
        raise Refused(f"a convolution with {rank} spatial dimensions; wanted 1 or 2, batched")
    if isinstance(padding, str):
        raise Refused("padding by name")
    stride, padding, dilation = (_spread(v, rank) for v in (stride, padding, dilation))
    geometry = {
        "strides": stride,
        "padding": [*padding, *padding],
        "dilation": dilation,
        "groups": groups,
    }
    if transposed:
        functions = {1: op.nn.conv1d_transpose, 2: op.nn.conv2d_transpose}
        geometry["output_padding"] = _spread(output_padding, rank)
        if any(d != 1 for d in dilation):
            raise Refused("a transposed convolution with dilation")
    else:
        functions = {1: op.nn.conv1d, 2: op.nn.conv2d}
    result = c.emit(functions[rank](x, weight, **geometry))
    if bias is None:
        return result
    shape = (1, shape_of(bias)[0], *[1] * rank)
    if isinstance(bias, tvm.ir.expr.GenericConst):
        return op.add(result, constant(bias.value.numpy().reshape(shape)))
    return op.add(result, op.reshape(bias, shape))


def _spread(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in (values * rank if len(values) == 1 else values)]


def _conv(c, x, weight, bias, stride, padding, dilation, groups) -> relax.Expr:
    return _convolution(c, x, weight, bias, stride, padding, dilation, False, (), groups)


def _ones_and_zeros(c: Converter, weight: Any, bias: Any, size: int | tuple) -> tuple:
    ones, zeros = np.ones(size, "float32"), np.zeros(size, "float32")
    return constant(ones) if weight is None else weight, constant(zeros) if bias is None else bias


def _batch_norm_inference(c, x, weight, bias, mean, variance, _momentum, epsilon) -> tuple:
    weight, bias = _ones_and_zeros(c, weight, bias, shape_of(x)[1])
    result = c.emit(
        op.nn.batch_norm(x, weight, bias, mean, variance, axis=1, epsilon=epsilon, training=False)
    )
    return c.emit(relax.TupleGetItem(result, 0)), None, None


def _layer_norm(c, x, shape, weight, bias, epsilon, _cudnn=True) -> relax.Expr:
    weight, bias = _ones_and_zeros(c, weight, bias, tuple(shape))
    return op.nn.layer_norm(
        x, weight, bias, axes=[-i for i in range(len(shape), 0, -1)], epsilon=epsilon
    )


def _native_layer_norm(c, x, shape, weight, bias, epsilon) -> tuple:
    return c.emit(_layer_norm(c, x, shape, weight, bias, epsilon)), None, None


def _group_norm(c, x, groups, weight, bias, epsilon, _cudnn=True) -> relax.Expr:
    weight, bias = _ones_and_zeros(c, weight, bias, shape_of(x)[1])
    axes = list(range(2, len(shape_of(x))))
    return op.nn.group_norm(
        x, weight, bias, num_groups=groups, channel_axis=1, axes=axes, epsilon=epsilon
    )


def _native_group_norm(c, x, weight, bias, _n, _c, _hw, groups, epsilon) -> tuple:
    return c.emit(_group_norm(c, x, groups, weight, bias, epsilon)), None, None


def _rms_norm(c, x, shape, weight, epsilon) -> relax.Expr:
    axes = [-i for i in range(len(shape), 0, -1)]
    epsilon = float(np.finfo(np.float32).eps) if epsilon is None else epsilon
    scale = op.rsqrt(
        op.add(op.mean(op.multiply(x, x), axes, keepdims=True), c.cast(epsilon, c.dtype))
    )
    normal = op.multiply(x, scale)
    return normal if weight is None else op.multiply(normal, weight)


def _attention(c, query, key, value, mask, dropout, causal, scale, gqa) -> relax.Expr:
    rank = len(shape_of(query))
    if rank not in (3, 4) or gqa or dropout:
        raise Refused("dropout, grouped queries or an input that is not [B, S, D] or [B, H, S, D]")
    if any(
        len(shape_of(t)) != rank or shape_of(t)[:-2] != shape_of(query)[:-2] for t in (key, value)
    ):
        raise Refused("batch or heads that broadcast")
    if mask is not None and causal:
        raise Refused("a mask together with is_causal")

    def to_bshd(x: relax.Expr) -> relax.Expr:
        return c.emit(op.permute_dims(x if rank == 4 else op.expand_dims(x, 1), [0, 2, 1, 3]))

    bias = None
    if mask is not None:
        bias, causal = _bias(c, mask, (shape_of(query)[-2], shape_of(key)[-2]))
    if bias is not None:
        if rank == 3 and len(shape_of(bias)) == 3:
            bias = c.emit(op.expand_dims(bias, 1))
        bias = c.emit(op.reshape(bias, (*[1] * (4 - len(shape_of(bias))), *shape_of(bias))))
    scale = 1 / math.sqrt(shape_of(query)[-1]) if scale is None else scale
    result = op.nn.attention(
        to_bshd(query),
        to_bshd(key),
        to_bshd(value),
        bias,
        scale=tvm.tirx.FloatImm("float32", scale),
        causal_mask="TopLeft" if causal else None,
    )
    result = op.permute_dims(c.emit(result), [0, 2, 1, 3])
    return result if rank == 4 else op.squeeze(c.emit(result), 1)


def _bias(
    c: Converter, mask: relax.Expr, extent: tuple[int, int]
) -> tuple[relax.Expr | None, bool]:
    """The additive mask, and whether it is the causal one; no mask for one that hides nothing."""
    bias = _additive_mask(c, mask)
    if not isinstance(bias, tvm.ir.expr.GenericConst):
        return bias, False
    array = bias.value.numpy()
    if not array.any():
        return None, False
    causal = np.tril(np.ones(extent, bool))
    hidden = array <= np.finfo(np.float32).min / 2
    is_causal = (
        array.shape[-2:] == extent
        and extent[0] == extent[1]
        and (hidden == ~causal).all()
        and not array[~hidden].any()
    )
    return (None, True) if is_causal else (bias, False)


def _additive_mask(c: Converter, mask: relax.Expr) -> relax.Expr:
    if not is_bool(mask):
        return c.cast(mask, c.dtype)
    if isinstance(mask, tvm.ir.expr.GenericConst):
        kept = mask.value.numpy()
        if not kept.any(axis=-1).all():
            raise Refused("a constant mask that hides every key from some query")
        return constant(np.where(kept, 0, -np.inf).astype("float32"))
    return c.emit(op.where(mask, c.cast(0.0, "float32"), c.cast(float("-inf"), "float32")))


def _embedding(c, weight, indices, *_unused) -> relax.Expr:
    # "clip" keeps an index that is out of range inside the table; the default reads whatever lies behind it.
    return op.take(weight, indices, axis=0, mode="clip")


def _max_pool(c, x, kernel, stride, padding, dilation, ceil_mode) -> tuple:
    rank = len(kernel) if len(kernel) > 1 else 2
    if rank != 2 or len(shape_of(x)) != 4:
        raise Refused("an input that is not [N, C, H, W]")
    kernel = _spread(kernel, 2)
    padding = _pool_padding(
        x,
        kernel,
        _spread(stride or kernel, 2),
        _spread(padding, 2),
        _spread(dilation, 2),
        ceil_mode,
    )
    pooled = op.nn.max_pool2d(
        x,
        kernel,
        strides=_spread(stride or kernel, 2),
        padding=padding[0],
        dilation=_spread(dilation, 2),
        ceil_mode=False,
    )
    return c.emit(pooled), None


def _pool_padding(x, kernel, stride, padding, dilation, ceil_mode: bool) -> tuple[list[int], bool]:
    """(top, left, bottom, right) that make torch's output size without ceil_mode, and whether that is torch's own padding.

    torch drops a last window that would start beyond input and left padding; Relax's ceil_mode keeps it.
    """
    if not ceil_mode:
        return [*padding, *padding], True
    ends = []
    for size, k, s, p, d in zip(shape_of(x)[2:], kernel, stride, padding, dilation):
        span = size + 2 * p - d * (k - 1) - 1
        count = -(-span // s) + 1
        if (count - 1) * s >= size + p:
            count -= 1
        ends.append(max((count - 1) * s + d * (k - 1) + 1 - size - p, 0))
    return [*padding, *ends], ends == list(padding)


def _avg_pool(c, x, kernel, stride, padding, ceil_mode, count_include_pad, divisor) -> relax.Expr:
    if len(shape_of(x)) != 4 or divisor is not None:
        raise Refused("divisor_override, or an input that is not [N, C, H, W]")
    kernel, padding = _spread(kernel, 2), _spread(padding, 2)
    stride = _spread(stride or kernel, 2)
    ends, is_own = _pool_padding(x, kernel, stride, padding, [1, 1], ceil_mode)
    if not is_own and count_include_pad and any(padding):
        raise Refused("ceil_mode with counted padding")
    return op.nn.avg_pool2d(
        x,
        kernel,
        strides=stride,
        padding=ends,
        ceil_mode=False,
        count_include_pad=bool(count_include_pad and is_own),
    )


def _adaptive_avg_pool(c, x, size) -> relax.Expr:
    if len(shape_of(x)) != 4:
        raise Refused("an input that is not [N, C, H, W]")
    if list(size) == [1, 1]:
        return op.mean(x, [2, 3], keepdims=True)
    return op.nn.adaptive_avg_pool2d(x, output_size=list(size))


def _adaptive_max_pool(c, x, size) -> tuple:
    if len(shape_of(x)) != 4 or any(have % wanted for have, wanted in zip(shape_of(x)[2:], size)):
        raise Refused("an input that is not [N, C, H, W], or windows of different sizes")
    window = [have // wanted for have, wanted in zip(shape_of(x)[2:], size)]
    if list(size) == [1, 1]:
        return c.emit(op.max(x, [2, 3], keepdims=True)), None
    return c.emit(op.nn.max_pool2d(x, window, strides=window)), None


def _instance_norm(
    c, x, weight, bias, mean, _variance, use_input_stats, _momentum, epsilon, _cudnn
) -> relax.Expr:
    if not use_input_stats or mean is not None:
        raise Refused("running statistics")
    return _group_norm(c, x, shape_of(x)[1], weight, bias, epsilon)


def _col2im(c, x, size, kernel, dilation, padding, stride) -> relax.Expr:
    if len(shape_of(x)) != 3:
        raise Refused("patches without a batch")
    return join_patches(c, x, size, kernel, stride, padding, dilation)


def _im2col(c, x, kernel, dilation, padding, stride) -> relax.Expr:
    if len(shape_of(x)) != 4:
        raise Refused("patches without a batch")
    return cut_patches(c, x, kernel, stride, padding, dilation)


CONVERTERS: dict[str, Callable] = {
    "linear.default": _linear, "addmm.default": _addmm, "baddbmm.default": _baddbmm,
    "matmul.default": lambda c, a, b: op.matmul(a, b), "mm.default": lambda c, a, b: op.matmul(a, b), "bmm.default": lambda c, a, b: op.matmul(a, b),
    "convolution.default": _convolution, "conv1d.default": _conv, "conv2d.default": _conv,
    "_native_batch_norm_legit_no_training.default": _batch_norm_inference,
    "layer_norm.default": _layer_norm, "native_layer_norm.default": _native_layer_norm, "rms_norm.default": _rms_norm,
    "group_norm.default": _group_norm, "instance_norm.default": _instance_norm, "native_group_norm.default": _native_group_norm,
    "scaled_dot_product_attention.default": _attention, "embedding.default": _embedding,
    "col2im.default": _col2im, "im2col.default": _im2col, "max_pool2d_with_indices.default": _max_pool, "avg_pool2d.default": _avg_pool,
    "adaptive_max_pool2d.default": _adaptive_max_pool, "adaptive_avg_pool2d.default": _adaptive_avg_pool, "_adaptive_avg_pool2d.default": _adaptive_avg_pool,
}  # fmt: skip
