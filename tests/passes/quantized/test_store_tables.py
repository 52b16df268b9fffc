# SPDX-License-Identifier: Apache-2.0
"""Tables of which rows are picked, as bytes."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from passes.evaluate import evaluate
from passes.layers import is_call, is_const
from passes.quantized.store_tables import StoreTables
from passes.rewriting import bindings_of


def picking(weight, indices=(2, 5), axis=0, mode="fast", twice=False):
    builder = relax.BlockBuilder()
    ids = relax.Var("ids", relax.TensorType(indices, "int64"))
    table = relax.const(weight)
    with builder.function("main", [ids]):
        with builder.dataflow():
            y = builder.emit(relax.op.take(table, ids, axis=axis, mode=mode), "picked")
            if twice:
                again = builder.emit(relax.op.take(table, ids, axis=axis, mode=mode))
                y = builder.emit(relax.op.add(y, again))
            out = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(out)
    return builder.get()


def stored_constants(mod) -> list:
    """The arrays that rows are picked from, each once."""
    tables = {
        b.value.args[0]
        for b in bindings_of(mod["main"])
        if is_call(b.value, "relax.take") and is_const(b.value.args[0])
    }
    return [t.value.numpy() for t in tables]


@pytest.mark.parametrize("twice", [False, True])
def test_rows_are_within_half_a_step_of_their_own_scale(rng, twice):
    weight = rng.standard_normal((700, 24)).astype("float32")
    weight *= 10.0 ** rng.integers(-3, 3, (700, 1))  # rows of very different size
    weight[[3, 4]] = 0
    weight = weight.astype("float32")
    mod, pass_ = picking(weight, twice=twice), StoreTables()
    found = pass_(mod)
    tables = stored_constants(found)
    assert sorted(str(t.dtype) for t in tables) == ["float32", "int8"]
    assert sum(t.nbytes for t in tables) < 0.3 * weight.nbytes and len(pass_.notes) == 1
    ids = rng.integers(0, 700, (2, 5))
    ids[0, :2] = 3, 699
    wanted, got = evaluate(mod, [ids])[0], evaluate(found, [ids])[0]
    half = np.abs(weight).max(axis=1)[ids][..., None] / 254 * (1 + twice)
    assert (np.abs(got - wanted) <= half * 1.0001).all() and not got[0, 0].any()
    assert found["main"].ret_ty == mod["main"].ret_ty


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (np.ones((40, 16), "float32"), {}),
        (np.ones((8000, 4), "float32"), {}),
        (np.ones((700, 24), "float16"), {}),
        (np.zeros((700, 24), "float32"), {}),
        (np.full((700, 24), np.inf, "float32"), {}),
        (np.ones((700, 24), "float32"), {"axis": 1}),
        (np.ones((700, 24), "float32"), {"mode": "nan"}),
    ],
    ids=["small", "short rows", "half", "zero", "infinite", "columns", "nan out of range"],
)
def test_what_stays(weight, options):
    mod, pass_ = picking(weight, **options), StoreTables()
    assert pass_(mod).same_as(mod) and not pass_.notes


def test_a_network_with_a_table_is_stored_and_verified(rng):
    torch = pytest.importorskip("torch")
    from compiler.driver import build

    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(3000, 32)
            self.fc = torch.nn.Linear(32, 16)

        def forward(self, ids):
            return self.fc(torch.relu(self.table(ids)))

    ids = torch.arange(12).reshape(2, 6)
    data = [rng.integers(0, 3000, (2, 6)) for _ in range(3)]
    found = build(Words(), example=(ids,), recipe="int8", calibration=data, choose="asked")
    sizes = {n: v.bytes["weights"] for n, v in found.variants.items()}
    assert sizes["compressed"] < 0.31 * sizes["dense"]
    assert "table of 3000 rows" in " ".join(found.manifest["source"]["notes"])
