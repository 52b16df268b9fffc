# SPDX-License-Identifier: Apache-2.0
"""Load a .pt2 archive without running anything that it brings along.

`torch.export.load` (2.13) unpickles without restriction wherever a payload says so (`use_pickle`, opaque objects,
legacy weight files), falls back from `weights_only=True` to an unrestricted load for sample inputs, loads shared
objects stored under `data/aotinductor/`, evaluates symbolic expressions through `sympy.sympify` (which is `eval`) and
resolves operator names as attributes of the `torch` module; `ExportedProgram.module()` then compiles the archive's guards
with `exec`. Here the archive is read into memory once and every one of
these doors is checked before torch sees the bytes; the guards are thrown away.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compiler.frontend.support import first_line
from schedules.errors import ModelError

_TARGETS = re.compile(
    r"torch\.ops\.(aten|prims|higher_order)\.\w+(\.\w+)?"
    r"|torch\.ops\.quantized_decomposed\.(de)?quantize_per_(tensor|channel)\.\w+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|torch\.sym_(int|float|max|min|not|ite|sqrt)|math\.(ceil|floor|trunc)"
)
_SYMBOL = re.compile(r"z?[su]f?\d+")
# What the exporter writes (sympy's `srepr` and its printed form), by name; everything else is refused.
_FUNCTIONS = frozenset(
    {
        "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv",
        "ModularIndexing", "Where", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Abs", "TruncToInt", "TruncToFloat", "CeilToInt",
        "FloorToInt", "ToFloat", "IntTrueDiv", "FloatTrueDiv", "PowByNatural", "FloatPow", "RoundToInt", "RoundDecimal", "Identity",
        "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "int_oo", "oo",
    }
)  # fmt: skip
_ARITHMETIC = (
    ast.Expression, ast.Call, ast.Name, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp,
    ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.expr_context,
)  # fmt: skip
_CONTAINERS = frozenset(
    {
        "builtins.tuple",
        "builtins.list",
        "builtins.dict",
        "collections.OrderedDict",
        "torch.fx.immutable_collections.immutable_list",
        "torch.fx.immutable_collections.immutable_dict",
    }
)
_LONGEST_EXPRESSION = 4000
_PICKLES_OF_MODEL = re.compile(r"data/(weights|constants|sample_inputs)/[^/]+\.pt")


def load_archive(path: Path) -> Any:
    """The `torch.export.ExportedProgram` in the archive at `path`.

    Raises ModelError if it is not such an archive, is damaged, or would have to run code to be loaded.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from None
    check_archive(data, str(path))
    import torch

    from compiler.frontend.torch_quantization import register_operators

    register_operators()
    try:
        program = torch.export.load(io.BytesIO(data))
        program._guards_code = []
        return program
    except Exception as error:  # whatever torch raises on a damaged archive
        raise ModelError(
            f"torch.export cannot load it: {first_line(error)}", where=str(path)
        ) from error


