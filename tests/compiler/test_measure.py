# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import threading

import numpy as np
import pytest

from compiler import peers
from compiler.arrays import aligned
from compiler.environment import describe_environment, versions
from compiler.measure import (
    Latency,
    bench,
    default_inputs,
    interleave,
    measure_memory,
    noise_warning,
    pinned,
    ratio,
    require_agreement,
)
from compiler.profile import (
    callback_overhead,
    kernel_times,
    layer_times,
    layer_us,
    profile_artifact,
    useful_shares,
)
from compiler.runtime import load_variants
from schedules.errors import MeasurementError, UserError


@pytest.fixture(scope="module")
def models(tiny_artifact):
    return load_variants(tiny_artifact, ["dense", "compressed"])


@pytest.fixture
def x(rng):
    return [rng.standard_normal((4, 64)).astype("float32")]


def latency(*blocks) -> Latency:
    return Latency.of([np.asarray(b, "float64") for b in blocks])


# ---- statistics


def test_latency_of_known_samples():
    found = latency(range(1, 51), range(51, 101))
    assert (found.median, found.min, found.max, found.mean, found.runs) == (50.5, 1, 100, 50.5, 100)
    assert found.p90 == pytest.approx(90.1) and found.p99 == pytest.approx(99.01)
    assert found.iqr == pytest.approx(49.5) and found.noisy
    assert [len(b) for b in found.blocks()] == [50, 50]
    assert found.blocks()[1][0] == 51


def test_only_a_wide_spread_is_called_noisy():
    assert not latency([1.0, 1.01, 0.99, 1.0, 5.0]).noisy  # one outlier is not a spread
    noisy = latency([1.0, 1.2, 0.8, 1.3, 0.7])
    assert noisy.noisy
    assert "40% of the median" in noise_warning("dense", noisy)


def test_ratio_pairs_the_rounds():
    """A machine that slows down for whole rounds moves both medians, not their ratio."""
    speed = np.repeat([1.0, 3.0], 20)
    rng = np.random.default_rng(0)
    top = latency(*[s * 2 * (1 + 0.01 * rng.standard_normal(10)) for s in speed])
    bottom = latency(*[s * (1 + 0.01 * rng.standard_normal(10)) for s in speed])
    found = ratio(top, bottom)
    assert 1.9 < found.low <= found.median <= found.high < 2.1
    assert ratio(top, bottom) == found  # seeded


def test_ratio_of_noise_is_uncertain():
    rng = np.random.default_rng(1)
    a, b = (latency(*[rng.lognormal(0, 0.5, 5) for _ in range(10)]) for _ in "ab")
    found = ratio(a, b)
    assert found.high - found.low > 0.1


def test_ratio_of_engines_timed_apart_is_refused():
    with pytest.raises(MeasurementError, match="timed together"):
        ratio(latency([1.0]), latency([1.0], [1.0]))


# ---- interleaving


def test_engines_alternate_in_rotating_blocks_with_an_untimed_run():
    calls = []
    engines = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = interleave(engines, runs=120, seconds=0, warm_up=2)
    assert all(f.rounds == (50, 50, 50) for f in found.values())
    assert all(f.runs == 150 for f in found.values())
    after_warm_up = "".join(calls[4:])
    assert after_warm_up == "a" * 51 + "b" * 51 + "b" * 51 + "a" * 51 + "a" * 51 + "b" * 51


def test_seconds_are_a_minimum_too():
    found = interleave({"a": lambda: None}, runs=1, seconds=0.05)
    assert sum(found["a"].samples) < 50 and found["a"].runs > 100


