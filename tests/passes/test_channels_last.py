# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.channels_last import ChannelsLast, layout_changes
from passes.layers import CONV2D, attrs_of, conv2d, dense, is_call, shape_of
from passes.rewriting import bindings_of, constant

op = relax.op
RNG = np.random.default_rng(9)
X = (2, 4, 7, 5)
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def array(*shape):
    return RNG.standard_normal(shape).astype("float32")


W = array(6, 4, 3, 3)
SQUARE = array(4, 4, 1, 1)


def conv(x, w=W, layout="NCHW", name="stem", **options):
    return conv2d(x, constant(w), name=name, layout=layout, **options)


def test_a_convolution_with_its_bias_and_activation(rewrites):
    bias = array(6, 1, 1)

    def before(_b, x):
        return op.nn.relu(op.add(conv(x, strides=(2, 1), padding=(1, 0, 2, 1)), constant(bias)))

    def after(_b, x):
        y = conv(op.permute_dims(x, TO_LAST), layout="NHWC", strides=(2, 1), padding=(1, 0, 2, 1))
        y = op.nn.relu(op.add(y, constant(bias.reshape(1, 1, 1, 6))))
        return op.permute_dims(y, TO_FIRST)

    found = rewrites(ChannelsLast(), [X], before, after)
    (call,) = [b.value for b in bindings_of(found["main"]) if is_call(b.value, CONV2D)]
    assert attrs_of(call)["name"] == "stem"
    assert len(layout_changes(found)) == 2


def test_one_channel_and_one_pixel_need_no_permute(rewrites):
    w = array(6, 1, 7, 5)
    rewrites(
        ChannelsLast(), [(2, 1, 7, 5)],
        lambda _b, x: op.reshape(conv(x, w), (2, 6)),
        lambda _b, x: op.reshape(conv(op.reshape(x, (2, 7, 5, 1)), w, "NHWC"), (2, 6)),
    )  # fmt: skip


def residual_block(b, x):
    """Squeeze and excitation, pools, concatenation, a split and a classifier."""
    y = b.emit(op.nn.relu(conv(x, SQUARE)))
    gate = op.sigmoid(op.add(conv(op.mean(y, [2, 3], True), SQUARE), constant(array(4, 1, 1))))
    y = op.add(op.multiply(y, gate), op.nn.max_pool2d(x, (3, 3), (1, 1), (1, 1, 1, 1)))
    pooled = op.nn.avg_pool2d(x, (3, 3), (1, 1), (1, 1, 0, 0))
    both = op.concat([y, op.nn.pad(pooled, [0, 0, 0, 0, 0, 1, 1, 0])], 1)
    halves = b.emit(op.split(both, 2, 1))
    y = op.minimum(op.add(halves[0], halves[1]), relax.const(6.0))
    y = op.strided_slice(op.nn.softmax(y, axis=1), [1, 2], [1, 0], [4, 7], [1, 2])
    return dense(op.mean(y, [2, 3]), constant(array(2, 3)), name="fc")


def test_a_network_changes_layout_once(build, same_values):
    found = same_values(ChannelsLast(), build([(2, 4, 7, 5)], residual_block))
    assert len(layout_changes(found)) == 1
    assert all(
        attrs_of(b.value)["layout"] == "NHWC"
        for b in bindings_of(found["main"])
        if is_call(b.value, CONV2D)
    )


@pytest.mark.parametrize(
    "body",
    [
        lambda y: op.mean(y, [1], True),
        lambda y: op.max(y, [-3, 3], True),
        lambda y: op.sum(y, [1]),
        lambda y: op.sum(y, [3]),
        lambda y: op.mean(y, [2, 3]),
        lambda y: op.nn.prelu(y, constant(array(6)), 1),
        lambda y: op.nn.group_norm(y, constant(array(6)), constant(array(6)), 3, 1, [2, 3]),
        lambda y: op.nn.instance_norm(y, constant(array(6)), constant(array(6)), 1, [2, 3]),
        lambda y: op.image.resize2d(y, (9, 8), layout="NCHW", method="linear"),
        lambda y: op.nn.adaptive_avg_pool2d(y, (3, 2)),
        lambda y: op.nn.log_softmax(y, 2),
        lambda y: op.nn.leakyrelu(y, 0.1),
        lambda y: op.where(op.greater(y, constant(array(6, 1, 1))), y, constant(array(5, 3))),
        lambda y: op.power(y, constant(np.full((1, 1, 1, 1), 2, "float32"))),
        lambda y: op.permute_dims(y, [0, 2, 3, 1]),
        lambda y: op.permute_dims(y, [3, 1, 0, 2]),
        lambda y: op.reshape(y, (2, 90)),
        lambda y: op.cumsum(y, 1),
        lambda y: op.broadcast_to(op.mean(y, [2, 3], True), (2, 6, 4, 3)),
        lambda y: op.concat([y, constant(array(2, 1, 5, 3))], 1),
        lambda y: op.matmul(y, constant(array(3, 2))),
    ],
)  # fmt: skip
def test_operators_after_a_convolution(build, same_values, body):
    found = same_values(ChannelsLast(), build([X], lambda _b, x: body(conv(x))))
    convolutions = [b.value for b in bindings_of(found["main"]) if is_call(b.value, CONV2D)]
    assert [attrs_of(c)["layout"] for c in convolutions] == ["NHWC"]


