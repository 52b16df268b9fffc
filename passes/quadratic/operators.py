# SPDX-License-Identifier: Apache-2.0
"""The quadratic operators: several linear layers of one x, combined.

`kerf.quadratic_conv2d(x, w..., shifts)`   attributes of `kerf.conv2d`, `form`, `layers`, `flops`
`kerf.quadratic_dense(x, w..., shifts)`    attributes of `kerf.dense`, `form`, `layers`, `flops`

    (w_r x + shifts[0]) * (w_g x + shifts[1]) + w_b x^2 + w_l x

`form` names the branches there are, one weight for each in that order: r and g (together), b, l. `shifts` float32 [2, O]
is there where r and g are. A constant, as any layer's bias, is a `relax.add` after the operator.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from tvm import relax

from passes.layers import (
    CONV2D,
    DENSE,
    attrs_of,
    const_array,
    infer_conv2d,
    infer_dense,
    multiply_accumulates,
    operator_call,
    register_operator,
)
from passes.rewriting import constant

QUADRATIC_CONV2D = "kerf.quadratic_conv2d"
QUADRATIC_DENSE = "kerf.quadratic_dense"
FORMS = ("rgb", "rgl", "rg", "b", "bl")
GEOMETRY = ("strides", "padding", "dilation", "groups", "layout", "winograd")


@functools.cache
def register() -> None:
    """Register the quadratic operators; idempotent."""
    register_operator(QUADRATIC_CONV2D, infer_conv2d)
    register_operator(QUADRATIC_DENSE, infer_dense)


def is_quadratic(call) -> bool:
    """Whether a call is of a quadratic operator."""
    name = getattr(getattr(call, "op", None), "name", "")
    return isinstance(call, relax.Call) and name in (QUADRATIC_CONV2D, QUADRATIC_DENSE)


def weights_of(call: relax.Call) -> dict[str, np.ndarray]:
    """The weight of each branch of a quadratic call."""
    form = attrs_of(call)["form"]
    return {branch: const_array(w) for branch, w in zip(form, list(call.args)[1:])}


def shifts_of(call: relax.Call) -> np.ndarray | None:
    """float32 [2, O], or None where nothing is multiplied."""
    has = "r" in attrs_of(call)["form"]
    return const_array(call.args[-1]) if has else None


def quadratic_call(
    like: relax.Call,
    x: relax.Expr,
    weights: Mapping[str, np.ndarray],
    shifts: np.ndarray | None,
    layers: Sequence[str],
) -> relax.Call:
    """A quadratic operator with the geometry of the layer or quadratic call `like`.

    `weights` by branch, in any order; `layers` the names of the layers it stands for, the first of them its own.
    """
    register()
    form = "".join(sorted(weights, key="rgbl".index))
    if form not in FORMS:
        raise ValueError(f"no quadratic operator of the form {form}")
    attrs = attrs_of(like)
    is_conv = like.op.name in (CONV2D, QUADRATIC_CONV2D)
    macs = multiply_accumulates(like)
    args = [x, *(constant(weights[b].astype("float32")) for b in form)]
    if shifts is not None:
        args.append(constant(shifts.astype("float32")))
    return operator_call(
        QUADRATIC_CONV2D if is_conv else QUADRATIC_DENSE, args, name=layers[0], layers=list(dict.fromkeys(layers)),
        form=form, flops=2 * macs * len(form), **{k: attrs[k] for k in GEOMETRY if k in attrs},
    )  # fmt: skip


def plain_layer(like: relax.Call, x: relax.Expr, weight: np.ndarray, name: str) -> relax.Call:
    """The dense layer with a quadratic operator's geometry."""
    attrs = attrs_of(like)
    operator = CONV2D if like.op.name == QUADRATIC_CONV2D else DENSE
    geometry = {k: attrs[k] for k in GEOMETRY if k in attrs}
    return operator_call(operator, [x, constant(weight.astype("float32"))], name=name, **geometry)
