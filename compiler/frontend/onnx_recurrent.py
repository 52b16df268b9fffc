# SPDX-License-Identifier: Apache-2.0
"""ONNX LSTM, GRU and RNN unrolled into matrix products, gates and a concatenation of the steps.

    rewrite: Y, Y_h, Y_c = LSTM(X, W, R, B)  ->  P = MatMul(X, W') + b;  for t: g = P[t] + MatMul(h, R'), gates, c, h;  Y = Concat(h...)

Formulas: the ONNX operator specification (LSTM-14, GRU-14, RNN-14), default activations only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper


@dataclass
class Unrolled:
    """Nodes that replace one recurrent node, and the constants (with their names in the model) that they read."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, *inputs: str, **attributes) -> str:
        return self.add_many(kind, 1, *inputs, **attributes)[0]

    def add_many(self, kind: str, count: int, *inputs: str, **attributes) -> list[str]:
        index = len(self.nodes)
        outputs = [f"{self.prefix}/{index}/{i}" for i in range(count)]
        self.nodes.append(
            helper.make_node(
                kind, inputs, outputs, name=f"{self.prefix}/{kind}_{index}", **attributes
            )
        )
        return outputs

    def constant(self, label: str, array: np.ndarray, name: str | None = None) -> str:
        key = f"{self.prefix}/const/{label}"
        self.constants[key] = array
        if name:
            self.names[key] = name
        return key


@dataclass(frozen=True)
class _Cell:
    """`step(out, projected, h, c, weights)` -> (h, c); `gates` times the hidden size rows in W."""

    gates: int
    activations: tuple[str, ...]
    step: Callable
    has_cell: bool = False


