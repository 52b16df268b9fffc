# SPDX-License-Identifier: Apache-2.0
"""Tuning a model end to end: tasks, trials, resuming, interruption, and builds that use the result."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from schedules.errors import TargetError
from schedules.records import FILE, Records, target_key
from schedules.target import NAMED, detect_host


def network(*, second: int = 24, height: int = 6):
    """`x [1, h, h, 24]` through three 1x1 convolutions, two of them alike, in channels-last layout."""
    from tvm import relax

    from passes import layers

    random = np.random.default_rng(0)

    def conv(x, outputs: int, name: str):
        weight = random.standard_normal((outputs, int(x.ty.shape[3]), 1, 1)).astype("float32")
        return layers.conv2d(x, relax.const(weight), name=name, layout="NHWC")

    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, height, height, 24), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            h = bb.emit(relax.op.nn.relu(bb.emit(conv(x, 24, "a"))))
            h = bb.emit(relax.op.nn.softmax(bb.emit(conv(h, second, "b"))))
            y = bb.emit_output(conv(h, 40, "c"))
        bb.emit_func_output(y)
    return bb.get()


@pytest.fixture(scope="module")
def tasks_of():
    from compiler.tuning_tasks import find_tasks

    return lambda **more: find_tasks(network(**more), detect_host())


def run(tasks, directory, trials: int, **more):
    from compiler.tuning import Run

    lines: list[str] = []
    records = Records.open(directory, create=True)
    tuning = Run(tasks, records, detect_host(), trials=trials, say=lines.append, **more)
    rows, ended = tuning.run()
    return rows, ended, tuning, lines


def test_tasks_are_the_distinct_problems_with_their_calls(tasks_of):
    found = {(t.problem.c, t.problem.o): (t.loops, t.calls) for t in tasks_of()}
    assert found == {(24, 24): ("contraction", 2), (24, 40): ("contraction", 1)}
    assert len(tasks_of(second=16)) == 3


def test_candidates_keep_the_zeros_of_the_weights():
    from tvm import relax

    from compiler.tuning_tasks import isolate
    from passes import layers
    from passes.layers import const_array

    weight = np.array([[1.5, 0.0, -2.5], [0.0, 0.25, 0.0]], "float32")
    x = relax.Var("x", relax.TensorType((1, 3), "float32"))
    alone = isolate(layers.dense(x, relax.const(weight), name="fc"))
    call = alone["main"].body.blocks[0].bindings[0].value
    whole = const_array(call.args[1])
    assert ((whole == 0) == (weight == 0)).all()
    assert (whole == np.round(whole)).all()


def int8_network():
    """Bytes through a layer of each integer kernel, one of few channels, each followed by rounding to bytes."""
    from tvm import relax

    from passes.quantized import operators as int8

    random = np.random.default_rng(0)
    int8.register()
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 9, 9, 3), "uint8"))
    shapes = {"few": ((16, 3, 3, 3), 1), "dw": ((16, 1, 3, 3), 16), "conv": ((24, 16, 1, 1), 1)}
    with bb.function("main", [x]):
        with bb.dataflow():
            y = x
            for name, (shape, groups) in shapes.items():
                weight = relax.const(random.integers(-9, 9, shape).astype("int8"))
                around = (shape[-1] // 2,) * 4
                more = {"zero_point": 3, "padding": around, "groups": groups, "layout": "NHWC"}
                y = bb.emit(int8.int8_conv2d(y, weight, name=name, **more))
                y = bb.emit(relax.op.astype(y, "float32"))
                y = bb.emit(int8.quantize(y, scale=9.0, zero_point=3))
            y = bb.emit_output(y)
        bb.emit_func_output(y)
    return bb.get()


def test_integer_kernels_are_tuned_as_they_run(tmp_path):
    """Each kernel with what rounds its sums to bytes, on bytes; candidates give the definition's bytes."""
    from compiler.tuning_tasks import find_tasks

    tasks = {t.name: t for t in find_tasks(int8_network(), detect_host())}
    assert sorted(t.loops for t in tasks.values()) == [
        *("int8_contraction", "int8_contraction", "int8_depthwise")
    ]
    for task in tasks.values():
        made = task.make(task.default)
        assert made.inputs[0].dtype == np.uint8 and str(made.func.params[-1].dtype) == "uint8"
    rows, _, tuning, _ = run(list(tasks.values()), tmp_path, trials=12)
    assert tuning.done == 12 and len(rows) == 3
    tried = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert {r["loops"] for r in tried} == {"int8_contraction", "int8_depthwise"}
    assert not [r for r in tried if r["kind"] == "trial" and r["ratio"] is None]


