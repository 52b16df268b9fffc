# SPDX-License-Identifier: Apache-2.0
"""Quantized ONNX models: imported as the file says, then computed on bytes with the file's own scales."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compiler.frontend import import_model
from compiler.pipeline import canonicalize
from passes import families
from passes.evaluate import evaluate
from passes.layers import attrs_of, is_call
from passes.quantized.take_imported import describe_imported, is_quantized, take_imported
from passes.rewriting import bindings_of
from passes.treat_layers import layers_of
from passes.treatment import Treatment
from schedules.errors import KerfError

quantization = pytest.importorskip("onnxruntime.quantization")


def float_model(rng) -> onnx.ModelProto:
    """Convolution, depthwise, residual, ReLU, max pooling, a concatenation of two scales, mean, a matrix product."""

    def weight(name, *shape):
        array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array(array.astype("float32"), name)

    node = helper.make_node
    nodes = [
        node("Conv", ["x", "c1.weight", "c1.bias"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["ar"]),
        node("Conv", ["ar", "dw.weight"], ["d"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=8),
        node("Relu", ["d"], ["dr"]),
        node("Conv", ["dr", "c2.weight", "c2.bias"], ["b"], kernel_shape=[1, 1]),
        node("Add", ["b", "ar"], ["s"]),
        node("Relu", ["s"], ["sr"]),
        node("MaxPool", ["sr"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["m", "c3.weight"], ["e"], kernel_shape=[1, 1]),
        node("Concat", ["m", "e"], ["f"], axis=1),
        node("Conv", ["f", "c4.weight"], ["g"], kernel_shape=[1, 1]),
        node("GlobalAveragePool", ["g"], ["p"]),
        node("Flatten", ["p"], ["q"]),
        node("Gemm", ["q", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]
    weights = [
        weight("c1.weight", 8, 3, 3, 3), weight("c1.bias", 8), weight("dw.weight", 8, 1, 3, 3),
        weight("c2.weight", 8, 8, 1, 1), weight("c2.bias", 8), weight("c3.weight", 5, 8, 1, 1),
        weight("c4.weight", 9, 13, 1, 1), weight("fc.weight", 10, 9), weight("fc.bias", 10),
    ]  # fmt: skip
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 7])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])
    graph = helper.make_graph(nodes, "net", [image], [result], initializer=weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def images(rng, count):
    return [rng.standard_normal((1, 3, 8, 7)).astype("float32") for _ in range(count)]


class Samples(quantization.CalibrationDataReader):
    def __init__(self, arrays):
        self.left = iter(arrays)

    def get_next(self):
        array = next(self.left, None)
        return None if array is None else {"x": array}


def quantize(rng, path, **options) -> onnx.ModelProto:
    """The model as ONNX Runtime's static quantization writes it."""
    onnx.save(float_model(rng), path / "float.onnx")
    out = path / "int8.onnx"
    with redirect_stderr(io.StringIO()):
        quantization.quantize_static(path / "float.onnx", out, Samples(images(rng, 16)), **options)
    return onnx.load(out)


Type, Format = quantization.QuantType, quantization.QuantFormat
WRITTEN = {
    "u8_per_channel": {"activation_type": Type.QUInt8, "weight_type": Type.QInt8, "per_channel": True},
    "s8_per_tensor": {"activation_type": Type.QInt8, "weight_type": Type.QInt8},
    "s8_symmetric": {
        "activation_type": Type.QInt8, "weight_type": Type.QInt8, "per_channel": True,
        "extra_options": {"ActivationSymmetric": True},
    },
    "u8_weights": {"activation_type": Type.QUInt8, "weight_type": Type.QUInt8},
    "s16_activations": {"activation_type": Type.QInt16, "weight_type": Type.QInt8},
    "s4_weights": {"activation_type": Type.QUInt8, "weight_type": Type.QInt4},  # operators of ONNX Runtime's own domain
    "operators": {
        "activation_type": Type.QUInt8, "weight_type": Type.QInt8, "per_channel": True,
        "quant_format": Format.QOperator,
    },
}  # fmt: skip
LAYERS = {"c1", "dw", "c2", "c3", "c4", "fc"}
REFERENCES = {name: f for family in families() for name, f in family.references.items()}


def run(mod, x):
    return evaluate(mod, [x], dtype="float32", references=REFERENCES)[0]


