# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.canonicalize_shapes import CanonicalizeShapes, merged_axes
from passes.layers import conv2d, dense
from passes.rewriting import bindings_of, constant

op = relax.op
RNG = np.random.default_rng(3)


def array(*shape):
    return RNG.standard_normal(shape).astype("float32")


W, B = array(5, 7), array(5)


@pytest.mark.parametrize(
    ("shape", "before", "after"),
    [
        ((2, 1, 3), lambda x: op.squeeze(x, [1]), lambda x: op.reshape(x, (2, 3))),
        ((2, 3), lambda x: op.expand_dims(x, [1, 3]), lambda x: op.reshape(x, (2, 1, 3, 1))),
        ((2, 3), lambda x: op.flatten(x), lambda x: op.reshape(x, (6,))),
        (
            (2, 3, 4),
            lambda x: op.reshape(op.reshape(x, (6, 4)), (4, 6)),
            lambda x: op.reshape(x, (4, 6)),
        ),
        (
            (2, 3, 4, 5),
            lambda x: op.permute_dims(op.permute_dims(x, [0, 2, 3, 1]), [1, 0, 3, 2]),
            lambda x: op.permute_dims(x, [2, 0, 1, 3]),
        ),
        (
            (1, 4, 1, 5),
            lambda x: op.permute_dims(x, [2, 1, 3, 0]),
            lambda x: op.reshape(x, (1, 4, 5, 1)),
        ),
        (
            (2, 8, 3, 5),
            lambda x: op.permute_dims(op.reshape(x, (2, 8, 15)), [0, 2, 1]),
            lambda x: op.reshape(op.permute_dims(x, [0, 2, 3, 1]), (2, 15, 8)),
        ),
        (
            (2, 15, 8),
            lambda x: op.reshape(op.permute_dims(x, [0, 2, 1]), (2, 8, 3, 5)),
            lambda x: op.permute_dims(op.reshape(x, (2, 3, 5, 8)), [0, 3, 1, 2]),
        ),
        (
            (2, 9, 8),
            lambda x: op.reshape(op.permute_dims(x, [0, 2, 1]), (2, 8, 1, 9)),
            lambda x: op.permute_dims(op.reshape(x, (2, 1, 9, 8)), [0, 3, 1, 2]),
        ),
    ],
    ids=[
        "squeeze",
        "expand",
        "flatten",
        "reshapes",
        "permutes",
        "unit axes",
        "merge",
        "split",
        "conv1d",
    ],
)
def test_rewrites(rewrites, shape, before, after):
    rewrites(CanonicalizeShapes(), [shape], lambda _b, x: before(x), lambda _b, x: after(x), 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: op.broadcast_to(x, (2, 3, 4, 5)),
        lambda x: op.reshape(x, (2, 3, 4, 5)),
        lambda x: op.permute_dims(op.permute_dims(x, [0, 3, 1, 2]), [0, 2, 3, 1]),
        lambda x: op.reshape(op.reshape(x, (2, 12, 5)), (2, 3, 4, 5)),
    ],
    ids=["broadcast", "reshape", "permutes", "reshapes"],
)
def test_what_changes_nothing_disappears(rewrites, change):
    rewrites(
        CanonicalizeShapes(),
        [(2, 3, 4, 5)],
        lambda _b, x: op.abs(change(x)),
        lambda _b, x: op.abs(x),
        0,
    )


def test_dense_layers_run_on_the_shape_that_came_in(rewrites):
    scale = array(1, 5)

    def before(_b, x):
        y = op.add(constant(B), dense(op.reshape(x, (6, 7)), constant(W), name="fc"))
        y = op.nn.gelu(op.multiply(y, constant(scale)))
        return op.add(op.reshape(y, (2, 3, 5)), op.reshape(op.abs(y), (2, 3, 5)))

    def after(b, x):
        y = op.add(constant(B), dense(x, constant(W), name="fc"))
        y = b.emit(op.nn.gelu(op.multiply(y, constant(scale.reshape(5)))))
        return op.add(y, op.abs(y))

    rewrites(CanonicalizeShapes(), [(2, 3, 7)], before, after)


def test_dense_layers_take_the_shape_that_is_wanted(rewrites):
    rewrites(
        CanonicalizeShapes(),
        [(2, 3, 7, 1)],
        lambda _b, x: op.reshape(
            op.add(dense(op.reshape(x, (6, 7)), constant(W), name="fc"), constant(B)), (2, 3, 5)
        ),
        lambda _b, x: op.add(dense(op.reshape(x, (2, 3, 7)), constant(W), name="fc"), constant(B)),
    )


