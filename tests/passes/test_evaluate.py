# SPDX-License-Identifier: Apache-2.0
"""The numpy interpreter against torch in float64, operator by operator, on awkward shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from tvm import relax

from passes.evaluate import evaluate
from passes.layers import conv2d, dense
from passes.rewriting import bindings_of, constant
from schedules.errors import KerfError, UserError

op = relax.op
IMAGE = (2, 6, 9, 7)
EXACT = 1e-12


def weights(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype("float32")


def t(array):
    return torch.from_numpy(np.asarray(array)).double()


def agree(build, rng, shapes, body, reference, positive=False):
    """`body` evaluated on random float32 inputs equals torch's `reference` on the same, in float64."""
    arrays = [rng.standard_normal(s).astype("float32") for s in shapes]
    arrays = [np.abs(a) + 0.1 for a in arrays] if positive else arrays
    (found,) = evaluate(build(shapes, body), arrays)
    wanted = reference(*[t(a) for a in arrays]).numpy()
    assert found.shape == wanted.shape
    assert found.dtype == "float64"
    np.testing.assert_allclose(found, wanted, rtol=EXACT, atol=EXACT)


CONVOLUTIONS = [
    {"shape": (8, 6, 3, 3)},
    {"shape": (8, 6, 1, 1), "strides": (2, 2)},
    {"shape": (8, 2, 3, 2), "groups": 3, "strides": (2, 1), "padding": (1, 1)},
    {"shape": (6, 1, 3, 3), "groups": 6, "padding": (1, 1)},
    {"shape": (12, 1, 5, 3), "groups": 6, "dilation": (2, 3), "padding": (4, 3)},
    {"shape": (1, 6, 9, 7)},
]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda c: "x".join(map(str, c["shape"])))
def test_convolution(build, rng, case, layout):
    if case.get("groups") == 3:
        case = {**case, "shape": (9, 2, 3, 2)}
    w = weights(*case["shape"])
    strides, dilation = case.get("strides", (1, 1)), case.get("dilation", (1, 1))
    pad, groups = case.get("padding", (0, 0)), case.get("groups", 1)
    last = layout == "NHWC"

    def body(_b, x):
        x = op.permute_dims(x, [0, 2, 3, 1]) if last else x
        y = conv2d(
            x,
            constant(w),
            name="l",
            strides=strides,
            padding=(*pad, *pad),
            dilation=dilation,
            groups=groups,
            layout=layout,
        )
        return op.permute_dims(y, [0, 3, 1, 2]) if last else y

    agree(
        build, rng, [IMAGE], body, lambda x: F.conv2d(x, t(w), None, strides, pad, dilation, groups)
    )


def test_convolution_in_slabs(build, rng, monkeypatch):
    from passes import numpy_images

    monkeypatch.setattr(numpy_images, "_COLUMNS_LIMIT", 100)
    w = weights(5, 6, 3, 3)
    agree(
        build,
        rng,
        [IMAGE],
        lambda _b, x: conv2d(x, constant(w), name="l"),
        lambda x: F.conv2d(x, t(w)),
    )


@pytest.mark.parametrize(
    ("stride", "pad", "extra", "groups"), [(1, 0, 0, 1), (3, 1, 2, 1), (2, 2, 1, 2)]
)
def test_transposed_convolution(build, rng, stride, pad, extra, groups):
    w = weights(6, 4, 3, 2)
    agree(
        build,
        rng,
        [IMAGE],
        lambda _b, x: op.nn.conv2d_transpose(
            x, constant(w), (stride, stride), (pad, pad), (extra, extra), groups=groups
        ),
        lambda x: F.conv_transpose2d(x, t(w), None, stride, pad, extra, groups),
    )


def test_one_dimensional_convolutions(build, rng):
    w, mirrored = weights(8, 3, 3), weights(6, 4, 3)
    agree(
        build,
        rng,
        [(2, 6, 9)],
        lambda _b, x: op.nn.conv1d(x, constant(w), 2, (1, 1), 1, groups=2),
        lambda x: F.conv1d(x, t(w), None, 2, 1, 1, 2),
    )
    agree(
        build,
        rng,
        [(2, 6, 9)],
        lambda _b, x: op.nn.conv1d_transpose(x, constant(mirrored), 2, (1, 1), (1,)),
        lambda x: F.conv_transpose1d(x, t(mirrored), None, 2, 1, 1),
    )


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("pad", [0, 1])
def test_pools(build, rng, ceil, pad):
    window = ((3, 2), (2, 2), (pad, pad, pad, pad))
    agree(
        build,
        rng,
        [IMAGE],
        lambda _b, x: op.nn.max_pool2d(x, *window, ceil_mode=ceil),
        lambda x: F.max_pool2d(x, (3, 2), 2, pad, 1, ceil),
    )
    for counted in (False, True):
        agree(
            build,
            rng,
            [IMAGE],
            lambda _b, x, c=counted: op.nn.avg_pool2d(
                x, *window, ceil_mode=ceil, count_include_pad=c
            ),
            lambda x, c=counted: F.avg_pool2d(x, (3, 2), 2, pad, ceil, c),
        )