def output_step(model: onnx.ModelProto) -> float:
    """The scale of the model's result."""
    (last,) = [n for n in model.graph.node if "y" in n.output]
    (scale,) = [t for t in model.graph.initializer if t.name == last.input[1]]
    return float(numpy_helper.to_array(scale))


@pytest.mark.parametrize("written", WRITTEN)
def test_files_of_onnx_runtime(rng, tmp_path, written):
    """As imported: what ONNX Runtime computes, but for steps where a value lies at a tie. On bytes: within the roundings
    that are left out."""
    model = quantize(rng, tmp_path, **{"quant_format": Format.QDQ, **WRITTEN[written]})
    imported = import_model(model)
    mod = canonicalize(imported.mod)
    assert {layer.name for layer in layers_of(mod)} == LAYERS
    taken = take_imported(mod, {name: Treatment("int8") for name in LAYERS})
    step = output_step(model)
    declined = {d.layer: d.declined for d in taken.decisions if d.declined}
    differing, errors = [], []
    for x in images(rng, 6):
        wanted = imported.reference([x])[0]
        differing.append(np.abs(run(mod, x) - wanted).max() / step)
        errors.append((run(taken.treated, x) - wanted) / step)
    assert np.std(errors) < 1 and np.abs(errors).max() < 4
    assert np.median(differing) < 1e-3 and max(differing) < 1.5
    if written == "s16_activations":
        assert set(declined) == LAYERS and "8 bits" in declined["c1"]
    elif written != "u8_weights":
        assert not declined
    else:
        assert all("int8 does not hold" in reason for reason in declined.values())


def test_integer_layers_hold_the_integers_of_the_file(rng, tmp_path):
    model = quantize(rng, tmp_path, quant_format=Format.QDQ, **WRITTEN["s8_per_tensor"])
    mod = canonicalize(import_model(model).mod)
    assert is_quantized(mod)
    treated = take_imported(mod, {name: Treatment("int8") for name in LAYERS}).treated
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    calls = {
        attrs_of(b.value)["name"]: b.value
        for b in bindings_of(treated["main"])
        if is_call(b.value, "kerf.int8_conv2d") or is_call(b.value, "kerf.int8_dense")
    }
    assert set(calls) == LAYERS
    for name, call in calls.items():
        np.testing.assert_array_equal(
            call.args[1].value.numpy(), stored[f"{name}.weight_quantized"]
        )
    # int8 activations are uint8 ones with a zero point 128 higher.
    assert attrs_of(calls["c1"])["zero_point"] == int(stored["x_zero_point"]) + 128


def test_inspect_shows_what_is_stored(rng, tmp_path):
    model = quantize(rng, tmp_path, quant_format=Format.QDQ, **WRITTEN["u8_per_channel"])
    found = describe_imported(canonicalize(import_model(model).mod))
    assert found["c1"] == {"imported": "weight int8 per channel, input uint8"}


DYNAMIC = {
    "s8_per_tensor": {"weight_type": Type.QInt8},
    "s8_per_channel": {"weight_type": Type.QInt8, "per_channel": True},
    "u8_weights": {"weight_type": Type.QUInt8},
}


def quantize_dynamic(rng, path, **options) -> onnx.ModelProto:
    """The model as ONNX Runtime's dynamic quantization writes it: DynamicQuantizeLinear, ConvInteger, MatMulInteger."""
    onnx.save(float_model(rng), path / "float.onnx")
    with redirect_stderr(io.StringIO()):
        quantization.quantize_dynamic(path / "float.onnx", path / "int8.onnx", **options)
    return onnx.load(path / "int8.onnx")


@pytest.mark.parametrize("written", DYNAMIC)
def test_scales_found_at_run_time(rng, tmp_path, written):
    """What ONNX Runtime computes, in floats and on bytes: the same integers, and one rounding of floats."""
    model = quantize_dynamic(rng, tmp_path, **DYNAMIC[written])
    assert {"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"} <= {
        n.op_type for n in model.graph.node
    }
    imported = import_model(model)
    mod = canonicalize(imported.mod)
    taken = take_imported(mod, {name: Treatment("int8") for name in LAYERS})
    declined = {d.layer: d.declined for d in taken.decisions if d.declined}
    assert {d.layer for d in taken.decisions} == LAYERS
    assert set(declined) <= (LAYERS if written == "u8_weights" else set())
    assert all("int8 does not hold" in why for why in declined.values())
    computed = [b.value.op.name for b in bindings_of(taken.treated["main"])]
    assert sum(n in ("kerf.int8_conv2d", "kerf.int8_dense") for n in computed) == len(
        LAYERS - set(declined)
    )
    for x in [*images(rng, 4), np.zeros((1, 3, 8, 7), "float32")]:
        wanted = imported.reference([x])[0]
        for graph in (mod, taken.treated):
            np.testing.assert_allclose(run(graph, x), wanted, rtol=2e-6, atol=2e-6)


