# SPDX-License-Identifier: Apache-2.0
"""Front ends as a user meets them: real architectures from both, shapes chosen at import, and every kind of bad input."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compiler.frontend import TensorSpec, import_model
from compiler.frontend.names import is_anonymous, layer_name, node_name
from passes.evaluate import evaluate
from passes.layers import attrs_of
from schedules.errors import ModelError, UnsupportedModel
from tools import zoo


def layers(imported):
    values = [b.value for block in imported.mod["main"].body.blocks for b in block.bindings]
    return [
        attrs_of(v)["name"]
        for v in values
        if getattr(getattr(v, "op", None), "name", "").startswith("kerf.")
    ]


def agree(imported, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [
        rng.standard_normal(s.shape).astype("float32")
        if s.dtype == "float32"
        else rng.integers(0, 90, s.shape).astype(s.dtype)
        for s in imported.inputs
    ]
    for result, wanted, spec in zip(
        evaluate(imported.mod, arrays), imported.reference(arrays), imported.outputs, strict=True
    ):
        assert result.shape == wanted.shape == spec.shape
        np.testing.assert_allclose(
            result, wanted, rtol=1e-4, atol=3e-5 * max(1, np.abs(wanted).max())
        )
        assert wanted.std() > 1e-2  # an output that does not depend on anything would always agree


LAYERS = {
    "resnet18": (13, "model.resnet.embedder.embedder.convolution", "model.classifier.1"),
    "resnet50": (18, "model.resnet.embedder.embedder.convolution", "model.classifier.1"),
    "vgg16": (7, "features.0", "classifier.6"),
    "mobilenetv2": (53, "model.mobilenet_v2.conv_stem.first_conv.convolution", "model.classifier"),
    "regnet_y": (26, "model.regnet.embedder.embedder.convolution", "model.classifier.1"),
    "convnext_t": (17, "model.convnext.embeddings.patch_embeddings", "model.classifier"),
    "efficientnet_b0": (37, "model.efficientnet.embeddings.convolution", "model.classifier"),
    "vit_s16": (14, "model.vit.embeddings.patch_embeddings.projection", "model.classifier"),
    "bert": (12, "model.encoder.layer.0.attention.self.query", "model.encoder.layer.1.output.dense"),
    "bert_token": (12, "model.encoder.layer.0.attention.self.query", "model.encoder.layer.1.output.dense"),
    "gpt2": (9, "model.transformer.h.0.attn.c_attn", "model.lm_head"),
    "lstm": (13, None, "head"),
}  # fmt: skip


# The deepest ones only where time does not matter; what they add is covered by the others.
_DEEP = ("resnet50", "mobilenetv2", "efficientnet_b0")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in _DEEP else n for n in zoo.ZOO]
)
def test_architecture_from_torch(name):
    module, example = zoo.build(name, tiny=True)
    imported = import_model(module, example=example)
    count, first, last = LAYERS[name]
    assert (len(layers(imported)), layers(imported)[-1]) == (count, last)
    assert layers(imported)[0] == (first or "lstm.weight_ih_l0")
    agree(imported)


@pytest.mark.parametrize(
    "name",
    [n if n in ("vgg16", "lstm") else pytest.param(n, marks=pytest.mark.slow) for n in zoo.ZOO],
)
def test_architecture_from_onnx(name, tmp_path):
    module, example = zoo.build(name, tiny=True)
    zoo.save_onnx(module, example, tmp_path / "model.onnx")
    imported = import_model(tmp_path / "model.onnx")
    count, first, last = LAYERS[name]
    assert (len(layers(imported)), layers(imported)[-1]) == (count, last)
    assert layers(imported)[0] == (first or "lstm.W")
    agree(imported)


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("layer1.0.conv1.weight", "layer1.0.conv1"),
        ("lstm.weight_hh_l0", "lstm.weight_hh_l0"),
        ("conv.parametrizations.weight.original1", "conv"),
        ("conv.weight_orig", "conv"),
        ("conv.weight_mask", "conv"),
        ("conv.weight_g", "conv"),
        ("masked.weight_masks", "masked.weight_masks"),
        ("weight", "weight"),
        ("fc.bias", "fc.bias"),
    ],
)
def test_layer_names(parameter, layer):
    assert layer_name(parameter) == layer


def test_anonymous_names():
    assert all(map(is_anonymous, ("", "onnx::MatMul_17", "val_3", "const_2", "12")))
    assert not any(map(is_anonymous, ("conv.weight", "t_proj", "constraint", "value_3.weight")))
    assert node_name("/encoder/layer.0/query/MatMul") == "encoder.layer.0.query"
    assert node_name("/MatMul") == "MatMul" and node_name("query") == "query"


class Net(nn.Module):
    """Small, with a batch norm, a tied name and integer-free inputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, image):
        return self.fc(self.norm(self.conv(image)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def dynamic_pt2(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "dynamic.pt2"
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(
        torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},)), path
    )
    return path


