# SPDX-License-Identifier: Apache-2.0
"""Dead filters leave with the channels they feed, through everything that treats channels alone, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes import layers
from passes.layers import attrs_of, const_array, is_call, shape_of
from passes.remove_dead_filters import RemoveDeadFilters, compact

X = (2, 3, 8, 8)


class Net:
    """Makes layers with seeded weights; `dead` filters of each are zero."""

    def __init__(self, rng):
        self.rng, self.count = rng, 0

    def weight(self, shape, dead=()):
        weight = self.rng.standard_normal(shape).astype("float32")
        weight[list(dead)] = 0
        return weight

    def conv(
        self, bb, x, outputs, kernel=3, *, dead=(), groups=1, padding=None, weight=None, name=""
    ):
        self.count += 1
        inputs = shape_of(x)[1] // groups
        weight = self.weight((outputs, inputs, kernel, kernel), dead) if weight is None else weight
        pad = kernel // 2 if padding is None else padding
        return bb.emit(
            layers.conv2d(x, relax.const(weight), name=name or f"conv{self.count}", padding=(pad,) * 4, groups=groups)
        )  # fmt: skip

    def dense(self, bb, x, outputs, dead=()):
        self.count += 1
        weight = self.weight((outputs, shape_of(x)[-1]), dead)
        return bb.emit(layers.dense(x, relax.const(weight), name=f"dense{self.count}"))

    def bias(self, bb, x, zero=()):
        values = self.rng.standard_normal(shape_of(x)[1]).astype("float32")
        values[list(zero)] = 0
        return bb.emit(relax.op.add(x, relax.const(values.reshape(1, -1, 1, 1))))


@pytest.fixture
def net(rng):
    return Net(rng)


def relu(bb, x):
    return bb.emit(relax.op.nn.relu(x))


def weights(mod) -> list[tuple[int, ...]]:
    return [w.shape for w, _ in weighted(mod)]


def weighted(mod):
    found = [b.value for block in mod["main"].body.blocks for b in block.bindings]
    return [(const_array(c.args[1]), attrs_of(c)) for c in found if is_call(c, layers.CONV2D) or is_call(c, layers.DENSE)]  # fmt: skip


@pytest.fixture
def compacted(build, same_values):
    """`compacted(body)`: the rewritten module of a body over one image, its values those of the original."""

    def run(body, inputs=(X,), tolerance=1e-12):
        mod = build(list(inputs), body)
        return same_values(RemoveDeadFilters(), mod, tolerance)

    return run


def test_a_dead_filter_leaves_with_the_channel_it_feeds(net, compacted):
    def body(bb, x):
        y = relu(bb, net.bias(bb, net.conv(bb, x, 8, dead=(1, 5, 6)), zero=(1, 5, 6)))
        return net.conv(bb, y, 4)

    assert weights(compacted(body)) == [(5, 3, 3, 3), (4, 5, 3, 3)]


def test_nothing_dead_nothing_done(net, build):
    mod = build([X], lambda bb, x: net.conv(bb, relu(bb, net.conv(bb, x, 8)), 4))
    assert RemoveDeadFilters()(mod).same_as(mod)


def test_the_outputs_of_the_network_keep_their_shape(net, build):
    mod = build([X], lambda bb, x: net.conv(bb, x, 8, dead=(1, 2)))
    rewritten, found = compact(mod)
    assert rewritten is mod
    assert found["conv1"].dead == 2 and "output of the network" in found["conv1"].reason


def test_a_negative_bias_under_relu_is_dead_and_a_positive_one_is_folded_without_padding(
    net, compacted
):
    def body(bb, x, padding):
        y = net.conv(bb, x, 4, dead=(0, 1))
        y = bb.emit(relax.op.add(y, relax.const(np.float32([-1, 2, 1, 1]).reshape(1, 4, 1, 1))))
        return net.conv(bb, relu(bb, y), 5, padding=padding)

    mod = compacted(lambda bb, x: body(bb, x, 0), tolerance=1e-7)
    assert weights(mod) == [(2, 3, 3, 3), (5, 2, 3, 3)]
    # With padding a constant 2 is not constant at the border: only the filter behind the negative bias goes.
    assert weights(compacted(lambda bb, x: body(bb, x, 1))) == [(3, 3, 3, 3), (5, 3, 3, 3)]


def test_a_constant_is_folded_through_any_activation_and_into_a_dense_layer(net, compacted):
    def body(bb, x):
        y = bb.emit(relax.op.sigmoid(net.bias(bb, net.conv(bb, x, 6, dead=(2, 3)))))
        y = bb.emit(relax.op.mean(y, [2, 3]))
        return net.dense(bb, y, 7)

    # The constant that is added is rounded to float32.
    assert weights(compacted(body, tolerance=1e-7)) == [(4, 3, 3, 3), (7, 4)]


def test_death_spreads_forward_through_layers(net, compacted):
    def body(bb, x):
        y = relu(bb, net.conv(bb, x, 6, dead=(0, 1)))
        second = net.weight((5, 6, 1, 1))
        second[3, 2:] = 0  # reads only what is dead
        z = relu(bb, net.conv(bb, y, 5, weight=second, kernel=1))
        return net.conv(bb, z, 4)

    assert weights(compacted(body)) == [(4, 3, 3, 3), (4, 4, 1, 1), (4, 4, 3, 3)]


def test_a_filter_that_nobody_reads_leaves_as_well(net, compacted):
    def body(bb, x):
        y = relu(bb, net.bias(bb, net.conv(bb, x, 6)))
        second = net.weight((5, 6, 3, 3))
        second[:, [1, 4]] = 0  # input channels
        return net.conv(bb, y, 5, weight=second)

    assert weights(compacted(body)) == [(4, 3, 3, 3), (5, 4, 3, 3)]


def test_a_residual_sum_loses_only_what_is_dead_in_every_branch(net, compacted):
    def body(bb, x):
        stem = relu(bb, net.conv(bb, x, 8, dead=(1, 2, 3)))
        branch = net.conv(bb, relu(bb, net.conv(bb, stem, 6, dead=(0,))), 8, dead=(2, 3, 4))
        y = relu(bb, bb.emit(relax.op.add(stem, branch)))
        return net.conv(bb, y, 4)

    # 2 and 3 go everywhere; 1 and 4 are alive in one branch
    shapes = weights(compacted(body))
    assert shapes == [(6, 3, 3, 3), (5, 6, 3, 3), (6, 5, 3, 3), (4, 6, 3, 3)]


def test_concatenation_keeps_the_order_of_what_is_left(net, compacted):
    def body(bb, x):
        a = relu(bb, net.conv(bb, x, 4, dead=(0,)))
        b = relu(bb, net.conv(bb, x, 6, dead=(1, 5)))
        joined = bb.emit(relax.op.concat([a, b, x], axis=1))
        return bb.emit(relax.op.add(net.conv(bb, joined, 4), net.conv(bb, a, 4, kernel=1)))

    shapes = weights(compacted(body))
    assert shapes == [(3, 3, 3, 3), (4, 3, 3, 3), (4, 10, 3, 3), (4, 3, 1, 1)]


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_depthwise_convolution_loses_the_channels_of_its_input(net, compacted, multiplier):
    def body(bb, x):
        y = relu(bb, net.conv(bb, x, 6, dead=(1, 4)))
        y = relu(bb, net.conv(bb, y, 6 * multiplier, groups=6))
        return net.conv(bb, y, 5, kernel=1)

    mod = compacted(body)
    assert weights(mod) == [(4, 3, 3, 3), (4 * multiplier, 1, 3, 3), (5, 4 * multiplier, 1, 1)]
    assert weighted(mod)[1][1]["groups"] == 4


def test_a_dead_depthwise_filter_takes_the_filter_before_it_along(net, compacted):
    def body(bb, x):
        y = relu(bb, net.conv(bb, x, 6))
        return net.conv(bb, relu(bb, net.conv(bb, y, 6, groups=6, dead=(2,))), 5, kernel=1)

    assert weights(compacted(body)) == [(5, 3, 3, 3), (5, 1, 3, 3), (5, 5, 1, 1)]


def test_a_dead_depthwise_filter_stays_where_its_input_is_read_elsewhere(net, compacted):
    def body(bb, x):
        y = relu(bb, net.conv(bb, x, 6))
        z = relu(bb, net.conv(bb, y, 6, groups=6, dead=(2,)))
        return bb.emit(relax.op.add(net.conv(bb, z, 5), net.conv(bb, y, 5)))

    assert weights(compacted(body)) == [(6, 3, 3, 3), (6, 1, 3, 3), (5, 6, 3, 3), (5, 6, 3, 3)]


def test_grouped_convolutions_lose_whole_groups_and_even_shares(net, compacted):
    def body(bb, x, dead):
        y = relu(bb, net.conv(bb, x, 12, dead=dead))
        second = net.weight((9, 4, 3, 3))
        second[0:3] = 0
        return net.conv(bb, relu(bb, net.conv(bb, y, 9, groups=3, weight=second)), 5)

    # group 0 has dead inputs and outputs: it goes
    mod = compacted(lambda bb, x: body(bb, x, (0, 1, 2, 3)))
    assert weights(mod) == [(8, 3, 3, 3), (6, 4, 3, 3), (5, 6, 3, 3)]
    assert weighted(mod)[1][1]["groups"] == 2

    # group 0's outputs are dead, so its inputs are unread; the others lose inputs only as evenly as they can
    mod = compacted(lambda bb, x: body(bb, x, (4, 5, 9)))
    assert weights(mod) == [(6, 3, 3, 3), (6, 3, 3, 3), (5, 6, 3, 3)]


def test_uneven_groups_stay(net, compacted):
    def body(bb, x):
        y = relu(bb, net.conv(bb, x, 8, dead=(0, 1)))
        return net.conv(bb, relu(bb, net.conv(bb, y, 6, groups=2, dead=(5,))), 5)

    assert weights(compacted(body)) == [(8, 3, 3, 3), (6, 4, 3, 3), (5, 6, 3, 3)]


def test_pooling_and_flattening_lead_to_the_dense_layer(net, compacted):
    def body(bb, x):
        y = relu(bb, net.conv(bb, x, 6, dead=(0, 3)))
        y = bb.emit(relax.op.nn.max_pool2d(y, (2, 2), (2, 2)))
        y = bb.emit(relax.op.nn.avg_pool2d(y, (3, 3), (1, 1), (1, 1, 1, 1), count_include_pad=True))
        flat = bb.emit(relax.op.reshape(y, (2, 6 * 16)))
        hidden = bb.emit(relax.op.nn.gelu(net.dense(bb, flat, 9, dead=(8,))))
        return net.dense(bb, hidden, 4)

    assert weights(compacted(body)) == [(4, 3, 3, 3), (8, 64), (4, 8)]


def test_squeeze_and_excite_goes_with_its_channels(net, compacted):
    def body(bb, x):
        y = relu(bb, net.conv(bb, x, 6, dead=(1, 2)))
        s = bb.emit(relax.op.mean(y, [2, 3], keepdims=True))
        s = relu(bb, net.bias(bb, net.conv(bb, s, 3, kernel=1)))
        s = bb.emit(relax.op.sigmoid(net.bias(bb, net.conv(bb, s, 6, kernel=1))))
        return net.conv(bb, bb.emit(relax.op.multiply(y, s)), 4)

    assert weights(compacted(body)) == [(4, 3, 3, 3), (3, 4, 1, 1), (4, 3, 1, 1), (4, 4, 3, 3)]


def test_batch_norm_spelled_as_scale_and_shift_is_sliced(net, compacted):
    def body(bb, x):
        y = net.conv(bb, x, 5, dead=(4,))
        scale, shift = (net.rng.standard_normal((1, 5, 1, 1)).astype("float32") for _ in range(2))
        shift[0, 4] = -3
        y = bb.emit(relax.op.add(bb.emit(relax.op.multiply(y, relax.const(scale))), relax.const(shift)))  # fmt: skip
        return net.conv(bb, relu(bb, y), 4)

    assert weights(compacted(body)) == [(4, 3, 3, 3), (4, 4, 3, 3)]


def test_a_transformer_mlp_loses_hidden_neurons_but_not_the_width_of_its_norm(net, compacted):
    def body(bb, x):
        h = bb.emit(relax.op.nn.gelu(net.dense(bb, x, 12, dead=(0, 7))))
        y = bb.emit(relax.op.add(net.dense(bb, h, 6, dead=(2,)), x))
        ones = relax.const(np.ones(6, "float32"))
        return net.dense(bb, bb.emit(relax.op.nn.layer_norm(y, ones, ones, -1)), 3)

    assert weights(compacted(body, inputs=[(2, 5, 6)])) == [(10, 6), (6, 10), (3, 6)]


def test_what_is_not_understood_keeps_its_channels(net, compacted):
    def body(bb, x):
        y = relu(bb, net.conv(bb, x, 6, dead=(0, 3)))
        y = bb.emit(relax.op.nn.softmax(y, 1))
        return net.conv(bb, y, 4)

    assert weights(compacted(body)) == [(6, 3, 3, 3), (4, 6, 3, 3)]


@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (0, 1, 3, 2)])
def test_a_transposition_is_followed_and_a_reshape_that_mixes_is_not(net, compacted, axes):
    def body(bb, x):
        y = relu(bb, net.conv(bb, x, 8, dead=(0, 3)))
        y = bb.emit(relax.op.permute_dims(y, axes))
        return net.conv(bb, y, 4)

    wanted = [(8, 3, 3, 3), (4, 8, 3, 3)] if axes[1] == 2 else [(6, 3, 3, 3), (4, 6, 3, 3)]
    assert weights(compacted(body)) == wanted

    def shuffled(bb, x):
        y = relu(bb, net.conv(bb, x, 8, dead=(0, 4)))
        y = bb.emit(relax.op.reshape(y, (2, 2, 4, 8, 8)))
        y = bb.emit(
            relax.op.reshape(bb.emit(relax.op.permute_dims(y, (0, 2, 1, 3, 4))), (2, 8, 8, 8))
        )
        return net.conv(bb, y, 4)

    assert weights(compacted(shuffled)) == [(8, 3, 3, 3), (4, 8, 3, 3)]


def test_of_a_layer_that_is_all_dead_one_filter_stays(net, build, same_values):
    mod = build([X], lambda bb, x: net.conv(bb, relu(bb, net.bias(bb, net.conv(bb, x, 6, dead=range(6)), zero=range(6))), 4))  # fmt: skip
    assert weights(same_values(RemoveDeadFilters(), mod)) == [(1, 3, 3, 3), (4, 1, 3, 3)]
    found = compact(mod)[1]
    assert found["conv1"].outputs == (6, 1) and "one stays" in found["conv1"].reason


def test_a_filter_of_nan_is_alive(net, build):
    weight = net.weight((4, 3, 3, 3), dead=(1,))
    weight[2] = np.nan
    mod = build([X], lambda bb, x: net.conv(bb, relu(bb, net.conv(bb, x, 4, weight=weight)), 4))
    assert weights(RemoveDeadFilters()(mod)) == [(3, 3, 3, 3), (4, 3, 3, 3)]


def test_a_layer_whose_zeros_lie_in_blocks_loses_whole_blocks(net, build, rng):
    dead = (0, 1, 2, 3, 5, 6, 12, 13, 14, 15)
    mod = build([X], lambda bb, x: net.conv(bb, relu(bb, net.conv(bb, x, 16, dead=dead)), 4))
    assert [w[0] for w in weights(compact(mod)[0])] == [6, 4]
    assert [w[0] for w in weights(compact(mod, {"conv1": 4})[0])] == [8, 4]
    assert [w[0] for w in weights(compact(mod, {"conv1": 8})[0])] == [16, 4]


def test_two_outputs_that_share_a_tensor_pin_it(net, compacted):
    def body(bb, x):
        y = relu(bb, net.conv(bb, x, 6, dead=(1,)))
        return bb.emit(relax.Tuple([y, net.conv(bb, y, 4)]))

    assert weights(compacted(body)) == [(6, 3, 3, 3), (4, 6, 3, 3)]


def test_channels_before_and_after_are_told(net, build):
    def body(bb, x):
        y = relu(bb, net.conv(bb, x, 6, dead=(1, 2), name="a"))
        return net.conv(bb, relu(bb, net.conv(bb, y, 6, groups=6, name="b")), 4, name="c")

    found = compact(build([X], body))[1]
    assert (found["a"].inputs, found["a"].outputs, found["a"].dead) == ((3, 3), (6, 4), 2)
    assert (found["b"].inputs, found["b"].outputs, found["b"].dead) == ((6, 4), (6, 4), 0)
    assert (found["c"].inputs, found["c"].outputs) == ((6, 4), (4, 4)) and found["c"].changed
