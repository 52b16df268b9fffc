# SPDX-License-Identifier: Apache-2.0
"""Activations stay in planes between sparse layers, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from compiler import pipeline
from passes import layers
from passes.evaluate import evaluate
from passes.layers import attrs_of, is_call, shape_of
from passes.rewriting import bindings_of
from passes.sparse.keep_planes import KeepPlanes
from passes.sparse.operators import sparse_call
from passes.sparse.reference import sparse_conv2d, sparse_dense
from schedules.target import detect_host

REFERENCES = {"kerf.sparse_conv2d": sparse_conv2d, "kerf.sparse_dense": sparse_dense}


class Network:
    """Emits sparse layers, channels last."""

    def __init__(self, builder: relax.BlockBuilder, rng):
        self.builder, self.rng = builder, rng

    def const(self, *shape):
        return relax.const(self.rng.standard_normal(shape).astype("float32"))

    def weight(self, *shape):
        kept = np.repeat(self.rng.random((shape[0] // 4, *shape[1:])) < 0.4, 4, axis=0)
        return relax.const((self.rng.standard_normal(shape) * kept).astype("float32"))

    def emit(self, value):
        return self.builder.emit(value)

    def conv(self, x, name, outputs, kernel=1, stride=1, grain="out:4"):
        weight = self.weight(outputs, shape_of(x)[-1], kernel, kernel)
        call = layers.conv2d(
            x, weight, name=name, strides=(stride, stride), padding=(kernel // 2,) * 4, layout="NHWC"
        )  # fmt: skip
        return self.emit(sparse_call(call, grain))

    def dense(self, x, name, outputs):
        call = layers.dense(x, self.weight(outputs, shape_of(x)[-1]), name=name)
        return self.emit(sparse_call(call, "out:4"))

    def relu(self, x):
        return self.emit(relax.op.nn.relu(x))

    def add(self, a, b):
        return self.emit(relax.op.add(a, b))


@pytest.fixture
def network(build, rng):
    """`network(shape, body)`: a module of `body(Network, x)`."""
    return lambda shape, body: build([shape], lambda builder, x: body(Network(builder, rng), x))


def sides(mod) -> dict[str, tuple[int, int]]:
    """(x in planes, y in planes) of each sparse layer."""
    found = {}
    for b in bindings_of(mod["main"]):
        if any(is_call(b.value, name) for name in REFERENCES):
            attrs = attrs_of(b.value)
            found[attrs["name"]] = (attrs.get("planes_in", 0), attrs.get("planes_out", 0))
    return found


def residual(net, x):
    """A block with a strided shortcut, a gate of one number per channel, and a mean."""
    y = net.relu(net.add(net.conv(x, "a", 16, kernel=3), net.const(1, 1, 1, 16)))
    z = net.add(net.conv(y, "b", 24, stride=2), net.conv(net.conv(y, "c", 8, 3, 2), "d", 24))
    gate = net.emit(relax.op.sigmoid(net.emit(relax.op.mean(z, [1, 2], keepdims=True))))
    z = net.conv(net.emit(relax.op.multiply(z, gate)), "e", 16)
    return net.emit(relax.op.mean(z, [1, 2]))


def test_a_residual_network_is_computed_in_planes(network, rng):
    mod = network((2, 12, 13, 8), residual)
    kept = KeepPlanes()(mod)
    assert sides(kept) == {"a": (0, 1)} | dict.fromkeys("bcde", (1, 1))
    x = rng.standard_normal((2, 12, 13, 8)).astype("float32")
    (want,) = evaluate(mod, [x], references=REFERENCES)
    np.testing.assert_allclose(_run(kept, x), want, rtol=1e-4, atol=1e-3)


def test_windows_of_single_elements_are_between_planes(network, rng):
    """Not where they would have to be packed first."""

    def body(net, x):
        y = net.relu(net.conv(x, "a", 16, grain="element"))
        y = net.relu(net.conv(y, "b", 12, kernel=3, grain="element"))
        return net.conv(net.conv(y, "c", 20, 3, 2, grain="element"), "d", 8, grain="element")

    mod = network((2, 11, 13, 8), body)
    kept = KeepPlanes()(mod)
    assert sides(kept) == {"a": (0, 1), "b": (1, 1), "c": (1, 1), "d": (1, 0)}
    x = rng.standard_normal((2, 11, 13, 8)).astype("float32")
    (want,) = evaluate(mod, [x], references=REFERENCES)
    np.testing.assert_allclose(_run(kept, x), want, rtol=1e-4, atol=1e-3)

    def packed(net, x):
        return net.conv(net.conv(x, "a", 16, kernel=3, grain="element"), "b", 8, grain="element")

    assert sides(KeepPlanes()(network((1, 40, 40, 8), packed))) == {"a": (0, 0), "b": (0, 0)}


def test_matrices_between_sparse_products_are_kept_in_planes(network, rng):
    def body(net, x):
        y = net.emit(relax.op.nn.gelu(net.add(net.dense(x, "up", 64), net.const(64))))
        return net.add(net.dense(y, "down", 32), x)

    mod = network((2, 11, 32), body)
    kept = KeepPlanes()(mod)
    assert sides(kept) == {"up": (0, 1), "down": (1, 0)}
    x = rng.standard_normal((2, 11, 32)).astype("float32")
    (want,) = evaluate(mod, [x], references=REFERENCES)
    np.testing.assert_allclose(_run(kept, x), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("images, kept", [(1, True), (2, False)])
def test_products_of_the_pixels_of_an_image_share_its_planes(network, rng, images, kept):
    def body(net, x):
        y = net.conv(x, "a", 16)
        return net.dense(net.relu(net.add(y, net.dense(y, "b", 16))), "c", 12)

    mod = network((images, 6, 7, 8), body)
    planes = KeepPlanes()(mod)
    wanted = {"a": (0, 1), "b": (1, 1), "c": (1, 0)} if kept else dict.fromkeys("abc", (0, 0))
    assert sides(planes) == wanted
    x = rng.standard_normal((images, 6, 7, 8)).astype("float32")
    (want,) = evaluate(mod, [x], references=REFERENCES)
    np.testing.assert_allclose(_run(planes, x), want, rtol=1e-4, atol=1e-3)


def _run(mod, x):
    """The graph, compiled."""
    import tvm

    cpu = detect_host()
    compiled = pipeline.compile_graph("planes", pipeline.fuse_graph(mod, cpu), cpu)
    machine = relax.VirtualMachine(compiled.executable, tvm.cpu())
    constants = tuple(tvm.runtime.tensor(np.asarray(c)) for c in compiled.constants)
    return machine["main"](tvm.runtime.tensor(x), constants).numpy()


def _after(net, x, between):
    return net.conv(between(net, net.conv(x, "a", 8)), "b", 8)


NEAR_MISSES = {
    "a pooling between": lambda n, x: _after(
        n, x, lambda n, y: n.emit(relax.op.nn.max_pool2d(y, (2, 2), (1, 1), layout="NHWC"))
    ),
    "numbers that differ by pixel": lambda n, x: _after(
        n, x, lambda n, y: n.add(y, n.const(1, 9, 9, 1))
    ),
    "another reader": lambda n, x: n.add(
        *(lambda y: (n.conv(y, "b", 8), n.emit(relax.op.nn.softmax(y))))(n.conv(x, "a", 8))
    ),
    "a sum with what is not in planes": lambda n, x: _after(n, x, lambda n, y: n.add(y, x)),
    "a stride of three": lambda n, x: n.conv(n.conv(x, "a", 8), "b", 8, stride=3),
    "single elements of a larger kernel": lambda n, x: n.conv(
        n.conv(x, "a", 8, kernel=3, grain="element"), "b", 8, kernel=3, grain="element"
    ),
    "the output of the network": lambda n, x: n.relu(n.conv(x, "b", 8)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_others_read_or_write_stays_channels_last(network, name):
    kept = KeepPlanes()(network((1, 9, 9, 8), NEAR_MISSES[name]))
    assert set(sides(kept).values()) == {(0, 0)}


def test_images_of_less_than_a_vector_stay_channels_last(network):
    body = lambda n, x: _after(n, x, lambda n, y: n.relu(y))  # noqa: E731
    assert sides(KeepPlanes()(network((1, 4, 4, 8), body)))["a"] == (0, 1)
    assert sides(KeepPlanes()(network((1, 3, 5, 8), body)))["a"] == (0, 0)


@pytest.fixture
def image(build, rng):
    """`image(shape, body)`: a module of `body(Network, x)`, x channels last of an image [N, C, H, W]."""

    def made(shape, body, axes=(0, 2, 3, 1)):
        def moved(builder, x):
            return body(Network(builder, rng), builder.emit(relax.op.permute_dims(x, axes)))

        return build([shape], moved)

    return made


@pytest.mark.parametrize("grain", ["out:4", "element"])
def test_an_image_is_read_in_the_planes_it_comes_in(image, rng, grain):
    def body(net, x):
        y = net.relu(net.conv(x, "stem", 16, kernel=3, stride=2, grain=grain))
        return net.relu(net.conv(y, "next", 8))

    mod = image((2, 3, 17, 23), body)
    kept = KeepPlanes()(mod)
    assert sides(kept) == {"stem": (1, 1), "next": (1, 0)}
    x = rng.standard_normal((2, 3, 17, 23)).astype("float32")
    (want,) = evaluate(mod, [x], references=REFERENCES)
    np.testing.assert_allclose(_run(kept, x), want, rtol=1e-4, atol=1e-3)


def test_an_image_of_many_channels_or_moved_otherwise_is_not(image):
    body = lambda net, x: net.relu(net.conv(x, "stem", 16, kernel=3))  # noqa: E731
    assert sides(KeepPlanes()(image((1, 3, 17, 17), body))) == {"stem": (1, 0)}
    assert sides(KeepPlanes()(image((1, 4, 17, 17), body))) == {"stem": (0, 0)}
    assert sides(KeepPlanes()(image((1, 17, 3, 17), body, (0, 3, 1, 2)))) == {"stem": (0, 0)}
    strided = lambda net, x: net.relu(net.conv(x, "stem", 16, kernel=7, stride=4))  # noqa: E731
    assert sides(KeepPlanes()(image((1, 3, 67, 67), strided))) == {"stem": (0, 0)}