def test_sums_that_are_read_as_integers_are_refused():
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w"], ["y"], name="product"),
        helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.UINT8, [2, 4])],
        [helper.make_tensor_value_info(n, t, [2, 3]) for n, t in (("y", TensorProto.INT32), ("z", TensorProto.FLOAT))],
        initializer=[numpy_helper.from_array(np.ones((4, 3), "int8"), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with pytest.raises(KerfError, match=r"MatMulInteger \(product\)"):
        import_model(model)


def linear(scale, zero_point, x=(1, 4, 5), axis=None, extra=None):
    """y = DequantizeLinear(QuantizeLinear(x))"""
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize", **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes, **(extra or {})),
    ]
    tensors = [numpy_helper.from_array(scale, "s")]
    tensors.append(
        zero_point
        if isinstance(zero_point, TensorProto)
        else numpy_helper.from_array(zero_point, "z")
    )
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x)], initializer=tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(
    ("scale", "zero_point", "axis"),
    [
        (np.float32(0.5), np.uint8(7), None),
        (np.float32(0.25), np.int8(-3), None),
        (np.float32(0.3), np.uint8(0), None),
        (np.array([0.5, 0.25, 1, 2], "float32"), np.array([1, -2, 3, 0], "int8"), 1),
        (np.array([0.5, 0.25, 1, 2, 4], "float32"), np.array([0, 1, 2, 3, 4], "uint8"), -1),
        (np.float32(0.001), np.int16(-300), None),
        (np.float32(0.001), np.uint16(300), None),
    ],
)
def test_rounding_is_that_of_the_standard(rng, scale, zero_point, axis):
    imported = import_model(linear(scale, zero_point, axis=axis))
    x = rng.standard_normal((1, 4, 5)).astype("float32") * 20
    x[0, :, 0] = [0.25, -0.0, np.inf, -np.inf]  # a tie, and what saturates
    found = run(canonicalize(imported.mod), x)
    np.testing.assert_array_equal(found, imported.reference([x])[0])


INT4 = helper.make_tensor("z", TensorProto.INT4, [], [0])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (linear(np.float32(0), np.uint8(0)), "scale"),
        (linear(np.float32(-1), np.uint8(0)), "scale"),
        (linear(np.float32("nan"), np.uint8(0)), "NaN"),
        (linear(np.float32(1), INT4), "int4"),
        (linear(np.ones(4, "float32"), np.zeros(4, "int8"), axis=2), "axis"),
    ],
    ids=["zero", "negative", "nan", "int4", "axis"],
)
def test_what_cannot_be_read_is_refused(model, words):
    with pytest.raises(KerfError, match=words):
        import_model(model)


def test_a_changed_weight_is_not_taken_for_the_file_s(rng, tmp_path):
    """A weight that a pass has scaled is no longer what the scales in its attributes say."""
    from tvm import relax

    from passes.treat_layers import rewrite_layers

    model = quantize(rng, tmp_path, quant_format=Format.QDQ, **WRITTEN["u8_per_channel"])
    mod = canonicalize(import_model(model).mod)

    def halve(call):
        if attrs_of(call)["name"] != "c2":
            return call
        args = [call.args[0], relax.const(call.args[1].value.numpy() * np.float32(0.3))]
        return relax.Call(call.op, args, call.attrs, call.ty_args, ret_ty=call.ty)

    changed = rewrite_layers(mod, halve)
    taken = take_imported(changed, {name: Treatment("int8") for name in LAYERS})
    declined = {d.layer: d.declined for d in taken.decisions if d.declined}
    assert set(declined) == {"c2"} and "changed" in declined["c2"]


def test_files_of_nncf(rng):
    """Float biases, signed and unsigned activations in one file, scales along axis -2."""
    nncf = pytest.importorskip("nncf")
    data = nncf.Dataset([{"x": x} for x in images(rng, 8)])
    imported = import_model(nncf.quantize(float_model(rng), data, subset_size=8))
    mod = canonicalize(imported.mod)
    assert {layer.name for layer in layers_of(mod)} == LAYERS
    taken = take_imported(mod, {name: Treatment("int8") for name in LAYERS})
    assert not [d.declined for d in taken.decisions if d.declined]
    for x in images(rng, 4):
        wanted = imported.reference([x])[0]
        assert np.abs(run(mod, x) - wanted).max() < 0.02 * np.abs(wanted).max()
        assert np.abs(run(taken.treated, x) - wanted).max() < 0.05 * np.abs(wanted).max()


