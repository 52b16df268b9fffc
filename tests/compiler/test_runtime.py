# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

import compiler
from compiler.artifact import open_artifact
from compiler.runtime import LoadedModel, from_variant, load, load_variants
from compiler.thread_pool import threads_in_use
from schedules.errors import ArtifactError, UserError


@pytest.fixture(scope="module")
def models(tiny_artifact):
    return load_variants(tiny_artifact, ["dense", "compressed"])


@pytest.fixture
def x(rng):
    return rng.standard_normal((4, 64)).astype("float32")


def aligned(array, offset=0):
    """A copy of `array` that lies `offset` bytes behind a multiple of 64."""
    buffer = np.empty(array.nbytes + 128, "uint8")
    start = -buffer.ctypes.data % 64 + offset
    out = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def test_both_variants_compute_their_own_network(models, tiny, x):
    for name, model in models.items():
        np.testing.assert_allclose(model(x), tiny.expected(name, x), rtol=1e-5, atol=1e-4)
    assert np.abs(models["dense"](x) - models["compressed"](x)).max() > 0.1


def test_the_public_door(tiny_artifact, tiny, x):
    model = compiler.load(tiny_artifact.path, variant="dense")
    np.testing.assert_allclose(model(x), tiny.expected("dense", x), rtol=1e-5, atol=1e-4)
    assert compiler.load(tiny_artifact.path).variant == "compressed"


def test_run_by_name(models, x):
    found = models["dense"].run({"x": x})
    assert list(found) == ["y"]
    np.testing.assert_array_equal(found["y"], models["dense"](x))


@pytest.mark.parametrize("offset", [0, 4, 16, 32])
def test_any_alignment_and_layout_gives_the_same(models, x, offset):
    wanted = models["dense"](x)
    np.testing.assert_array_equal(models["dense"](aligned(x, offset)), wanted)
    np.testing.assert_array_equal(models["dense"](np.asfortranarray(x)), wanted)
    np.testing.assert_array_equal(models["dense"](np.repeat(x, 2, axis=1)[:, ::2]), wanted)
    frozen = aligned(x, offset)
    frozen.flags.writeable = False
    np.testing.assert_array_equal(models["dense"](frozen), wanted)


def test_aligned_arrays_are_used_where_they_lie(models, x):
    model = models["dense"]
    lies = aligned(x)
    assert model.bind([lies])[0].__dlpack_device__() == (1, 0)
    assert np.from_dlpack(model.bind([lies])[0]).ctypes.data == lies.ctypes.data
    moved = aligned(x, 4)
    assert np.from_dlpack(model.bind([moved])[0]).ctypes.data != moved.ctypes.data


def test_torch_tensors_go_in_without_a_copy(models, x):
    torch = pytest.importorskip("torch")
    model, tensor = models["dense"], torch.from_numpy(x).clone()
    assert tensor.data_ptr() % 64 == 0
    assert np.from_dlpack(model.bind([tensor])[0]).ctypes.data == tensor.data_ptr()
    wanted = model(x)
    np.testing.assert_array_equal(model(tensor), wanted)
    np.testing.assert_array_equal(model(tensor.T.contiguous().T), wanted)
    learning = torch.cat([tensor[:1], tensor]).requires_grad_()[1:]  # aligned, and not
    np.testing.assert_array_equal(model(learning), wanted)
    np.testing.assert_array_equal(
        model(torch.cat([tensor[0, :1], tensor.flatten()])[1:].view(4, 64)), wanted
    )
    with pytest.raises(UserError, match="wrong dtype; found x float64"):
        model(tensor.double())


def test_results_are_the_callers_own(models, rng):
    model = models["dense"]
    first = model(np.ones((4, 64), "float32"))
    kept = first.copy()
    model(np.zeros((4, 64), "float32"))
    np.testing.assert_array_equal(first, kept)
    first[...] = 7  # writable, and nobody else's
    np.testing.assert_array_equal(model(np.ones((4, 64), "float32")), kept)


def test_a_result_that_is_an_input_or_a_constant_is_copied(tiny):
    """A program may return what it was given; writing into that must not change the model or the
    caller's input."""
    import tvm
    from tvm import relax

    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((3,), "float32"))
    params = relax.Var("params", relax.TupleType([relax.TensorType((3,), "float32")]))
    with bb.function("main", [x, params], attrs={"num_input": 1}):
        c = bb.emit(relax.TupleGetItem(params, 0))
        bb.emit_func_output(relax.Tuple([x, c, bb.emit_te(lambda a: tvm.topi.add(a, a), x)]))
    variant = dataclasses.replace(
        tiny.variants[0],
        executable=tvm.compile(bb.get(), tiny.target.tvm()),
        constants=[np.arange(3, dtype="float32")],
    )
    spec = dataclasses.replace(tiny.inputs[0], shape=(3,))
    outputs = [dataclasses.replace(spec, name=n) for n in "abc"]
    model = from_variant(variant, [spec], outputs, tiny.target)
    given = aligned(np.ones(3, "float32"))
    for _ in range(2):
        same, constant, twice = model(given)
        np.testing.assert_array_equal(same, 1)
        np.testing.assert_array_equal(constant, [0, 1, 2])
        np.testing.assert_array_equal(twice, 2)
        same[:], constant[:] = 9, 9
    np.testing.assert_array_equal(given, 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x: x[:3], r"wrong shape; found x float32\[3,64\]; wanted x float32\[4,64\]"),
        (lambda x: x.astype("float64"), r"wrong dtype; found x float64\[4,64\]"),
        (lambda x: x.astype(">f4"), "wrong dtype"),
        (lambda x: x.tolist(), "not an array; found list"),
        (lambda x: None, "not an array"),
    ],
)
def test_inputs_that_do_not_fit_are_user_errors(models, x, bad, message):
    with pytest.raises(UserError, match=message):
        models["dense"](bad(x))


