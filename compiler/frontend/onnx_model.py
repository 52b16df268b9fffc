# SPDX-License-Identifier: Apache-2.0
"""ONNX models to Relax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import tvm
from onnx import external_data_helper
from tvm import relax

from compiler.frontend import (
    Imported,
    Shape,
    TensorSpec,
    onnx_layer_ops,
    onnx_ops,
    onnx_quantization,
    onnx_shape_ops,
)
from compiler.frontend.onnx_convert import Converter, unsupported
from compiler.frontend.onnx_graph import OnnxGraph
from compiler.frontend.onnx_grids import unsupported_types, zero_points
from compiler.frontend.onnx_prepare import prepare
from compiler.frontend.support import first_line, main_function
from passes.name_layers import NameLayers
from schedules.errors import ModelError, UnsupportedModel

_IR_VERSION = 10
CONVERTERS = {
    **onnx_ops.CONVERTERS,
    **onnx_layer_ops.CONVERTERS,
    **onnx_shape_ops.CONVERTERS,
    **onnx_quantization.CONVERTERS,
}
_DTYPES = ("float32", "int64", "int32", "int16", "int8", "uint8", "bool")


def load_onnx(path: Path) -> onnx.ModelProto:
    """The checked model at `path` with its external data. Raises ModelError saying what is wrong with the file."""
    where = str(path)
    try:
        model = onnx.load_model(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=where) from None
    except Exception as error:  # protobuf's DecodeError, whatever its class is in this version
        raise ModelError(
            f"not an ONNX model, or truncated ({first_line(error)})", where=where
        ) from None
    if not model.ir_version or not model.graph.output:
        raise ModelError("not an ONNX model: it holds no graph", where=where)
    _load_external_data(model, path)
    return model


def _load_external_data(model: onnx.ModelProto, path: Path) -> None:
    """ONNX's own loader, which refuses paths outside the model's directory."""
    where = str(path)
    try:
        for tensor in external_data_helper._get_all_tensors(model):
            if external_data_helper.uses_external_data(tensor):
                info = external_data_helper.ExternalDataInfo(tensor)
                if not (path.parent / info.location).is_file():
                    raise ModelError(
                        f"external data of {tensor.name} is missing",
                        where=where,
                        wanted=str(path.parent / info.location),
                    )
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (ValueError, OSError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"its external data cannot be loaded: {first_line(error)}", where=where
        ) from None


def import_onnx(
    model: onnx.ModelProto, *, where: str, shapes: Mapping[str, Shape], batch: int | None
) -> Imported:
    """An ONNX model as Relax. See `compiler.frontend.import_model`."""
    _check(model, where)
    graph = prepare(model, where, shapes, batch)
    if problems := unsupported(graph, CONVERTERS):
        raise UnsupportedModel(
            f"{len(problems)} operators have no converter", where=where, found="; ".join(problems)
        )
    _check_tensors(graph)
    mod = _convert(graph)
    inputs = [
        TensorSpec(name, tuple(shape), np.dtype(dtype).name)
        for name, (shape, dtype) in graph.inputs.items()
    ]
    outputs = [TensorSpec(name, *_type(value)) for name, value in zip(graph.outputs, _results(mod))]
    return Imported(mod, inputs, outputs, "onnx", _reference(model, inputs, where))


def _check(model: onnx.ModelProto, where: str) -> None:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        if "No Op registered" in str(error) or "no op registered" in str(error).lower():
            return  # reported with all the other unsupported operators
        raise ModelError(f"not a valid ONNX model: {first_line(error)}", where=where) from None
    except ValueError as error:
        if "2GB" not in str(error) and "2GiB" not in str(error):
            raise ModelError(f"not a valid ONNX model: {first_line(error)}", where=where) from None


def _check_tensors(graph: OnnxGraph) -> None:
    """Only float32 and integer tensors, and no NaN among the weights."""
    for name, (_shape, dtype) in graph.inputs.items():
        if np.dtype(dtype).name not in _DTYPES:
            raise UnsupportedModel(
                f"input {name} is {np.dtype(dtype).name}",
                where=graph.where,
                wanted=", ".join(_DTYPES),
                todo="Export the model in float32.",
            )
    if refused := unsupported_types(graph):
        raise UnsupportedModel(
            "activations are quantized to a type without a kernel",
            where=graph.where,
            found="; ".join(refused[:4]),
            wanted="int8 or uint8",
            todo="Quantize activations to 8 bits.",
        )
    unread = zero_points(graph)
    for name, array in graph.constants.items():
        if array.dtype.name not in _DTYPES and name not in unread:
            raise UnsupportedModel(
                f"weight {name} is {array.dtype.name}",
                where=graph.where,
                wanted="float32",
                todo="Export the model in float32.",
            )
        if array.dtype == np.float32 and np.isnan(array).any():
            raise ModelError(
                f"weight {name} holds NaN",
                where=graph.where,
                found=f"{int(np.isnan(array).sum())} of {array.size} values",
            )


def _convert(graph: OnnxGraph) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    converter = Converter(builder, graph, CONVERTERS)
    params = [
        relax.Var(name, relax.TensorType(tuple(shape), np.dtype(dtype).name))
        for name, (shape, dtype) in graph.inputs.items()
    ]
    converter.env.update(zip(graph.inputs, params))
    with main_function(builder, params):
        with builder.dataflow():
            for node in graph.nodes:
                converter.convert(node)
            results = [converter.value(name) for name in graph.outputs]
            output = builder.emit_output(results[0] if len(results) == 1 else relax.Tuple(results))
        builder.emit_func_output(output)
    return NameLayers(converter.names, converter.grids)(builder.finalize())


def _results(mod: tvm.IRModule) -> list:
    kind = mod["main"].ret_ty
    return list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]


def _type(kind: relax.TensorType) -> tuple[Shape, str]:
    return tuple(int(d) for d in kind.shape), str(kind.dtype.dtype)


def _reference(model: onnx.ModelProto, inputs: Sequence[TensorSpec], where: str) -> Callable:
    session: list = []  # made when first needed: it holds the weights once more

    def reference(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The model run by ONNX Runtime, or by ONNX's reference implementation where that is not installed."""
        if len(arrays) != len(inputs):
            raise ModelError(
                "wrong number of inputs",
                where=where,
                found=str(len(arrays)),
                wanted=str(len(inputs)),
            )
        if not session:
            session.append(_session(model))
        feeds = {spec.name: np.asarray(a, spec.dtype, order="C") for spec, a in zip(inputs, arrays)}
        return [np.asarray(r) for r in session[0].run(None, feeds)]

    return reference


def _session(model: onnx.ModelProto):
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # ONNX Runtime refuses file format versions it has not seen, though they hold nothing that it would not know.
    version, model.ir_version = model.ir_version, min(model.ir_version, _IR_VERSION)
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    finally:
        model.ir_version = version
