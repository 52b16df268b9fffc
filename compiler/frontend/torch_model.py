# SPDX-License-Identifier: Apache-2.0
"""torch.export programs and modules to Relax."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import tvm
from torch.export import ExportedProgram
from tvm import relax

from compiler.frontend import (
    Imported,
    Shape,
    TensorSpec,
    torch_layer_ops,
    torch_ops,
    torch_quantization,
    torch_shape_ops,
)
from compiler.frontend.support import first_line, main_function, require_known
from compiler.frontend.torch_convert import Converter, unsupported
from compiler.frontend.torch_graph import Prepared, prepare
from passes.name_layers import NameLayers
from schedules.errors import ModelError, UnsupportedModel

CONVERTERS = {
    **torch_ops.CONVERTERS,
    **torch_layer_ops.CONVERTERS,
    **torch_shape_ops.CONVERTERS,
    **torch_quantization.CONVERTERS,
}
_DTYPES = {
    torch.float32: "float32", torch.int64: "int64", torch.int32: "int32", torch.int16: "int16", torch.int8: "int8", torch.uint8: "uint8",
    torch.bool: "bool",
}  # fmt: skip


def import_module(
    module: torch.nn.Module, example: Any, *, shapes: Mapping[str, Shape], batch: int | None
) -> Imported:
    """Export `module` (in eval mode, restored afterwards) with its example inputs and import the program."""
    where = type(module).__name__
    if example is None:
        raise ModelError(
            "a module needs example inputs", where=where, todo="Pass example=(tensor, ...)."
        )
    args, kwargs = _example(example, where)
    if batch is not None:
        args, kwargs = _with_batch(args, kwargs, batch)
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            program = torch.export.export(module, args, kwargs)
    except Exception as error:  # tracing runs the user's code: anything may come out
        raise UnsupportedModel(
            f"torch.export cannot trace it: {first_line(error)}", where=where,
            todo="Run torch.export.export on it to see the whole message.",
        ) from error  # fmt: skip
    finally:
        for child, mode in modes.items():
            child.training = mode
    return import_exported(program, where=where, kind="module", shapes=shapes, batch=None)


def _example(example: Any, where: str) -> tuple[tuple, dict]:
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    else:
        args, kwargs = (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
    to_tensor = {True: torch.as_tensor, False: lambda v: v}
    args = tuple(to_tensor[isinstance(a, np.ndarray)](a) for a in args)
    kwargs = {k: to_tensor[isinstance(a, np.ndarray)](a) for k, a in kwargs.items()}
    if not any(isinstance(a, torch.Tensor) for a in (*args, *kwargs.values())):
        raise ModelError("the example holds no tensor", where=where, found=type(example).__name__)
    return args, kwargs


def _with_batch(args: tuple, kwargs: dict, batch: int) -> tuple[tuple, dict]:
    """Example inputs with another first dimension, where it equals the first tensor's."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.ndim]
    old = tensors[0].shape[0]

    def resize(value: Any) -> Any:
        if not (isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == old):
            return value
        return value.repeat(-(-batch // old), *[1] * (value.ndim - 1))[:batch].clone()

    return tuple(map(resize, args)), {k: resize(v) for k, v in kwargs.items()}


def import_exported(
    program: ExportedProgram,
    *,
    where: str,
    kind: str,
    shapes: Mapping[str, Shape],
    batch: int | None,
) -> Imported:
    """An exported program as Relax; open dimensions are fixed by exporting it once more with inputs of those shapes."""
    _quiet_torch()
    program = _specialise(program, where, shapes, batch)
    prepared = prepare(program, where)
    _check_tensors(prepared, where)
    if problems := unsupported(prepared, CONVERTERS):
        raise UnsupportedModel(
            f"{len(problems)} operators have no converter", where=where, found="; ".join(problems)
        )
    mod = _convert(prepared, where)
    inputs = [_spec(n.name, n.meta["val"], where) for n in prepared.inputs]
    names = (
        ["output"]
        if len(prepared.outputs) == 1
        else [f"output{i}" for i in range(len(prepared.outputs))]
    )
    outputs = [_spec(name, n.meta["val"], where) for name, n in zip(names, prepared.outputs)]
    return Imported(mod, inputs, outputs, kind, _reference(program, inputs))


def _quiet_torch() -> None:
    # Re-exporting a program warns about every guard it drops.
    logging.getLogger("torch.export").setLevel(logging.ERROR)


def _placeholders(program: ExportedProgram) -> list:
    user = set(program.graph_signature.user_inputs)
    return [n for n in program.graph.nodes if n.op == "placeholder" and n.name in user]


def _specialise(
    program: ExportedProgram, where: str, shapes: Mapping[str, Shape], batch: int | None
) -> ExportedProgram:
    """`program` with static shapes. Raises ModelError where a shape is unknown, missing or contradicts the model."""
    nodes = _placeholders(program)
    known = [n.name for n in nodes]
    require_known(shapes, known, where)
    examples, open_dimensions = [], False
    for node in nodes:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            examples.append(value)
            continue
        shape, is_open = _static_shape(node.name, value, shapes.get(node.name), batch, where)
        open_dimensions |= is_open
        examples.append(torch.zeros(shape, dtype=value.dtype))
    if not open_dimensions:
        return program
    args, kwargs = torch.utils._pytree.tree_unflatten(examples, program.call_spec.in_spec)
    try:
        with torch.no_grad():
            return torch.export.export(program.module(check_guards=False), args, kwargs)
    except Exception as error:
        raise ModelError(
            f"the program does not accept these shapes: {first_line(error)}", where=where,
            found=", ".join(f"{n}={tuple(e.shape)}" for n, e in zip(known, examples) if isinstance(e, torch.Tensor)),
        ) from error  # fmt: skip


def _static_shape(
    name: str, value: torch.Tensor, wanted: Shape | None, batch: int | None, where: str
) -> tuple[Shape, bool]:
    """The shape to build for, and whether the program leaves any of it open."""
    dims = [d if isinstance(d, int) else None for d in value.shape]
    shape = list(dims)
    if wanted is not None:
        if len(wanted) != len(dims) or any(d is not None and d != w for d, w in zip(dims, wanted)):
            text = "x".join("?" if d is None else str(d) for d in dims)
            raise ModelError(
                f"input {name} cannot have this shape",
                where=where,
                found="x".join(map(str, wanted)),
                wanted=text,
            )
        shape = list(wanted)
    if batch is not None and shape:
        if dims[0] is None and shape[0] is None:
            shape[0] = batch
        elif shape[0] != batch and wanted is None:
            raise ModelError(
                f"input {name} was exported for batch {shape[0]} only", where=where, wanted=str(batch),
                todo="Export with dynamic_shapes, or with an example of that batch.",
            )  # fmt: skip
    if None in shape:
        text = "x".join("?" if d is None else str(d) for d in shape)
        raise ModelError(
            f"input {name} leaves dimensions open", where=where, found=text, wanted="one shape",
            todo=f"Give --input {name}=... (or a batch, where only the first is open).",
        )  # fmt: skip
    return tuple(shape), None in dims


def _check_tensors(prepared: Prepared, where: str) -> None:
    """Only float32 weights and inputs, and no NaN or infinity among the weights."""
    for node in prepared.inputs:
        _spec(node.name, node.meta["val"], where)
    for node, tensor in prepared.constants.items():
        if not (node.op == "placeholder" and isinstance(tensor, torch.Tensor)):
            continue
        if tensor.dtype not in _DTYPES:
            raise UnsupportedModel(
                f"parameter {prepared.names[node]} is {tensor.dtype}", where=where, wanted="float32",
                todo="Convert it with model.float() before exporting.",
            )  # fmt: skip
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise ModelError(
                f"parameter {prepared.names[node]} holds NaN",
                where=where,
                found=f"{int(torch.isnan(tensor).sum())} of {tensor.numel()} values",
            )


def _spec(name: str, value: torch.Tensor, where: str) -> TensorSpec:
    if value.dtype not in _DTYPES:
        raise UnsupportedModel(
            f"{name} is {value.dtype}",
            where=where,
            wanted=", ".join(_DTYPES.values()),
            todo="Convert the model with model.float().",
        )
    return TensorSpec(name, tuple(int(d) for d in value.shape), _DTYPES[value.dtype])


def _convert(prepared: Prepared, where: str) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    params = [
        relax.Var(
            n.name, relax.TensorType(tuple(n.meta["val"].shape), _DTYPES[n.meta["val"].dtype])
        )
        for n in prepared.inputs
    ]
    converter = Converter(builder, prepared, where, CONVERTERS)
    for node, param in zip(prepared.inputs, params):
        converter.env[node] = param
    with main_function(builder, params):
        with builder.dataflow():
            for node in prepared.graph.nodes:
                if node.op == "call_function" and node not in prepared.constants and node.users:
                    converter.convert(node)
            results = [converter.value(n) for n in prepared.outputs]
            output = builder.emit_output(results[0] if len(results) == 1 else relax.Tuple(results))
        builder.emit_func_output(output)
    return NameLayers(converter.names, converter.grids)(builder.finalize())


def _reference(program: ExportedProgram, inputs: Sequence[TensorSpec]) -> Callable:
    nodes = _placeholders(program)
    constants = {n: n.meta["val"] for n in nodes if not isinstance(n.meta["val"], torch.Tensor)}
    # Without the guards: those of an archive would be compiled with `exec`.
    module = functools.cache(lambda: program.module(check_guards=False))

    def reference(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The program run by torch on arrays in the order of its inputs."""
        if len(arrays) != len(inputs):
            raise ModelError(
                "wrong number of inputs", found=str(len(arrays)), wanted=str(len(inputs))
            )
        tensors = iter(arrays)
        flat = [
            constants[n] if n in constants else torch.from_numpy(np.array(next(tensors), copy=True))
            for n in nodes
        ]
        args, kwargs = torch.utils._pytree.tree_unflatten(flat, program.call_spec.in_spec)
        with torch.no_grad():
            result = module()(*args, **kwargs)
        leaves = torch.utils._pytree.tree_leaves(result)
        return [leaf.detach().numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]

    return reference
