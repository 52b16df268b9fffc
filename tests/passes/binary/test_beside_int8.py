# SPDX-License-Identifier: Apache-2.0
"""Binary layers beside int8 ones: signs are taken of bytes as they lie, and everything left over becomes int8."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

import passes
from passes.binary.operators import BINARY_PACK
from passes.binary.steps import Plane, byte_plane
from passes.channels_last import ChannelsLast
from passes.evaluate import evaluate
from passes.family import Context
from passes.layers import attrs_of, const_array, conv2d, dense, is_call
from passes.quantized.operators import DEQUANTIZE, DEQUANTIZE_ADD, INT8_CONV2D, INT8_DENSE
from passes.quantized.reference import dequantize
from passes.rewriting import bindings_of
from passes.treat_layers import treat_layers
from passes.treatment import Treatment
from schedules.target import NAMED

OP = relax.op
ASKED = Treatment("binary", otherwise=Treatment("int8"))


@pytest.fixture
def references():
    return {n: f for family in passes.families() for n, f in family.references.items()}


@pytest.fixture
def observe(rng, references):
    samples = [rng.standard_normal((1, 3, 16, 16)).astype("float32") for _ in range(4)]

    def observe(mod, names, _further=None):
        for sample in samples:
            values = {mod["main"].params[0].name: sample}
            evaluate(
                mod, [sample], references=references, dtype="float32", observe=values.__setitem__
            )
            yield {name: values[name] for name in names}

    return observe


def _network(build, rng, between, shift=0.0):
    """A stem with max pooling; a unit of signs with its shortcut, `between(builder, maxima)` what its signs are taken of;
    a real 1x1 layer and a head."""

    def real(*shape):
        return relax.const(
            (rng.standard_normal(shape) / np.prod(shape[1:]) ** 0.5).astype("float32")
        )

    def body(b, x):
        y = b.emit(conv2d(x, real(40, 3, 3, 3), name="stem", strides=[2, 2], padding=[1] * 4))
        y = b.emit(OP.add(y, relax.const(np.full((1, 40, 1, 1), shift, "float32"))))
        maxima = b.emit(OP.nn.max_pool2d(y, (3, 3), (2, 2), (1, 1, 1, 1)))
        above = b.emit(OP.greater_equal(between(b, maxima), relax.const(np.float32(0))))
        signs = b.emit(OP.where(above, relax.const(np.float32(1)), relax.const(np.float32(-1))))
        weight = np.where(rng.random((40, 40, 3, 3)) < 0.5, -0.05, 0.05).astype("float32")
        y = b.emit(conv2d(signs, relax.const(weight), name="unit", padding=[1] * 4))
        y = b.emit(OP.add(y, maxima))
        y = b.emit(conv2d(y, real(24, 40, 1, 1), name="around"))
        return dense(b.emit(OP.mean(y, axis=[2, 3])), real(10, 24), name="head")

    return build([(1, 3, 16, 16)], body)


def _itself(_builder, maxima):
    return maxima


_FACTOR = np.linspace(-1, 1, 40).astype("float32").reshape(1, 40, 1, 1)
_FACTOR[0, 7] = 0
_SHIFT = np.linspace(-2, 2, 40).astype("float32").reshape(1, 40, 1, 1)


def _shifted(builder, maxima):
    """As RSign: a shift per channel, and factors of both signs, one of them 0."""
    scaled = builder.emit(OP.multiply(maxima, relax.const(_FACTOR)))
    return builder.emit(OP.add(scaled, relax.const(_SHIFT)))


def _calls(mod, name):
    return [b.value for b in bindings_of(mod["main"]) if is_call(b.value, name)]


@pytest.mark.parametrize("between", [_itself, _shifted])
def test_signs_are_packed_from_bytes_and_the_rest_is_int8(build, rng, observe, references, between):
    mod = _network(build, rng, between)
    names = ("stem", "unit", "around", "head")
    found = treat_layers(mod, dict.fromkeys(names, ASKED), Context(NAMED["avx512"], observe))
    decisions = {d.layer: d for d in found.decisions}
    assert {n: d.treatment for n, d in decisions.items()} == {
        "stem": "int8", "unit": "binary", "around": "int8", "head": "int8",
    }  # fmt: skip
    assert all(
        "real numbers" in decisions[n].passed_on["binary"] for n in ("stem", "around", "head")
    )
    assert not decisions["unit"].passed_on
    assert decisions["unit"].found["signs"] == "packed from bytes"
    (pack,) = _calls(found.treated, BINARY_PACK)
    assert str(pack.args[0].ty.dtype) == str(pack.args[1].ty.dtype) == "uint8"
    assert (
        len(_calls(found.treated, INT8_CONV2D)) == 2 and len(_calls(found.treated, INT8_DENSE)) == 1
    )
    (pool,) = _calls(found.treated, "relax.nn.max_pool2d")
    assert str(pool.ty.dtype) == "uint8"
    # The shortcut joins the sum as bytes, and nothing stores the maxima as floats.
    (joined,) = _calls(found.treated, DEQUANTIZE_ADD)
    assert joined.args[1].same_as(pack.args[0]) and not _calls(found.treated, DEQUANTIZE)

    x = [rng.standard_normal((1, 3, 16, 16)).astype("float32")]
    (wanted,) = evaluate(found.treated, x, references=references)
    (last,) = evaluate(ChannelsLast()(found.treated), x, references=references)
    np.testing.assert_allclose(last, wanted, rtol=1e-5, atol=1e-5)
    # Signs of bytes are the signs of the numbers they stand for, element by element.
    kept = {}
    evaluate(found.treated, x, references=references, dtype="float32", observe=kept.__setitem__)
    maxima = dequantize(attrs_of(joined), kept[pack.args[0].name])
    packed = references[BINARY_PACK](
        attrs_of(pack), kept[pack.args[0].name], *map(const_array, pack.args[1:])
    )
    if between is _shifted:
        maxima = maxima * _FACTOR + _SHIFT
    bits = np.moveaxis(maxima >= 0, 1, -1)
    words = np.moveaxis(packed, 1, -1)
    unpacked = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    np.testing.assert_array_equal(unpacked[..., :40].astype(bool), bits)
    assert not unpacked[..., 40:].any() and 0 < bits.mean() < 1


def test_without_int8_before_it_signs_are_packed_from_floats(build, rng, observe):
    mod = _network(build, rng, _itself)
    asked = dict.fromkeys(("unit", "around", "head"), ASKED)
    found = treat_layers(mod, asked, Context(NAMED["avx512"], observe))
    (pack,) = _calls(found.treated, BINARY_PACK)
    assert str(pack.args[0].ty.dtype) == "float32"
    assert found.decisions[1].found["signs"].startswith("packed from float32: ")
    assert [d.treatment for d in found.decisions] == ["dense", "binary", "int8", "int8"]


def test_maxima_that_are_always_positive_leave_constant_signs(build, rng, observe, references):
    mod = _network(build, rng, _itself, shift=30.0)
    found = treat_layers(
        mod, dict.fromkeys(("stem", "unit"), ASKED), Context(NAMED["avx512"], observe)
    )
    (pack,) = _calls(found.treated, BINARY_PACK)
    (pool,) = _calls(found.treated, "relax.nn.max_pool2d")
    (made,) = [b for b in bindings_of(found.treated["main"]) if b.var.same_as(pool.args[0])]
    assert (const_array(pack.args[1]) == attrs_of(made.value)["zero_point"]).all()
    x = [rng.standard_normal((1, 3, 16, 16)).astype("float32")]
    assert np.isfinite(evaluate(found.treated, x, references=references)[0]).all()


@pytest.mark.parametrize("zero_point", [0, 3, 128, 255])
def test_thresholds_on_bytes_are_those_on_numbers(rng, zero_point):
    """Every byte against thresholds on steps, beside them, between, beyond, infinite, and none."""
    values = dequantize({"scale": 0.037, "zero_point": zero_point}, np.arange(256, dtype=np.uint8))
    some = values[[0, 1, 100, 254, 255]]
    t = np.concatenate(
        [some, np.nextafter(some, np.float32(np.inf)), np.nextafter(some, np.float32(-np.inf)),
         [0.0, -0.0, np.inf, -np.inf, np.nan], rng.uniform(-10, 10, 40)]
    ).astype("float32")  # fmt: skip
    flip = rng.random(len(t)) < 0.5
    plane = byte_plane(Plane(t, flip), values)
    assert plane.threshold.dtype == np.uint8
    byte = np.arange(256, dtype=np.uint8)[:, None]
    found = (byte >= plane.threshold) ^ plane.flip
    np.testing.assert_array_equal(found, (values[:, None] >= t) ^ flip)