def test_tune_resume_and_confirm(tasks_of, tmp_path):
    rows, ended, first, lines = run(tasks_of(), tmp_path, trials=8)
    assert ended == "" and first.done == 8
    assert {r.calls for r in rows} == {1, 2} and all(r.confirmed and r.default_us > 0 for r in rows)
    assert any("8 of 8 trials" in line for line in lines)
    entries = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    trials = [e for e in entries if e["kind"] == "trial"]
    results = [e for e in entries if e["kind"] == "result"]
    assert len(trials) == 8 and len(results) == sum(r.trials > 0 for r in rows)
    assert not any(e["error"] for e in trials)
    assert all(e["target"] == target_key(detect_host()) for e in entries)
    # The same number of trials again: nothing is tried, nothing is added.
    rows, ended, again, _ = run(tasks_of(), tmp_path, trials=8)
    assert again.done == 8 and again.searched_trials == 0
    assert len((tmp_path / FILE).read_text().splitlines()) == len(entries)
    # More: only the difference is tried, and no point twice.
    *_, more, _ = run(tasks_of(), tmp_path, trials=11)
    assert more.done == 11 and more.searched_trials == 3
    entries = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    tried = [json.dumps([e["problem"], e["point"]]) for e in entries if e["kind"] == "trial"]
    assert len(set(tried)) == len(tried) == 11


def test_an_interrupted_run_keeps_its_trials(tasks_of, tmp_path, monkeypatch):
    from schedules.candidates import Bench, Outcome

    calls = []

    def try_points(self, points, seconds=0):
        calls.append(points)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [Outcome(p, 1.1, 11.0) for p in points]

    monkeypatch.setattr(Bench, "try_points", try_points)
    rows, ended, tuning, _ = run(tasks_of(), tmp_path, trials=64)
    assert ended == "interrupted" and tuning.done == 8
    assert not all(r.confirmed for r in rows) and all(r.tuned_us is None for r in rows)
    assert len((tmp_path / FILE).read_text().splitlines()) == 8
    *_, tuning, _ = run(tasks_of(), tmp_path, trials=16)
    assert tuning.done == 16 and tuning.searched_trials == 8


def test_a_run_stops_when_its_time_is_up(tasks_of, tmp_path):
    _, ended, tuning, _ = run(tasks_of(), tmp_path, trials=64, budget=0.0)
    assert ended == "out of time" and tuning.done == 0


@pytest.mark.parametrize("ratio, kept", [(0.8, True), (0.99, False), (1.05, False)])
def test_only_a_clear_gain_is_kept(tasks_of, tmp_path, monkeypatch, ratio, kept):
    from schedules.candidates import Bench, Comparison, Outcome

    def compare(self, points, seconds=0):
        return [
            Comparison(p, ratio, ratio - 0.01, ratio + 0.01, 100 * ratio, 100.0) for p in points
        ]

    monkeypatch.setattr(Bench, "try_points", lambda self, ps: [Outcome(p, 0.7, 7.0) for p in ps])
    monkeypatch.setattr(Bench, "compare", compare)
    rows, *_ = run(tasks_of(), tmp_path, trials=8)
    searched = next(r for r in rows if r.trials)
    assert searched.confirmed and (searched.tuned_us is not None) == kept
    records = Records.open(tmp_path)
    assert bool([r for r in records.results.values() if r["kept"]]) == kept


def test_tuning_for_a_machine_that_is_not_here_is_an_error(tmp_path):
    from compiler.tuning import tune

    with pytest.raises(TargetError, match="tuning needs a machine"):
        tune("none.onnx", tmp_path / "records", trials=1, target=NAMED["aarch64"])
    assert not (tmp_path / "records").exists()


def keep_other_points(tasks, directory, target) -> None:
    """Records in which every task's best is some point that is not the default."""
    records = Records.open(directory, create=True)
    for task in tasks:
        point = next(p for p in task.space.points if p.nv != task.default.nv)
        records.add(
            {
                "kind": "result",
                "target": target_key(target),
                "loops": task.loops,
                "problem": task.problem.to_dict(),
                "point": point.to_dict(),
                "kept": True,
                "trials": 1,
            }
        )


def test_a_build_uses_recorded_points_and_says_so(tasks_of, tmp_path):
    import tvm
    from tvm import relax, runtime

    from compiler import pipeline
    from compiler.layer_rows import describe_kernel

    host = detect_host()
    keep_other_points(tasks_of()[:1], tmp_path, host)
    tuned = host.with_records(Records.open(tmp_path))
    x = np.random.default_rng(1).standard_normal((1, 6, 6, 24)).astype("float32")
    outputs, marks = [], []
    for target in (host, tuned):
        variant = pipeline.compile_graph("dense", pipeline.fuse_graph(network(), target), target)
        vm = relax.VirtualMachine(variant.executable, tvm.cpu())
        constants = [runtime.tensor(c) for c in map(np.asarray, variant.constants)]
        outputs.append(vm["main"](runtime.tensor(x), constants).numpy())
        marks.append({k.layers[0]: bool(k.point.get("tuned")) for k in variant.kernels if k.layers})
    assert not any(marks[0].values())
    assert marks[1] == {"a": True, "b": True, "c": False}
    described = {k.layers[0]: describe_kernel(k) for k in variant.kernels if k.layers}
    assert described["a"].endswith("tuned") and "tuned" not in described["c"]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


def test_records_of_another_target_change_nothing(tasks_of, tmp_path):
    from compiler import pipeline

    host = detect_host()
    keep_other_points(tasks_of(), tmp_path, replace(host, l2_bytes=host.l2_bytes + 1))
    tuned = host.with_records(Records.open(tmp_path))
    variant = pipeline.compile_graph("dense", pipeline.fuse_graph(network(), tuned), tuned)
    assert not any(k.point.get("tuned") for k in variant.kernels)
    assert "other l2_bytes" in Records.open(tmp_path).ignored_for(host)
