# SPDX-License-Identifier: Apache-2.0
"""Kernels of every family are tuned as they run: on words of signs, on floats, several from one layer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tvm

import passes
from compiler import pipeline
from compiler.tuning import Run
from compiler.tuning_tasks import find_tasks
from passes.family import Context
from passes.treat_layers import treat_layers
from schedules.fused import Fused
from schedules.records import FILE, Records
from schedules.target import detect_host

# (family, sample) -> loop structures of its tasks
SAMPLES = {
    ("binary", "chain"): ["binary_contraction"] * 3,
    ("binary", "signs as weights"): ["sign_tables"],  # the dense layer of one row has one tile
    ("sparse", "out:8"): ["sparse_windows"] * 2,
    ("quadratic", "conv2d"): ["quadratic_contraction"] * 2,
    # What gathers rows has nothing to choose; the first layer of its MLP has.
    ("activation_sparse", "relu, one row"): ["contraction"],
}


def treated(family: str, sample: str):
    """The sample's graph with its family's operators, channels last."""
    (given,) = (f for f in passes.families() if f.name == family)
    (found,) = (s for s in given.samples() if s.name == sample)
    graph = pipeline.canonicalize(found.graph(np.random.default_rng(0)))
    return pipeline.lay_out(treat_layers(graph, dict(found.asked), Context(detect_host())).treated)


@pytest.mark.parametrize("family, sample", SAMPLES)
def test_each_family_has_its_tasks(family, sample):
    tasks = find_tasks(treated(family, sample), detect_host())
    assert [t.loops for t in tasks] == SAMPLES[family, sample]
    assert all(t.default in t.space.points for t in tasks)
    for task in tasks:
        made = task.make(task.default)
        assert Fused.read(made.func).point["point"] == task.default.to_dict()


def test_trials_on_signs_give_what_their_definitions_do_and_a_build_uses_them(tmp_path):
    """Words of signs in, sums or words out; sums of floats by tables."""
    target = detect_host()
    graphs = [treated("binary", sample) for sample in ("chain", "signs as weights")]
    tasks = [task for graph in graphs for task in find_tasks(graph, target)]
    records = Records.open(tmp_path, create=True)
    Run(tasks, records, target, trials=24).run()
    tried = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    trials = [r for r in tried if r["kind"] == "trial"]
    assert len(trials) == 24 and all(r["ratio"] for r in trials)
    assert {r["loops"] for r in trials} == {"binary_contraction", "sign_tables"}
    task = tasks[0]
    other = next(p for p in task.space.points if p.paired != task.default.paired or p.mr == 1)

    class Given:
        def lookup(self, target, loops, problem):
            return other.to_dict() if problem == task.problem.to_dict() else None

    fused = pipeline.fuse_graph(graphs[0], target.with_records(Given()))
    functions = [f for _, f in fused.mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    found = [read for f in functions if (read := Fused.read(f)) is not None]
    assert other.to_dict() in [read.point.get("point") for read in found]
