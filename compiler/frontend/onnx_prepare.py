# SPDX-License-Identifier: Apache-2.0
"""Prepare an ONNX graph for conversion: static shapes, constants computed in numpy, recurrent layers unrolled, names.

After `prepare` every value has a static type, everything that does not depend on the inputs is a constant, and every
constant knows what the model calls it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from compiler.frontend import Shape
from compiler.frontend.names import is_anonymous, layer_name
from compiler.frontend.onnx_graph import OnnxGraph, scope_of
from compiler.frontend.onnx_grids import fold_dequantize, fold_transpose, take_apart
from compiler.frontend.onnx_recurrent import EXPANSIONS
from compiler.frontend.support import first_line, require_known
from schedules.errors import ModelError, UnsupportedModel

_RANDOM = (
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
)
# Folding a broadcast would store what is better done at run time.
_FOLDED_BYTES = 1 << 20
# Constants up to this size take part in shape inference by value (they may be shapes); larger ones by type only.
_SHAPE_ELEMENTS = 256


def prepare(
    model: onnx.ModelProto, where: str, shapes: Mapping[str, Shape], batch: int | None
) -> OnnxGraph:
    """Raises ModelError for shapes that are open or do not fit, UnsupportedModel for control flow that stays."""
    if model.functions:
        import onnx.inliner

        model = onnx.inliner.inline_local_functions(model)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    inputs = _inputs(model, constants, where, shapes, batch)
    outputs = [o.name for o in model.graph.output]
    graph = OnnxGraph(
        where,
        list(model.opset_import),
        take_apart(model.graph.node, constants, outputs),
        inputs,
        outputs,
        constants,
    )
    graph.names = {name: layer_name(name) for name in constants if not is_anonymous(name)}
    changed = True
    while changed:
        _infer(graph, model.ir_version)
        changed = _fold(graph)
        changed |= _expand(graph)
    _drop_unused(graph)
    return graph


def _inputs(
    model, constants: Mapping, where: str, shapes: Mapping[str, Shape], batch: int | None
) -> dict:
    declared = [i for i in model.graph.input if i.name not in constants]
    known = [i.name for i in declared]
    require_known(shapes, known, where)
    inputs = {}
    for value in declared:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            raise UnsupportedModel(f"input {value.name} is not a tensor", where=where)
        dims = (
            [
                d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
                for d in tensor.shape.dim
            ]
            if tensor.HasField("shape")
            else None
        )
        shape = _static_shape(value.name, dims, shapes.get(value.name), batch, where)
        inputs[value.name] = (shape, helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return inputs


def _static_shape(
    name: str, dims: list | None, wanted: Shape | None, batch: int | None, where: str
) -> Shape:
    text = "any shape" if dims is None else "x".join("?" if d is None else str(d) for d in dims)
    if wanted is not None:
        if dims is not None and (
            len(wanted) != len(dims) or any(d is not None and d != w for d, w in zip(dims, wanted))
        ):
            raise ModelError(
                f"input {name} cannot have this shape",
                where=where,
                found="x".join(map(str, wanted)),
                wanted=text,
            )
        return tuple(wanted)
    shape = list(dims) if dims is not None else [None]
    if batch is not None and shape:
        if shape[0] not in (None, batch):
            raise ModelError(
                f"input {name} has batch {shape[0]} in the model",
                where=where,
                wanted=str(batch),
                todo="Export with an open batch dimension.",
            )
        shape[0] = batch if dims is not None else None
    if None in shape:
        raise ModelError(
            f"input {name} leaves dimensions open", where=where, found=text, wanted="one shape",
            todo=f"Give --input {name}=... (or a batch, where only the first is open).",
        )  # fmt: skip
    return tuple(shape)


def _infer(graph: OnnxGraph, ir_version: int) -> None:
    """Types of all values by ONNX's own inference, which sees large constants by type only."""
    small = [
        numpy_helper.from_array(a, n)
        for n, a in graph.constants.items()
        if a.size <= _SHAPE_ELEMENTS
    ]
    typed = {n: (a.shape, a.dtype) for n, a in graph.constants.items() if a.size > _SHAPE_ELEMENTS}
    values = [_value(name, *kind) for name, kind in {**graph.inputs, **typed}.items()]
    outputs = [onnx.ValueInfoProto(name=name) for name in graph.outputs]
    skeleton = helper.make_model(
        helper.make_graph(graph.nodes, "skeleton", values, outputs, initializer=small),
        opset_imports=graph.opsets,
        ir_version=ir_version,
    )
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        raise ModelError(
            f"its shapes are inconsistent: {first_line(error)}", where=graph.where
        ) from None
    graph.types = {**graph.inputs, **{n: (a.shape, a.dtype) for n, a in graph.constants.items()}}
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        tensor = value.type.tensor_type
        if (
            value.type.HasField("tensor_type")
            and tensor.HasField("shape")
            and all(d.HasField("dim_value") for d in tensor.shape.dim)
            and tensor.elem_type
        ):
            shape = tuple(d.dim_value for d in tensor.shape.dim)
            graph.types.setdefault(
                value.name, (shape, helper.tensor_dtype_to_np_dtype(tensor.elem_type))
            )