def test_a_permute_to_channels_last_and_back_is_free(build, same_values):
    """As ConvNeXt does around its layer norm."""

    def body(b, x):
        y = b.emit(conv(x, SQUARE))
        z = op.nn.layer_norm(
            op.permute_dims(y, TO_LAST), constant(array(4)), constant(array(4)), [-1]
        )
        return op.mean(op.add(y, op.permute_dims(z, TO_FIRST)), [2, 3])

    found = same_values(ChannelsLast(), build([X], body))
    assert layout_changes(found) == ["x0_nhwc"]


def test_an_operator_that_needs_nchw_gets_it_and_is_reported(build, same_values):
    found = same_values(
        ChannelsLast(), build([X], lambda _b, x: conv(op.cumsum(conv(x, SQUARE), 3), SQUARE))
    )
    assert len(layout_changes(found)) == 4


def test_names_of_variables_stay(build):
    def body(b, x):
        y = b.emit(conv(x, SQUARE), name_hint="stem")
        return op.mean(b.emit(op.nn.relu(y), name_hint="activation"), [2, 3])

    found = ChannelsLast()(build([X], body))
    assert [b.var.name for b in bindings_of(found["main"])][:3] == ["x0_nhwc", "stem", "activation"]


def test_tuples_of_images_are_given_back_in_nchw(build, same_values):
    found = same_values(
        ChannelsLast(), build([X], lambda b, x: b.emit(op.split(conv(x, SQUARE), 2, 1)))
    )
    assert [shape_of(p) for p in found["main"].params] == [X]


def test_declines_graphs_without_convolutions(declines):
    declines(ChannelsLast(), [X], lambda _b, x: op.nn.relu(x))


def test_other_convolution_like_operators_are_moved_too(build, same_values):
    """Any operator of ours with a `layout` is one, whatever family it belongs to."""
    from passes.layers import infer_conv2d, operator_call, register_operator

    name = "kerf.test_channels_last_conv2d"
    register_operator(name, infer_conv2d)

    def body(_b, x):
        attrs = {"name": "l", "strides": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1]}
        return operator_call(name, [x, constant(SQUARE)], **attrs, groups=1, layout="NCHW", extra=3)

    found = ChannelsLast()(build([X], body))
    (call,) = [b.value for b in bindings_of(found["main"]) if is_call(b.value, name)]
    assert attrs_of(call)["layout"] == "NHWC" and attrs_of(call)["extra"] == 3


def test_one_dimensional_convolutions_change_layout_once(build, same_values):
    """Convolution, batch norm, activation, pool over sequences, as images of height 1."""
    import tvm

    from passes.canonicalize_pooling import CanonicalizePooling
    from passes.canonicalize_shapes import CanonicalizeShapes
    from passes.fold_batch_norm import FoldBatchNorm

    def conv1d(b, x, w, name):
        n, c, length = shape_of(x)
        y = b.emit(conv2d(op.reshape(x, (n, c, 1, length)), constant(w), name=name))
        return b.emit(op.reshape(y, (n, w.shape[0], shape_of(y)[3])))

    def body(b, x):
        y = op.add(conv1d(b, x, array(6, 4, 1, 3), "first"), constant(array(1, 6, 1)))
        parameters = [constant(array(6)) for _ in range(3)]
        positive = constant(np.abs(array(6)) + np.float32(0.1))
        y = b.emit(op.nn.batch_norm(y, *parameters, positive, axis=1, training=False))[0]
        y = b.emit(op.nn.max_pool1d(op.nn.relu(y), 2, 2))
        y = conv1d(b, y, array(5, 6, 1, 2), "second")
        return op.squeeze(op.nn.adaptive_avg_pool1d(y, 1), [2])

    passes = [CanonicalizePooling(), CanonicalizeShapes(), FoldBatchNorm(), CanonicalizeShapes()]
    both = tvm.transform.Sequential([*passes, ChannelsLast()])
    found = same_values(both, build([(2, 4, 12)], body), 1e-6)
    assert len(layout_changes(found)) == 1
    operators = [b.value.op.name for b in bindings_of(found["main"])]
    assert "relax.multiply" not in operators and "relax.nn.batch_norm" not in operators


def test_tensors_of_lower_rank_keep_their_own_form(build, same_values):
    """A [C, H, W] tensor that broadcasts against an image is still split along its own axes."""

    def body(b, x, y):
        z = op.add(conv(x, SQUARE), y)
        halves = b.emit(op.split(y, 2, 0))
        return op.add(op.mean(z, [0, 1, 2, 3]), op.sum(op.multiply(halves[0], halves[1])))

    same_values(ChannelsLast(), build([X, (4, 7, 5)], body))


def test_a_number_computed_at_run_time_scales_an_image(build, same_values):
    def body(b, x):
        largest = b.emit(op.max(x))
        y = b.emit(op.multiply(b.emit(conv(x)), largest))
        return op.add(y, b.emit(op.divide(largest, constant(np.float32(3)))))

    same_values(ChannelsLast(), build([X], body))
