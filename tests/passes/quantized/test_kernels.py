# SPDX-License-Identifier: Apache-2.0
"""Integer kernels against int32 sums in numpy: every bit, on every instruction set this machine has."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline

from passes import layers
from passes.evaluate import evaluate
from passes.lower import lower_operators
from passes.quantized import FAMILY, reference
from passes.quantized import operators as int8
from passes.quantized.problems import (
    SampleProblem,
    dense_problems,
    depthwise_problems,
    sparse_problems,
)
from schedules import dispatch, int8_contraction, int8_depthwise, terms
from schedules.errors import KerfError
from schedules.fused import Emission
from schedules.target import NAMED, CpuTarget, detect_host

op = relax.op
_FUSE = [
    relax.transform.AnnotateTIROpPattern,
    relax.transform.FuseOps,
    relax.transform.FuseTIR,
    relax.transform.DeadCodeElimination,
]


def tiers() -> list[CpuTarget]:
    """The instruction sets with a dot product of their own that this machine can run."""
    host = detect_host()
    names = ("avx512-vnni", "avx512", "avx2", "generic")
    return [
        NAMED[n] for n in names if NAMED[n].arch == host.arch and NAMED[n].has_only(host.features)
    ]


def each_tier() -> list:
    """`tiers()` as test parameters: the first and the one without VNNI that most machines have always, others as slow ones."""
    always = {tiers()[0].name, "avx2"}
    slow = pytest.mark.slow
    return [pytest.param(t, id=t.name, marks=() if t.name in always else slow) for t in tiers()]


def graph(body: Callable, inputs: list[np.ndarray]) -> tvm.IRModule:
    """`main` with one input per array, returning the tuple of what `body(builder, *inputs)` gives."""
    layers.register()
    int8.register()
    bb = relax.BlockBuilder()
    args = [
        relax.Var(f"x{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(inputs)
    ]
    with bb.function("main", args):
        with bb.dataflow():
            results = [bb.emit(r) for r in body(bb, *args)]
            out = bb.emit_output(relax.Tuple(results))
        bb.emit_func_output(out)
    return bb.finalize()


def scheduled(mod: tvm.IRModule, target: CpuTarget):
    """(module of kernels, loop structure by function)."""
    lowerings = {**_dense_lowerings(), **FAMILY.lowerings}
    mod = lower_operators(mod, lowerings, target).mod
    mod = tvm.transform.Sequential([p() for p in _FUSE])(mod)
    mod, kernels = dispatch.schedule_module(mod, target)
    return mod, {name: kernel.loops for name, kernel in kernels.items()}


def _dense_lowerings():
    from passes.dense import FAMILY as dense

    return dense.lowerings


def run(mod: tvm.IRModule, inputs: list[np.ndarray], target: CpuTarget) -> list[np.ndarray]:
    mod, _ = scheduled(mod, target)
    with target.tvm() as built_for:
        passes = pipeline.dataflow_lower_passes(built_for) + pipeline.finalize_passes(built_for)
        mod = tvm.transform.Sequential(passes)(mod)
    executable = tvm.compile(mod, target.tvm(), relax_pipeline=tvm.transform.Sequential([]))
    outputs = relax.VirtualMachine(executable, tvm.cpu())["main"](
        *[tvm.runtime.tensor(a) for a in inputs]
    )
    return [o.numpy() for o in outputs]


def check(body: Callable, inputs: list[np.ndarray], target: CpuTarget) -> list[np.ndarray]:
    """Kernels and numpy (in float32) agree in every bit; what they compute."""
    mod = graph(body, inputs)
    wanted = evaluate(mod, inputs, dtype="float32", references=FAMILY.references)
    got = run(mod, inputs, target)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.array_equal(a, b, equal_nan=a.dtype == np.float32), f"output {i}"
    return got


def layer(sample: SampleProblem, x, weight: np.ndarray) -> relax.Call:
    w = relax.const(weight)
    more = {"name": "l", "zero_point": sample.zero_point, "grain": sample.grain}
    if sample.attrs is None:
        return int8.int8_dense(x, w, **more)
    return int8.int8_conv2d(x, w, layout="NHWC", **dict(sample.attrs), **more)


def _window(strides, padding) -> tuple:
    return (("strides", strides), ("padding", padding), ("dilation", (1, 1)), ("groups", 1))


def weight_of(sample: SampleProblem, rng) -> np.ndarray:
    """int8 weights, whole blocks of them zero where the sample has a grain."""
    weight = rng.integers(-128, 128, sample.w).astype("int8")
    if sample.grain is None:
        return weight
    outputs = {"in:4": 1, "block:4x4": 4, "block:8x4": 8}[sample.grain]
    (o, c), taps = sample.w[:2], sample.w[2:]
    kept = rng.random((-(-o // outputs), -(-c // 4), *taps)) < sample.density
    kept.flat[0] = True
    return weight * kept.repeat(outputs, 0)[:o].repeat(4, 1)[:, :c]


def check_samples(
    samples: list[SampleProblem], target: CpuTarget, rng, draw=None
) -> list[np.ndarray]:
    draw = draw or (lambda s: rng.integers(0, 256, s.x))
    inputs = [draw(s).astype("uint8") for s in samples]
    weights = [weight_of(s, rng) for s in samples]
    body = lambda bb, *xs: [layer(*of) for of in zip(samples, xs, weights)]  # noqa: E731
    return check(body, inputs, target)


@pytest.mark.parametrize("target", each_tier())
def test_sums_are_exact(target, rng):
    first = target is tiers()[0]
    dense, depthwise = dense_problems(), depthwise_problems()
    check_samples(dense if first else [dense[i] for i in (2, 11)], target, rng)
    check_samples(depthwise if first else depthwise[2:3], target, rng)


@pytest.mark.parametrize("target", each_tier())
def test_sparse_sums_are_exact(target, rng):
    samples = sparse_problems()
    samples = samples if target is tiers()[0] else [samples[i] for i in (1, 6, 8, 10)]
    inputs = [np.zeros(s.x, "uint8") for s in samples]
    weights = [weight_of(s, rng) for s in samples]
    body = lambda bb, *xs: [layer(*of) for of in zip(samples, xs, weights)]  # noqa: E731
    loops = set(scheduled(graph(body, inputs), target)[1].values())
    assert {"sparse_planes", "sparse_windows", "sparse_vector"} <= loops
    assert not {"int8_contraction", "contraction"} & loops
    check_samples(samples, target, rng)


def test_two_threads(rng):
    target = tiers()[0].with_threads(2)
    check_samples(sparse_problems()[1:2], target, rng)
    check_samples(
        [dense_problems()[i] for i in (6, 10, 13)] + depthwise_problems()[:1], target, rng
    )


@pytest.mark.parametrize("target", each_tier())
def test_nothing_saturates(target):
    """All pixels 255, all weights 127 or -128: 16-bit sums of two products would overflow."""
    x = np.full((1, 4, 4, 64), 255, "uint8")
    flat, ones = np.full((3, 4096), 255, "uint8"), np.ones((16, 64, 3, 3), "int8")
    weights = [ones * 127, ones * -128, np.full((17, 4096), 127, "int8")]
    depthwise = np.full((64, 1, 3, 3), -128, "int8")

    def body(bb, image, rows):
        shared = {"name": "l", "zero_point": 0, "layout": "NHWC", "padding": (1, 1, 1, 1)}
        for w in weights[:2]:
            yield int8.int8_conv2d(image, relax.const(w), **shared)
        yield int8.int8_dense(rows, relax.const(weights[2]), name="l", zero_point=0)
        yield int8.int8_conv2d(image, relax.const(depthwise), groups=64, **shared)

    got = check(body, [x, flat], target)
    assert got[0].max() == 255 * 127 * 64 * 9 and got[1].min() == -255 * 128 * 64 * 9
    assert (got[2] == 255 * 127 * 4096).all()


@pytest.mark.parametrize("target", each_tier())
def test_images_are_quantized_into_their_border(target, rng):
    """Planar floats become bytes within a border in one kernel: whole vectors of pixels, the rest, three channels or one."""
    samples = [
        SampleProblem((2, 9, 53, 3), (16, 3, 7, 7), 124, _window((2, 2), (3, 3, 3, 3))),
        SampleProblem((1, 5, 16, 2), (16, 2, 3, 3), 0, _window((1, 1), (0, 1, 2, 0))),
        SampleProblem((1, 7, 31, 1), (16, 1, 2, 5), 255, _window((1, 3), (0, 0, 0, 0))),
    ]
    samples = samples if target is tiers()[0] else samples[:1]
    weights = [weight_of(s, rng) for s in samples]
    images = [
        rng.standard_normal([s.x[i] for i in (0, 3, 1, 2)]).astype("float32") for s in samples
    ]
    for image in images:
        image.flat[: len(SPECIAL)] = SPECIAL

    def body(bb, *images):
        for sample, image, weight in zip(samples, images, weights):
            x = bb.emit(int8.quantize(image, scale=0.02, zero_point=sample.zero_point))
            yield layer(sample, bb.emit(op.permute_dims(x, (0, 2, 3, 1))), weight)

    found = list(scheduled(graph(body, images), target)[1].values())
    assert sorted(set(found)) == ["byte_border", "int8_contraction"] and len(found) == 2 * len(
        samples
    )
    check(body, images, target)


def test_all_rows_for_one_panel_that_stays_near(rng):
    """Kernels of more than 1x1 whose weights fill the nearest cache, one of their panels not: every sum, and the order."""
    sample = SampleProblem((2, 5, 9, 64), (80, 64, 3, 3), 131, (("padding", (1, 1, 1, 1)),))
    problem = int8_contraction.Problem(2, 5, 9, 64, 80, 3, 3, padding=(1, 1, 1, 1))
    point = int8_contraction.default_point(problem, tiers()[0])
    assert (point.order, point.block) == ("blocks", 10)
    check_samples([sample], tiers()[0], rng)


@pytest.mark.parametrize("kernel, padding", [(3, (1, 0, 2, 1)), (1, (0, 0, 0, 0))])
def test_strided_layers_of_near_pixels_go_by_panels(kernel, padding, rng):
    target = tiers()[0]
    shape, outputs = (2, 9, 13, 36), 9 * target.lanes + 3
    around = {"strides": (2, 2), "padding": padding}
    sample = SampleProblem(shape, (outputs, 36, kernel, kernel), 131, tuple(around.items()))
    problem = int8_contraction.Problem(*shape, outputs, kernel, kernel, (2, 2), padding)
    assert int8_contraction.default_point(problem, target).order == "panels"
    check_samples([sample], target, rng)


def test_strided_layers_of_far_pixels_or_one_panel_go_by_rows():
    def order(size, inputs, outputs, threads=1):
        around = (3, 3, (2, 2), (1, 1, 1, 1))
        problem = int8_contraction.Problem(1, size, size, inputs, outputs, *around)
        target = NAMED["avx512-vnni"].with_threads(threads)
        return int8_contraction.default_point(problem, target).order

    assert order(28, 128, 256) == "panels"
    assert {order(112, 64, 128), order(28, 32, 64), order(28, 128, 256, 2)} == {"blocks"}


def test_borders_count_nothing(rng):
    """An image that is its zero point everywhere sums to 0, at the borders as inside; and so with padding beyond reach."""
    padded = [dense_problems()[i] for i in (2, 7, 8)] + [depthwise_problems()[i] for i in (2, 7)]
    got = check_samples(padded, tiers()[0], rng, lambda s: np.full(s.x, s.zero_point))
    assert not any(g.any() for g in got)


def test_border_pixels_alone(rng):
    """One pixel in each corner differs from the zero point: every sum near it comes from the taps inside the image."""
    sample = SampleProblem((1, 6, 7, 20), (40, 20, 5, 5), 131, (("padding", (2, 2, 2, 2)),))

    def corners(s):
        x = np.full(s.x, s.zero_point)
        x[:, ::5, ::6] = rng.integers(0, 256, x[:, ::5, ::6].shape)
        return x

    (got,) = check_samples([sample], tiers()[0], rng, corners)
    assert got[0, 0, 0].any() and not got[0, 2, 3].any() == got[0, 0, 0].any()


def test_pixels_read_as_signed_bytes(rng, signed_pixels):
    """Instruction sets with a signed dot product only subtract 128 first: the same sums, by plain arithmetic here."""
    samples = [dense_problems()[i] for i in (2, 10)] + depthwise_problems()[2:3]
    samples += [sparse_problems()[i] for i in (2, 3, 8, 10)]
    check_samples(samples, tiers()[0], rng)


def test_plain_arithmetic(rng, monkeypatch):
    """What targets without any instruction for it use."""
    for module in (terms, int8_depthwise):
        monkeypatch.setattr(module, "dot_product", lambda target: terms._plain)
    check_samples([dense_problems()[2], depthwise_problems()[2]], tiers()[-1], rng)


def assembly(body: Callable, inputs: list[np.ndarray], target: CpuTarget) -> tuple[str, set]:
    """The machine code of a graph's kernels, which need not run here, and their loop structures."""
    mod, loops = scheduled(graph(body, inputs), target)
    kernels = tvm.IRModule(
        {
            gv: f.with_attr("global_symbol", gv.name_hint)
            for gv, f in mod.functions_items()
            if isinstance(f, tvm.tirx.PrimFunc)
        }
    )
    return tvm.compile(kernels, target.tvm()).mod.inspect_source("asm"), set(loops.values())


