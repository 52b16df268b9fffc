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
    assert found.description["left_out"] == 1 and "1 calib" in found.description["warning"]
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
    by_name = load_calibration([{"x": np.zeros((1, 3)), "mask": np.ones((1, 2), "int8")}], PAIR)
    assert [a.shape for a in next(by_name.samples())] == [(1, 3), (1, 2)]


def test_labels_beside_the_inputs_are_passed_over(tmp_path, rng):
    np.savez(tmp_path / "c.npz", x=rng.standard_normal((2, 3)), labels=np.zeros(2, "int64"))
    assert len(list(load_calibration(tmp_path / "c.npz", IMAGE).samples())) == 1


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
        ({"x": np.zeros((0, 3), "float32")}, "holds no samples"),
        ({"x": np.zeros((1, 3), "float32")}, "too few samples for one run; found 1; wanted 2"),
        ({"y": np.zeros((2, 3)), "z": np.zeros((2, 3))}, "lacks an input"),
        ({"x": np.zeros((2, 3), "S3")}, "wrong dtype of x"),
        ({"x": np.zeros((2, 3), "uint8")}, "wrong dtype of x"),  # pixels that nobody prepared
        ({"x": np.zeros((2, 3)), "extra": np.zeros((2, 3))}, "extra is no input of the model"),
        ({"labels": np.zeros(2, "int64")}, "lacks an input"),
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
        (tmp_path / "empty", "holds no calibration data"),
        (tmp_path / "bad.npz", "not a readable"),
        (tmp_path / "missing.npz", "no such file"),
        ([], "holds no samples"),
        (3, "is not calibration data"),
        (b"bytes", "is not calibration data"),
        ([np.zeros((2, 4))], "wrong shape"),
        ([{"x": np.zeros((2, 3)), "y": np.zeros(1)}], "y is no input of the model"),
        ([{}], "lacks an input"),
    ]:
        with pytest.raises(UserError, match=message):
            load_calibration(source, IMAGE)


def test_inputs_must_have_as_many_samples_as_each_other(tmp_path):
    np.savez(tmp_path / "c.npz", x=np.zeros((3, 3), "float32"), mask=np.ones((2, 2), "int64"))
    with pytest.raises(UserError, match="different numbers of samples"):
        load_calibration(tmp_path / "c.npz", PAIR)


def test_a_generator_can_be_gone_through_twice_and_files_are_identified(tmp_path, rng):
    data = rng.standard_normal((3, 2, 3)).astype("float32")
    found = load_calibration((row for row in data), IMAGE)
    for _ in range(2):
        np.testing.assert_array_equal([s[0] for s in found.samples()], data)
    sums = []
    for name, scale in (("a", 1), ("b", 1), ("c", 2)):
        np.savez(tmp_path / f"{name}.npz", x=data[0] * scale)
        sums.append(load_calibration(tmp_path / f"{name}.npz", IMAGE).description["sha256"])
    assert sums[0] == sums[1] != sums[2]


PICTURE = [TensorSpec("x", (1, 3, 4, 4), "float32")]


@pytest.fixture
def pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i, size in enumerate(((8, 10), (12, 8))):
        pixels = np.zeros((size[1], size[0], 3), "uint8")
        pixels[..., 0], pixels[..., 1] = 255, 51 * (i + 1)
        image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def test_images_are_prepared_as_said_and_that_is_recorded(pictures):
    text = "resize=6,crop=4,mean=0.5/0.1/0,std=0.5/0.2/1"
    found = load_calibration(pictures, PICTURE, text)
    assert found.description["samples"] == 2
    assert found.description["preprocess"]["crop"] == 4
    for i, (array,) in enumerate(found.samples()):
        wanted = [(1 - 0.5) / 0.5, (0.2 * (i + 1) - 0.1) / 0.2, 0.0]
        np.testing.assert_allclose(
            array, np.broadcast_to(np.reshape(wanted, (1, 3, 1, 1)), (1, 3, 4, 4)), atol=1e-5
        )
    swapped = next(load_calibration(pictures, PICTURE, "resize=6,crop=4,channels=bgr").samples())[0]
    assert swapped[0, 2].min() == pytest.approx(1) and swapped[0, 0].max() == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--preprocess"),
        ("crop=5", "another size"),
        ("rotate=5", "unknown key"),
        ("crop=0", "1 or more"),
        ("std=0", "above 0"),
        ("mean=1/2", "another number of channels"),
        ("channels=cmyk", "one of rgb"),
        ("resize=6,crop=4,resize=8", "resize is given twice"),
        ("resize=6,crop=7", "smaller than the crop; found 6x8; wanted 7x7"),
        ("scale=1/0", "a fraction such as 1/255"),
        ("scale=-1", "a fraction such as 1/255"),
    ],
)
def test_images_refuse(pictures, text, message):
    with pytest.raises(UserError, match=message):
        load_calibration(pictures, PICTURE, text)