def test_slow_engines_get_short_blocks():
    import time

    found = interleave({"slow": lambda: time.sleep(0.03)}, runs=2, seconds=0, warm_up=1)
    assert found["slow"].rounds == (2,)
    assert 30 <= found["slow"].min < 60


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_pinning_holds_for_every_thread_and_ends():
    before = os.sched_getaffinity(0)
    stop = threading.Event()
    old = threading.Thread(target=stop.wait)
    old.start()
    with pinned(1) as cores:
        assert len(cores) == 1
        found = {frozenset(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")}
        assert found == {frozenset(cores)}
    stop.set()
    old.join()
    assert os.sched_getaffinity(0) == before


def test_agreement_is_asked_of_peers():
    wanted = np.array([[100.0, 1.0]])
    require_agreement("peer", [wanted + 0.05], wanted)
    with pytest.raises(MeasurementError, match="peer computes something else"):
        require_agreement("peer", [wanted + 0.2], wanted)
    with pytest.raises(MeasurementError):
        require_agreement("peer", [np.full((1, 2), np.nan)], wanted)


# ---- bench


def test_bench_times_both_variants(tiny_artifact):
    found = bench(tiny_artifact, duration=0.2, runs=20, memory=False)
    assert set(found.latency) == {"dense", "compressed"}
    assert set(found.ratios) == {"compressed/dense"}
    both = found.ratios["compressed/dense"]
    assert both.low <= both.median <= both.high
    assert found.environment["cores"] and found.environment["threads"] == 1
    assert len(found.environment["load_average"]) == 3


def test_bench_of_a_dense_build_has_no_ratio(tiny, write_tiny, tmp_path):
    written = write_tiny(tmp_path / "out", tiny.variants[:1])
    found = bench(written, duration=0, runs=5, memory=False)
    assert set(found.latency) == {"dense"} and not found.ratios


def test_memory_is_that_of_the_model_alone(tiny_artifact):
    ballast = np.ones(1 << 27, "uint8")  # in this process, not in the measured one
    found = measure_memory(tiny_artifact, default_inputs(tiny_artifact), 1, ["dense"])["dense"]
    assert 0 < found["start"] <= found["peak"]
    assert found["peak"] - found["start"] < ballast.nbytes


def test_inputs_default_to_those_stored_at_build_time(tiny_artifact):
    (first,) = default_inputs(tiny_artifact)
    assert first.shape == (4, 64)
    np.testing.assert_array_equal(first, default_inputs(tiny_artifact)[0])


def test_unknown_and_absent_peers_are_user_errors(tiny_artifact, monkeypatch):
    with pytest.raises(UserError, match="wanted onnxruntime, openvino, torch"):
        bench(tiny_artifact, against=["tensorrt"], duration=0)
    with pytest.raises(UserError, match=r"original model.*is not there"):
        bench(tiny_artifact, against=["onnxruntime"], duration=0)

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(peers.importlib, "import_module", absent)
    with pytest.raises(UserError, match="pip install openvino"):
        bench(tiny_artifact, against=["openvino"], duration=0)


@pytest.fixture(scope="module")
def onnx_artifact(tiny, write_tiny, tmp_path_factory):
    """The tiny network with the ONNX file it could have come from."""
    onnx = pytest.importorskip("onnx")
    h = onnx.helper
    w1, w2 = tiny.weights["dense"]
    graph = h.make_graph(
        [
            h.make_node("MatMul", ["x", "w1"], ["a"]),
            h.make_node("Relu", ["a"], ["b"]),
            h.make_node("MatMul", ["b", "w2"], ["y"]),
        ],
        "tiny",
        [h.make_tensor_value_info("x", 1, [4, 64])],
        [h.make_tensor_value_info("y", 1, [4, 16])],
        [onnx.numpy_helper.from_array(w, n) for n, w in (("w1", w1), ("w2", w2))],
    )
    directory = tmp_path_factory.mktemp("peers")
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, directory / "tiny.onnx")
    return write_tiny(directory / "out", source={"path": str(directory / "tiny.onnx")})


@pytest.mark.peers
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_peers_run_the_original_model_beside_ours(onnx_artifact, name):
    package = pytest.importorskip(name)
    found = bench(onnx_artifact, against=[name], duration=0.1, runs=10, memory=False)
    assert set(found.latency) == {"dense", "compressed", name}
    assert set(found.ratios) == {"compressed/dense", f"dense/{name}", f"compressed/{name}"}
    assert package.__version__.startswith(found.peers[name])


@pytest.mark.peers
def test_torch_does_not_pretend_to_run_onnx(onnx_artifact):
    pytest.importorskip("torch")
    with pytest.raises(UserError, match="torch cannot run an ONNX model"):
        bench(onnx_artifact, against=["torch"], duration=0)


@pytest.mark.peers
def test_a_module_in_memory_is_run_by_torch_and_exported_for_the_others(tiny, tiny_artifact):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = (
                torch.nn.Parameter(torch.from_numpy(w)) for w in tiny.weights["dense"]
            )

        def forward(self, x):
            return torch.relu(x @ self.w1) @ self.w2

    found = bench(
        tiny_artifact, against=["torch", "onnxruntime"], module=Module().eval(), duration=0, runs=5,
        memory=False,
    )  # fmt: skip
    assert {"torch", "onnxruntime"} <= set(found.latency)


def test_a_peer_that_computes_something_else_is_not_timed(tiny_artifact):
    torch = pytest.importorskip("torch")

    class Wrong(torch.nn.Module):
        def forward(self, x):
            return x[:, :16]

    with pytest.raises(MeasurementError, match="torch computes something else"):
        bench(tiny_artifact, against=["torch"], module=Wrong(), duration=0, memory=False)


def test_the_environment_is_json():
    found = json.loads(json.dumps(describe_environment(1)))
    assert found["cpu"]["model"] and found["versions"]["numpy"] == np.__version__
    assert versions()["kerf-compiler"]


# ---- profile


def test_every_kernel_call_is_timed(models, x):
    times = layer_times(models["dense"], x, runs=10)
    assert set(times) == {0, 1} and all(t >= 0 for t in times.values())
    assert times[0] > times[1]  # 64x32 against 32x16 products, unscheduled


def test_variants_are_timed_layer_by_layer(models, x):
    found = layer_us(models, x, runs=10)
    assert set(found) == {"dense", "compressed"}
    assert set(found["dense"]) == {"fc1", "fc2"}


def test_the_instrument_is_removed(models, x):
    before = models["dense"](*x)
    layer_times(models["dense"], x, runs=3)
    np.testing.assert_array_equal(models["dense"](*x), before)


def test_runs_alternate_and_have_a_minimum(models, x):
    _, done = kernel_times(models, x, runs=100, seconds=0)
    assert done == 3
    _, done = kernel_times(models, x, runs=7, seconds=60)
    assert done == 7


def test_the_callbacks_cost_is_known_and_grows_with_arguments():
    found = callback_overhead()
    assert 0 < found[2] < 1000
    assert found[8] > found[2]


def test_a_kernel_of_two_layers_is_shared_between_them():
    from compiler.profile import _by_layer

    assert _by_layer([(("a", "b"), 10.0), (("a",), 2.0), ((), 99.0)]) == {"a": 7.0, "b": 5.0}


def test_profile_of_an_artifact(tiny_artifact, x, monkeypatch):
    # These kernels are so short that on a busy machine nothing may be left of them.
    monkeypatch.setattr("compiler.profile.callback_overhead", lambda: (0.0,) * 9)
    found = profile_artifact(tiny_artifact, x, runs=5, seconds=0.2)
    dense = found.variants["dense"]
    assert [k.layers for k in dense.kernels] == [("fc1",), ("fc2",)]
    assert all(k.roofline > 0 for k in dense.kernels)
    assert dense.kernels[0].gflops == pytest.approx(2 * 4 * 64 * 32 / dense.kernels[0].us / 1e3)
    assert dense.total_us > 0 and found.peak_gflops > 1 and found.bandwidth_gbs > 0.1
    assert found.cache_gbs[0] >= found.cache_gbs[1] > 0.1
    json.dumps(found.to_json())


def test_useful_operations_are_those_of_nonzero_weights():
    rows = [
        {"name": "a", "treatment": "sparse", "found": {"density": 0.1}},
        {"name": "b", "treatment": "dense", "found": {"density": 0.1}},
        {"name": "c", "treatment": "sparse", "found": {}},
        {"name": "d"},
    ]
    assert useful_shares(rows) == pytest.approx({"a": 0.1, "b": 1.0, "c": 1.0, "d": 1.0})


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(()),
        np.arange(7, dtype=np.int8),
        np.ones((3, 1, 17), np.float32)[::2],
        np.zeros((0, 3)),
    ],
)
def test_aligned_arrays_are_equal_and_begin_where_kernels_want(array):
    for alignment in (64, 4096):
        found = aligned(array, alignment)
        assert found.ctypes.data % alignment == 0 or not found.size
        assert found.flags.c_contiguous and found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
