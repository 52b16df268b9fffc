# SPDX-License-Identifier: Apache-2.0
"""Constants by what they are made of and without their zeros: what is restored has the bits that were stored."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from compiler.artifact import WEIGHTS, open_artifact, read_constants, read_tensors
from compiler.storage import StoredForm, restore, store
from schedules.errors import ArtifactError
from schedules.preparation import Source
from schedules.winograd_matrices import matrices, transform_weights
from tests.compiler.test_artifact import rewrite_manifest


def _again(stored, size=1 << 30):
    form = StoredForm.parse(stored.form.to_json())
    return restore(form, lambda suffix: stored.tensors[suffix], size)


def _mostly_zeros(rng, shape, dtype="float32", density=0.1):
    array = rng.standard_normal(shape) * 100
    return np.where(rng.random(shape) < density, array, 0).astype(dtype)


def _same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8", "uint16", "int64"])
@pytest.mark.parametrize("shape", [(8192,), (17, 33, 41), (1, 4099, 7)])
def test_zeros_are_left_out_and_filled_in(rng, dtype, shape):
    array = _mostly_zeros(rng, shape, dtype, 0.05)
    stored = store(array)
    assert stored.nbytes < 0.75 * array.nbytes and stored.bytes_with_zeros == array.nbytes
    assert stored.mask_bytes <= (array.size + 7) // 8
    _same_bits(_again(stored), array)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32"])
def test_indices_are_stored_as_differences(rng, dtype):
    rows = [np.sort(rng.choice(20000, 500, replace=False)) for _ in range(20)]
    index = np.concatenate(rows).astype(dtype)
    index[-1] = np.iinfo(dtype).max
    index[-2] = np.iinfo(dtype).min
    stored = store(index)
    assert stored.form.preparation == "running_sum" and stored.nbytes < 0.7 * index.nbytes
    _same_bits(_again(stored), index)


def test_negative_zero_nan_and_infinity_are_values():
    array = np.zeros((64, 64), "float32")
    array[3, 5], array[7, 0], array[63, 63] = -0.0, np.nan, -np.inf
    stored = store(array)
    assert stored.tensors[".values"].size == 3
    _same_bits(_again(stored), array)


@pytest.mark.parametrize(
    "array",
    [
        np.ones((64, 64), "float32"),
        np.zeros(100, "float32"),
        np.float32(0.0),
        np.zeros((0, 4), "float32"),
        np.tile(np.array([1, 0], "int8"), 4096),  # half of the bytes, but an eighth for the mask
    ],
)
def test_what_gains_too_little_is_stored_as_it_is(array):
    if array.dtype == np.int8:
        array = np.where(np.arange(array.size) % 3 > 0, 1, 0).astype("int8")
    stored = store(np.asarray(array))
    assert stored.form.shape is None and stored.form.preparation == ""
    if array.dtype != np.int8:  # which is deflated
        assert stored.form == StoredForm() and stored.form.to_json() == {}
    _same_bits(_again(stored), np.asarray(array))


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("m", [2, 3, 4])
def test_transformed_weights_are_stored_as_taps(rng, m, density):
    taps = _mostly_zeros(rng, (3, 2 * 9, 33, 16), density=density)
    source = Source(taps, "winograd", {"m": m})
    packed = source.prepared()
    stored = store(packed, source)
    assert stored.nbytes <= taps.nbytes < packed.nbytes / 1.7
    _same_bits(_again(stored), packed)


@pytest.mark.parametrize("m", [2, 4])
def test_weights_are_transformed_in_float64_and_rounded_once(rng, m):
    size, g = m + 2, matrices(m)[1]
    # More columns than are transformed at once.
    taps = rng.standard_normal((2, 18, 300, 32)).astype("float32")
    found = transform_weights(taps, m)
    kernels = taps.astype("float64").reshape(2, 2, 3, 3, 300, 32)
    wanted = np.einsum("ai,bj,pkijcn->pkabcn", g, g, kernels, optimize=True)
    wanted = wanted.reshape(2, 2 * size * size, 300, 32)
    assert found.dtype == np.float32
    assert (np.abs(found - wanted) <= np.abs(wanted) * 2.0**-24 + 1e-14).all()


@pytest.mark.parametrize(
    ("form", "tensors", "message"),
    [
        ({"preparation": "pickle"}, {"": np.zeros(4)}, "unknown preparation 'pickle'"),
        ({"preparation": "running_sum"}, {"": np.zeros((2, 3), "int8")}, "no bytes"),
        ({"preparation": "running_sum"}, {"": np.zeros((3, 3), "uint8")}, "no bytes"),
        ({"preparation": "running_sum"}, {"": np.zeros(4, "uint8")}, "no bytes"),
        ({"preparation": "winograd", "parameters": {"m": 5}}, {"": 9}, "F\\(5x5"),
        ({"preparation": "winograd", "parameters": {"m": 10**9}}, {"": 9}, "no weights"),
        ({"preparation": "winograd", "parameters": {"n": 4}}, {"": 9}, "unexpected keyword"),
        ({"preparation": "winograd", "parameters": {"m": 4}}, {"": 8}, "no weights"),
        ({"shape": [64]}, {".mask": np.zeros(9, "uint8"), ".values": np.ones(1)}, "no mask"),
        ({"shape": [64]}, {".mask": np.zeros(8, "int8"), ".values": np.ones(1)}, "no mask"),
        ({"shape": [64]}, {".mask": np.zeros(8, "uint8"), ".values": np.ones(1)}, "1 values"),
        ({"shape": [1 << 60]}, {".mask": np.zeros(8, "uint8"), ".values": np.ones(1)}, "no mask"),
    ],
)
def test_what_does_not_fit_is_refused(form, tensors, message):
    if isinstance(tensors.get(""), int):
        tensors = {"": np.zeros((1, tensors[""], 4, 16), "float32")}
    with pytest.raises(ValueError, match=message):
        restore(StoredForm.parse(form), lambda suffix: tensors[suffix], 1 << 30)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_small_numbers_are_deflated(rng, dtype):
    array = np.abs(rng.standard_normal((7, 1, 33, 100)) * 12).astype(dtype)
    stored = store(array)
    assert stored.nbytes < 0.9 * array.nbytes and set(stored.form.deflated) == {""}
    _same_bits(_again(stored, array.nbytes), array)


@pytest.mark.parametrize("array", ["noise", "floats", "few"])
def test_what_gains_less_than_a_tenth_is_not_deflated(rng, array):
    arrays = {
        "noise": rng.integers(-128, 128, (64, 300)).astype("int8"),
        "floats": (rng.standard_normal((64, 300)) * 2).round().astype("float32") + 0.5,
        "few": np.ones(4000, "int8"),
    }
    stored = store(arrays[array])
    assert stored.form == StoredForm() and stored.nbytes == arrays[array].nbytes


def test_indices_without_their_zeros_are_deflated(rng):
    index = np.cumsum(rng.integers(1, 20, 200_000)).astype("int32")
    stored = store(index)
    assert set(stored.form.deflated) == {".mask", ".values"}
    assert stored.nbytes < 0.7 * index.size
    _same_bits(_again(stored, index.nbytes), index)


def _deflated(change):
    """A form and its tensor, of 8192 small numbers, changed."""
    stored = store(np.arange(8192).astype("int8") % 4)
    form, data = stored.form.to_json(), stored.tensors[""]
    return change(form["deflated"][""], data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made, data: (made, data[:-1]), "8192 bytes inflated, not 8192"),
        (lambda made, data: (made, np.append(data, data[:1])), "8192 bytes inflated"),
        (lambda made, data: (made, data[4:]), "incorrect header"),
        (lambda made, data: (made, np.append(data[:-1], data[-1:] ^ 1)), "incorrect data check"),
        (lambda made, data: (made, data.view("int8")), "int8 .* inflated"),
        (lambda made, data: ({**made, "shape": [8191]}, data), "8192 bytes inflated, not 8191"),
        (lambda made, data: ({**made, "shape": [8193]}, data), "8192 bytes inflated, not 8193"),
        (lambda made, data: ({**made, "dtype": "int16"}, data), "8192 bytes inflated, not 16384"),
        (lambda made, data: ({**made, "shape": [1 << 40]}, data), "inflated to 1099511627776"),
    ],
)
def test_what_inflates_to_something_else_is_refused(change, message):
    made, data = _deflated(change)
    form = StoredForm.parse({"deflated": {"": made}})
    with pytest.raises(ValueError, match=message):
        restore(form, lambda _: data, 1 << 20)


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {"shape": 4},
        {"shape": [-1]},
        {"shape": ["a"]},
        {"parameters": {"m": "four"}},
        {"deflated": {"": {"dtype": "int8"}}},
        {"deflated": {"": {"dtype": "object", "shape": [4]}}},
        {"deflated": {"": {"dtype": "int8", "shape": [-4]}}},
    ],
)
def test_a_malformed_entry_of_the_manifest_is_refused(write_tiny, tmp_path, entry):
    written = write_tiny(tmp_path / "out")
    rewrite_manifest(written.path, lambda m: m["stored"].update(key=entry))
    with pytest.raises(ArtifactError, match="is malformed"):
        open_artifact(written.path)


@pytest.fixture
def sparse_artifact(tiny, write_tiny, tmp_path, rng):
    """Both variants' first constant holds few values; the second one is made of taps."""
    taps = rng.standard_normal((1, 9, 4, 16)).astype("float32")
    source = Source(taps, "winograd", {"m": 2})
    dense = dataclasses.replace(
        tiny.variants[0],
        constants=[_mostly_zeros(rng, (64, 64)), source.prepared()],
        sources=[None, source],
    )
    return write_tiny(tmp_path / "out", [dense]), dense