def _expand(
    cell: _Cell,
    node: onnx.NodeProto,
    x_shape: tuple,
    constants: Mapping[str, np.ndarray],
    name: str,
) -> Unrolled | str:
    """The unrolled node, or why it cannot be."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    if reason := _refusal(cell, attributes, inputs, x_shape, constants):
        return reason
    out = Unrolled(node.output[0] or node.name or f"{node.op_type}/{inputs[0]}")
    steps, batch = x_shape[:2]
    hidden = constants[inputs[2]].shape[-1]
    directions = constants[inputs[1]].shape[0]
    lasts, cells, sequences = [], [], []
    for d in range(directions):
        reverse = (directions == 2 and d == 1) or attributes.get(
            "direction", b"forward"
        ) == b"reverse"
        state = _initial(out, inputs[5], constants, d, (batch, hidden), "h")
        memory = (
            _initial(out, inputs[6], constants, d, (batch, hidden), "c") if cell.has_cell else None
        )
        suffix = "_reverse" if reverse and directions == 2 else ""
        parts = _weights(cell, out, node, inputs, constants, d, hidden, name, suffix, attributes)
        projected = out.add("MatMul", inputs[0], parts["W"])
        projected = out.add("Add", projected, parts["bias"])
        by_step = out.add_many(
            "Split", steps, projected, out.constant("ones", np.ones(steps, "int64")), axis=0
        )
        zero = out.constant("axis0", np.array([0], "int64"))
        outputs: list[str] = [""] * steps
        for t in reversed(range(steps)) if reverse else range(steps):
            state, memory = cell.step(
                out, out.add("Squeeze", by_step[t], zero), state, memory, parts
            )
            outputs[t] = out.add("Unsqueeze", state, zero)
        sequences.append(
            out.add(
                "Unsqueeze",
                out.add("Concat", *outputs, axis=0),
                out.constant("axis1", np.array([1], "int64")),
            )
        )
        lasts.append(out.add("Unsqueeze", state, zero))
        cells.append(out.add("Unsqueeze", memory, zero) if cell.has_cell else "")
    for output, parts, axis in zip(node.output, (sequences, lasts, cells), (1, 0, 0)):
        if output:
            out.nodes.append(
                helper.make_node(
                    "Concat", parts, [output], name=f"{out.prefix}/{output}", axis=axis
                )
            )
    return out


def _refusal(
    cell: _Cell, attributes: Mapping, inputs: list[str], x_shape: tuple, constants: Mapping
) -> str:
    if any(name and name not in constants for name in inputs[1:4]):
        return "weights that are computed"
    if inputs[7]:
        return "peephole weights"
    lengths = constants.get(inputs[4]) if inputs[4] else None
    if inputs[4] and (lengths is None or (lengths != x_shape[0]).any()):
        return "sequences of different lengths"
    given = tuple(a.decode().lower() for a in attributes.get("activations", ()))
    directions = constants[inputs[1]].shape[0]
    if given and given != tuple(a.lower() for a in cell.activations) * directions:
        return f"activations {', '.join(given)}"
    if attributes.get("clip") or attributes.get("input_forget") or attributes.get("layout"):
        return "clip, input_forget or layout"
    return ""


def _initial(
    out: Unrolled, name: str, constants: Mapping, direction: int, shape: tuple, label: str
) -> str:
    if not name:
        return out.constant(f"{label}0", np.zeros(shape, "float32"))
    index = out.constant(f"{label}_direction{direction}", np.array(direction, "int64"))
    return out.add("Gather", name, index, axis=0)


def _weights(
    cell: _Cell,
    out,
    node,
    inputs,
    constants,
    d: int,
    hidden: int,
    name: str,
    suffix: str,
    attributes: Mapping,
) -> dict:
    w, r = constants[inputs[1]][d], constants[inputs[2]][d]
    count = cell.gates * hidden
    bias = constants[inputs[3]][d] if inputs[3] else np.zeros(2 * count, "float32")
    linear = node.op_type != "GRU" or attributes.get("linear_before_reset", 0)
    w_bias, r_bias = bias[:count], bias[count:].copy()
    parts = {"hidden": hidden, "linear": linear}
    if node.op_type == "GRU":
        # Only the gates' recurrent bias may be added early; the candidate's is scaled by the reset gate if `linear`.
        early = r_bias.copy()
        if linear:
            early[2 * hidden :] = 0
            parts["r_bias"] = out.constant(f"rb{d}", r_bias[2 * hidden :])
        parts["R_gates"] = out.constant(f"rg{d}", r[: 2 * hidden].T, f"{name}.R{suffix}")
        parts["R_candidate"] = out.constant(
            f"rc{d}", r[2 * hidden :].T, f"{name}.R_candidate{suffix}"
        )
        r_bias = early
    else:
        parts["R"] = out.constant(f"r{d}", r.T, f"{name}.R{suffix}")
    parts["W"] = out.constant(f"w{d}", w.T, f"{name}.W{suffix}")
    parts["bias"] = out.constant(f"b{d}", (w_bias + r_bias).astype("float32"))
    return parts


def _sizes(out: Unrolled, parts: Mapping, count: int) -> str:
    return out.constant(f"split{count}", np.full(count, parts["hidden"], "int64"))


def _lstm_step(out: Unrolled, projected: str, h: str, c: str, parts: Mapping) -> tuple[str, str]:
    gates = out.add("Add", projected, out.add("MatMul", h, parts["R"]))
    i, o, f, g = out.add_many("Split", 4, gates, _sizes(out, parts, 4), axis=1)
    i, o, f, g = (
        out.add(kind, x)
        for kind, x in (("Sigmoid", i), ("Sigmoid", o), ("Sigmoid", f), ("Tanh", g))
    )
    c = out.add("Add", out.add("Mul", f, c), out.add("Mul", i, g))
    return out.add("Mul", o, out.add("Tanh", c)), c


def _gru_step(out: Unrolled, projected: str, h: str, _c: None, parts: Mapping) -> tuple[str, None]:
    from_z, from_r, from_h = out.add_many("Split", 3, projected, _sizes(out, parts, 3), axis=1)
    recurrent_z, recurrent_r = out.add_many(
        "Split", 2, out.add("MatMul", h, parts["R_gates"]), _sizes(out, parts, 2), axis=1
    )
    z = out.add("Sigmoid", out.add("Add", from_z, recurrent_z))
    r = out.add("Sigmoid", out.add("Add", from_r, recurrent_r))
    if parts["linear"]:
        recurrent = out.add(
            "Mul", r, out.add("Add", out.add("MatMul", h, parts["R_candidate"]), parts["r_bias"])
        )
    else:
        recurrent = out.add("MatMul", out.add("Mul", r, h), parts["R_candidate"])
    candidate = out.add("Tanh", out.add("Add", from_h, recurrent))
    # (1 - z) * candidate + z * h
    return out.add("Add", candidate, out.add("Mul", z, out.add("Sub", h, candidate))), None


def _rnn_step(out: Unrolled, projected: str, h: str, _c: None, parts: Mapping) -> tuple[str, None]:
    return out.add("Tanh", out.add("Add", projected, out.add("MatMul", h, parts["R"]))), None


_LSTM = _Cell(4, ("Sigmoid", "Tanh", "Tanh"), _lstm_step, has_cell=True)
_GRU = _Cell(3, ("Sigmoid", "Tanh"), _gru_step)
_RNN = _Cell(1, ("Tanh",), _rnn_step)

# operator -> expand(node, shape of X [steps, batch, inputs], constants, layer name) -> Unrolled, or why not
EXPANSIONS: dict[str, Callable] = {
    "LSTM": lambda *arguments: _expand(_LSTM, *arguments),
    "GRU": lambda *arguments: _expand(_GRU, *arguments),
    "RNN": lambda *arguments: _expand(_RNN, *arguments),
}