@pytest.fixture(scope="module")
def static_pt2(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "static.pt2"
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 8, 8),)), path)
    return path


def small_onnx(dims=("N", 3, 8, 8)) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    tensors = {
        "conv.weight": rng.standard_normal((4, 3, 3, 3)),
        "fc.weight": rng.standard_normal((5, 4)),
        "fc.bias": rng.standard_normal(5),
    }
    nodes = [
        helper.make_node("Conv", ["image", "conv.weight"], ["c"], name="/conv/Conv", pads=[1, 1, 1, 1]), helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]), helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "fc.weight", "fc.bias"], ["logits"], name="/fc/Gemm", transB=1),
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, dims)]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [dims[0], 5])]
    initializers = [numpy_helper.from_array(a.astype("float32"), n) for n, a in tensors.items()]
    return helper.make_model(
        helper.make_graph(nodes, "small", inputs, outputs, initializers),
        opset_imports=[helper.make_opsetid("", 17)],
    )


def test_module_exported_program_and_file_are_the_same(net, static_pt2):
    example = torch.randn(2, 3, 8, 8)
    texts = []
    for imported, kind in (
        (import_model(net, example=example), "module"),
        (import_model(torch.export.export(net, (example,))), "exported_program"),
        (import_model(static_pt2), "pt2"),
    ):
        assert imported.source_kind == kind
        assert imported.inputs == [TensorSpec("image", (2, 3, 8, 8), "float32")]
        assert imported.outputs == [TensorSpec("output", (2, 5), "float32")]
        assert layers(imported) == ["conv", "fc"]
        texts.append(imported.mod.script(show_meta=False))
    assert texts[0] == texts[1] == texts[2]
    agree(imported)


def test_a_module_in_training_mode_is_imported_in_eval_mode_and_left_as_it_was():
    module = Net().train()
    imported = import_model(module, example=torch.randn(2, 3, 8, 8))
    assert module.training and module.norm.training
    agree(imported)


def test_batch_of_a_module(net):
    imported = import_model(net, example=(torch.randn(2, 3, 8, 8),), batch=5)
    assert imported.inputs[0].shape == (5, 3, 8, 8) and imported.outputs[0].shape == (5, 5)
    agree(imported)


@pytest.mark.parametrize("options", [{"batch": 3}, {"inputs": {"image": (3, 3, 8, 8)}}])
def test_open_batch_of_a_file(dynamic_pt2, options):
    imported = import_model(dynamic_pt2, **options)
    assert imported.outputs[0].shape == (3, 5) and layers(imported) == ["conv", "fc"]
    agree(imported)


@pytest.mark.parametrize("options", [{"batch": 3}, {"inputs": {"image": (3, 3, 8, 8)}}])
def test_open_batch_of_onnx(options):
    imported = import_model(small_onnx(), **options)
    assert imported.outputs == [TensorSpec("logits", (3, 5), "float32")] and layers(imported) == [
        "conv",
        "fc",
    ]
    agree(imported)


def test_names_from_nodes_where_initializers_are_anonymous():
    model = small_onnx((1, 3, 8, 8))
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("conv.weight", "onnx::Conv_12").replace(
            "fc.weight", "val_3"
        )
    for node in model.graph.node:
        node.input[:] = [
            n.replace("conv.weight", "onnx::Conv_12").replace("fc.weight", "val_3")
            for n in node.input
        ]
    assert layers(import_model(model)) == ["conv", "fc"]


def test_keyword_examples_and_several_outputs():
    class Two(nn.Module):
        def forward(self, a, *, b):
            return {"sum": a + b, "product": a * b}

    imported = import_model(Two(), example={"a": torch.randn(2, 3), "b": torch.randn(2, 3)})
    assert [s.name for s in imported.inputs] == ["a", "b"] and [
        s.name for s in imported.outputs
    ] == ["output0", "output1"]
    agree(imported)


