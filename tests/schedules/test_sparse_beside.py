# SPDX-License-Identifier: Apache-2.0
"""Weight-sparse 1x1 convolution of two inputs, read where their planes lie, against a float64 sum over the non-zeros."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax

from passes import layers
from passes.sparse import lowering, reference
from passes.sparse.operators import in_planes, plane_of, sparse_call
from schedules import sparse_chain
from schedules.dispatch import loop_structure
from schedules.fused import Fused
from schedules.spaces import space_of
from schedules.sparse_problem import Problem
from schedules.target import NAMED
from tests.schedules.test_sparse_planes import build, sparse_weight


@dataclass(frozen=True)
class Sample:
    """Planes of images [N, H, W], of `x` and `beside` channels, to `outputs` channels."""

    image: tuple[int, int, int]
    x: int
    beside: int
    outputs: int
    grain: str
    density: float = 0.3
    point: sparse_chain.Point | None = None


SAMPLES = {
    "images": Sample((2, 33, 37), 12, 7, 33, "out:4"),
    "elements": Sample((2, 16, 17), 13, 13, 19, "element"),
    "a_block_that_sticks_out": Sample((1, 20, 20), 17, 1, 10, "out:8"),
    "few_pixels_behind_the_last_vector": Sample((2, 7, 7), 33, 20, 24, "out:8"),
    "half_blocks": Sample((1, 17, 16), 16, 9, 24, "out:8", 0.2, sparse_chain.Point(5, 4, 7, 24)),
    "many": Sample((1, 16, 16), 300, 270, 32, "out:8", 0.1),
}  # fmt: skip
DEFINED = ("images", "elements")


def made(sample: Sample, weight: np.ndarray, target):
    """(definition, kernel, arrays behind the inputs) of a sample with a bias and a ReLU."""
    n, h, w = sample.image
    plane = plane_of(sample.image, 1)
    given = [
        relax.Var(name, relax.TensorType((n, channels, plane), "float32"))
        for name, channels in (("x", sample.x), ("beside", sample.beside))
    ]
    bb = relax.BlockBuilder()
    bias = np.linspace(-1, 1, sample.outputs, dtype=np.float32)
    with bb.function("main", given):
        with bb.dataflow():
            joined = relax.Var(
                "joined", relax.TensorType((n, h, w, sample.x + sample.beside), "float32")
            )
            one = layers.conv2d(joined, relax.const(weight), name="l", layout="NHWC")
            one = in_planes(sparse_call(one, sample.grain), given[0], True, True)
            call = layers.operator_call(
                one.op.name, [*one.args, given[1]], **layers.attrs_of(one), layers=["l", "s"]
            )
            call = bb.normalize(call)
            problem = lowering.problem_of(call)
            assert lowering.structure_for(problem) is sparse_chain
            point = sample.point or lowering.default_point(problem, target)
            y = bb.emit(lowering.lower_at(bb, call, problem, sparse_chain, point))
            y = bb.emit(relax.op.add(y, relax.const(bias.reshape(1, -1, 1))))
            out = bb.emit_output(bb.emit(relax.op.nn.relu(y)))
        bb.emit_func_output(out)
    fuse = [relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern()]
    fuse += [relax.transform.FuseOps(), relax.transform.FuseTIR()]
    mod = tvm.transform.Sequential(fuse)(bb.get())
    (func,) = [f for _, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    packed = lowering.pack_at(weight, sample.grain, problem, sparse_chain, point)
    kernel = loop_structure(Fused.read(func).loops)(Fused.read(func), target)
    return func, kernel, [*packed.arrays(), bias.reshape(1, -1, 1)]


def planes(x: np.ndarray) -> np.ndarray:
    """[N, H, W, C] as planes."""
    flat = x.reshape(len(x), -1, x.shape[-1]).transpose(0, 2, 1)
    behind = plane_of(x.shape[:3], 1) - flat.shape[-1]
    return np.pad(flat, ((0, 0), (0, 0), (0, behind)), mode="edge")


def check(samples: dict[str, Sample], target, rng) -> None:
    """Kernels, and some definitions, compiled as one module."""
    weights, functions, arrays = {}, {}, {}
    for name, s in samples.items():
        shape = (s.outputs, s.x + s.beside, 1, 1)
        weights[name] = sparse_weight(rng, shape, s.grain, s.density)
        definition, kernel, arrays[name] = made(s, weights[name], target)
        functions[name] = kernel
        if name in DEFINED:
            functions[f"{name}_definition"] = definition
    lib = build(functions, target)
    attrs = {"strides": (1, 1), "padding": (0,) * 4, "dilation": (1, 1), "groups": 1, "layout": "NHWC"}  # fmt: skip
    for name, s in samples.items():
        weight, bias = weights[name], arrays[name][-1].ravel()
        inputs = [rng.standard_normal((*s.image, c)).astype(np.float32) for c in (s.x, s.beside)]
        x, beside = (x.astype(np.float64) for x in inputs)
        attrs["grain"] = s.grain
        want = np.maximum(reference.sparse_conv2d(attrs, x, weight, beside) + bias, 0)
        size = reference.sparse_conv2d(attrs, np.abs(x), np.abs(weight), np.abs(beside))
        bound = (size + np.abs(bias)) * (np.count_nonzero(weight[:, :, 0, 0], 1).max() + 2) / 2**24
        for function in {name, f"{name}_definition"} & functions.keys():
            y = tvm.runtime.tensor(np.full(planes(want).shape, np.nan, np.float32))
            given = [planes(x) for x in inputs] + arrays[name]
            lib[function](*[tvm.runtime.tensor(a) for a in given], y)
            error = np.abs(y.numpy() - planes(want))
            assert (error <= planes(bound) + 1e-30).all(), f"{function}: {np.nanmax(error)}"


def test_two_inputs(host_tiers, rng):
    """Images of whole and part vectors, awkward channels, every grain, an input without non-zeros in some block."""
    check(SAMPLES, host_tiers[0], rng)


def test_other_tiers_and_threads(host_tiers, rng):
    few = {name: SAMPLES[name] for name in ("images", "elements")}
    check(few, host_tiers[-1], rng)
    split = replace(SAMPLES["many"], point=sparse_chain.Point(2, 4, 16, 8, 4))
    check({"split": split, "images": SAMPLES["images"]}, host_tiers[0].with_threads(2), rng)


def test_the_weights_of_one_input_are_packed_behind_those_of_the_other(rng):
    weight = sparse_weight(rng, (16, 12, 1, 1), "out:4", 0.5)
    problem = Problem(
        1, 16, 16, 12, 16, 16, 16, block=4, stored=20, planes_in=True, planes_out=True, beside=5
    )  # fmt: skip
    assert problem.inputs == (7, 5)
    point = sparse_chain.default_point(problem, NAMED["avx512"])
    packed = lowering.pack_at(weight, "out:4", problem, sparse_chain, point)
    assert packed.chunks == 2 and packed.chunk == 7
    for block in range(4):
        first, second = (
            packed.index[slice(*packed.pointer[i : i + 2])] for i in (block, 4 + block)
        )
        kept = np.flatnonzero(weight[4 * block, :, 0, 0])
        assert [*first, *(second + 7)] == list(kept)


def test_their_kernels_have_a_space_to_tune_in():
    problem = Problem(
        1, 56, 56, 128, 256, 56, 56, block=8, stored=400, planes_in=True, planes_out=True, beside=64
    )  # fmt: skip
    target = NAMED["avx512"]
    point = sparse_chain.default_point(problem, target)
    assert space_of("sparse_chain", problem, point, target).indices_of(point) is not None