def test_embedding_lookups_keep_the_shape_of_their_indices(rewrites):
    rewrites(
        CanonicalizeShapes(),
        [((2, 4), "int64")],
        lambda _b, x: op.reshape(op.take(constant(W), op.reshape(x, (8,)), axis=0), (2, 4, 7)),
        lambda _b, x: op.take(constant(W), x, axis=0),
        0,
    )


def test_norms_and_sums_of_flattened_tensors(rewrites):
    gamma, beta = constant(array(7)), constant(array(7))

    def before(_b, x, y):
        x, y = op.reshape(x, (6, 7)), op.reshape(y, (6, 7))
        z = op.nn.layer_norm(op.add(x, y), gamma, beta, axes=[-1], epsilon=1e-6)
        return op.reshape(op.nn.softmax(op.nn.rms_norm(z, gamma, axes=[1]), axis=1), (2, 3, 7))

    def after(_b, x, y):
        z = op.nn.layer_norm(op.add(x, y), gamma, beta, axes=[-1], epsilon=1e-6)
        return op.nn.softmax(op.nn.rms_norm(z, gamma, axes=[-1]), axis=-1)

    rewrites(CanonicalizeShapes(), [(2, 3, 7), (2, 3, 7)], before, after)


def test_batched_products_keep_batch_and_heads_apart(rewrites):
    rewrites(
        CanonicalizeShapes(),
        [(2, 3, 5, 7), (2, 3, 7, 4)],
        lambda _b, x, y: op.reshape(
            op.matmul(op.reshape(x, (6, 5, 7)), op.reshape(y, (6, 7, 4)), "float32"), (2, 3, 5, 4)
        ),
        lambda _b, x, y: op.matmul(x, y, "float32"),
    )


def test_products_of_differently_merged_operands_stay(declines):
    declines(
        CanonicalizeShapes(),
        [(2, 3, 5, 7), (3, 2, 7, 4)],
        lambda _b, x, y: op.matmul(op.reshape(x, (6, 5, 7)), op.reshape(y, (6, 7, 4))),
    )


@pytest.mark.parametrize(
    "body",
    [
        lambda x: op.permute_dims(op.reshape(x, (2, 7, 12)), [0, 2, 1]),  # regroups, does not merge
        lambda x: op.add(op.reshape(x, (6, 28)), constant(np.ones((6, 1), "float32"))),  # by row
        lambda x: op.nn.softmax(op.reshape(x, (6, 28)), axis=0),
        lambda x: op.mean(op.reshape(x, (2, 3, 28)), [1]),
        lambda x: op.permute_dims(x, [0, 2, 1, 3]),
    ],
    ids=["regroups", "rows", "other axis", "reduction", "one permute"],
)
def test_declines(declines, body):
    declines(CanonicalizeShapes(), [(2, 3, 4, 7)], lambda _b, x: body(x))


def test_a_permute_read_twice_is_not_doubled(build, same_values):
    def body(b, x):
        y = b.emit(op.permute_dims(x, [0, 2, 1]))
        return op.concat([op.flatten(op.reshape(y, (2, 8, 3, 5))), op.flatten(op.abs(y))], 0)

    found = same_values(CanonicalizeShapes(), build([(2, 15, 8)], body), 0)
    names = [b.value.op.name for b in bindings_of(found["main"])]
    assert names.count("relax.permute_dims") == 1


def test_the_name_of_a_layer_survives(build, same_values):
    w = constant(array(4, 3, 1, 1))
    found = same_values(
        CanonicalizeShapes(),
        build(
            [(2, 3, 5, 5)], lambda _b, x: op.squeeze(op.expand_dims(conv2d(x, w, name="stem"), [0]))
        ),
    )
    (binding,) = bindings_of(found["main"])
    assert binding.value.attrs["name"] == "stem"


@pytest.mark.parametrize(
    ("fine", "coarse", "groups"),
    [
        ((2, 3, 4), (2, 12), [[0], [1, 2]]),
        ((2, 3, 1, 4), (2, 3, 4), [[0], [1], [2, 3]]),
        ((2, 3, 1, 1), (2, 3), [[0], [1, 2, 3]]),
        ((1, 1), (1,), [[0, 1]]),
        ((2, 3, 4), (6, 4), [[0, 1], [2]]),
        ((2, 3, 4), (4, 6), None),
        ((2, 3), (2, 1, 3), None),
        ((4, 3), (2, 6), None),
    ],
)
def test_merged_axes(fine, coarse, groups):
    assert merged_axes(fine, coarse) == groups
