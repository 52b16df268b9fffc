# SPDX-License-Identifier: Apache-2.0
"""The sparse kernel against a float64 sum over the non-zeros: awkward shapes, tiers, tiles, threads, special values."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax

from passes import layers
from passes.sparse import lowering, reference
from passes.sparse.format import block_of
from passes.sparse.operators import in_planes, plane_of, sparse_call
from passes.sparse.problems import SampleProblem, problems
from schedules import sparse_chain, sparse_planes, sparse_vector, sparse_windows
from schedules.dispatch import loop_structure
from schedules.errors import ScheduleError
from schedules.fused import Fused
from schedules.sparse_planes import Point, default_point
from schedules.sparse_problem import Problem, parts_of, tiles_of
from schedules.target import NAMED


def sparse_weight(rng, shape, grain: str, density: float) -> np.ndarray:
    block = block_of(grain)
    mask = rng.random((-(-shape[0] // block), *shape[1:])) < density
    mask.flat[0] = True
    return (rng.standard_normal(shape) * np.repeat(mask, block, axis=0)[: shape[0]]).astype(
        np.float32
    )


def to_planes(x: np.ndarray, sample: SampleProblem) -> np.ndarray:
    """A channels-last tensor of a layer as planes, one per channel, behind whose last pixel that is repeated."""
    images = x.shape[0] if sample.attrs else 1
    planes = x.reshape(images, -1, x.shape[-1]).transpose(0, 2, 1)
    behind = plane_of(x.shape[:-1], 1) - planes.shape[-1]
    return np.pad(planes, ((0, 0), (0, 0), (0, behind)), mode="edge")


def fused_kernel(
    sample: SampleProblem, weight, target, *, point=None, epilogue: str = "bias relu", planes=(False, False)
):  # fmt: skip
    """(definition, scheduled PrimFunc, arguments but x and y, attributes, y's shape) of one layer with an epilogue.
    `planes`: whether x and y lie in planes."""
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(sample.x, "float32"))
    bias = np.linspace(-1, 1, weight.shape[0], dtype=np.float32)
    if planes[1]:
        bias = bias.reshape(1, -1, 1)
    given = x
    if planes[0]:
        shape = to_planes(np.empty(sample.x, np.float32), sample).shape
        given = relax.Var("x", relax.TensorType(shape, "float32"))
    constants = []
    with bb.function("main", [given]):
        with bb.dataflow():
            w = relax.const(weight)
            attrs = dict(sample.attrs)
            call = (
                layers.conv2d(x, w, name="l", layout="NHWC", **attrs)
                if attrs
                else layers.dense(x, w, name="l")
            )
            call = sparse_call(call, sample.grain)
            call = bb.normalize(in_planes(call, given, *planes) if any(planes) else call)
            problem = lowering.problem_of(call)
            point = point or lowering.default_point(problem, target)
            structure = importlib.import_module(type(point).__module__)
            y = bb.emit(lowering.lower_at(bb, call, problem, structure, point))
            if epilogue:
                y = bb.emit(relax.op.nn.relu(bb.emit(relax.op.add(y, relax.const(bias)))))
                constants = [bias]
            out = bb.emit_output(y)
        bb.emit_func_output(out)
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
    ]
    mod = tvm.transform.Sequential([*passes, relax.transform.FuseTIR()])(bb.get())
    (func,) = [
        f for _, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc) and Fused.read(f)
    ]
    packed = lowering.pack_at(weight, sample.grain, problem, structure, point)
    arrays = [*packed.arrays(), *constants]
    return (
        func,
        loop_structure(Fused.read(func).loops)(Fused.read(func), target),
        arrays,
        layers.attrs_of(call),
        layers.shape_of(call),
    )


def expected(attrs, x, weight, epilogue: bool):
    """(float64 result, bound of a float32 sum's rounding error) of each output."""
    define = reference.sparse_conv2d if weight.ndim == 4 else reference.sparse_dense
    y = define(attrs, x.astype(np.float64), weight)
    size = define(attrs, np.abs(x).astype(np.float64), np.abs(weight))
    terms = np.count_nonzero(weight.reshape(len(weight), -1), axis=1).max() + 2
    if epilogue:
        bias = np.linspace(-1, 1, weight.shape[0], dtype=np.float32)
        return np.maximum(y + bias, 0), (size + np.abs(bias)) * terms * 2.0**-24
    return y, size * terms * 2.0**-24


def build(functions: dict, target):
    mod = tvm.IRModule(
        {
            n: f.with_attr("global_symbol", n).with_attr("tirx.noalias", True)
            for n, f in functions.items()
        }
    )
    return tvm.compile(mod, target=target.tvm())


def run(lib, name: str, x, arrays, shape):
    """y, which starts as NaN so that an element left unwritten shows."""
    y = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    lib[name](*[tvm.runtime.tensor(a) for a in (x, *arrays)], y)
    return y.numpy()


def check(cases: dict, target, rng) -> None:
    """Compile {name: (sample, point)} as one module and compare each kernel with its reference."""
    made = {}
    for name, (sample, point) in cases.items():
        weight = sparse_weight(rng, sample.w, sample.grain, sample.density)
        made[name] = (*fused_kernel(sample, weight, target, point=point), sample, weight)
    lib = build({name: m[1] for name, m in made.items()}, target)
    for name, (_, _, arrays, attrs, shape, sample, weight) in made.items():
        x = rng.standard_normal(sample.x).astype(np.float32)
        want, bound = expected(attrs, x, weight, epilogue=True)
        error = np.abs(run(lib, name, x, arrays, shape) - want)
        assert (error <= bound + 1e-30).all(), (
            f"{name}: error {np.nanmax(error)} beyond rounding, {sample}"
        )


def check_planes(cases: dict, target, rng, weights=sparse_weight) -> None:
    """As `check`, of {name: (sample, point, (x in planes, y in planes))}, and the definitions as well."""
    made = {}
    for name, (sample, point, planes) in cases.items():
        weight = weights(rng, sample.w, sample.grain, sample.density)
        made[name] = (*fused_kernel(sample, weight, target, point=point, planes=planes), sample, weight, planes)  # fmt: skip
    functions = {name: m[1] for name, m in made.items()}
    functions |= {f"{n}_definition": m[0] for n, m in made.items() if all(m[-1])}
    lib = build(functions, target)
    for name, (_, _, arrays, attrs, shape, sample, weight, planes) in made.items():
        x = rng.standard_normal(sample.x).astype(np.float32)
        want, bound = expected(attrs, x, weight, epilogue=True)
        if planes[1]:
            want, bound = to_planes(want, sample), to_planes(bound, sample)
        given = to_planes(x, sample) if planes[0] else x
        for function in {name, f"{name}_definition"} & functions.keys():
            error = np.abs(run(lib, function, given, arrays, shape) - want)
            assert (error <= bound + 1e-30).all(), f"{function}: {np.nanmax(error)}, {sample}"


def test_planes_between_layers(host_tiers, rng):
    """Every side in planes: remainders of vectors, two images, strides, dilation, groups, blocks that stick out."""
    attrs = {"strides": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}

    def conv(x, w, grain, **changes):
        return SampleProblem("kerf.sparse_conv2d", x, w, grain, 0.3, tuple((attrs | changes).items()))  # fmt: skip

    around = {"padding": (1, 1, 1, 1)}
    samples = {
        "pointwise": conv((1, 7, 7, 16), (18, 16, 1, 1), "out:4"),
        "images": conv((2, 7, 9, 12), (33, 12, 3, 3), "out:8", **around),
        "strided": conv((1, 14, 13, 8), (16, 8, 3, 3), "out:4", strides=(2, 2), **around),
        "shortcut": conv((1, 30, 29, 8), (16, 8, 1, 1), "out:4", strides=(2, 2)),
        "elements": conv((2, 9, 9, 12), (20, 12, 1, 1), "element", strides=(2, 2)),
        "grouped": conv((1, 9, 33, 16), (16, 4, 3, 3), "out:4", groups=4, padding=(1, 0, 2, 1)),
        "dilated": conv((1, 13, 14, 8), (16, 8, 5, 5), "element", dilation=(2, 1), padding=(2, 2, 2, 2)),
        "matrix": SampleProblem("kerf.sparse_dense", (2, 17, 40), (22, 40), "out:8", 0.2),
        "one_pixel_behind": conv((2, 7, 7, 12), (20, 12, 1, 1), "out:8"),
        "one_behind_strided": conv((1, 14, 13, 12), (22, 12, 1, 1), "out:8", strides=(2, 2)),
        "four_behind": conv((1, 4, 9, 12), (33, 12, 1, 1), "out:8"),
        "nine_behind": conv((1, 5, 5, 12), (16, 12, 1, 1), "out:16"),
        "crowded": SampleProblem("kerf.sparse_dense", (1, 128, 40), (22, 40), "out:4", 0.2),
        "read_in_place": conv((2, 33, 33, 12), (22, 12, 1, 1), "out:4"),
    }  # fmt: skip
    sides = ((True, True), (False, True), (True, False))
    cases = {
        f"{name}_{i}": (s, None, planes)
        for i, planes in enumerate(sides)
        for name, s in samples.items()
        if i == 0 or name in ("pointwise", "images", "crowded")
    }
    Chain = sparse_chain.Point
    cases["panels"] = (samples["pointwise"], Chain(2, 4, 2, 18), (True, True))
    cases["panels_before_the_last_line"] = (samples["crowded"], Chain(2, 4, 3, 22), (True, True))
    cases["runs_that_differ"] = (samples["read_in_place"], Chain(4, 4, 20, 22), (True, True))
    cases["runs_of_single_vectors"] = (samples["crowded"], Chain(1, 4, 3, 22), (True, True))
    cases["runs_made_alike"] = (samples["crowded"], Chain(2, 4, 7, 22), (True, True))
    cases["panels_of_lines"] = (samples["shortcut"], Chain(3, 2, 5, 16), (True, True))
    check_planes(cases, host_tiers[0], rng)
    split = {"split": (samples["pointwise"], Chain(2, 4, 3, 8, 2), (True, True)), "image": cases["images_0"]}  # fmt: skip
    check_planes(split, host_tiers[-1].with_threads(2), rng)


def test_every_sample_on_every_tier(host_tiers, rng):
    check({f"sample{i}": (s, None) for i, s in enumerate(problems())}, host_tiers[0], rng)
    for target in host_tiers[1:]:
        check({f"sample{i}": (problems()[i], None) for i in (1, 2, 4, 7)}, target, rng)


def test_every_point_computes_the_same(host_tiers, rng):
    """Tiles of several widths, chunked panels, parts with a remainder, split tiles, both row counts of a block."""
    target = host_tiers[0]
    conv = SampleProblem(
        "kerf.sparse_conv2d", (1, 7, 9, 20), (56, 20, 3, 3), "out:8", 0.3,
        (("strides", (1, 1)), ("padding", (1, 1, 1, 1)), ("dilation", (1, 1)), ("groups", 1)),
    )  # fmt: skip
    dense = SampleProblem("kerf.sparse_dense", (70, 50), (41, 50), "element", 0.2)
    cases = {
        "chunked": (conv, Point(vectors=3, rows=8, chunk=64, part=16)),
        "half_blocks": (conv, Point(vectors=2, rows=4, chunk=180, part=24)),
        "split": (conv, Point(vectors=1, rows=8, chunk=50, part=16, splits=3)),
        "bands": (conv, sparse_windows.Point(3, 8, 24, 1, lines=3)),
        "one_line": (conv, sparse_windows.Point(2, 4, 56, 1, lines=1)),
        "narrow": (dense, Point(vectors=1, rows=1, chunk=7, part=16)),
        "wide": (dense, Point(vectors=5, rows=1, chunk=50, part=41)),
    }
    check(cases, target, rng)
    threaded = Point(vectors=2, rows=8, chunk=180, part=16, splits=2)
    cases = {
        "threads": (conv, threaded),
        "bands_threads": (conv, sparse_windows.Point(2, 8, 16, 2, lines=4)),
    }
    check(cases, target.with_threads(2), rng)


def test_the_scheduled_kernel_equals_its_definition(host_tiers, rng):
    sample = problems()[2]
    weight = sparse_weight(rng, sample.w, sample.grain, sample.density)
    definition, kernel, arrays, _, shape = fused_kernel(sample, weight, host_tiers[0])
    lib = build({"definition": definition, "kernel": kernel}, host_tiers[0])
    x = rng.standard_normal(sample.x).astype(np.float32)
    got, want = run(lib, "kernel", x, arrays, shape), run(lib, "definition", x, arrays, shape)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_special_values_reach_the_outputs_that_use_them_and_no_other(host_tiers, rng):
    sample = SampleProblem(
        "kerf.sparse_conv2d", (1, 5, 6, 8), (12, 8, 3, 3), "element", 0.15,
        (("strides", (1, 1)), ("padding", (1, 1, 1, 1)), ("dilation", (1, 1)), ("groups", 1)),
    )  # fmt: skip
    weight = sparse_weight(rng, sample.w, sample.grain, sample.density)
    _, kernel, arrays, attrs, shape = fused_kernel(sample, weight, host_tiers[0], epilogue="")
    x = rng.standard_normal(sample.x).astype(np.float32)
    x[0, 0, 0, 2], x[0, 4, 5, 3], x[0, 2, 2, 1], x[0, 1, 1] = np.nan, np.inf, -np.inf, -0.0
    got = run(build({"main": kernel}, host_tiers[0]), "main", x, arrays, shape)
    with np.errstate(invalid="ignore"):
        want = reference.sparse_conv2d(attrs, x, weight)
    assert np.isnan(want).any() and np.isinf(want).any() and np.isfinite(want).any()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isposinf(got), np.isposinf(want))
    np.testing.assert_allclose(
        got[np.isfinite(want)], want[np.isfinite(want)], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("pixels", [1, 15, 16, 17, 49, 128, 197, 3136])
def test_tiles_cover_every_vector_once(pixels):
    for lanes in (4, 8, 16):
        for vectors in (1, 3, 6, 8):
            tiles, most, large = tiles_of(pixels, lanes, vectors)
            assert large * most + (tiles - large) * (most - 1) == -(-pixels // lanes)
            assert 1 <= large <= tiles and most <= vectors


def test_parts_cover_every_channel_once():
    for outputs in (1, 15, 64, 100, 1000):
        parts = parts_of(outputs, 64)
        assert [first for first, _ in parts] == [
            sum(n for _, n in parts[:i]) for i in range(len(parts))
        ]
        assert sum(n for _, n in parts) == outputs


def test_default_points_fit_the_registers():
    for target in NAMED.values():
        for block in (1, 4, 8, 16):
            problem = Problem(
                1, 14, 14, 256, 256, 14, 14, (3, 3), padding=(1, 1, 1, 1), block=block
            )
            point = default_point(problem, target)
            assert block % point.rows == 0
            # One row takes its panel operand from memory; more rows keep it in registers.
            operands = 1 if point.rows == 1 else point.vectors + 1
            assert point.rows * point.vectors + operands <= target.registers, (
                target.name,
                block,
                point,
            )


def test_offsets_of_a_window_are_distinct_and_within_its_panel():
    for stride, dilation, kernel in (
        ((1, 1), (1, 1), (3, 3)),
        ((2, 3), (3, 2), (5, 4)),
        ((4, 1), (1, 1), (2, 7)),
    ):
        problem = Problem(1, 40, 40, 6, 8, 9, 11, kernel, stride, dilation, block=4)
        places = sparse_windows.offsets(problem, 4)
        assert places.shape == (6, *kernel) and len(np.unique(places)) == places.size
        window = sparse_windows.window_of(problem, 4)
        last_pixel = 3 * window.line + problem.out_width - 1
        assert (places + last_pixel).max() < 6 * window.channel


@pytest.mark.parametrize(
    "channels, pixels, block, span",
    [
        (384, 197, 4, 13),  # all of a plane
        (1536, 197, 4, 5),  # and 4, and 4
        (3072, 128, 4, 4),  # as many as a tile should have
        (3072, 128, 1, 2),
        (64, 3136, 8, 98),  # half of a long one
        (64, 3136, 4, 66),  # one more run, for one tile less
    ],
)
def test_runs_of_planes_fit_the_second_level_cache(channels, pixels, block, span):
    cpu = replace(NAMED["avx512"], l2_bytes=2**20)
    plane = -(-pixels // 16) * 16
    problem = Problem(
        1, 1, pixels, channels, 384, 1, pixels, block=block, planes_in=True, planes_out=True,
        input_plane=plane, output_plane=plane,
    )  # fmt: skip
    assert sparse_chain.default_point(problem, cpu).span == span


@pytest.mark.parametrize(
    "pixels, block, behind",
    [(49, 8, 1), (36, 8, 4), (17, 4, 1), (49, 1, 0), (53, 8, 0), (48, 8, 0), (7, 8, 0), (196, 8, 0)],
)  # fmt: skip
def test_few_pixels_behind_whole_vectors_have_their_channels_in_lanes(pixels, block, behind):
    cpu = NAMED["avx512"]
    problem = Problem(
        1, 1, pixels, 64, 64, 1, pixels, block=block, planes_in=True, planes_out=True,
        input_plane=-(-pixels // 16) * 16, output_plane=-(-pixels // 16) * 16,
    )  # fmt: skip
    point = sparse_chain.default_point(problem, cpu)
    assert sparse_chain.pixels_behind(problem, point.rows, cpu) == behind
    assert sparse_chain.pixels_behind(replace(problem, output_plane=pixels), 8, cpu) == 0


def test_blocks_of_a_spatial_kernel_use_windows_and_others_do_not():
    problem = Problem(1, 56, 56, 64, 64, 56, 56, (3, 3), padding=(1, 1, 1, 1), block=4)

    def chosen(**changes):
        return lowering.structure_for(replace(problem, **changes))

    assert chosen() is sparse_windows
    assert chosen(block=1) is sparse_planes
    assert chosen(block=1, channels=3) is sparse_windows
    assert chosen(block=1, planes_in=True) is sparse_windows
    assert chosen(block=1, planes_out=True) is sparse_windows
    pointwise = dict(kernel=(1, 1), padding=(0, 0, 0, 0))
    assert chosen(**pointwise) is sparse_planes
    assert chosen(planes_in=True, **pointwise) is sparse_planes
    assert chosen(planes_out=True, **pointwise) is sparse_chain
    halved = dict(strides=(2, 2), out_height=28, out_width=28, **pointwise)
    assert chosen(planes_in=True, planes_out=True, **halved) is sparse_chain
    assert chosen(planes_in=True, **halved) is sparse_windows
    row = dict(height=1, width=1, out_height=1, out_width=1, **pointwise)
    assert chosen(**row) is sparse_vector
    assert chosen(batch=4, **row) is sparse_vector
    assert chosen(batch=5, **row) is sparse_planes
    assert chosen(groups=2, **row) is sparse_planes


def test_a_few_rows_of_activations(host_tiers, rng):
    """One row and several, outputs that are no multiple of the block, more partial sums than non-zeros."""
    Vector = sparse_vector.Point
    cases = {
        "one_row": (SampleProblem("kerf.sparse_dense", (1, 100), (70, 100), "out:4", 0.2), None),
        "element": (SampleProblem("kerf.sparse_dense", (1, 300), (33, 300), "element", 0.1), None),
        "three_rows": (SampleProblem("kerf.sparse_dense", (3, 1, 40), (17, 40), "out:8", 0.3), Vector(3)),
        "four_rows": (SampleProblem("kerf.sparse_dense", (2, 2, 64), (48, 64), "out:16", 0.1), Vector(1)),
        "less_than_a_block": (SampleProblem("kerf.sparse_dense", (1, 50), (3, 50), "out:4", 0.3), Vector(16)),
        "pixel": (
            SampleProblem(
                "kerf.sparse_conv2d", (1, 1, 1, 24), (20, 24, 1, 1), "out:8", 0.3,
                (("strides", (1, 1)), ("padding", (0, 0, 0, 0)), ("dilation", (1, 1)), ("groups", 1)),
            ),
            None,
        ),
    }  # fmt: skip
    for target in (host_tiers[0], host_tiers[-1], host_tiers[0].with_threads(2)):
        check(cases, target, rng)


def test_images_of_few_channels_use_windows_at_every_grain(host_tiers, rng):
    attrs = (("strides", (2, 2)), ("padding", (3, 3, 3, 3)), ("dilation", (1, 1)), ("groups", 1))
    cases = {
        grain.replace(":", ""): (
            SampleProblem("kerf.sparse_conv2d", (2, 19, 23, c), (24, c, 7, 7), grain, 0.15, attrs),
            None,
        )
        for c, grain in ((3, "element"), (3, "out:4"), (1, "out:8"))
    }
    check(cases, host_tiers[0], rng)


def test_problem_and_point_survive_the_annotation():
    problem = Problem(2, 5, 9, 8, 20, 3, 5, (3, 3), (2, 2), (1, 1), (1, 0, 2, 1), block=4, stored=7)
    assert (
        Problem.from_dict(
            {k: list(v) if isinstance(v, tuple) else v for k, v in problem.to_dict().items()}
        )
        == problem
    )


def test_an_anchor_with_other_arguments_is_refused(host_tiers):
    from schedules.fused import annotations

    problem = Problem(1, 1, 4, 4, 4, 1, 4)
    notes = annotations(
        "sparse_planes", problem=problem.to_dict(), point=Point(1, 1, 4, 4).to_dict()
    )
    x = tvm.te.placeholder((4, 4), name="x")
    y = tvm.te.compute((4, 4), lambda i, j: x[i, j] * 2.0, attrs=notes)
    with pytest.raises(ScheduleError, match="arguments"):
        sparse_planes.schedule(Fused.read(tvm.te.create_prim_func([x, y])), host_tiers[0])


@pytest.mark.parametrize(
    "kernel, stride, structure", [(16, 16, sparse_planes), (7, 4, sparse_windows)]
)
def test_windows_far_apart_are_packed_tap_by_tap(kernel, stride, structure):
    """The patches of a vision transformer: code of its own for each of 256 phases took minutes to compile."""
    out = (64 - kernel) // stride + 1
    problem = Problem(
        1, 64, 64, 3, 16, out, out, (kernel, kernel), (stride, stride), block=4, stored=4
    )
    assert lowering.structure_for(problem) is structure
