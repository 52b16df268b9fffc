# SPDX-License-Identifier: Apache-2.0
"""Prepare an exported program for conversion: chosen decomposition, then everything constant computed by torch.

Decomposing everything breaks attention, GELU and layer norm into pieces that no later pass could put together again;
decomposing nothing leaves hundreds of composite operators. `KEPT` lists what stays whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from compiler.frontend.names import layer_name
from compiler.frontend.torch_grids import grid_of, is_dequantize, weight_name
from passes.name_layers import Grid
from schedules.errors import ModelError, UnsupportedModel

DTYPES = {
    torch.float32: "float32", torch.float64: "float64", torch.int64: "int64", torch.int32: "int32", torch.int16: "int16", torch.int8: "int8",
    torch.uint8: "uint8", torch.bool: "bool",
}  # fmt: skip
KEPT = (
    "linear.default", "matmul.default", "scaled_dot_product_attention.default", "gelu.default", "silu.default",
    "layer_norm.default", "group_norm.default", "rms_norm.default", "hardswish.default", "hardsigmoid.default", "softplus.default",
    "leaky_relu.default", "elu.default", "prelu.default", "pixel_shuffle.default", "adaptive_avg_pool2d.default",
    "upsample_nearest2d.vec", "upsample_bilinear2d.vec", "hardtanh.default", "relu6.default", "log_softmax.int", "softmax.int",
    "conv1d.default", "conv2d.default", "std.correction", "stack.default", "square.default", "reciprocal.default", "mish.default",
    "addmm.default", "rsub.Scalar", "split.Tensor", "split_with_sizes.default", "unbind.int", "t.default", "transpose.int",
    "instance_norm.default", "pad.default", "col2im.default", "im2col.default",
)  # fmt: skip
# Evaluating these would freeze one sample of a random variable or an uninitialised buffer into the model.
_NOT_FOLDED = (
    "rand",
    "dropout",
    "bernoulli",
    "empty",
    "normal",
    "multinomial",
    "exponential",
    "uniform",
)
# A folded constant may be larger than its inputs only this far: a broadcast is better done at run time.
_FOLDED_BYTES = 1 << 20


@dataclass(frozen=True)
class Prepared:
    """A functional graph whose placeholders are inputs or constants, and nothing constant is left to compute.

    `constants` maps nodes (placeholders, attributes, folded calls) to tensors; `names` some of them to layer names, `grids`
    weights that are stored as integers to their scales.
    """

    graph: fx.Graph
    inputs: list[fx.Node]
    constants: dict[fx.Node, torch.Tensor]
    names: dict[fx.Node, str]
    outputs: list[fx.Node]
    grids: dict[fx.Node, Grid]


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Functionalised, and decomposed into core operators but for `KEPT`."""
    table = torch.export.default_decompositions()
    for name in KEPT:
        packet, _, overload = name.partition(".")
        table.pop(getattr(getattr(torch.ops.aten, packet), overload), None)
    return program.run_decompositions(table)


def prepare(program: ExportedProgram, where: str) -> Prepared:
    """Decompose, bind and fold. Raises ModelError for a program that changes its own state or takes odd inputs."""
    program = decompose(program)
    signature = program.graph_signature
    kinds = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    inputs, constants, names = [], {}, {}
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        spec = kinds.get(node.name)
        if spec is None or not isinstance(node.meta.get("val"), torch.Tensor):
            if node.users:
                raise UnsupportedModel(
                    f"input {node.name} is not a tensor",
                    where=where,
                    found=str(getattr(spec, "kind", "no input")),
                )
            continue
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            constants[node] = _bound_tensor(program, spec.target)
            names[node] = layer_name(spec.target)
        elif node.users:
            raise UnsupportedModel(f"input {node.name} is a {spec.kind.name}", where=where)
    if open_nodes := [n.name for n in program.graph.nodes if _is_open(n.meta.get("val"))]:
        raise UnsupportedModel(
            "the size of a result depends on data", where=where, found=", ".join(open_nodes[:5])
        )
    grids = _fold(program, constants, names)
    outputs = _user_outputs(program, where)
    return Prepared(program.graph, inputs, constants, names, outputs, grids)


def _is_open(value) -> bool:
    """Whether a tensor's shape, or a number, is known at run time only."""
    if isinstance(value, (tuple, list)):
        return any(map(_is_open, value))
    if isinstance(value, torch.Tensor):
        return any(not isinstance(d, int) for d in value.shape)
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _bound_tensor(program: ExportedProgram, target: str) -> torch.Tensor:
    tensor = program.state_dict.get(target)
    tensor = program.constants[target] if tensor is None else tensor
    tensor = tensor.detach()
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def _user_outputs(program: ExportedProgram, where: str) -> list[fx.Node]:
    output = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    mutated = [
        s.target
        for s in program.graph_signature.output_specs
        if s.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
    ]
    if mutated:
        raise UnsupportedModel(
            "the model changes its own state when it runs",
            where=where,
            found=", ".join(map(str, mutated)),
            todo="Call model.eval() before exporting.",
        )
    nodes = []
    for value, spec in zip(output.args[0], program.graph_signature.output_specs):
        if spec.kind is not OutputKind.USER_OUTPUT or value is None:
            continue
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            raise UnsupportedModel("an output is not a tensor", where=where, found=repr(value))
        nodes.append(value)
    if not nodes:
        raise ModelError("the model has no tensor outputs", where=where)
    return nodes


def _fold(program: ExportedProgram, constants: dict, names: dict) -> dict[fx.Node, Grid]:
    """Compute every call all of whose inputs are constant, with torch itself; a folded weight keeps its layer's name.

    Returns the scales of weights that were integers.
    """
    grids: dict[fx.Node, Grid] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            value = getattr(program.graph_module, node.target, None)
            if isinstance(value, torch.Tensor):
                constants[node] = value.detach()
        elif node.op == "call_function" and _foldable(node, constants):
            value = node.target(
                *fx.map_arg(node.args, constants.__getitem__),
                **fx.map_arg(node.kwargs, constants.__getitem__),
            )
            # Counted in elements: truth values that choose between two numbers are no broadcast.
            elements = sum(
                constants[n].numel()
                for n in node.all_input_nodes
                if isinstance(constants[n], torch.Tensor)
            )
            grown = (
                isinstance(value, torch.Tensor)
                and value.nbytes > _FOLDED_BYTES
                and value.numel() > 2 * elements
            )
            if grown and not is_dequantize(node):
                continue
            constants[node] = value
            owners = [names[n] for n in node.all_input_nodes if n in names]
            if owners:
                names[node] = weight_name(node, owners[0], names)
            if is_dequantize(node) and (grid := grid_of(node, constants)) is not None:
                grids[node] = grid
    return grids


def _foldable(node: fx.Node, constants: dict) -> bool:
    if not all(n in constants for n in node.all_input_nodes):
        return False
    name = getattr(node.target, "__name__", str(node.target))
    if any(word in name for word in _NOT_FOLDED):
        return False
    schema = getattr(node.target, "_schema", None)
    return name == "getitem" or (schema is not None and not schema.is_mutable)