@pytest.mark.parametrize(
    ("target", "instruction", "register"),
    [
        (NAMED["avx512-vnni"], "vpdpbusd", "%zmm"),
        (CpuTarget("avxvnni", "x86_64", (*NAMED["avx2"].features, "avxvnni")), "vpdpbusd", "%ymm"),
        (NAMED["avx512"], "vpmaddwd", "%zmm"),
        (NAMED["avx2"], "vpmaddwd", "%ymm"),
        (CpuTarget("arm", "aarch64", ("neon", "dotprod")), "sdot", "v"),
        (CpuTarget("arm", "aarch64", ("neon", "dotprod", "i8mm")), "usdot", "v"),
    ],
    ids=["VNNI", "VNNI 256", "AVX-512BW", "AVX2", "dotprod", "i8mm"],
)
def test_every_tier_compiles_to_its_instruction(target, instruction, register, rng):
    samples = [dense_problems()[2], depthwise_problems()[1]]
    weights = [rng.integers(-128, 128, s.w).astype("int8") for s in samples]
    inputs = [np.zeros(s.x, "uint8") for s in samples]
    found, loops = assembly(
        lambda bb, *xs: [layer(*of) for of in zip(samples, xs, weights)], inputs, target
    )
    assert {"int8_contraction", "int8_depthwise"} <= loops
    products = [line for line in found.splitlines() if f"\t{instruction}\t" in line]
    assert sum(register in line for line in products) >= 8
    assert "maddubs" not in found  # the instruction that saturates