def check_archive(data: bytes, where: str) -> None:
    """Raise ModelError unless the archive holds one exported program and nothing that would be executed."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        damaged = archive.testzip()
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError) as error:
        raise ModelError(
            f"not a .pt2 archive, or truncated: {error}",
            where=where,
            todo="Save it with torch.export.save.",
        ) from None
    if damaged:
        raise ModelError(f"damaged: the checksum of {damaged} does not match", where=where)
    members = archive.namelist()
    if len(set(members)) != len(members):
        raise ModelError("refused: two members of the archive have one name", where=where)
    roots = {m.partition("/")[0] for m in members}
    files = {m.partition("/")[2]: m for m in members}
    models = [f for f in files if f.startswith("models/") and f.endswith(".json")]
    if len(roots) != 1 or not models:
        raise ModelError(
            "not a program saved by torch.export.save of PyTorch 2.8 or later", where=where, found=", ".join(sorted(members)[:4]) or "an empty archive",
            todo="Export and save it again.",
        )  # fmt: skip
    for file, member in files.items():
        _check_member(file, lambda member=member: archive.read(member), where)


def _check_member(file: str, read, where: str) -> None:
    if file.startswith(("data/aotinductor/", "executorch/", "mtia/")):
        raise ModelError(f"refused: {file} is compiled code, which would be executed", where=where)
    if file.startswith("models/") and file.endswith(".json"):
        _check_program(_json(read(), file, where), file, where)
    elif re.fullmatch(r"data/(weights|constants)/.*_config\.json", file):
        _check_payloads(_json(read(), file, where), file, where)
    elif _PICKLES_OF_MODEL.fullmatch(file):
        _check_pickle(read(), file, where)


def _json(data: bytes, file: str, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise ModelError(f"damaged: {file} is not JSON ({error})", where=where) from None


def _check_payloads(config: Any, file: str, where: str) -> None:
    entries = config.get("config", {}) if isinstance(config, dict) else {}
    for name, meta in entries.items():
        if meta.get("use_pickle") or str(meta.get("path_name", "")).startswith(
            ("custom_obj_", "opaque_obj_")
        ):
            raise ModelError(
                f"refused: {name!r} in {file} is stored as a pickle, which runs code when it is loaded", where=where,
                wanted="plain tensors", todo="Export the model without custom objects or tensor subclasses.",
            )  # fmt: skip


def _check_pickle(data: bytes, file: str, where: str) -> None:
    """Accept only what torch's restricted unpickler accepts, so that its unrestricted fallback is never reached."""
    if not data:
        return
    import torch

    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise ModelError(
            f"refused: {file} is a pickle that holds more than tensors: {first_line(error)}",
            where=where,
        ) from None


def _walk(value: Any) -> Iterator[dict]:
    """Every JSON object inside `value`, without recursion (graphs nest deeply)."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _check_program(program: Any, file: str, where: str) -> None:
    """Operator names must be operators, symbolic expressions arithmetic on symbols."""
    unknown = []
    for item in _walk(program):
        target = item.get("target")
        if (
            "inputs" in item
            and "outputs" in item
            and isinstance(target, str)
            and not _TARGETS.fullmatch(target)
        ):
            unknown.append(target)
        for key in ("expr_str", "as_expr"):
            text = item.get(key)
            if isinstance(text, str) and not _is_arithmetic(text):
                raise ModelError(
                    f"refused: {file} holds a shape expression that is not arithmetic",
                    where=where,
                    found=repr(text[:60]),
                )
        for key in ("in_spec", "out_spec"):
            if isinstance(item.get(key), str):
                _check_structure(item[key], file, where)
    for text in _symbol_keys(program):
        if not _is_arithmetic(text):
            raise ModelError(
                f"refused: {file} names a symbol that is none", where=where, found=repr(text[:60])
            )
    if unknown:
        raise ModelError(
            f"refused: {file} calls what is no operator of PyTorch's own", where=where, found=", ".join(sorted(set(unknown)))[:200],
            todo="Register no custom operators, or decompose them before exporting.",
        )  # fmt: skip


def _check_structure(spec: str, file: str, where: str) -> None:
    """The nesting of inputs or outputs: other containers than Python's own may import what they name."""
    tree = _json(spec.encode(), file, where)
    types = {str(item["type"]) for item in _walk(tree) if item.get("type") is not None}
    if types - _CONTAINERS or "__enum__" in spec:
        raise ModelError(
            "refused: its inputs or outputs are not plain tuples, lists and dicts", where=where, found=", ".join(sorted(types - _CONTAINERS)),
            todo="Wrap the model in a module that takes and returns tensors.",
        )  # fmt: skip


def _symbol_keys(program: Any) -> list[str]:
    constraints = program.get("range_constraints") if isinstance(program, dict) else None
    return list(constraints) if isinstance(constraints, dict) else []


def _is_arithmetic(text: str) -> bool:
    """Whether evaluating `text` can do nothing but compute on symbols: no attribute, no index, no name of Python's."""
    if len(text) > _LONGEST_EXPRESSION:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(isinstance(node, _ARITHMETIC) and _is_known(node) for node in ast.walk(tree))


def _is_known(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _SYMBOL.fullmatch(node.value) is not None
    return not isinstance(node, ast.Constant) or isinstance(node.value, (bool, int, float))
