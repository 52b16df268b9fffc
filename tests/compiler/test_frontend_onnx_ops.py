# SPDX-License-Identifier: Apache-2.0
"""Every ONNX converter against ONNX's reference implementation, in models of one node."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from compiler.frontend import import_model
from passes.evaluate import evaluate
from schedules.errors import UnsupportedModel


@dataclass(frozen=True)
class Case:
    """One node: arrays that are inputs (`x`), then constants; `shape_of_result` where ONNX infers none."""

    operator: str
    inputs: tuple
    constants: tuple = ()
    attributes: dict = field(default_factory=dict)
    outputs: int = 1
    opset: int = 20

    def model(self) -> onnx.ModelProto:
        names = [f"x{i}" for i in range(len(self.inputs))]
        weights = [(f"w{i}", c) for i, c in enumerate(self.constants)]
        results = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(
            self.operator,
            [*names, *["" if c is None else n for n, c in weights]],
            results,
            name="node",
            **self.attributes,
        )
        values = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip(names, self.inputs)
        ]
        outputs = [onnx.ValueInfoProto(name=n) for n in results]
        tensors = [numpy_helper.from_array(c, n) for n, c in weights if c is not None]
        graph = helper.make_graph([node], "case", values, outputs, initializer=tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        inferred = onnx.shape_inference.infer_shapes(model)
        model.graph.ClearField("output")
        model.graph.output.extend(inferred.graph.output)
        for output in model.graph.output:
            if not output.type.tensor_type.elem_type:  # GroupNormalization: ONNX infers nothing
                output.CopyFrom(
                    helper.make_tensor_value_info(
                        output.name, TensorProto.FLOAT, self.inputs[0].shape
                    )
                )
        return model


_rng = np.random.default_rng(0)


def f(*shape):
    return _rng.standard_normal(shape).astype("float32")


def i(*values):
    return np.array(values, "int64")


X = f(2, 6, 9, 7)
SMALL = f(3, 4, 5)
SCALES, SIZES = np.array([1, 1, 1.6, 0.7], "float32"), i(2, 6, 4, 13)
CASES = [
    *[Case("Resize", (X,), (None, SCALES), {"coordinate_transformation_mode": mode, "nearest_mode": rounding})
      for mode in ("half_pixel", "asymmetric", "pytorch_half_pixel")
      for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")],
    Case("Resize", (X,), (None, None, SIZES)), Case("Resize", (X,), (None, None, SIZES), {"coordinate_transformation_mode": "align_corners", "nearest_mode": "ceil"}),
    Case("Resize", (X,), (None, None, SIZES), {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    Case("Pad", (X,), (i(0, 1, 2, 0, 1, 0, 1, 3),), {"mode": "edge"}), Case("Pad", (X,), (i(1, 2), None, i(-1)), {"mode": "wrap"}),
    Case("GatherND", (SMALL, i(2, 0, -1, 3).reshape(2, 2))), Case("GatherND", (SMALL,), (i(1, -1, 0, 2, 3, 4).reshape(2, 3),)), Case("GatherND", (SMALL,), (i(-1, 0).reshape(2, 1),)),
    Case("ScatterND", (SMALL,), (i(2, 0, -1, 3).reshape(2, 2), f(2, 5))), Case("ScatterND", (SMALL,), (i(1).reshape(1, 1), f(1, 4, 5))),
    Case("ScatterElements", (SMALL,), (i(3, 0, -2, 1, 0, 2).reshape(3, 2, 1), f(3, 2, 1)), {"axis": 1}),
    *[Case("Einsum", shapes, (), {"equation": equation}) for equation, shapes in (
        ("bik,bjk->bij", (f(2, 3, 5), f(2, 4, 5))), ("bik,ko->bio", (f(2, 3, 5), f(5, 4))), ("bhid,bjhd->bhij", (f(2, 3, 4, 5), f(2, 6, 3, 5))),
        ("ij,jk", (f(3, 4), f(4, 2))), ("ba,cb", (f(3, 4), f(2, 3))), ("i,j->ji", (f(3), f(4))), ("i,i->", (f(5), f(5))), ("ijk->ki", (f(2, 3, 4),)), ("ij->", (f(2, 3),)),
        ("abc,bd->ad", (f(2, 3, 4), f(3, 5))), ("bij, bij -> b", (f(2, 3, 4), f(2, 3, 4))))],
    Case("MaxPool", (SMALL,), (), {"kernel_shape": [3], "strides": [2], "pads": [1, 0]}), Case("MaxPool", (SMALL,), (), {"kernel_shape": [2], "strides": [2], "ceil_mode": 1}),
    Case("AveragePool", (SMALL,), (), {"kernel_shape": [3], "strides": [2], "pads": [1, 1], "count_include_pad": 1}), Case("AveragePool", (SMALL,), (), {"kernel_shape": [2]}),
    *[Case(name, (X,)) for name in (
        "Abs", "Neg", "Exp", "Floor", "Ceil", "Erf", "Sigmoid", "Tanh", "Sin", "Cos", "Relu", "Sign", "IsNaN", "Softplus", "Round", "Gelu", "HardSigmoid",
        "HardSwish", "Elu", "LeakyRelu", "Mish", "Softsign", "Softmax", "LogSoftmax", "Identity", "Flatten", "Transpose", "GlobalAveragePool", "GlobalMaxPool",
        "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ArgMax", "ArgMin", "Dropout",
    )],
    *[Case(name, (np.abs(X) + 0.1,)) for name in ("Log", "Sqrt", "Reciprocal")],
    *[Case(name, (SMALL,), (f(4, 1),)) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "PRelu")],
    *[Case(name, (SMALL > 0,), (f(5) > 0,)) for name in ("And", "Or", "Xor")],
    Case("Not", (SMALL > 0,)), Case("Equal", (np.round(SMALL),), (np.zeros(5, "float32"),)), Case("Gelu", (X,), (), {"approximate": "tanh"}),
    Case("Add", (SMALL,), (np.zeros((4, 5), "float32"),)), Case("Add", (f(1, 5),), (np.zeros((3, 5), "float32"),)),
    *[Case("Pow", (np.abs(SMALL) + 0.1,), (np.array(e, "float32"),)) for e in (2, 3, 0.5, -1.5)], Case("Pow", (SMALL,), (i(2),)),
    Case("Clip", (X,), (np.float32(-0.5) * np.ones((), "float32"), np.array(0.5, "float32"))), Case("Clip", (X,), (None, np.array(6, "float32"))),
    Case("Clip", (X,), (), {"min": -0.5, "max": 0.5}, opset=6), Case("Where", (SMALL > 0, SMALL), (np.array(0, "float32"),)),
    Case("Cast", (SMALL,), (), {"to": TensorProto.INT64}), Case("Cast", (SMALL,), (), {"to": TensorProto.BOOL}), Case("Cast", (i(1, 2),), (), {"to": TensorProto.FLOAT}),
    Case("HardSigmoid", (X,), (), {"alpha": 0.3, "beta": 0.4}), Case("Elu", (X,), (), {"alpha": 0.3}), Case("LeakyRelu", (X,), (), {"alpha": 0.3}),
    Case("Softmax", (X,), (), {"axis": 1}), Case("LogSoftmax", (X,), (), {"axis": 2}),
    Case("MatMul", (SMALL,), (f(5, 6),)), Case("MatMul", (SMALL, f(3, 5, 2))), Case("MatMul", (f(5),), (f(5, 6),)), Case("MatMul", (f(3, 5),), (f(2, 5, 6),)),
    Case("Gemm", (f(3, 5),), (f(5, 6), f(6))), Case("Gemm", (f(3, 5),), (f(6, 5), f(6)), {"transB": 1, "alpha": 0.5, "beta": 2.0}), Case("Gemm", (f(5, 3),), (f(5, 6),), {"transA": 1}),
    Case("Conv", (X,), (f(4, 6, 3, 3), f(4))), Case("Conv", (X,), (f(4, 6, 3, 3),), {"strides": [2, 1], "pads": [1, 0, 2, 1]}), Case("Conv", (X,), (f(12, 1, 3, 3),), {"group": 6, "dilations": [2, 2]}),
    Case("Conv", (X,), (f(4, 6, 3, 3),), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}), Case("Conv", (X,), (f(4, 6, 4, 4),), {"auto_pad": "SAME_LOWER"}),
    Case("Conv", (X,), (f(4, 6, 3, 3),), {"auto_pad": "VALID"}), Case("Conv", (SMALL,), (f(6, 4, 3), f(6)), {"pads": [1, 0]}), Case("Conv", (SMALL,), (f(6, 2, 2),), {"group": 2, "strides": [2]}),
    Case("ConvTranspose", (X,), (f(6, 4, 3, 3), f(4)), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    Case("BatchNormalization", (X,), (f(6), f(6), f(6), np.abs(f(6)) + 0.1), {"epsilon": 1e-3}), Case("LayerNormalization", (SMALL,), (f(5), f(5))),
    Case("LayerNormalization", (SMALL,), (f(4, 5),), {"axis": 1, "epsilon": 1e-2}), Case("InstanceNormalization", (X,), (f(6), f(6))),
    Case("GroupNormalization", (X,), (f(6), f(6)), {"num_groups": 3}, opset=21), Case("MaxPool", (X,), (), {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}),
    Case("MaxPool", (X,), (), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}), Case("MaxPool", (X,), (), {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("AveragePool", (X,), (), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}), Case("AveragePool", (X,), (), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", (X,), (), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    Case("Reshape", (SMALL,), (i(0, -1),)), Case("Flatten", (SMALL,), (), {"axis": 2}), Case("Squeeze", (f(1, 3, 1),), (i(0, -1),)), Case("Squeeze", (f(1, 3, 1),), (), {"axes": [0]}, opset=11),
    Case("Unsqueeze", (SMALL,), (i(0, -1),)), Case("Expand", (f(3, 1, 5),), (i(2, 1, 4, 1),)), Case("Transpose", (SMALL,), (), {"perm": [1, 2, 0]}),
    Case("Concat", (SMALL, f(3, 2, 5)), (), {"axis": -2}), Case("Split", (SMALL,), (i(1, 3),), {"axis": 1}, outputs=2), Case("Split", (X,), (), {"axis": 3, "num_outputs": 4}, outputs=4),
    Case("Split", (X,), (), {"axis": 1, "split": [2, 4]}, outputs=2, opset=11), Case("Slice", (X,), (i(1, -3), i(100, -1), i(1, 2))), Case("Slice", (X,), (i(-1), i(-(2**62)), i(3), i(-2))),
    Case("Slice", (X,), (), {"starts": [1], "ends": [3], "axes": [1]}, opset=9), Case("Slice", (X,), (i(0), i(2**62), i(2), i(3))),
    Case("Gather", (X,), (np.array(-1, "int64"),), {"axis": 1}), Case("Gather", (X,), (i(0, -2, 3),), {"axis": 2}), Case("Gather", (SMALL, i(0, -1, 2)), (), {"axis": 1}),
    Case("GatherElements", (SMALL,), (np.zeros((3, 2, 5), "int64") - 1,), {"axis": 1}), Case("Pad", (X,), (i(0, 0, 1, 2, 0, 1, 0, 3), np.array(0.5, "float32"))),
    Case("Pad", (X,), (i(1, 2), None, i(-1)), {"mode": "reflect"}), Case("Pad", (X,), (), {"pads": [0, 0, 1, 1, 0, 0, 1, 1]}, opset=9), Case("Tile", (SMALL,), (i(1, 2, 3),)),
    Case("ReduceMean", (X,), (i(2, -1),), {"keepdims": 0}), Case("ReduceMean", (X,), (), {"axes": [2, 3]}, opset=11), Case("ReduceSum", (X,), (i(1),)),
    Case("ReduceSum", (X,), (), {"noop_with_empty_axes": 1}), Case("ReduceMax", (X,), (i(3),), {"keepdims": 0}), Case("ArgMax", (X,), (), {"axis": -1, "keepdims": 0}),
    Case("CumSum", (SMALL,), (np.array(1, "int64"),)), Case("CumSum", (SMALL,), (np.array(-1, "int64"),), {"exclusive": 1}), Case("Trilu", (SMALL,), (np.array(1, "int64"),)),
    Case("Trilu", (SMALL,), (), {"upper": 0}), Case("DepthToSpace", (f(1, 8, 2, 3),), (), {"blocksize": 2}), Case("Col2Im", (f(2, 12, 6),), (i(4, 9), i(2, 3)), {"strides": [2, 3]}), Case("DepthToSpace", (f(1, 8, 2, 3),), (), {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", (f(1, 2, 4, 6),), (), {"blocksize": 2}), Case("Resize", (X,), (None, np.array([1, 1, 2, 3], "float32"))),
    Case("Resize", (X,), (None, np.array([1, 1, 2, 2], "float32")), {"mode": "linear"}), Case("Resize", (X,), (None, None, i(2, 6, 5, 13)), {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
    Case("LSTM", (f(4, 2, 3),), (f(1, 20, 3), f(1, 20, 5), f(1, 40)), {"hidden_size": 5}, outputs=3), Case("LSTM", (f(4, 2, 3),), (f(1, 20, 3), f(1, 20, 5)), {"hidden_size": 5}),
    Case("GRU", (f(4, 2, 3),), (f(1, 15, 3), f(1, 15, 5), f(1, 30)), {"hidden_size": 5, "linear_before_reset": 1}, outputs=2),
    Case("GRU", (f(4, 2, 3),), (f(1, 15, 3), f(1, 15, 5), f(1, 30)), {"hidden_size": 5}, outputs=2), Case("RNN", (f(4, 2, 3),), (f(1, 5, 3), f(1, 5, 5), f(1, 10)), {"hidden_size": 5}, outputs=2),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.operator}-{c.opset}")
def test_operator(case):
    model = case.model()
    imported = import_model(model)
    results = evaluate(imported.mod, list(case.inputs))
    expected = ReferenceEvaluator(model).run(None, {f"x{n}": a for n, a in enumerate(case.inputs)})
    assert len(results) == len(imported.outputs)
    for result, wanted, spec in zip(results, expected, imported.outputs):
        assert result.shape == wanted.shape == spec.shape and spec.dtype == wanted.dtype.name
        np.testing.assert_allclose(result, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.peers
@pytest.mark.parametrize(
    "case",
    [
        *[
            Case(name, (f(4, 2, 3),), (f(2, gates * 5, 3), f(2, gates * 5, 5), f(2, gates * 10)), {"hidden_size": 5, "direction": "bidirectional"}, outputs)
            for name, gates, outputs in (("LSTM", 4, 3), ("GRU", 3, 2), ("RNN", 1, 2))
        ],
        Case("LSTM", (f(4, 2, 3),), (f(1, 20, 3), f(1, 20, 5), f(1, 40)), {"hidden_size": 5, "direction": "reverse"}, 3),
        Case("Softmax", (X,), (), {"axis": 1}, opset=11), Case("Softmax", (X,), (), {}, opset=11),
        Case("ConvTranspose", (X,), (f(6, 2, 2, 2),), {"group": 2}),
        Case("AveragePool", (X,), (), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1}),
    ],
    ids=lambda c: f"{c.operator}-{c.opset}",
)  # fmt: skip
def test_operator_like_onnxruntime(case):
    """Where ONNX's reference implementation does not implement all that the specification says."""
    pytest.importorskip("onnxruntime")
    imported = import_model(case.model())
    for result, wanted in zip(
        evaluate(imported.mod, list(case.inputs)),
        imported.reference(list(case.inputs)),
        strict=True,
    ):
        np.testing.assert_allclose(result, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case("MaxPool", (X,), (), {"kernel_shape": [2, 2]}, outputs=2), "indices"),
        (Case("Dropout", (X,), (np.array(0.5, "float32"), np.array(True))), "training"),
        (Case("Resize", (X,), (None, None, i(2, 6, 5, 13)), {"mode": "cubic"}), "mode cubic"),
        (
            Case(
                "Resize",
                (X,),
                (None, SCALES),
                {"coordinate_transformation_mode": "half_pixel_symmetric"},
            ),
            "half_pixel_symmetric",
        ),
        (Case("Einsum", (f(3, 3),), (), {"equation": "ii->i"}), "equation ii->i"),
        (
            Case("GatherND", (SMALL,), (i(0, 1, 2).reshape(3, 1),), {"batch_dims": 1}),
            "batch dimensions",
        ),
        (Case("GatherND", (SMALL,), (i(3, 0).reshape(1, 2),)), "out of range"),
        (Case("ScatterND", (SMALL,), (i(1, 1).reshape(2, 1), f(2, 4, 5))), "several values"),
        (Case("ScatterND", (SMALL,), (i(3).reshape(1, 1), f(1, 4, 5))), "out of range"),
        (Case("ScatterND", (SMALL, i(0).reshape(1, 1), f(1, 4, 5))), "computed at run time"),
        (
            Case("ScatterND", (SMALL,), (i(1).reshape(1, 1), f(1, 4, 5)), {"reduction": "add"}),
            "reduction add",
        ),
        (Case("Einsum", (f(2, 3), f(3, 4)), (), {"equation": "...j,jk->...k"}), "equation"),
        (Case("Pad", (X,), (i(-1, 0), None, i(-1)), {"mode": "edge"}), "negative padding"),
        (Case("Reshape", (SMALL, i(12, 5))), "computed at run time|depends on data"),
        (
            Case(
                "LSTM", (f(4, 2, 3),), (f(1, 20, 3), f(1, 20, 5)), {"hidden_size": 5, "clip": 1.0}
            ),
            "clip",
        ),
        (Case("Cast", (SMALL,), (), {"to": TensorProto.FLOAT16}), "float16"),
        (Case("TopK", (SMALL,), (i(2),), outputs=2), "TopK .node."),
        (Case("Col2Im", (f(1, 12, 12),), (i(4, 5), i(2, 2))), "patches that overlap"),
        # A zeroth bias of 8 tokens, read by 12.
        (
            Case("Add", (f(1, 12, 4),), (f(8, 4),)),
            "Add .node.: its operands do not fit.*1x12x4, 8x4",
        ),
        (Case("Mul", (f(1, 12, 4), f(8, 4))), "Mul .node.: its operands do not fit.*1x12x4, 8x4"),
    ],
    ids=lambda v: v.operator if isinstance(v, Case) else "",
)
def test_refuses(case, says):
    with pytest.raises(UnsupportedModel, match=says):
        import_model(case.model())