def test_an_artifact_holds_the_small_forms_and_gives_the_constants(sparse_artifact):
    written, dense = sparse_artifact
    read = open_artifact(written.path)
    found = read_constants(read, [read.variant("dense")], np.copy)
    for key, constant in zip(read.variant("dense").constants, dense.constants):
        _same_bits(found[key], constant)
    bytes_of = read.variant("dense").bytes
    tensors = read_tensors(read.path / WEIGHTS)
    assert bytes_of["weights"] == sum(a.nbytes for a in tensors.values())
    assert bytes_of["index"] == 64 * 64 // 8  # too small to be deflated
    assert bytes_of["with_zeros"] - bytes_of["library"] == 4 * 64 * 64 + 4 * 9 * 4 * 16


def test_a_form_that_the_tensors_do_not_have_is_refused(sparse_artifact):
    written, _ = sparse_artifact
    first, second = written.variant("dense").constants

    def opened(change):
        rewrite_manifest(written.path, change)
        read = open_artifact(written.path)
        return read_constants(read, [read.variant("dense")], np.copy)

    with pytest.raises(ArtifactError, match="bytes of constant"):
        opened(lambda m: m["stored"].pop(second))
    with pytest.raises(ArtifactError, match="lacks the tensor"):
        opened(lambda m: m["stored"].pop(first))


def test_an_artifact_of_the_first_format_is_read(tiny, write_tiny, tmp_path):
    written = write_tiny(tmp_path / "out", tiny.variants[:1])

    def older(manifest):
        manifest["format_version"] = 1
        del manifest["stored"]
        variant = manifest["variants"]["dense"]
        del variant["stored_bytes"], variant["index_bytes"]
        variant["index"] = [False, True]

    rewrite_manifest(written.path, older)
    read = open_artifact(written.path)
    info = read.variant("dense")
    assert info.stored_bytes == info.constant_bytes and info.index_bytes == (
        0,
        info.stored_bytes[1],
    )
    found = read_constants(read, [info], np.copy)
    for key, constant in zip(info.constants, tiny.variants[0].constants):
        _same_bits(found[key], constant)