def rejected(error, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        import_model(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_shapes_that_do_not_fit(net, dynamic_pt2, static_pt2):
    assert "batch 2 only" in rejected(ModelError, static_pt2, batch=3)
    assert "leaves dimensions open" in rejected(ModelError, dynamic_pt2)
    assert "cannot have this shape" in rejected(
        ModelError, dynamic_pt2, inputs={"image": (1, 3, 9, 8)}
    )
    assert "no such input" in rejected(ModelError, dynamic_pt2, inputs={"picture": (1, 3, 8, 8)})
    assert "does not accept" in rejected(ModelError, dynamic_pt2, batch=100)
    assert "leaves dimensions open" in rejected(ModelError, small_onnx())
    assert "cannot have this shape" in rejected(
        ModelError, small_onnx(), inputs={"image": (1, 4, 8, 8)}
    )
    assert "no such input" in rejected(ModelError, small_onnx(), inputs={"picture": (1, 3, 8, 8)})
    assert "has batch 2" in rejected(ModelError, small_onnx((2, 3, 8, 8)), batch=3)
    assert "example inputs" in rejected(ModelError, net)
    assert "positive" in rejected(ModelError, net, example=torch.randn(1, 3, 8, 8), batch=0)
    assert "not a model" in rejected(ModelError, 3)


def test_files_that_are_no_models(tmp_path, static_pt2):
    def file(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    whole, model = static_pt2.read_bytes(), small_onnx().SerializeToString()
    assert "no such file" in rejected(ModelError, tmp_path / "absent.onnx")
    assert "directory" in rejected(ModelError, tmp_path)
    assert "unknown kind" in rejected(ModelError, file("model.txt", b""))
    assert "torch.export.save" in rejected(ModelError, file("model.pth", b""))
    for data in (b"", b"not an onnx file at all", model[: len(model) // 2]):
        assert "ONNX" in rejected(ModelError, file("bad.onnx", data))
    for data in (b"", b"not a zip", whole[: len(whole) // 2]):
        assert ".pt2" in rejected(ModelError, file("bad.pt2", data))
    flipped = bytearray(whole)
    flipped[whole.index(np.float32(0.5).tobytes()[:0] or b"data/weights/weight_0") + 200] ^= 255
    assert "damaged" in rejected(ModelError, file("flipped.pt2", bytes(flipped)))


def test_external_data(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(
        small_onnx((1, 3, 8, 8)),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    agree(import_model(path))
    (tmp_path / "weights.bin").write_bytes(b"short")
    assert "external data" in rejected(ModelError, path)
    (tmp_path / "weights.bin").unlink()
    assert "weights.bin" in rejected(ModelError, path)


def test_weights_that_are_not_numbers(net):
    model = small_onnx((1, 3, 8, 8))
    array = numpy_helper.to_array(model.graph.initializer[1]).copy()
    array[0, 0] = np.nan
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(array, "fc.weight"))
    assert "fc.weight holds NaN" in rejected(ModelError, model)
    bad = Net()
    with torch.no_grad():
        bad.fc.weight[0, 0] = float("nan")
    assert "fc holds NaN" in rejected(ModelError, bad, example=torch.randn(1, 3, 8, 8))


def test_types_that_are_not_supported():
    assert "float()" in rejected(
        UnsupportedModel, nn.Linear(2, 2).half(), example=torch.randn(1, 2).half()
    )
    assert "float()" in rejected(
        UnsupportedModel, nn.Linear(2, 2).double(), example=torch.randn(1, 2).double()
    )


def test_unsupported_operators_are_listed_all_at_once():
    model = small_onnx((1, 3, 8, 8))
    extra = [
        helper.make_node("Hardmax", ["logits"], ["h"], name="/a"),
        helper.make_node("Det", ["image"], ["d"], name="/b"),
        helper.make_node("Mine", ["h"], ["m"], name="/c", domain="my.ops"),
    ]
    model.graph.node.extend(extra)
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    model.graph.output.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, dims)
        for n, dims in (("m", [1, 5]), ("d", [1, 3]))
    )
    message = rejected(UnsupportedModel, model)
    assert all(
        text in message for text in ("3 operators", "Hardmax (/a)", "Det (/b)", "my.ops.Mine (/c)")
    )


def test_a_module_that_cannot_be_traced():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert "cannot trace" in rejected(UnsupportedModel, Branch(), example=torch.randn(3))


def test_a_module_that_changes_its_own_state():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return x + self.count

    assert "changes its own state" in rejected(UnsupportedModel, Counter(), example=torch.randn(3))


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def rewritten(source: Path, target: Path, change) -> Path:
    """A copy of the archive with `change(name, data)` applied to every member (None keeps it); `change` may add members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, data in change(None, None) or []:
            new.writestr(name, data)
    return target


@pytest.mark.parametrize(
    "attack",
    ["sample inputs", "weight", "constant", "operator", "shape", "structure", "library", "twice"],
)
def test_nothing_in_an_archive_is_executed(static_pt2, dynamic_pt2, tmp_path, attack):
    ran = tmp_path / "ran"
    evil = pickle.dumps(Payload(ran))
    buffer = io.BytesIO()
    torch.save({"x": Payload(ran)}, buffer)
    members = zipfile.ZipFile(static_pt2).namelist()
    root = members[0].split("/")[0]

    def change(name, data):
        if name is None:
            extra = {
                "library": [(f"{root}/data/aotinductor/model/x.so", b"x")], "weight": [(f"{root}/data/weights/evil", buffer.getvalue())],
                "constant": [(f"{root}/data/constants/opaque_obj_0", evil)], "twice": [(members[0], b"0")],
            }  # fmt: skip
            return extra.get(attack, [])
        if attack == "sample inputs" and "sample_inputs" in name:
            return buffer.getvalue()
        if attack == "weight" and name.endswith("_weights_config.json"):
            config = json.loads(data)
            meta = next(iter(config["config"].values()))
            meta.update(use_pickle=True, path_name="evil")
            return json.dumps(config)
        if attack == "constant" and name.endswith("_constants_config.json"):
            return json.dumps(
                {
                    "config": {
                        "c": {
                            "path_name": "opaque_obj_0",
                            "is_param": False,
                            "use_pickle": True,
                            "tensor_meta": None,
                        }
                    }
                }
            )
        if attack == "operator" and "/models/" in name:
            return data.replace(b"torch.ops.aten.relu.default", b"torch.os.system")
        if attack == "shape" and "/models/" in name:
            return data.replace(
                b"Symbol(",
                b"__import__('pathlib').Path('%s').touch() or Symbol(" % str(ran).encode(),
            )
        if attack == "structure" and "/models/" in name:
            return data.replace(b"builtins.dict", b"collections.defaultdict")
        return data

    path = rewritten(
        dynamic_pt2 if attack == "shape" else static_pt2, tmp_path / "evil.pt2", change
    )
    message = rejected(ModelError, path, batch=2)
    assert "refused" in message
    assert not ran.exists()


def test_guards_of_an_archive_are_not_executed(dynamic_pt2, tmp_path):
    ran = tmp_path / "ran"
    guard = json.dumps([f"__import__('pathlib').Path({str(ran)!r}).touch() or True"]).encode()
    path = rewritten(
        dynamic_pt2, tmp_path / "guards.pt2",
        lambda name, data: data.replace(b'"guards_code": []', b'"guards_code": ' + guard) if name and "/models/" in name else data,
    )  # fmt: skip
    assert path.read_bytes() != dynamic_pt2.read_bytes()
    agree(import_model(path, batch=2))
    assert not ran.exists()


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "2*s77 + 1",
        "Max(1, s0)",
        "(s0//2)",
        "Mod(s1, 8)",
        "s0 <= 64",
        "u0",
        "Symbol('s40', positive=True, integer=True)",
        "Add(Symbol('s40'), Integer(2))",
    ],
)
def test_shape_expressions_are_arithmetic(text):
    from compiler.frontend.torch_archive import _is_arithmetic

    assert _is_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "s0.func",
        "s0 . func",
        "open",
        "exec",
        "lambda: 0",
        "s0;s1",
        "[s0]",
        "'a'",
        "s0\\n",
        "Symbol('os')",
        "(lambda: s0)()",
        "s0(1)(2)",
        "[s0 for s0 in s1]",
        "f'{s0}'",
        "1" * 5000,
    ],
)
def test_other_expressions_are_not(text):
    from compiler.frontend.torch_archive import _is_arithmetic

    assert not _is_arithmetic(text)
