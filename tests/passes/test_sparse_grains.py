# SPDX-License-Identifier: Apache-2.0
"""Grains: names, packing and unpacking as inverses, storage, detection, pruning, the numpy reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.numpy_images import conv2d
from passes.numpy_nn import dense
from passes.sparse.detect import coarsest_grain, density_at, found
from passes.sparse.grains import Grain, as_4d
from passes.sparse.prune import check, prune, saliency
from passes.sparse.reference import convolve_packed, multiply_packed
from passes.sparse.storage import (
    COLUMNS_16,
    COLUMNS_32,
    GAPS,
    INDICES,
    pack,
    positions,
    storage_bytes,
    unpack,
)

NAMES = (
    "element", "row", "kernel", "filter", "channel", "out:4", "out:8", "out:16", "in:4", "block:4x4", "block:8x2",
    "block:32x32", "2:4", "1:4", "1:2", "3:7", "8:16",
)  # fmt: skip


def normal(rng, shape):
    return rng.standard_normal(shape).astype(np.float32)


def pruned(rng, shape, name, density=0.3):
    return prune(normal(rng, shape), grain=name, density=Grain.parse(name).density or density)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_parsed_and_written_back(name):
    assert Grain.parse(name).name == name
    assert Grain.parse(Grain.parse(name)) == Grain.parse(name)


@pytest.mark.parametrize("name", ["", "out", "out:5", "in:8", "4:2", "4:4", "0:4", "block:4", "block:0x4", "block:65x4", "rows", "Element", " 2:4", "block:100x4"])  # fmt: skip
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown grain.*element, row, kernel"):
        Grain.parse(name)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("row", "element"), ("kernel", "element"), ("2:4", "element"), ("in:4", "element"), ("out:8", "out:8"),
     ("block:4x4", "out:4"), ("block:8x2", "out:8"), ("block:32x32", "out:16"), ("block:6x6", "element"), ("block:12x1", "out:4"), ("filter", "element")],
)  # fmt: skip
def test_a_grain_runs_as_the_coarsest_kernel_format_that_represents_it(name, kernel):
    assert Grain.parse(name).runs_as() == kernel


def test_blocks_that_straddle_groups_run_finer():
    grain = Grain.parse("block:16x4")
    assert [grain.runs_as(n) for n in (32, 24, 12, 6)] == ["out:16", "out:8", "out:4", "element"]


shapes = st.one_of(
    st.tuples(st.integers(1, 19), st.integers(1, 33)),
    st.tuples(*(st.integers(1, n) for n in (19, 17, 5, 5))),
)


@settings(deadline=None, max_examples=200)
@given(
    shape=shapes,
    name=st.sampled_from(NAMES),
    indices=st.sampled_from([None, *INDICES]),
    density=st.floats(0.01, 1),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float32", "int8"]),
)
def test_unpack_undoes_pack(shape, name, indices, density, seed, dtype):
    grain, rng = Grain.parse(name), np.random.default_rng(seed)
    weight = rng.integers(-128, 128, shape).astype(dtype)
    weight[rng.random(shape) > density] = 0
    if grain.of:
        weight = prune(weight, grain=grain)
    packed = pack(weight, grain, indices)
    assert packed.values.dtype == weight.dtype
    np.testing.assert_array_equal(unpack(packed), weight)
    assert packed.values.size == grain.stored(weight)
    assert packed.fill == packed.values.size - np.count_nonzero(weight)
    assert packed.nbytes == packed.values.nbytes + packed.index.nbytes + packed.pointer.nbytes
    if indices is None and not grain.of:
        assert packed.nbytes == min(pack(weight, grain, each).nbytes for each in INDICES)


def test_special_values_are_kept_and_negative_zero_is_zero():
    weight = np.zeros((4, 6), np.float32)
    weight[0, 1], weight[1, 2], weight[2, 3], weight[3, 0] = np.nan, np.inf, -0.0, -np.inf
    packed = pack(weight, "element")
    assert len(packed.values) == 3
    np.testing.assert_array_equal(unpack(packed), weight)


def test_gaps_longer_than_a_byte_are_skipped_in_steps():
    weight = np.zeros((2, 1000), np.float32)
    weight[0, 254], weight[0, 510], weight[1, 999] = 1, 2, 3
    packed = pack(weight, "element", GAPS)
    # 254 fits; 255 zeros lie between the next two; then 1488, which is 5 * 255 + 213
    assert packed.index.tolist() == [254, 255, 0, 255, 255, 255, 255, 255, 213]
    assert positions(packed).tolist() == [254, 510, 1999]
    np.testing.assert_array_equal(unpack(packed), weight)


def test_columns_that_do_not_fit_are_refused():
    weight = np.ones((1, 1 << 17), np.float32)
    with pytest.raises(ValueError, match="131072 columns of blocks do not fit into columns16"):
        pack(weight, "element", COLUMNS_16)
    assert pack(weight, "element", COLUMNS_32).index.dtype == np.uint32
    with pytest.raises(ValueError, match="unknown index layout"):
        pack(weight, "element", "columns8")


def test_a_constraint_that_the_weight_breaks_is_refused():
    with pytest.raises(ValueError, match="4 neighbouring input channels hold more than 2"):
        pack(np.ones((2, 8), np.float32), "2:4")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("indices", INDICES)
def test_the_storage_formula_is_the_packed_size(rng, name, indices):
    shape, grain = (64, 96, 3, 3), Grain.parse(name)
    weight = pruned(rng, shape, name, 0.1)
    packed = pack(weight, name, indices)
    density = grain.pattern(weight).mean()
    wanted = storage_bytes(shape, name, density, indices=indices)
    if grain.of or indices != GAPS:
        assert packed.nbytes == wanted
    else:
        assert packed.nbytes == pytest.approx(wanted, rel=2e-3, abs=8)


def test_the_formula_is_that_of_the_literature_where_nothing_is_added():
    # d * (b + i / g): 10 % of rows of 3 at 32 bits with 8-bit indices
    shape = (64, 64, 3, 3)
    wanted = 0.1 * (32 + 8 / 3) / 8 * math.prod(shape)
    assert storage_bytes(shape, "row", 0.1) == pytest.approx(wanted, rel=1e-6)
    assert storage_bytes((64, 64), "2:4", 0.5) == 64 * 64 * (4 / 2 + 2 * 2 / 4 / 8)


def test_coarser_grains_need_fewer_index_bytes(rng):
    sizes = {
        n: pack(pruned(rng, (64, 64, 3, 3), n, 0.1), n)
        for n in ("element", "row", "kernel", "filter")
    }
    index = [p.index_bytes for p in sizes.values()]
    assert index == sorted(index, reverse=True) and index[0] > 2.9 * index[1]


# Detection


@pytest.mark.parametrize("name", ["element", "row", "kernel", "filter", "channel", "out:4", "out:8", "out:16", "in:4", "block:4x4", "block:8x8", "2:4", "1:4", "1:2", "2:8"])  # fmt: skip
def test_the_coarsest_grain_is_found(rng, name):
    facts = found(pruned(rng, (64, 64, 3, 3), name, 0.2))
    grain = Grain.parse(name)
    assert facts["grain"] == name
    assert facts["density"] == pytest.approx(grain.density or 0.2, abs=0.02)
    assert facts["grain_density"][name] == pytest.approx(facts["density"], rel=0.05)
    runs_elsewhere = name not in ("element", "filter", "channel", "out:4", "out:8", "out:16")
    assert ("runs_as" in facts) == runs_elsewhere


def test_a_dense_weight_has_no_grain_and_one_of_zeros_is_dead(rng):
    assert found(normal(rng, (16, 8, 3, 3)))["grain"] is None
    assert coarsest_grain(np.zeros((16, 8, 3, 3), np.float32)).name == "filter"


def test_a_few_zeros_are_no_grain_of_large_blocks(rng):
    weight = normal(rng, (64, 64, 3, 3))
    weight[rng.random(weight.shape) < 0.004] = 0
    assert coarsest_grain(weight).name == "element"


@pytest.mark.parametrize("name", ["row", "kernel", "out:4", "out:16", "block:4x4"])
def test_zeros_beside_the_grid_are_not_taken_for_a_grain(rng, name):
    weight = pruned(rng, (64, 64, 3, 3), name, 0.2)
    moved = np.roll(weight, 1, 3) if name in ("row", "kernel") else np.roll(weight, (2, 2), (0, 1))
    moved[0, 0, 0, 0] = 1
    wanted = {"row": ("row", "kernel"), "kernel": ("kernel",)}.get(name, ())
    assert coarsest_grain(moved).name in (*wanted, "element")


def test_random_zeros_are_no_constraint_and_few_fill_is_tolerated(rng):
    weight = normal(rng, (64, 64))
    weight[rng.random((64, 64)) < 0.95] = 0
    assert coarsest_grain(weight).name == "element"
    weight = pruned(rng, (64, 64), "out:8", 0.2)
    weight[np.nonzero(weight)[0][0], np.nonzero(weight)[1][0]] = 0
    assert coarsest_grain(weight).name == "out:8"


def test_in_a_1x1_convolution_rows_and_kernels_are_elements(rng):
    for name in ("row", "kernel"):
        assert coarsest_grain(pruned(rng, (32, 32, 1, 1), name, 0.2)).name == "element"


@pytest.mark.parametrize(
    ("pruned_at", "grain"), [("element", "element"), ("row", "row"), ("kernel", "filter"), ("out:4", "out:4"), ("block:8x8", "out:8")],
)  # fmt: skip
def test_blocks_of_input_channels_are_no_grain_of_depthwise_convolutions(rng, pruned_at, grain):
    assert coarsest_grain(pruned(rng, (64, 1, 3, 3), pruned_at, 0.3)).name == grain


@pytest.mark.parametrize("outputs", [1, 7, 17, 20])
def test_channels_that_the_block_does_not_divide_are_padded(rng, outputs):
    weight = pruned(rng, (outputs, 40, 3, 3), "out:4", 0.2)
    packed = pack(weight, "out:4")
    np.testing.assert_array_equal(unpack(packed), weight)
    assert packed.values.size % 4 == 0
    if outputs > 4:
        assert coarsest_grain(weight).name == "out:4"
        assert density_at("out:4", weight) == pytest.approx(np.mean(weight != 0))


def test_what_torch_prunes_is_found(rng):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune as tp

    def grain_after(method, **options):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(64, 64, 3)
        method(conv, "weight", **options)
        tp.remove(conv, "weight")
        return found(conv.weight.detach().numpy())

    unstructured = grain_after(tp.l1_unstructured, amount=0.9)
    assert unstructured["grain"] == "element"
    assert unstructured["density"] == pytest.approx(0.1, abs=1e-3)
    assert grain_after(tp.random_unstructured, amount=0.5)["grain"] == "element"
    filters = grain_after(tp.ln_structured, amount=0.25, n=1, dim=0)
    assert filters["grain"] == "filter" and filters["density"] == 0.75
    assert grain_after(tp.ln_structured, amount=0.25, n=2, dim=1)["grain"] == "channel"
    # A kernel row or column dead in every filter: the largest blocks over both kinds of channels.
    for facts in (
        grain_after(tp.ln_structured, amount=1, n=2, dim=2),
        grain_after(tp.random_structured, amount=1, dim=3),
    ):
        assert (facts["grain"], facts["runs_as"]) == ("block:32x32", "out:16")


# Pruning


@pytest.mark.parametrize(
    "name", ["element", "row", "kernel", "filter", "channel", "out:4", "in:4", "block:4x4"]
)
def test_prune_keeps_the_most_salient_grains(rng, name):
    weight, grain = normal(rng, (32, 20, 3, 3)), Grain.parse(name)
    result = prune(weight, density=0.25, grain=name)
    kept, scores = grain.pattern(result), saliency(weight, grain)
    assert kept.sum() == round(0.25 * kept.size)
    assert scores[kept].min() >= scores[~kept].max()
    np.testing.assert_array_equal(result[result != 0], weight[result != 0])


@pytest.mark.parametrize("name", ["2:4", "1:4", "3:7"])
@pytest.mark.parametrize("inputs", [28, 30, 3])
def test_a_constraint_keeps_the_largest_of_every_group(rng, name, inputs):
    weight, grain = normal(rng, (5, inputs, 3, 1)), Grain.parse(name)
    result = prune(weight, grain=name)
    assert grain.fits(result)
    before, after = (np.sort(np.abs(grain.groups_of(w)), axis=-1) for w in (weight, result))
    np.testing.assert_array_equal(before[..., -grain.keep :], after[..., -grain.keep :])
    assert not after[..., : -grain.keep].any()


def test_the_density_of_a_constraint_is_its_own(rng):
    weight = normal(rng, (8, 8))
    np.testing.assert_array_equal(
        prune(weight, grain="2:4", density=0.5), prune(weight, grain="2:4")
    )
    with pytest.raises(ValueError, match="2:4 keeps 50% of the weights, not 10%"):
        prune(weight, grain="2:4", density=0.1)
    check({"grain": "2:4"}, True)
    check({"grain": "row"}, False)
    with pytest.raises(ValueError, match="pruning needs to know the density"):
        check({"grain": "row"}, True)


# The numpy reference, from the packed arrays


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_product_is_the_dense_one(rng, name):
    x, w = rng.standard_normal((2, 3, 37)), pruned(rng, (21, 37), name)
    np.testing.assert_allclose(
        multiply_packed(x, pack(w, name)), dense({}, x, w), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("groups", "strides", "dilation", "padding", "kernel"),
    [(1, (1, 1), (1, 1), (1, 1, 1, 1), (3, 3)), (3, (2, 1), (1, 2), (0, 2, 1, 0), (3, 2)), (1, (2, 2), (1, 1), (0, 0, 0, 0), (1, 1))],
)  # fmt: skip
def test_a_packed_convolution_is_the_dense_one(
    rng, name, groups, strides, dilation, padding, kernel
):
    w = pruned(rng, (12, 5, *kernel), name)
    attrs = {"strides": strides, "dilation": dilation, "padding": padding, "groups": groups, "layout": "NCHW"}  # fmt: skip
    x = rng.standard_normal((2, 5 * groups, 7, 6))
    wanted = conv2d(attrs, x, w)
    np.testing.assert_allclose(convolve_packed(attrs, x, pack(w, name)), wanted, rtol=0, atol=1e-12)
    last = convolve_packed({**attrs, "layout": "NHWC"}, x.transpose(0, 2, 3, 1), pack(w, name))
    np.testing.assert_allclose(last.transpose(0, 3, 1, 2), wanted, rtol=0, atol=1e-12)


def test_a_matrix_is_a_1x1_convolution():
    assert as_4d((3, 4)) == (3, 4, 1, 1)