def _value(name: str, shape: Shape, dtype: np.dtype) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape)
    )


def _fold(graph: OnnxGraph) -> bool:
    """Compute nodes whose inputs are constant; whether any was."""
    kept = []
    for node in graph.nodes:
        if not _fold_node(graph, node):
            kept.append(node)
    changed = len(kept) < len(graph.nodes)
    graph.nodes = kept
    return changed


def _fold_node(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    inputs = [name for name in node.input if name]
    if node.op_type in ("Shape", "Size") and inputs[0] in graph.types:
        graph.constants[node.output[0]] = _shape_value(node, graph.types[inputs[0]][0])
        return True
    if node.op_type == "Identity" and inputs[0] in graph.constants:
        _store(graph, node, [graph.constants[inputs[0]]], inputs)
        return True
    if fold_dequantize(graph, node, _evaluate):
        return True
    has_branches = any(
        a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute
    )
    if (
        has_branches
        or node.op_type in _RANDOM
        or node.domain not in ("", "ai.onnx")
        or not all(n in graph.constants for n in inputs)
    ):
        return False
    results = _evaluate(graph, node, inputs)
    size = sum(graph.constants[n].nbytes for n in inputs)
    if results is None or any(
        not isinstance(r, np.ndarray) or r.nbytes > max(_FOLDED_BYTES, 2 * size) for r in results
    ):
        return False
    _store(graph, node, results, inputs)
    fold_transpose(graph, node)
    return True


def _shape_value(node: onnx.NodeProto, shape: Shape) -> np.ndarray:
    if node.op_type == "Size":
        return np.array(int(np.prod(shape)), "int64")
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return np.array(shape[attributes.get("start", 0) : attributes.get("end", len(shape))], "int64")


def _evaluate(graph: OnnxGraph, node: onnx.NodeProto, inputs: list[str]) -> list | None:
    """The node's outputs by ONNX's reference implementation, None where it has none."""
    feeds = {name: graph.constants[name] for name in dict.fromkeys(inputs)}
    values = [_value(name, array.shape, array.dtype) for name, array in feeds.items()]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    single = helper.make_model(
        helper.make_graph([node], "fold", values, outputs), opset_imports=graph.opsets
    )
    try:
        return [np.asarray(r) for r in ReferenceEvaluator(single).run(None, feeds)]
    except Exception:  # the reference implementation raises anything for what it lacks: the node stays, and is checked as any other
        return None


def _store(graph: OnnxGraph, node: onnx.NodeProto, results: list, inputs: list[str]) -> None:
    owners = [graph.names[n] for n in inputs if n in graph.names]
    for name, array in zip([o for o in node.output if o], results):
        graph.constants[name] = array
        if owners:
            graph.names[name] = owners[0]


def _expand(graph: OnnxGraph) -> bool:
    """Unroll LSTM, GRU and RNN nodes over their static number of steps."""
    nodes, changed = [], False
    for node in graph.nodes:
        expansion = EXPANSIONS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if expansion is None or node.input[0] not in graph.types:
            nodes.append(node)
            continue
        unrolled = expansion(
            node,
            graph.types[node.input[0]][0],
            graph.constants,
            scope_of(node) or node.op_type.lower(),
        )
        if isinstance(unrolled, str):
            raise UnsupportedModel(f"{node.op_type} {node.name}: {unrolled}", where=graph.where)
        nodes += unrolled.nodes
        graph.constants.update(unrolled.constants)
        graph.names.update(unrolled.names)
        changed = True
    graph.nodes = nodes
    return changed


def _drop_unused(graph: OnnxGraph) -> None:
    """Nodes and constants that no output needs."""
    needed, kept = set(graph.outputs), []
    for node in reversed(graph.nodes):
        if any(o in needed for o in node.output):
            kept.append(node)
            needed.update(n for n in node.input if n)
            for attribute in node.attribute:
                needed.update(n for inner in attribute.g.node for n in inner.input)
    graph.nodes = kept[::-1]
    graph.constants = {n: a for n, a in graph.constants.items() if n in needed}