RESIZES = {
    "nearest": ("nearest_neighbor", "asymmetric", "floor", {"mode": "nearest"}),
    "bilinear": ("linear", "half_pixel", "", {"mode": "bilinear", "align_corners": False}),
    "corners": ("linear", "align_corners", "", {"mode": "bilinear", "align_corners": True}),
    "bicubic": ("cubic", "half_pixel", "", {"mode": "bicubic", "align_corners": False}),
}


@pytest.mark.parametrize("mode", RESIZES)
@pytest.mark.parametrize("size", [(18, 14), (5, 3), (10, 7)], ids=str)
def test_resize(build, rng, mode, size):
    method, coordinates, rounding, options = RESIZES[mode]
    agree(
        build,
        rng,
        [IMAGE],
        lambda _b, x: op.image.resize2d(
            x,
            size,
            layout="NCHW",
            method=method,
            coordinate_transformation_mode=coordinates,
            rounding_method=rounding,
            cubic_alpha=-0.75,
        ),
        lambda x: F.interpolate(x, size, **options),
    )


GAMMA, BETA, MEAN = weights(6), weights(6) + 1, weights(6) - 1
VARIANCE = np.abs(weights(6)) + np.float32(0.1)
C6 = [constant(v) for v in (GAMMA, BETA)]
LAST = [constant(weights(7)), constant(weights(7) + 1)]