def test_what_is_no_image_and_preparing_what_is_none(pictures, tmp_path):
    (tmp_path / "2.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not a readable image"):
        load_calibration(tmp_path, PICTURE, "resize=6,crop=4")
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "a.npy", np.zeros((1, 3, 4, 4), "float32"))
    arrays = [np.zeros((1, 3, 4, 4), "float32")]
    for source in (tmp_path / "arrays", tmp_path / "arrays" / "a.npy", "random", arrays):
        with pytest.raises(UserError, match="is for images"):
            load_calibration(source, PICTURE, "crop=4")


def test_a_byte_may_be_scaled_by_a_fraction(pictures):
    whole, fraction, number = (
        next(load_calibration(pictures, PICTURE, f"resize=6,crop=4{scale}").samples())[0]
        for scale in ("", ",scale=1/255", ",scale=1")
    )
    np.testing.assert_array_equal(fraction, whole)
    assert whole.max() == 1 and number.max() == 255


def test_images_beside_arrays_are_not_passed_over(pictures):
    np.save(pictures / "a.npy", np.zeros((1, 3, 4, 4), "float32"))
    for preprocess in (None, "resize=6,crop=4"):
        with pytest.raises(UserError, match="holds images and arrays"):
            load_calibration(pictures, PICTURE, preprocess)


def test_images_that_fill_no_batch_are_counted(pictures):
    three = [TensorSpec("x", (3, 3, 4, 4), "float32")]
    with pytest.raises(UserError, match="too few samples for one run; found 2; wanted 3"):
        load_calibration(pictures, three, "resize=6,crop=4")


def _convolution(weight):
    """y = relu(conv(x)), and its mean."""
    from tvm import relax

    from passes.layers import conv2d

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 7, 9), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(conv2d(x, relax.const(weight), name="c", padding=(1, 1, 1, 1)), "conv")
            z = builder.emit(relax.op.nn.relu(y), "relu")
            out = builder.emit_output(relax.op.mean(z, axis=[2, 3]))
        builder.emit_func_output(out)
    return builder.get()


def test_observed_values_are_those_of_the_graph(rng, monkeypatch):
    """Also where another graph's code serves: one that differs in its constants only, at fewer variables."""
    from compiler import pipeline
    from compiler.observe import Observer
    from passes.evaluate import evaluate
    from schedules.target import detect_host

    spec = [TensorSpec("x", (1, 3, 7, 9), "float32")]
    data = [rng.standard_normal((1, 3, 7, 9)).astype("float32") for _ in range(3)]
    observe = Observer(load_calibration(data, spec), detect_host())
    compiled, compile_once = [], pipeline.generate_code
    monkeypatch.setattr(
        pipeline, "generate_code", lambda *a, **k: compiled.append(1) or compile_once(*a, **k)
    )
    for names in (["relu", "x", "conv"], ["relu"]):
        mod = _convolution(rng.standard_normal((5, 3, 3, 3)).astype("float32"))
        seen = list(observe(mod, names))
        assert len(seen) == 3
        for sample, array in zip(seen, data):
            wanted: dict[str, np.ndarray] = {"x": array}
            evaluate(mod, [array], observe=wanted.__setitem__)
            assert set(sample) == set(names)
            for name in names:
                np.testing.assert_allclose(sample[name], wanted[name], rtol=1e-5, atol=1e-5)
    assert len(compiled) == 1
    with pytest.raises(KerfError, match="no such variable"):
        next(observe(mod, ["nowhere"]))
    list(observe(_convolution(rng.standard_normal((6, 3, 3, 3)).astype("float32")), ["relu"]))
    assert len(compiled) == 2


def test_an_index_out_of_range_is_seen_before_the_work():
    good, bad = np.zeros((1, 3), "float32"), np.array([[0, 7]], "int64")
    pair = [TensorSpec("x", (1, 3), "float32"), TensorSpec("ids", (1, 2), "int64")]
    load_calibration([[good, bad]], pair, ranges={"ids": 8})
    with pytest.raises(
        UserError, match="ids holds an index out of range; found 0 to 7; wanted 0 to 6"
    ):
        load_calibration([[good, bad]], pair, ranges={"ids": 7})
    with pytest.raises(UserError, match="index out of range"):
        load_calibration([[good, -bad]], pair, ranges={"ids": 8})
