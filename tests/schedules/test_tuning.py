# SPDX-License-Identifier: Apache-2.0
"""Tuning records, search spaces, the search itself, and candidates checked before they are timed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from schedules.errors import UserError
from schedules.records import FILE, Records, target_key
from schedules.target import NAMED, CpuTarget, detect_host

AVX512, AVX2 = NAMED["avx512"], NAMED["avx2"]
PROBLEM = {"n": 1, "padding": [0, 0, 0, 0]}


def entry(
    target: CpuTarget = AVX512, kind: str = "result", problem: dict = PROBLEM, **more
) -> dict:
    fields = {"kind": kind, "target": target_key(target), "loops": "contraction"}
    return {**fields, "problem": problem, "point": {"mr": 4}, "ratio": 0.9, **more}


# ---- records


def test_records_round_trip(tmp_path):
    records = Records.open(tmp_path / "new" / "dir", create=True)
    records.add(entry(kept=True))
    records.add(entry(kind="trial", ratio=None))
    again = Records.open(tmp_path / "new" / "dir")
    # A problem's tuples are lists in the file.
    problem = {"n": 1, "padding": (0, 0, 0, 0)}
    assert again.lookup(AVX512, "contraction", problem) == {"mr": 4}
    assert again.lookup(AVX512, "depthwise", problem) is None
    assert again.lookup(AVX512, "contraction", {**problem, "n": 2}) is None
    assert len(again.trials_of(AVX512, "contraction", problem)) == 1


def test_the_last_result_counts_and_only_if_kept(tmp_path):
    records = Records.open(tmp_path, create=True)
    records.add(entry(kept=True))
    records.add(entry(kept=True, point={"mr": 5}))
    assert records.lookup(AVX512, "contraction", PROBLEM) == {"mr": 5}
    records.add(entry(kept=False, point={"mr": 6}))
    assert records.lookup(AVX512, "contraction", PROBLEM) is None
    assert Records.open(tmp_path).lookup(AVX512, "contraction", PROBLEM) is None


@pytest.mark.parametrize(
    "other",
    [AVX2, AVX512.with_threads(2), replace(AVX512, l2_bytes=2 << 20)],
    ids=["isa", "threads", "cache"],
)
def test_records_of_another_target_are_ignored_and_said_so(tmp_path, other):
    records = Records.open(tmp_path, create=True)
    records.add(entry(kept=True))
    assert records.lookup(other, "contraction", PROBLEM) is None
    assert "1 tuning records are for another target" in records.ignored_for(other)
    assert records.ignored_for(replace(AVX512, name="another name")) == ""


@pytest.mark.parametrize(
    "line, found",
    [
        ("{oops", "damaged tuning record"),
        ("[1, 2]", "no valid 'kind'"),
        (json.dumps({**entry(), "kind": "rumour"}), "no valid 'kind'"),
        (json.dumps({**entry(), "point": 3}), "no valid 'point'"),
        (json.dumps({**entry(), "ratio": "fast"}), "no valid 'ratio'"),
    ],
)
def test_a_damaged_line_is_an_error_that_names_it(tmp_path, line, found):
    (tmp_path / FILE).write_text(json.dumps(entry()) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"{FILE}:2.*{found}"):
        Records.open(tmp_path)


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    whole = json.dumps(entry(kept=True)) + "\n"
    (tmp_path / FILE).write_text(whole + whole[:40])
    records = Records.open(tmp_path)
    assert records.lookup(AVX512, "contraction", PROBLEM) == {"mr": 4}
    records.add(entry(kind="trial"))
    assert len((tmp_path / FILE).read_text().splitlines()) == 2
    assert len(Records.open(tmp_path).trials_of(AVX512, "contraction", PROBLEM)) == 1


def test_a_missing_directory_or_a_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no tuning records"):
        Records.open(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a directory"):
        Records.open(tmp_path / "file", create=True)


def test_records_are_no_part_of_a_target():
    tuned = AVX512.with_records(Records(None))
    assert tuned == AVX512
    assert hash(tuned) == hash(AVX512)
    assert tuned.to_json() == AVX512.to_json()
    assert "records" not in AVX512.to_json()


# ---- spaces and lookup


def problem(**fields):
    from schedules.contraction import Problem

    return Problem(**{"n": 1, "h": 14, "w": 14, "c": 64, "o": 64, **fields})


def spaces():
    """(loops, problem, default point, space) of assorted problems on every tier."""
    from schedules import (
        batch_matmul,
        contraction,
        depthwise,
        grouped,
        int8_contraction,
        int8_depthwise,
        int8_winograd,
        winograd,
    )
    from schedules.spaces import space_of

    same = {"r": 3, "s": 3, "padding": (1, 1, 1, 1)}
    batch = batch_matmul.Problem((12,), (12,), 65, 64, 33)
    for target in (AVX512, AVX2, NAMED["aarch64"].with_threads(2)):
        cases = [
            (contraction, problem()),
            (contraction, problem(c=33, o=17, n=2, dilation=(2, 2), **same)),
            (contraction, problem(c=512, o=32)),
            (contraction, problem(c=64, o=64, groups=4, **same)),
            (contraction, problem(h=1, w=1, c=2048, o=1000)),
            (depthwise, problem(groups=64, **same)),
            (grouped, problem(groups=32, **same)),
            (batch_matmul, batch),
            (int8_contraction, problem(c=512, o=40)),
            (int8_contraction, problem(c=16, **same)),
            (int8_winograd, problem(h=28, w=28, c=128, o=128, r=3, s=3, padding=(1, 1, 1, 1))),
            (int8_contraction, problem(h=1, w=1, c=2048, o=1000)),
            (int8_depthwise, problem(groups=64, **same)),
        ]
        for structure, found in cases:
            default = structure.default_point(found, target)
            loops = structure.__name__.rpartition(".")[2]
            yield target, found, default, space_of(loops, found, default, target)
        found = winograd.Problem(1, 14, 14, 64, 48, (1, 1, 1, 1))
        default = winograd.default_point(found, 4, target)
        yield target, found, default, space_of("winograd", found, default, target)


def test_spaces_hold_the_default_and_fit_the_registers():
    for target, found, default, space in spaces():
        indices = space.indices_of(default)
        assert indices is not None and space.point(indices) == default, (target.name, found)
        assert 1 < len(space.points) <= space.size
        for point in space.points:
            rows = getattr(point, "mr", None) or point.rows
            vectors = getattr(point, "nv", None) or point.vectors
            fits = rows * vectors * getattr(point, "sums", 1) + vectors <= target.registers
            assert fits or point == default, (target.name, point)
            assert space.estimate(point) > 0


def test_tiles_are_no_wider_than_a_row():
    from schedules import contraction
    from schedules.spaces import space_of

    small = problem(h=1, w=3, c=5, o=40)
    default = contraction.default_point(small, AVX512)
    assert max(p.mr for p in space_of("contraction", small, default, AVX512).points) <= 3


def test_nothing_to_tune_has_no_space():
    from schedules.spaces import space_of

    assert space_of("softmax", None, None, AVX512) is None


def other_point(found, target):
    from schedules import contraction
    from schedules.spaces import space_of

    default = contraction.default_point(found, target)
    points = space_of("contraction", found, default, target).points
    return default, next(p for p in points if p != default)


def test_a_recorded_point_replaces_the_default_of_its_problem_only(tmp_path):
    from schedules import contraction
    from schedules.spaces import point_for

    default, other = other_point(problem(), AVX512)
    records = Records.open(tmp_path, create=True)
    records.add(entry(kept=True, problem=problem().to_dict(), point=other.to_dict()))
    tuned = AVX512.with_records(records)
    assert point_for(contraction, problem(), AVX512) == default
    assert point_for(contraction, problem(), tuned) == other
    near = problem(o=80)
    assert point_for(contraction, near, tuned) == contraction.default_point(near, AVX512)
    assert point_for(contraction, problem(), AVX2.with_records(records)).lanes == 8


@pytest.mark.parametrize("change", [{"mr": 1000}, {"lanes": 8}, {"flavour": 1}])
def test_a_recorded_point_that_is_not_legal_is_an_error(tmp_path, change):
    from schedules import contraction
    from schedules.spaces import point_for

    _, other = other_point(problem(), AVX512)
    point = {**other.to_dict(), **change}
    records = Records.open(tmp_path, create=True)
    records.add(entry(kept=True, problem=problem().to_dict(), point=point))
    with pytest.raises(UserError, match="cannot use"):
        point_for(contraction, problem(), AVX512.with_records(records))


# ---- search


def fused_conv(found, point):
    """The fused PrimFunc of a convolution's definition."""
    from tvm import te

    from passes.dense.conv2d import define_conv2d
    from schedules.contraction import packed_shape

    x = te.placeholder((found.n, found.h, found.w, found.c), name="x")
    w = te.placeholder(packed_shape(found, point), name="w")
    return te.create_prim_func([x, w, define_conv2d(found, point)(x, w)])