def test_rounding_alone_works_on_whole_registers():
    """A tensor that its own kernel rounds: TVM would take vectors of `lrint` apart and store byte by byte."""
    x = np.zeros((7, 96), "float32")
    body = lambda bb, x: [int8.quantize(x, scale=0.1, zero_point=7)]  # noqa: E731
    found, _ = assembly(body, [x], NAMED["avx512-vnni"])
    assert "vcvtps2dq" in found and "vpextrb" not in found and "gather" not in found


def requantized(
    bb, y, rng, *, outputs: int, zero_point: int, residual=None, relu=False, bounded=False
):
    """Bias, multiplier, residual, activation, bytes: what follows a sum."""
    bias = rng.integers(-9999, 9999, outputs).astype("int32")
    scale = (rng.random(outputs) * 4e-3).astype("float32")
    y = bb.emit(op.astype(bb.emit(op.add(bb.emit(y), relax.const(bias))), "float32"))
    y = bb.emit(op.multiply(y, relax.const(scale)))
    if residual is not None:
        y = bb.emit(int8.dequantize_add(y, residual, scale=0.31, zero_point=100))
    if relu:
        y = bb.emit(op.nn.relu(y))
    return int8.quantize(y, scale=1.0, zero_point=zero_point, bounded=bounded)


