# SPDX-License-Identifier: Apache-2.0
"""What an ONNX file stores as integers: weights become float32 constants on their grids, operators on integers are written
as float operators between QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import helper

from compiler.frontend import quantization
from compiler.frontend.names import is_anonymous, layer_name
from compiler.frontend.onnx_graph import OnnxGraph
from passes.name_layers import Grid

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# What quantizers make of the name of a weight: ONNX Runtime `fc.weight_quantized`, since 1.32 `fc.weight_Transposed_quantized`
# too; NNCF `q_output_fc.weight_1`.
_QUANTIZED = re.compile(r"(?P<runtime>.+?)(?:_Transposed)?_quantized|q_output_(?P<nncf>.+)_\d+")
# Types of integers that only weights may have: they are gone once the constants are computed.
_NARROW = ("int4", "uint4", "int2", "uint2")


def fold_dequantize(graph: OnnxGraph, node: onnx.NodeProto, evaluate: Callable) -> bool:
    """Compute a DequantizeLinear of constants, however much larger floats are, and remember the grid; whether it was one."""
    inputs = [name for name in node.input if name]
    if node.op_type != DEQUANTIZE or not all(n in graph.constants for n in inputs):
        return False
    name, stored, scale = node.output[0], inputs[0], graph.constants[inputs[1]]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    floats = _dequantized(*(graph.constants[n] for n in inputs), axis=attributes.get("axis", 1))
    if floats is None:  # in blocks, or anything else that is new
        results = evaluate(graph, node, inputs)
        if results is None:
            return False
        floats = results[0]
    graph.constants[name] = floats
    owner = layer_name(_unquantized(graph.names.get(stored, "")))
    if owner and not is_anonymous(owner):
        graph.names[name] = owner
    is_grid = (
        str(graph.constants[stored].dtype) in (*quantization.BYTES, *_NARROW) and scale.ndim <= 1
    )
    if is_grid and scale.dtype == np.float32 and np.all(scale > 0):
        axis = attributes.get("axis", 1) % max(1, floats.ndim) if scale.size > 1 else None
        graph.grids[name] = Grid(scale.reshape(-1), axis)
    return True


def _unquantized(name: str) -> str:
    """What a weight was called before it was quantized."""
    found = _QUANTIZED.fullmatch(name)
    return (found["runtime"] or found["nncf"]) if found else name


def _dequantized(
    stored: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None, *, axis: int
) -> np.ndarray | None:
    """(stored - zero_point) * scale in float32, per tensor or along an axis; None for anything else."""
    if scale.dtype != np.float32 or str(stored.dtype) not in (
        *quantization.BYTES,
        *quantization.WIDE,
        *_NARROW,
        "int32",
    ):
        return None
    along = [1] * stored.ndim
    if scale.size > 1:
        if scale.ndim != 1 or not -stored.ndim <= axis < stored.ndim:
            return None
        along[axis] = scale.size
        if stored.shape[axis] != scale.size:
            return None
    centred = stored.astype("int64")
    if zero_point is not None:
        centred = centred - zero_point.astype("int64").reshape(along if zero_point.size > 1 else ())
    return centred.astype("float32") * scale.reshape(along if scale.size > 1 else ())


def fold_transpose(graph: OnnxGraph, node: onnx.NodeProto) -> None:
    """A transposed weight is on the grid of the one it was made from."""
    if node.op_type != "Transpose" or node.input[0] not in graph.grids:
        return
    grid = graph.grids[node.input[0]]
    rank = graph.constants[node.input[0]].ndim
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}.get("perm")
    order = list(given) if given is not None else list(range(rank))[::-1]
    axis = None if grid.axis is None else order.index(grid.axis)
    graph.grids[node.output[0]] = Grid(grid.scale, axis)


def unsupported_types(graph: OnnxGraph) -> list[str]:
    """Quantizations of activations to types that no kernel and no float32 reading of the file covers."""
    found = []
    for node in graph.nodes:
        if node.op_type not in (QUANTIZE, DEQUANTIZE) or node.domain not in ("", "ai.onnx"):
            continue
        dtype = integer_type(graph, node)
        if dtype not in (*quantization.BYTES, *quantization.WIDE, "int32"):
            found.append(f"{node.op_type} {node.name or node.output[0]} ({dtype})")
    return found


def integer_type(graph: OnnxGraph, node: onnx.NodeProto) -> str:
    if len(node.input) > 2 and node.input[2] in graph.constants:
        return str(graph.constants[node.input[2]].dtype)
    if node.op_type == DEQUANTIZE:
        return str(np.dtype(graph.types.get(node.input[0], ((), np.uint8))[1]))
    chosen = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
    return str(helper.tensor_dtype_to_np_dtype(chosen)) if chosen else "uint8"


def zero_points(graph: OnnxGraph) -> set[str]:
    """Constants that are read as zero points only."""
    roles: dict[str, set[bool]] = {}
    for node in graph.nodes:
        for position, name in enumerate(node.input):
            is_zero_point = node.op_type in (QUANTIZE, DEQUANTIZE) and position == 2
            roles.setdefault(name, set()).add(is_zero_point)
    return {name for name, role in roles.items() if role == {True}}


# Operators on integers, taken apart. Inputs of one: a list of (value, scale, zero point) and the result's scale and zero
# point, by position. What is computed in float32 between them, and its attributes, are the node's own.

# operator -> (float operator, positions of its operands, position of the result's scale)
_INTEGER_OPERATORS: dict[tuple[str, str], tuple[str, tuple[int, ...], int]] = {
    ("", "QLinearConv"): ("Conv", (0, 3), 6),
    ("", "QLinearMatMul"): ("MatMul", (0, 3), 6),
    ("com.microsoft", "QGemm"): ("Gemm", (0, 3), 7),
    ("com.microsoft", "QLinearAdd"): ("Add", (0, 3), 6),
    ("com.microsoft", "QLinearMul"): ("Mul", (0, 3), 6),
    ("com.microsoft", "QLinearAveragePool"): ("AveragePool", (0,), 3),
    ("com.microsoft", "QLinearGlobalAveragePool"): ("GlobalAveragePool", (0,), 3),
    ("com.microsoft", "QLinearLeakyRelu"): ("LeakyRelu", (0,), 3),
    ("com.microsoft", "QLinearSigmoid"): ("Sigmoid", (0,), 3),
    ("com.microsoft", "QLinearSoftmax"): ("Softmax", (0,), 3),
}
_CONCAT = (
    "com.microsoft",
    "QLinearConcat",
)  # the result's scale first, then any number of operands
_BIAS_AT = {"QLinearConv": 8, "QGemm": 6}
# Operators that give int32 sums -> float operator; a Cast to float32 must be all that reads these.
_SUMS = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
# Attributes of the integer operator that its float operator lacks.
_DROPPED = ("channels_last", "opset")


def take_apart(
    nodes: Sequence[onnx.NodeProto], constants: dict[str, np.ndarray], outputs: Sequence[str]
) -> list:
    """The nodes with integer operators written as DequantizeLinear, float operator, QuantizeLinear.

    MatMulInteger and ConvInteger have no scale: their operands are dequantized with scale 1, and what is left of the Cast
    of their sums to float32 is an Identity. New constants (scales) go into `constants`. An operator that cannot be taken
    apart stays, and is reported with all others that have no converter.
    """
    found = []
    floats = _sums_read_as_floats(nodes) - set(outputs)
    for node in map(_in_standard_domain, nodes):
        if node.op_type == "Cast" and node.input[0] in floats:
            found.append(helper.make_node("Identity", [f"{node.input[0]}/float"], node.output))
            continue
        if node.op_type in _SUMS and node.output[0] in floats:
            found += _sum_apart(node, constants)
            continue
        domain = "" if node.domain == "ai.onnx" else node.domain
        rule = _INTEGER_OPERATORS.get((domain, node.op_type))
        if (domain, node.op_type) == _CONCAT:
            rule = ("Concat", tuple(range(2, len(node.input), 3)), 0)
        found += [node] if rule is None else _apart(node, *rule, constants)
    return found


def _in_standard_domain(node: onnx.NodeProto) -> onnx.NodeProto:
    """ONNX Runtime has QuantizeLinear and DequantizeLinear of its own for types that an older opset lacks: they do the same."""
    if node.domain != "com.microsoft" or node.op_type not in (QUANTIZE, DEQUANTIZE):
        return node
    same = onnx.NodeProto()
    same.CopyFrom(node)
    same.domain = ""
    return same


def _sums_read_as_floats(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    """Results of operators that give int32 sums, where nothing but casts to float32 reads them."""
    sums = {node.output[0] for node in nodes if node.op_type in _SUMS and node.domain == ""}
    cast: set[str] = set()
    for node in nodes:
        to = next((a.i for a in node.attribute if a.name == "to"), 0)
        is_cast = node.op_type == "Cast" and to == onnx.TensorProto.FLOAT
        (cast.update if is_cast else sums.difference_update)(node.input)
    return sums & cast


def _sum_apart(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> list:
    at = node.output[0]
    inputs, made = [], []
    for position, axis in ((0, 0), (1, 0 if node.op_type == "ConvInteger" else -1)):
        zero_point = node.input[position + 2] if len(node.input) > position + 2 else ""
        size = constants[zero_point].size if zero_point in constants else 1
        scale, name = f"{at}/{position}_scale", f"{at}/{position}_dequantized"
        constants[scale] = np.ones(size if size > 1 else (), "float32")
        extra = {"axis": axis} if size > 1 else {}
        parts = [node.input[position], scale, *([zero_point] if zero_point else [])]
        made.append(helper.make_node(DEQUANTIZE, parts, [name], **extra))
        inputs.append(name)
    kept = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    operator = _SUMS[node.op_type]
    made.append(helper.make_node(operator, inputs, [f"{at}/float"], name=node.name, **kept))
    return made


def _apart(node, operator: str, operands: Sequence[int], result: int, constants: dict) -> list:
    at = node.output[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("channels_last"):
        return [node]
    inputs, made = [], []
    for position in operands:
        value, scale, *zero_point = node.input[position : position + 3]
        name = f"{at}/{position}_dequantized"
        # Weights have a scale per output channel: the first axis of a convolution, the last of a product.
        axis = 0 if operator == "Conv" or attributes.get("transB") else -1
        per_channel = constants.get(scale, np.zeros(1)).size > 1
        extra = {"axis": axis} if per_channel else {}
        made.append(helper.make_node(DEQUANTIZE, [value, scale, *zero_point], [name], **extra))
        inputs.append(name)
    bias_at = _BIAS_AT.get(node.op_type)
    if bias_at is not None and len(node.input) > bias_at and node.input[bias_at]:
        x_scale, w_scale = (constants.get(node.input[p]) for p in (1, 4))
        if x_scale is None or w_scale is None:
            return [node]
        name = f"{at}/bias_scale"
        alpha = np.float32(attributes.get("alpha", 1.0))
        constants[name] = (x_scale.reshape(()) * w_scale.reshape(-1) * alpha).astype("float32")
        constants[name] = constants[name].reshape(() if w_scale.size == 1 else (-1,))
        extra = {"axis": 0} if w_scale.size > 1 else {}
        inputs.append(f"{at}/bias")
        made.append(
            helper.make_node(DEQUANTIZE, [node.input[bias_at], name], [f"{at}/bias"], **extra)
        )
    kept = {k: v for k, v in attributes.items() if k not in _DROPPED}
    parameters = [p for p in node.input[result : result + 2] if p]
    float_result = f"{at}/float" if parameters else at
    made.append(helper.make_node(operator, inputs, [float_result], name=node.name, **kept))
    if parameters:
        made.append(helper.make_node(QUANTIZE, [float_result, *parameters], [at]))
    return made