def new_search(found, target, space=None, batch=8):
    from schedules import contraction
    from schedules.spaces import space_of
    from schedules.tuning import Search, SpeedModel

    default = contraction.default_point(found, target)
    space = space or space_of("contraction", found, default, target)
    func = fused_conv(found, default)
    return Search(func, found, space, default, target, SpeedModel(), seed=3, batch=batch)


def synthetic_ratio(point) -> float:
    """A smooth cost with its least value where neither the default nor the estimate is."""
    return 1.0 + 0.05 * abs(point.mr - 5) + 0.1 * abs(point.nv - 3) + 0.02 * abs(point.unroll - 8)


def test_search_learns_and_does_not_repeat_itself():
    search = new_search(problem(), AVX512)
    tried = []
    for _ in range(5):
        points = search.propose()
        assert len(points) == 8
        tried += points
        search.learn(points, [synthetic_ratio(p) for p in points])
    assert len(set(tried)) == len(tried) == 40
    assert all(search.space.indices_of(p) is not None for p in tried)
    every = np.sort([synthetic_ratio(p) for p in search.space.points])
    ratios = [synthetic_ratio(p) for p in tried]
    # What is tried gets better, and much better than what is picked at random.
    assert np.mean(ratios[24:]) < np.mean(ratios[:8])
    assert np.mean(ratios[24:]) < every[len(every) // 4]
    assert min(ratios) <= every[len(every) // 20]


def test_search_ends_when_a_small_space_is_exhausted():
    from schedules import contraction
    from schedules.spaces import Space

    found = problem(c=16, o=16)
    default = contraction.default_point(found, AVX512)
    space = Space(
        {"mr": (1, 2, default.mr)}, lambda chosen: replace(default, mr=chosen["mr"]), lambda _: 1.0
    )
    search = new_search(found, AVX512, space)
    points = search.propose()
    assert sorted(p.mr for p in points) == [1, 2]
    assert not search.exhausted
    search.learn(points, [1.1, None])
    assert search.exhausted and search.propose() == []


def test_search_takes_up_what_an_earlier_run_measured():
    first = new_search(problem(), AVX512)
    points = first.propose()
    second = new_search(problem(), AVX512)
    second.learn(points, [synthetic_ratio(p) for p in points])
    assert not set(second.propose()) & set(points)


# ---- candidates


@pytest.fixture(scope="module")
def tiny():
    """A small convolution: make(point) and its default point, with weights that are whole numbers."""
    from passes.dense.conv2d import pack_weights
    from schedules import contraction
    from schedules.candidates import Candidate

    host = detect_host()
    found = problem(h=5, w=7, c=12, o=20)
    random = np.random.default_rng(0)
    x = random.integers(-3, 4, (1, 5, 7, 12)).astype("float32")
    weight = random.integers(-2, 3, (20, 12, 1, 1)).astype("float32")

    def make(point, weight=weight):
        return Candidate(point, fused_conv(found, point), (x, pack_weights(weight, found, point)))

    return found, make, weight, contraction.default_point(found, host), host


def test_candidates_are_timed_beside_the_default(tiny):
    from schedules.candidates import Bench

    _, make, _, default, host = tiny
    bench = Bench(make, default, host)
    others = [replace(default, mr=2), replace(default, mr=1)]
    outcomes = bench.try_points(others, seconds=0.02)
    assert [o.point for o in outcomes] == others
    assert all(o.error == "" and o.us > 0 and o.ratio > 0 for o in outcomes)
    found = bench.compare(others[:1], seconds=0.02)[0]
    assert found.low <= found.ratio <= found.high and found.default_us > 0


def test_a_candidate_that_computes_something_else_is_refused(tiny):
    from schedules.candidates import Bench

    _, make, weight, default, host = tiny
    wrong = weight.copy()
    wrong[7, 3] += 1  # one weight of 240, by one
    bad, good = replace(default, mr=1), replace(default, mr=2)
    bench = Bench(lambda p: make(p, wrong) if p == bad else make(p), default, host)
    refused, taken = bench.try_points([bad, good], seconds=0.02)
    assert "differs from its definition" in refused.error and refused.ratio is None
    assert taken.error == "" and taken.ratio is not None


def test_a_candidate_that_cannot_be_made_is_refused(tiny):
    from schedules.candidates import Bench

    _, make, _, default, host = tiny

    def broken(point):
        if point.mr == 1:
            raise ValueError("no such kernel")
        return make(point)

    outcomes = Bench(broken, default, host).try_points([replace(default, mr=1)], seconds=0.02)
    assert outcomes[0].error == "no such kernel" and outcomes[0].ratio is None


def test_interval_of_a_median():
    from schedules.candidates import median_interval

    values = np.arange(1.0, 101.0)
    low, high = median_interval(values)
    assert 38 <= low <= 42 and 59 <= high <= 63
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)