@pytest.mark.parametrize("outputs", [7, 40, 96])
@pytest.mark.parametrize("target", each_tier())
def test_epilogues_are_exact(target, outputs, rng):
    """Widths that are packed together, alone, and not at all; every zero point; one kernel per layer."""
    if target is not tiers()[0]:
        outputs = {7: 3, 40: 24, 96: 32}[outputs]  # the same cases in narrower registers
    x = rng.integers(0, 256, (1, 5, 5, outputs)).astype("uint8")
    w = rng.integers(-128, 128, (outputs, outputs, 3, 3)).astype("int8")
    per_channel = rng.integers(-128, 128, (outputs, 1, 3, 3)).astype("int8")
    matrix = rng.integers(-128, 128, (outputs, outputs)).astype("int8")
    shared = {"name": "l", "zero_point": 3, "layout": "NHWC", "padding": (1, 1, 1, 1)}

    def body(bb, x, r):
        of = {"outputs": outputs}
        conv = int8.int8_conv2d(x, relax.const(w), **shared)
        yield requantized(bb, conv, rng, zero_point=3, residual=r, relu=True, **of)
        conv = int8.int8_conv2d(x, relax.const(per_channel), groups=outputs, **shared)
        yield requantized(bb, conv, rng, zero_point=0, **of)
        dense = int8.int8_dense(x, relax.const(matrix), name="l", zero_point=200)
        yield requantized(bb, dense, rng, zero_point=255, residual=r, **of)
        dense = int8.int8_dense(x, relax.const(matrix), name="l", zero_point=0)
        yield requantized(bb, dense, rng, zero_point=128, bounded=True, **of)
        same = {"residual": r, "zero_point": 128, "bounded": True, **of}
        yield requantized(bb, int8.int8_conv2d(x, relax.const(w), **shared), rng, **same)

    inputs = [x, rng.integers(0, 256, x.shape).astype("uint8")]
    got = check(body, inputs, target)
    assert all(len(np.unique(g)) > 10 for g in got)