def test_a_weight_as_nncf_stores_it(rng):
    """`q_output_fc.weight_1`, a float bias, scales along axis -2; the input signed."""
    integers = rng.integers(-127, 128, (5, 12)).astype("int8")
    tensors = {
        "q_output_fc.weight_1": integers, "s": np.float32(0.02), "z": np.int8(3), "w_scale": rng.random(5).astype("float32"),
        "w_zero": np.zeros(5, "int8"), "fc.bias": rng.random(5).astype("float32"),
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["q_output_fc.weight_1", "w_scale", "w_zero"], ["w"], axis=-2),
        node("Gemm", ["d", "w", "fc.bias"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 5])],
        initializer=[numpy_helper.from_array(a, n) for n, a in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    imported = import_model(model)
    taken = take_imported(canonicalize(imported.mod), {"fc": Treatment("int8")})
    assert [(d.layer, d.declined) for d in taken.decisions] == [("fc", None)]
    x = rng.standard_normal((2, 12)).astype("float32")
    wanted = imported.reference([x])[0]
    # A float bias becomes a whole number of what one step of the sum is worth.
    half_a_step = tensors["s"] * tensors["w_scale"] / 2
    assert np.all(np.abs(run(taken.treated, x) - wanted) <= half_a_step + 1e-4)


def test_builds_with_scales_found_at_run_time(rng, tmp_path):
    """Its kernels, on bytes whose zero point comes with them: images with borders, channels that are no multiple of 4."""
    from compiler.driver import build

    model = quantize_dynamic(rng, tmp_path, **DYNAMIC["s8_per_channel"])
    artifact = build(model, recipe="int8", choose="asked")
    assert {row["treatment"] for row in artifact.layers} == {"int8"}
    steps = artifact.manifest["verify"]["kernels"]["compressed"]["steps"]
    assert steps["tensors"] == 6 * artifact.manifest["verify"]["runs"] and steps["wrong"] == 0


def token_model(rng) -> onnx.ModelProto:
    """ids [1, 9] -> [1, 9, 12]: a table of embeddings, a layer norm, two dense layers with GELU between and a residual."""

    def constant(name, *shape):
        return numpy_helper.from_array(rng.standard_normal(shape).astype("float32") / 4, name)

    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"]),
        helper.make_node("MatMul", ["n", "up"], ["h"], name="up"),
        helper.make_node("Gelu", ["h"], ["g"]),
        helper.make_node("MatMul", ["g", "down"], ["d"], name="down"),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    stored = [("table", 40, 12), ("gamma", 12), ("beta", 12), ("up", 12, 50), ("down", 50, 12)]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 9, 12])], [constant(*c) for c in stored],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_tokens_with_scales_found_at_run_time(rng, tmp_path):
    """Inputs are integers, so that nothing nearby shows what rounding does but the rounded values themselves."""
    from compiler.driver import build
    from compiler.runtime import load

    onnx.save(token_model(rng), tmp_path / "float.onnx")
    with redirect_stderr(io.StringIO()):
        quantization.quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx")
    path = tmp_path / "int8.onnx"
    assert "MatMulInteger" in {n.op_type for n in onnx.load(path).graph.node}
    artifact = build(path, tmp_path / "out", recipe="int8", choose="asked")
    assert {row["treatment"] for row in artifact.layers} == {"int8"}
    ids = rng.integers(0, 40, (1, 9))
    wanted = import_model(path).reference([ids])[0]  # by ONNX Runtime
    np.testing.assert_allclose(load(artifact.path)(ids), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("written", ["u8_per_channel", "s8_per_tensor", "u8_weights"])
def test_builds_are_verified_against_the_file(rng, tmp_path, written):
    """The kernels compute what the graphs say, bytes exactly; without calibration data."""
    from compiler.driver import build

    model = quantize(rng, tmp_path, quant_format=Format.QDQ, **WRITTEN[written])
    artifact = build(model, recipe="int8", choose="asked")
    taken = {row["name"] for row in artifact.layers if row["treatment"] == "int8"}
    assert taken == (LAYERS if written != "u8_weights" else taken - {"c1"})