def test_wrong_count_and_names_are_user_errors(models, x):
    with pytest.raises(UserError, match="wrong number of inputs; found 2; wanted 1: x float32"):
        models["dense"](x, x)
    with pytest.raises(UserError, match="unknown input 'z'"):
        models["dense"].run({"x": x, "z": x})
    with pytest.raises(UserError, match="missing input 'x'"):
        models["dense"].run({})


def test_variants_loaded_together_share_constants(models):
    dense, compressed = (m._constants for m in (models["dense"], models["compressed"]))
    assert dense[1].same_as(compressed[1]) and not dense[0].same_as(compressed[0])
    assert all(np.from_dlpack(c).ctypes.data % 64 == 0 for c in dense)


def test_both_names_of_a_dense_build_give_one_model(tiny, write_tiny, tmp_path):
    both = load_variants(write_tiny(tmp_path / "out", tiny.variants[:1]), ["dense", "compressed"])
    assert both["dense"] is both["compressed"]


def test_threads_are_checked(tiny_artifact):
    for threads in (0, -1, 1.5, 10_000):
        with pytest.raises(UserError, match="threads"):
            load(tiny_artifact.path, threads=threads)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_serial_kernels_do_not_pretend_to_be_parallel(tiny_artifact):
    with pytest.raises(UserError, match="Build with --threads 2"):
        load(tiny_artifact.path, threads=2)


_THREADS = """
import os, sys
cores = os.sched_getaffinity(0)
import numpy as np
from compiler.runtime import load
from compiler.thread_pool import threads_in_use
one, two = load(sys.argv[1], threads=1), load(sys.argv[1], threads=2)
x = np.zeros((4, 64), "float32")
for model, wanted in ((one, 1), (two, 2), (one, 1), (two, 2)):
    model(x)
    assert threads_in_use() == wanted, (threads_in_use(), wanted)
assert os.sched_getaffinity(0) == cores, "the process was bound to a core"
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("variable", ["", "1"])
def test_each_model_uses_its_own_number_of_threads(tiny, write_tiny, tmp_path, variable):
    written = write_tiny(tmp_path / "out", target=tiny.target.with_threads(2))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TVM_NUM_THREADS": variable,
    }
    subprocess.run([sys.executable, "-c", _THREADS, written.path], env=environment, check=True)


def test_calls_from_several_threads_do_not_mix(models, tiny, rng):
    model = models["dense"]
    inputs = [aligned(rng.standard_normal((4, 64)).astype("float32"), 4) for _ in range(4)]
    wanted = [model(x) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(200):
            if not np.array_equal(model(inputs[i]), wanted[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_memory_does_not_grow_over_ten_thousand_runs(models, x):
    psutil = pytest.importorskip("psutil")
    process, model = psutil.Process(), models["dense"]
    moved = aligned(x, 4)
    for _ in range(1000):
        model(x)
        model(moved)
    before = process.memory_info().rss
    for _ in range(5000):
        model(x)
        model(moved)
    assert process.memory_info().rss - before < 1 << 20


def test_results_outlive_the_model(tiny, x):
    model = from_variant(tiny.variants[0], tiny.inputs, tiny.outputs, tiny.target)
    result, gone = model(x), weakref.ref(model)
    wanted = result.copy()
    del model
    assert gone() is None
    np.testing.assert_array_equal(result, wanted)


_LEAN = """
import sys
for name in ("torch", "onnx", "onnxruntime", "openvino"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np, compiler
model = compiler.load(sys.argv[1])
print(model(np.ones((4, 64), "float32")).shape)
"""


def test_loading_and_running_need_neither_torch_nor_onnx(tiny_artifact, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _LEAN, str(tiny_artifact.path)],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(4, 16)"


def test_a_library_that_is_none_is_an_artifact_error(tiny_artifact, tmp_path):
    from compiler.runtime import _open_library

    (tmp_path / "dense.so").write_bytes(b"not a library")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        _open_library(tmp_path / "dense.so")


def test_absent_features_stop_the_load(tiny, write_tiny, tmp_path):
    target = dataclasses.replace(tiny.target, features=(*tiny.target.features, "sve"))
    written = write_tiny(tmp_path / "out", target=target)
    with pytest.raises(ArtifactError, match="lacks: sve"):
        load(written.path)


def test_an_artifact_may_be_moved(tiny_artifact, tmp_path, x, models):
    moved = shutil.copytree(tiny_artifact.path, tmp_path / "elsewhere")
    model = load(open_artifact(moved).path, "dense")
    assert isinstance(model, LoadedModel) and threads_in_use() >= 1
    np.testing.assert_array_equal(model(x), models["dense"](x))


def test_an_artifact_that_was_replaced_runs_its_own_library(
    write_tiny, compile_tiny, tiny, tmp_path, x
):
    """Also while the one before, of the same path, is still in use."""
    other = compile_tiny("dense", *tiny.weights["dense"], tiny.target, wrong=True)
    variants = {"first": tiny.variants[0], "second": other}
    wanted = {
        name: from_variant(variant, tiny.inputs, tiny.outputs, tiny.target)(x)
        for name, variant in variants.items()
    }
    assert not np.array_equal(wanted["first"], wanted["second"])
    loaded = []
    for name in ("first", "second", "first"):
        written = write_tiny(tmp_path / "out", [variants[name]], force=True)
        loaded.append((name, load(written.path)))
    for name, model in loaded:
        np.testing.assert_array_equal(model(x), wanted[name])