def test_sums_start_with_biases(rng, monkeypatch):
    """Biases of channels alone, and what is none: of all channels, of pixels, or added to a sum that is read otherwise too."""
    taken = []
    bias_of_sums = Emission.bias_of_sums

    def recorded(kernel):
        found = bias_of_sums(kernel)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(Emission, "bias_of_sums", recorded)
    x = rng.integers(0, 256, (1, 6, 6, 32)).astype("uint8")
    w = relax.const(rng.integers(-128, 128, (32, 32, 3, 3)).astype("int8"))
    shapes = ((32,), (1, 1, 1, 32), (), (1, 6, 6, 32))
    biases = [relax.const(rng.integers(-(2**30), 2**30, s).astype("int32")) for s in shapes]
    shared = {"zero_point": 7, "layout": "NHWC", "padding": (1, 1, 1, 1), "strides": (1, 1)}

    def body(bb, x):
        for i, added in enumerate(biases):
            yield op.add(bb.emit(int8.int8_conv2d(x, w, name=f"l{i}", **shared)), added)
        twice = bb.emit(int8.int8_conv2d(x, w, name="t", **shared))
        yield op.subtract(bb.emit(op.add(twice, biases[0])), twice)

    check(body, [x], tiers()[0])
    assert sum(taken) == 2


SPECIAL = np.array(
    [
        *(0, -0.0, np.nan, np.inf, -np.inf, 0.5, 1.5, 2.5, -0.5, -1.5, 254.5, 255.5, 127.49999),
        *(1e30, -1e30, 1e-30, -2147483648.0, 2147483648.0, 3e9, -3e9),
    ],
    "float32",
)