# name: (body, torch's reference)
OPERATORS = {
    "adaptive pool": (
        lambda _b, x: op.nn.adaptive_avg_pool2d(x, (4, 3)),
        lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    ),
    "layer norm": (
        lambda _b, x: op.nn.layer_norm(x, *LAST, axes=[-1], epsilon=0.5),
        lambda x: F.layer_norm(x, (7,), t(weights(7)), t(weights(7) + 1), 0.5),
    ),
    "rms norm": (
        lambda _b, x: op.nn.rms_norm(x, LAST[0], axes=[-1], epsilon=0.5),
        lambda x: F.rms_norm(x, (7,), t(weights(7)), 0.5),
    ),
    "group norm": (
        lambda _b, x: op.nn.group_norm(x, *C6, 3, 1, [2, 3], 0.5),
        lambda x: F.group_norm(x, 3, t(GAMMA), t(BETA), 0.5),
    ),
    "instance norm": (
        lambda _b, x: op.nn.instance_norm(x, *C6, 1, [2, 3], 0.5),
        lambda x: F.instance_norm(x, None, None, t(GAMMA), t(BETA), eps=0.5),
    ),
    "batch norm": (
        lambda b, x: b.emit(
            op.nn.batch_norm(x, *C6, constant(MEAN), constant(VARIANCE), 1, 0.5, training=False)
        )[0],
        lambda x: F.batch_norm(x, t(MEAN), t(VARIANCE), t(GAMMA), t(BETA), eps=0.5),
    ),
    "gelu": (lambda _b, x: op.nn.gelu(x), F.gelu),
    "gelu tanh": (lambda _b, x: op.nn.gelu_tanh(x), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (lambda _b, x: op.nn.silu(x), F.silu),
    "selu": (lambda _b, x: op.nn.selu(x), F.selu),
    "leaky relu": (lambda _b, x: op.nn.leakyrelu(x, 0.25), lambda x: F.leaky_relu(x, 0.25)),
    "prelu": (lambda _b, x: op.nn.prelu(x, C6[0], 1), lambda x: F.prelu(x, t(GAMMA))),
    "softplus": (lambda _b, x: op.nn.softplus(x, 2.0, 3.0), lambda x: F.softplus(x, 2.0, 3.0)),
    "sigmoid": (
        lambda _b, x: op.sigmoid(op.multiply(x, relax.const(500.0))),
        lambda x: torch.sigmoid(x * 500),
    ),
    "softmax": (lambda _b, x: op.nn.softmax(x, 1), lambda x: F.softmax(x, 1)),
    "log softmax": (lambda _b, x: op.nn.log_softmax(x, -1), lambda x: F.log_softmax(x, -1)),
    "erf": (lambda _b, x: op.erf(x), torch.erf),
    "variance": (
        lambda _b, x: op.variance(x, [1, 2], True),
        lambda x: x.var((1, 2), False, keepdim=True),
    ),
    "cumsum": (lambda _b, x: op.cumsum(x, 2), lambda x: x.cumsum(2)),
    "pixel shuffle": (
        lambda _b, x: op.nn.pixel_shuffle(op.reshape(x, (1, 12, 9, 7)), 2),
        lambda x: F.pixel_shuffle(x.reshape(1, 12, 9, 7), 2),
    ),
    "reflect pad": (
        lambda _b, x: op.nn.pad(x, [0, 0, 0, 0, 1, 2, 3, 0], "reflect"),
        lambda x: F.pad(x, (3, 0, 1, 2), "reflect"),
    ),
    "slice": (
        lambda _b, x: op.strided_slice(x, [1, 3], [-2, 6], [100, 0], [1, -2]),
        lambda x: x[:, -2:].flip(3)[..., 0:6:2],
    ),
    "take": (
        lambda _b, x: op.take(x, constant(np.array([[2, 0], [5, 1]])), 1),
        lambda x: x[:, torch.tensor([[2, 0], [5, 1]])],
    ),
    "top values": (lambda b, x: b.emit(op.topk(x, 3, 2))[0], lambda x: x.topk(3, 2).values),
    "einsum": (
        lambda _b, x: op.einsum(relax.Tuple([x, x]), "nchw,ndhw->ncd"),
        lambda x: torch.einsum("nchw,ndhw->ncd", x, x),
    ),
    "matmul": (
        lambda _b, x: op.matmul(x, constant(weights(6, 7, 5))),
        lambda x: x @ t(weights(6, 7, 5)),
    ),
    "dense": (
        lambda _b, x: dense(x, constant(weights(5, 7)), name="fc"),
        lambda x: F.linear(x, t(weights(5, 7))),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(build, rng, name):
    agree(build, rng, [IMAGE], *OPERATORS[name])


@pytest.mark.parametrize("causal", [None, "TopLeft", "BottomRight"])
@pytest.mark.parametrize("biased", [False, True])
def test_attention(build, rng, causal, biased):
    shapes = [(2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 6), (2, 1, 5, 7)]

    def body(_b, q, k, v, bias):
        return op.nn.attention(q, k, v, bias if biased else None, causal_mask=causal)

    def reference(q, k, v, bias):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(4) + (bias if biased else 0)
        if causal is not None:
            allowed = torch.ones(5, 7, dtype=bool).tril(2 if causal == "BottomRight" else 0)
            scores = scores.masked_fill(~allowed, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    agree(build, rng, shapes, body, reference)


def test_integers_keep_their_type_and_floats_are_widened(build):
    mod = build(
        [((3,), "int64")], lambda _b, x: op.astype(op.divide(x, relax.const(2, "int64")), "float32")
    )
    seen = {}
    (found,) = evaluate(
        mod, [np.array([-3, 3, 5])], observe=lambda name, a: seen.update({name: a.dtype})
    )
    np.testing.assert_array_equal(found, [-1, 1, 2])  # towards zero
    assert found.dtype == "float64"
    assert sorted(map(str, seen.values())) == ["float64", "int64"]
    assert evaluate(mod, [np.array([-3, 3, 5])], dtype="float32")[0].dtype == "float32"


def test_non_finite_values_are_handed_on(build):
    x = np.array([math.nan, math.inf, -math.inf, -0.0], "float32")
    (relu,) = evaluate(build([(4,)], lambda _b, x: op.nn.relu(x)), [x])
    np.testing.assert_array_equal(relu, [math.nan, math.inf, 0, 0])
    (clip,) = evaluate(build([(4,)], lambda _b, x: op.clip(x, -1, 1)), [x])
    np.testing.assert_array_equal(clip, [math.nan, 1, -1, 0])


def test_every_binding_is_observed_in_order_and_outputs_in_theirs(build, rng):
    def body(b, x):
        y = b.emit(op.exp(x), name_hint="y")
        return relax.Tuple([b.emit(op.negative(y), name_hint="z"), y])

    mod, x, seen = build([(2, 3)], body), rng.standard_normal((2, 3)), []
    negated, exponential = evaluate(mod, [x], observe=lambda name, _a: seen.append(name))
    np.testing.assert_array_equal(negated, -np.exp(x))
    np.testing.assert_array_equal(exponential, np.exp(x))
    assert seen == [b.var.name for b in bindings_of(mod["main"])][:2]


def test_references_take_precedence(build):
    mod = build([(2, 7)], lambda _b, x: dense(x, constant(weights(5, 7)), name="fc"))
    (found,) = evaluate(
        mod,
        [np.ones((2, 7))],
        references={"kerf.dense": lambda attrs, x, w: x @ w.T * len(attrs["name"])},
    )
    np.testing.assert_allclose(found, 2 * np.ones((2, 7)) @ weights(5, 7).T.astype("float64"))


def test_an_unknown_operator_is_named(build):
    mod = build([(2, 3)], lambda _b, _x: op.hamming_window(4, True, 0.5, 0.5, "float32"))
    with pytest.raises(KerfError, match=r"no numpy reference.*relax\.hamming_window"):
        evaluate(mod, [np.ones((2, 3))])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "wrong number of inputs"),
        ([np.ones((3, 2))], r"x0: wrong input shape.*\(3, 2\).*\(2, 3\)"),
    ],
)
def test_wrong_inputs_are_refused(build, inputs, message):
    with pytest.raises(UserError, match=message):
        evaluate(build([(2, 3)], lambda _b, x: op.abs(x)), inputs)
