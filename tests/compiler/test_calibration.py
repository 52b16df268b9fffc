# SPDX-License-Identifier: Apache-2.0
"""Calibration data from files, iterables and chance; and the values that observing a graph on it gives."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.calibration import load_calibration
from compiler.frontend import TensorSpec
from schedules.errors import KerfError, UserError

IMAGE = [TensorSpec("x", (2, 3), "float32")]
PAIR = [TensorSpec("x", (1, 3), "float32"), TensorSpec("mask", (1, 2), "int64")]


def test_a_file_is_cut_into_batches(tmp_path, rng):
    data = rng.standard_normal((7, 3)).astype("float32")
    np.savez(tmp_path / "c.npz", x=data)
    found = load_calibration(tmp_path / "c.npz", IMAGE)
    assert found.description["samples"] == 3  # the seventh row does not fill a batch
    for _ in range(2):  # as often as needed
        rows = [sample[0] for sample in found.samples()]
        np.testing.assert_array_equal(np.concatenate(rows), data[:6])


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path, rng):
    parts = rng.standard_normal((3, 2, 3)).astype("float32")
    for name, part in zip("bca", parts):
        np.save(tmp_path / f"{name}.npy", part)
    found = [s[0] for s in load_calibration(tmp_path, IMAGE).samples()]
    np.testing.assert_array_equal(found, parts[[2, 0, 1]])


def test_several_inputs_go_by_name_and_keep_their_types(tmp_path, rng):
    np.savez(tmp_path / "c.npz", mask=np.ones((2, 2), "int32"), x=rng.standard_normal((2, 3)))
    samples = list(load_calibration(str(tmp_path / "c.npz"), PAIR).samples())
    assert [a.dtype for a in samples[0]] == ["float32", "int64"] and len(samples) == 2
    by_name = load_calibration([{"x": np.zeros((1, 3)), "mask": np.ones((1, 2))}], PAIR)
    assert [a.shape for a in next(by_name.samples())] == [(1, 3), (1, 2)]


def test_random_data_says_that_it_is(rng):
    found = load_calibration("random", IMAGE)
    assert "warning" in found.description
    first, again = (next(found.samples())[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": np.zeros((4, 5), "float32")}, "wrong shape of x"),
        ({"x": np.full((4, 3), np.nan, "float32")}, "NaN"),
        ({"x": np.zeros((1, 3), "float32")}, "holds no samples"),
        ({"y": np.zeros((2, 3)), "z": np.zeros((2, 3))}, "lacks an input"),
        ({"x": np.zeros((2, 3), "S3")}, "does not hold numbers"),
    ],
)
def test_unusable_files_get_one_clear_line(tmp_path, arrays, message):
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_calibration(tmp_path / "c.npz", IMAGE)


def test_unusable_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not an archive")
    for source, message in [
        (tmp_path / "empty", "holds no .npy"),
        (tmp_path / "bad.npz", "not a readable"),
        (tmp_path / "missing.npz", "no such file"),
        ([], "holds no samples"),
        (3, "is not calibration data"),
        ([np.zeros((2, 4))], "wrong shape"),
    ]:
        with pytest.raises(UserError, match=message):
            load_calibration(source, IMAGE)


def test_observed_values_are_those_of_the_graph(rng):
    from tvm import relax

    from compiler.observe import Observer
    from passes.evaluate import evaluate
    from passes.layers import conv2d
    from schedules.target import detect_host

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 7, 9), "float32"))
    weight = relax.const(rng.standard_normal((5, 3, 3, 3)).astype("float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(conv2d(x, weight, name="c", padding=(1, 1, 1, 1)), "conv")
            z = builder.emit(relax.op.nn.relu(y), "relu")
            out = builder.emit_output(relax.op.mean(z, axis=[2, 3]))
        builder.emit_func_output(out)
    mod = builder.get()
    spec = [TensorSpec("x", (1, 3, 7, 9), "float32")]
    data = [rng.standard_normal((1, 3, 7, 9)).astype("float32") for _ in range(3)]
    observe = Observer(load_calibration(data, spec), detect_host())
    seen = list(observe(mod, ["relu", "x", "conv"]))
    assert len(seen) == 3
    for sample, array in zip(seen, data):
        wanted: dict[str, np.ndarray] = {}
        evaluate(mod, [array], observe=wanted.__setitem__)
        np.testing.assert_array_equal(sample["x"], array)
        for name in ("relu", "conv"):
            np.testing.assert_allclose(sample[name], wanted[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(KerfError, match="no such variable"):
        next(observe(mod, ["nowhere"]))