@pytest.mark.parametrize("target", each_tier())
def test_quantize_special_values(target):
    scales = [(1.0, 0), (1.0, 255), (0.1, 3), (0.0371, 128)]
    body = lambda bb, x: [int8.quantize(x, scale=s, zero_point=z) for s, z in scales]  # noqa: E731
    for (_, zero_point), got in zip(scales, check(body, [SPECIAL], target)):
        assert got[2] == zero_point and (got[3], got[4]) == (255, 0)  # NaN, inf, -inf


def test_dequantize(rng):
    x, y = rng.integers(0, 256, (3, 77)).astype("uint8"), rng.standard_normal((3, 77))

    def body(bb, x, y):
        yield int8.dequantize(x, scale=0.037, zero_point=9)
        yield int8.dequantize_add(y, x, scale=0.037, zero_point=9)

    check(body, [x, y.astype("float32")], tiers()[0])


def test_pooling(rng):
    x = rng.integers(0, 256, (2, 11, 13, 70)).astype("uint8")
    around = {"strides": (2, 2), "padding": (1, 1, 1, 1)}

    def body(bb, x):
        yield op.nn.max_pool2d(x, (3, 3), **around, layout="NHWC")
        for counted in (True, False):
            yield int8.int8_average_pool(
                x,
                pool_size=(3, 3),
                zero_point=77,
                count_include_pad=counted,
                layout="NHWC",
                **around,
            )
        yield int8.int8_average_pool(x, pool_size=(11, 13), zero_point=0, layout="NHWC")

    mod = graph(body, [x])
    _, loops = scheduled(mod, tiers()[0])
    assert list(loops.values()).count("pooling") == 4
    check(body, [x], tiers()[0])


def test_fused_multiply_add_rounds_once(rng):
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    powers = 10.0 ** rng.integers(-9, 9, (3, 5000))
    a, b, c = (rng.standard_normal((3, 5000)) * powers).astype("float32")
    c[:1000] = -(a * b)[:1000]  # what is left is the rounding error alone
    wanted = [libm.fmaf(*(float(v) for v in of)) for of in zip(a, b, c)]
    assert np.array_equal(reference.fused_multiply_add(a, b, c), np.array(wanted, "float32"))


def test_operands_that_are_refused(rng):
    x, w = (relax.Var("x", relax.TensorType((1, 70000), d)) for d in ("uint8", "float32"))
    weight = relax.const(np.full((2, 70000), 127, "int8"))
    for args, more, message in [
        ((w, weight), {}, "other operands"),
        ((x, w), {}, "other operands"),
        ((x, weight), {}, "may not fit int32"),
        ((x, relax.const(np.ones((2, 70000), "int8"))), {"zero_point": 256}, "zero point"),
        ((x, relax.const(np.ones((2, 70000), "int8"))), {"grain": "in:3"}, "unknown grain"),
    ]:
        with pytest.raises(KerfError, match=message):
            int8.int8_dense(*args, name="l", **{"zero_point": 0, **more})
    with pytest.raises(KerfError, match="scale"):
        int8.quantize(w, scale=0.0, zero_point=0)


@pytest.mark.parametrize("dtype", ["int8", "int32", "float32"])
def test_only_bytes_are_dequantized(rng, dtype):
    x = np.ones((2, 3), dtype)
    for made in (
        lambda bb, x: [int8.dequantize(x, scale=0.1, zero_point=0)],
        lambda bb, x: [int8.dequantize_add(bb.emit(op.astype(x, "float32")), x, scale=0.1, zero_point=0)],
    ):  # fmt: skip
        with pytest.raises(KerfError, match=f"reads bytes.*{dtype}.*uint8"):
            graph(made, [x])


def test_largest_sum_is_reached(rng):
    w = rng.integers(-128, 128, (3, 50)).astype("int8")
    for zero_point in (0, 77, 255):
        extremes = [np.where((w > 0) == high, 255, 0) - zero_point for high in (True, False)]
        reached = max(np.abs((e * w.astype(int)).sum(axis=1)).max() for e in extremes)
        assert int8.largest_sum(w, zero_point) == reached
