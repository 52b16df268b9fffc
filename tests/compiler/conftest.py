# SPDX-License-Identifier: Apache-2.0
"""A tiny two-layer network compiled without the driver: dense, and a compressed variant that
shares constants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest


@dataclass(frozen=True)
class Tiny:
    """`x [4, 64] -> relu(x @ w1) @ w2 [4, 16]` twice: `weights` by variant, the fused Relax
    modules, the compiled variants."""

    weights: dict
    variants: list
    inputs: tuple
    outputs: tuple
    target: object

    def expected(self, variant: str, x: np.ndarray) -> np.ndarray:
        w1, w2 = (w.astype("float64") for w in self.weights[variant])
        return np.maximum(x.astype("float64") @ w1, 0) @ w2


def _compile_tiny(name: str, w1: np.ndarray, w2: np.ndarray, target, wrong: bool = False):
    """A `CompiledVariant` of the tiny network; `wrong` breaks the second kernel, not its
    definition."""
    import tvm
    from tvm import relax

    from compiler.artifact import CompiledVariant, KernelCall
    from passes.hoist_constants import hoist_constants

    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, w1.shape[0]), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            h = bb.emit(relax.op.nn.relu(relax.op.matmul(x, relax.const(w1))))
            y = bb.emit_output(relax.op.matmul(h, relax.const(w2)))
        bb.emit_func_output(y)
    fused = tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
        ]
    )(bb.get())
    hoisted = hoist_constants(fused)
    mod = hoisted.mod
    names = [gv.name_hint for gv, f in mod.functions_items() if not isinstance(f, relax.Function)]
    first, second = sorted(names, key=lambda n: "relu" not in n)
    if wrong:
        mod = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
        mod.update_func(mod.get_global_var(second), _doubled(mod[second]))
    executable = tvm.compile(mod, target.tvm())
    kernels = [
        KernelCall(first, ["fc1"], "generic", {}, 2 * 4 * w1.size, 4 * (4 * 64 + w1.size)),
        KernelCall(second, ["fc2"], "generic", {}, 2 * 4 * w2.size, 4 * (4 * 32 + w2.size)),
    ]
    return CompiledVariant(
        name,
        executable,
        hoisted.constants,
        ["fc1/0", "fc2/0"],
        [False, False],
        kernels,
        hoisted.mod,
    )


def _doubled(func):
    """The same PrimFunc with its last store doubled: a kernel that computes something else."""
    import tvm_ffi
    from tvm import tirx

    def double(store):
        return tirx.BufferStore(
            store.buffer, store.value * tirx.const(2.0, "float32"), store.indices
        )

    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.BufferStore, double)))


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    from compiler.frontend import TensorSpec
    from schedules.target import detect_host

    rng = np.random.default_rng(0)
    w1 = rng.standard_normal((64, 32)).astype("float32")
    w2 = rng.standard_normal((32, 16)).astype("float32")
    pruned = np.where(np.abs(w1) > 1, w1, np.float32(0))
    target = detect_host()
    return Tiny(
        weights={"dense": (w1, w2), "compressed": (pruned, w2)},
        variants=[
            _compile_tiny("dense", w1, w2, target),
            _compile_tiny("compressed", pruned, w2, target),
        ],
        inputs=(TensorSpec("x", (4, 64), "float32"),),
        outputs=(TensorSpec("y", (4, 16), "float32"),),
        target=target,
    )


@pytest.fixture(scope="session")
def write_tiny(tiny):
    """`write_tiny(path, variants=None, **more)` writes the tiny network's artifact."""
    from compiler.artifact_writer import write_artifact

    def write(path, variants=None, **more):
        more = {"target": tiny.target, "recipe": {"name": "test"}, **more}
        return write_artifact(
            path, variants or tiny.variants, inputs=tiny.inputs, outputs=tiny.outputs, **more
        )

    return write


@pytest.fixture(scope="session")
def tiny_artifact(write_tiny, tmp_path_factory):
    """Dense and compressed in one artifact; do not change its files."""
    layers = [{"name": "fc1", "treatment": "sparse"}, {"name": "fc2", "treatment": "dense"}]
    return write_tiny(tmp_path_factory.mktemp("tiny") / "out", layers=layers)


@pytest.fixture(scope="session")
def compile_tiny():
    """`compile_tiny(name, w1, w2, target, wrong=False)`: see above."""
    return _compile_tiny
