# SPDX-License-Identifier: Apache-2.0
"""A transformer's stream lies in planes from its first norm to its last, where its layers are sparse."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from compiler import pipeline
from passes import families, layers
from passes.evaluate import evaluate
from passes.layers import attrs_of, is_call, shape_of
from passes.rewriting import bindings_of
from passes.sparse.attention_planes import ATTENTION_PLANES
from passes.sparse.keep_planes import KeepPlanes
from passes.sparse.operators import SPARSE_DENSE, TRANSPOSE, sparse_call
from schedules.target import detect_host

REFERENCES = {k: v for family in families() for k, v in family.references.items()}
HEADS, DEPTH = 2, 8
WIDTH = HEADS * DEPTH


class Network:
    """Emits layers of a transformer, in rows."""

    def __init__(self, builder: relax.BlockBuilder, rng):
        self.builder, self.rng, self.count = builder, rng, 0

    def emit(self, value):
        return self.builder.emit(value)

    def const(self, *shape):
        return relax.const(self.rng.standard_normal(shape).astype("float32"))

    def dense(self, x, outputs=WIDTH, sparse=True):
        self.count += 1
        shape = (outputs // 4, shape_of(x)[-1])
        weight = self.rng.standard_normal((outputs, shape[1])) / 4
        weight *= np.repeat(self.rng.random(shape) < 0.5, 4, axis=0)
        call = layers.dense(x, relax.const(weight.astype("float32")), name=f"l{self.count}")
        y = self.emit(sparse_call(call, "out:4") if sparse else call)
        return self.emit(relax.op.add(y, self.const(outputs)))

    def norm(self, x, rms=False):
        if rms:
            return self.emit(relax.op.nn.rms_norm(x, self.const(WIDTH), axes=[-1]))
        scale, shift = self.const(WIDTH), self.const(WIDTH)
        return self.emit(relax.op.nn.layer_norm(x, scale, shift, axes=[-1]))

    def attention(self, n, bias=None, causal=None, sparse=True, last=True):
        batch, rows, _ = shape_of(n)
        q, k, v = (
            self.emit(relax.op.reshape(self.dense(n, sparse=sparse), (batch, rows, HEADS, DEPTH)))
            for _ in range(3)
        )
        y = self.emit(relax.op.nn.attention(q, k, v, bias, causal_mask=causal))
        return self.dense(self.emit(relax.op.reshape(y, (batch, rows, WIDTH))), sparse=last)

    def block(self, x, rms=False, **options):
        x = self.emit(relax.op.add(self.attention(self.norm(x, rms), **options), x))
        y = self.emit(relax.op.nn.gelu(self.dense(self.norm(x, rms), 2 * WIDTH)))
        return self.emit(relax.op.add(self.dense(y), x))

    def begin(self, x):
        """What no sparse layer makes."""
        return self.emit(relax.op.nn.softmax(x))


@pytest.fixture
def network(build, rng):
    """`network(body, shape)`: a module of `body(Network, x)`."""
    return lambda body, shape=(2, 19, WIDTH): build(
        [shape], lambda builder, x: body(Network(builder, rng), x)
    )


def sides_of(value) -> tuple[int, int] | None:
    """(x in planes, y in planes) of a sparse layer."""
    if not is_call(value, SPARSE_DENSE):
        return None
    return tuple(attrs_of(value).get(side, 0) for side in ("planes_in", "planes_out"))


def sides(mod) -> list[tuple[int, int]]:
    """The same of each sparse layer."""
    return [found for b in bindings_of(mod["main"]) if (found := sides_of(b.value))]


def count(mod, name: str) -> int:
    return sum(is_call(b.value, name) for b in bindings_of(mod["main"]))


def check(mod, kept, rng) -> None:
    x = rng.standard_normal(shape_of(mod["main"].params[0])).astype("float32")
    (want,) = evaluate(mod, [x], references=REFERENCES)
    cpu = detect_host()
    compiled = pipeline.compile_graph("planes", pipeline.fuse_graph(kept, cpu), cpu)
    machine = relax.VirtualMachine(compiled.executable, tvm.cpu())
    constants = tuple(tvm.runtime.tensor(np.asarray(c)) for c in compiled.constants)
    got = machine["main"](tvm.runtime.tensor(x), constants).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("options", [{}, {"causal": "TopLeft"}, {"rms": True}])
def test_a_transformer_is_computed_in_planes(network, rng, options):
    def body(net, x):
        return net.norm(net.block(net.block(net.begin(x), **options), **options))

    mod = network(body)
    kept = KeepPlanes()(mod)
    assert set(sides(kept)) == {(1, 1)} and len(sides(kept)) == 12
    assert count(kept, ATTENTION_PLANES) == 2
    assert count(kept, TRANSPOSE) == 2  # where the stream begins, and where it ends
    check(mod, kept, rng)


def test_planes_do_not_lie_eight_lines_apart(network, rng):
    def body(net, x):
        return net.norm(net.block(net.block(net.begin(x))))

    mod = network(body, (2, 64, WIDTH))
    kept = KeepPlanes()(mod)
    lengths = {
        shape_of(b.var)[-1] for b in bindings_of(kept["main"]) if sides_of(b.value) == (1, 1)
    }
    assert lengths == {9 * 16}
    check(mod, kept, rng)


def test_norms_behind_residuals_too(network, rng):
    def body(net, x):
        x = net.norm(net.begin(x))
        for _ in range(2):
            x = net.norm(net.emit(relax.op.add(net.attention(x), x)))
            x = net.norm(net.emit(relax.op.add(net.dense(net.dense(x, 2 * WIDTH)), x)))
        return x

    mod = network(body)
    kept = KeepPlanes()(mod)
    assert set(sides(kept)) == {(1, 1)}
    check(mod, kept, rng)


def test_a_bias_per_key_stays_as_it_is(network, rng):
    def body(net, x):
        bias = net.const(2, 1, 1, 19)
        return net.norm(net.block(net.block(net.begin(x), bias=bias), bias=bias))

    mod = network(body)
    kept = KeepPlanes()(mod)
    assert count(kept, ATTENTION_PLANES) == 2
    check(mod, kept, rng)


def test_attention_that_the_kernel_does_not_serve_stays_in_rows(network, rng):
    """Its layers write rows themselves; nothing is copied for it."""

    def body(net, x):
        bias = net.const(1, 1, 19, 19)
        return net.norm(net.block(net.block(net.begin(x), bias=bias), bias=bias))

    mod = network(body)
    kept = KeepPlanes()(mod)
    assert count(kept, ATTENTION_PLANES) == 0
    assert sides(kept) == 2 * [(1, 0), (1, 0), (1, 0), (0, 1), (1, 1), (1, 1)]
    assert count(kept, TRANSPOSE) == 2
    check(mod, kept, rng)


def test_the_values_of_dense_layers_are_not_copied(network, rng):
    """Where q, k and v are dense, a stream would be copied in every block."""

    def body(net, x):
        return net.norm(net.block(net.block(net.begin(x), sparse=False), sparse=False))

    mod = network(body)
    kept = KeepPlanes()(mod)
    assert count(kept, ATTENTION_PLANES) == 0
    assert count(kept, TRANSPOSE) == 0
    check(mod, kept, rng)


def test_what_a_dense_layer_makes_is_copied_to_join_the_stream(network, rng):
    def body(net, x):
        return net.norm(net.block(net.block(net.block(net.begin(x))), last=False))

    mod = network(body)
    kept = KeepPlanes()(mod)
    assert count(kept, ATTENTION_PLANES) == 2  # the last one is read in rows
    assert sides(kept) == [(1, 1)] * 12 + [(1, 0)] * 3 + [(1, 1)] * 2
    assert count(kept, TRANSPOSE) == 3
    check(mod, kept, rng)


def test_copies_that_serve_few_layers_are_not_made(network):
    def body(net, x):
        return net.norm(net.emit(relax.op.add(net.dense(net.norm(net.begin(x))), x)))

    kept = KeepPlanes()(network(body))
    assert count(kept, TRANSPOSE) == 0 and sides(kept) == [(0, 0)]


def test_short_sequences_stay_in_rows(network):
    body = lambda net, x: net.norm(net.block(net.block(net.begin(x))))  # noqa: E731
    kept = KeepPlanes()(network(body, (1, 15, WIDTH)))
    assert set(sides(kept)) == {(0, 0)}
