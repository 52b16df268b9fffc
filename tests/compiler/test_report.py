# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from compiler import report
from compiler.comparison import Comparison, KernelCheck, Verification
from compiler.layer_rows import layer_rows
from compiler.measure import Latency, Measurement, Ratio
from compiler.profile import KernelRow, Profile, VariantProfile


def shown(parts, width=100) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width)
    for part in parts:
        console.print(part)
    return file.getvalue()


def row(name, treatment="dense", declined=None, density=0.1, grain="element", **more):
    found = {"density": density, "grain": None if density == 1 else grain}
    base = {
        "name": name,
        "asked": "sparse",
        "treatment": treatment,
        "declined": declined,
        "found": found,
    }
    kernel = "sparse_planes rows=4" if treatment == "sparse" else "contraction mr=8"
    return {**base, "kernel": kernel, "dense_kernel": "contraction mr=8", "bytes": 2048, **more}


ROWS = [
    row(
        "resnet.encoder.stages.0.layers.0.layer.0.convolution",
        "sparse",
        dense_us=123.4,
        compressed_us=61.7,
        grain="out:4",
    ),
    row(
        "resnet.encoder.stages.3.layers.1.layer.1.convolution",
        declined="sparse took 210 us, dense 190 us",
        dense_us=1900.0,
        compressed_us=1899.0,
        dense_kernel="winograd m=4",
    ),
    row("b", declined="sparse took 99 us, dense 50 us", dense_us=50.0, compressed_us=50.0),
    row(
        "c",
        declined="the weight has no zeros; prune it, or give --prune",
        density=1.0,
        dense_us=5.0,
        compressed_us=5.0,
    ),
]


@pytest.fixture
def measurement():
    rng = np.random.default_rng(0)

    def latency(ms):
        return Latency.of([ms * (1 + 0.01 * rng.standard_normal(10)) for _ in range(5)])

    return Measurement(
        latency={"dense": latency(10), "compressed": latency(5), "onnxruntime": latency(12)},
        ratios={"compressed/dense": Ratio(0.5, 0.49, 0.51)},
        peers={"onnxruntime": "1.31.1"},
        memory={"dense": {"start": 90 << 20, "peak": 190 << 20}},
        disk={
            "dense": {"total": 30 << 20, "with_zeros": 100 << 20},
            "compressed": {"total": 12 << 20, "with_zeros": 13 << 20},
        },
        environment={
            "cpu": {"model": "A CPU", "tier": "avx512", "governor": "unknown"},
            "cores": [1],
            "threads": 1,
            "load_average": [0.5, 0, 0],
            "date": "2026-01-01",
        },
        verify=VERIFICATION.to_json(),
        layers=ROWS,
        warnings=["dense: noisy"],
    )


VERIFICATION = Verification(
    2,
    {
        "dense": KernelCheck(1e-6, 1e-7, 1e-5, 5e-7, 1e-6, 3, True),
        "compressed": KernelCheck(2e-6, 1e-7, 1e-5, 5e-7, 1e-6, 0, True),
    },
    {"dense": Comparison(1e-6, 1e-7, 1.0, 1.0), "compressed": Comparison(0.5, 0.1, 0.98, 0.75)},
)


def test_nothing_is_cut_at_100_columns(measurement):
    text = shown(report.bench(measurement))
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "…" not in text
    unfolded = "".join(text.split())
    for name in (r["name"] for r in ROWS):
        assert name in unfolded or name.split(".")[-1] in unfolded
    for number in ("123.4", "61.7", "2.00x", "10.0", "0.500 (95 % interval 0.490 to 0.510)"):
        assert number in text


def test_reasons_that_differ_by_numbers_are_one_note(measurement):
    text = shown(report.why_not(ROWS))
    assert (
        text.count("[1]") == 1
        and "2 layers: sparse took 210 us, dense 190 us (and the like)" in text
    )
    assert "[2] 1 layer: the weight has no zeros" in text
    assert "[3]" not in text


def test_a_layer_passed_on_says_what_it_is_not():
    passed = {"passed_on": {"binary": "real numbers"}, "kernel": "int8_contraction"}
    rows = [row("a", "int8", **passed), row("b", declined="no scale", **passed)]
    rows += [row("c", "binary", found={"signs": "packed from float32: add lies between"})]
    text = " ".join(shown(report.why_not(rows)).split())
    assert "[1] 1 layer: not binary: real numbers [2]" in text
    assert "[2] 1 layer: not binary: real numbers; no scale [3]" in text
    assert "[3] 1 layer: signs packed from float32: add lies between" in text
    found = {"one_grain_kept": "one is kept", "padded_outputs": 3}
    text = " ".join(shown(report.why_not([row("d", "sparse", found=found)])).split())
    assert "1 layer: one is kept; 3 output channels of zeros fill its last block" in text
    assert "int8 [1]" in shown([report.layer_table(rows)])


def test_the_verification_keeps_both_questions_apart():
    text = shown(report.verification(VERIFICATION))
    assert "dense: verified, kernels within 1e-06 of float64" in text
    assert "3 Winograd kernels, whose rounding error is larger" in " ".join(text.split())
    assert "compressed against the original model: max abs 0.5" in text and "75.0%" in text


def test_a_failed_verification_says_so():
    failed = Verification(1, {"dense": KernelCheck(1, 1, 1e-5, 0, 0, 0, False)}, {})
    assert "dense: FAILED" in shown(report.verification(failed))


def test_a_target_of_another_machine_says_that_nothing_ran():
    assert "another machine" in shown(report.verification(Verification(2, {}, {})))


def test_hints_follow_from_the_rows():
    found = " ".join(report.hints(ROWS))
    assert "Winograd beats element sparsity: 1 3x3 layer;" in found and "out:4" in found
    assert "without zeros: 1 layer;" in found
    assert "try --recipe sparse" not in found
    assert "at least half zeros: 2 dense layers;" in " ".join(
        report.hints(
            [row("a", asked="dense"), row("b", asked="dense"), row("c", asked="dense", density=0.9)]
        )
    )


def test_no_hint_about_winograd_where_it_did_not_win():
    rows = [row("a", declined="slower"), row("b", "sparse", dense_kernel="winograd m=4")]
    rows += [row("c", declined="slower", dense_kernel="winograd m=4", grain="out:4")]
    assert not report.hints(rows)


def test_the_json_of_a_measurement_has_the_keys_others_rely_on(measurement):
    document = json.loads(json.dumps(measurement.to_json(), allow_nan=False))
    assert document["variants"]["dense"]["latency_ms"]["median"] == pytest.approx(10, rel=0.01)
    assert len(document["variants"]["dense"]["samples_ms"]) == 50
    assert document["ratios"]["compressed/dense"]["median"] == 0.5
    assert document["verify"]["max_abs"] == 0.5
    assert document["peers"]["onnxruntime"]["version"] == "1.31.1"
    for layer in document["layers"]:
        assert {
            "name",
            "treatment",
            "declined",
            "kernel",
            "dense_us",
            "compressed_us",
            "bytes",
        } <= set(layer)


def test_markdown_has_every_engine_and_layer(measurement):
    text = report.markdown(measurement)
    assert "| onnxruntime | 12" in text and "| compressed/dense | 0.500 | 0.490 to 0.510 |" in text
    assert all(r["name"] in text for r in ROWS)


def test_the_profile_shows_kernels_and_layers():
    kernel = KernelRow(
        0, "fused_conv", "contraction", ("a",), 100.0, 10**7, 10**6, 1000, 100.0, 10.0, 0.4
    )
    glue = KernelRow(1, "transpose", "generic", (), 3.0, 0, 0, 100, 0, 0, None)
    variant = VariantProfile("dense", (kernel, glue), 110.0)
    text = shown(
        report.profile(Profile({"dense": variant}, 9, 1, 60.0, 8.0, (40.0, 20.0), (2.0,) * 9, ROWS))
    )
    assert "kernels 0.103 ms, whole run 0.110 ms, between kernels 7 us" in text
    assert "transpose" in text and "97.1%" in text and "40%" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_report_of_a_build(tiny_artifact):
    text = shown(report.build(tiny_artifact))
    assert "fc1" in text and "sparse" in text and "1 of 2" in text
    assert str(tiny_artifact.path) in text.replace("\n", "")


def test_layer_rows_of_an_artifact(tiny_artifact):
    times = {"dense": {"fc1": 10.0, "fc2": 1.0}, "compressed": {"fc1": 5.0}}
    first, second = layer_rows(tiny_artifact, times)
    assert (
        first["dense_us"] == 10.0
        and first["compressed_us"] == 5.0
        and second["compressed_us"] is None
    )
    assert first["dense_bytes"] == 64 * 32 * 4
    assert first["bytes"] == tiny_artifact.variant("compressed").stored_bytes[0] < 64 * 32 * 2
    assert first["kernel"] == "generic"


FOUND = {
    "90% zeros, out:4": {"density": 0.1, "grain": "out:4"},
    "": {"density": 1.0, "grain": None, "zeros": 0, "input_zeros": "relu"},
    "6.3% active (densest token 9.0%, union 81.0%); threshold 0.139; weights off 0.85%": {
        "density": 1.0, "activation_density": 0.0631, "activation_density_densest_token": 0.09,
        "activation_density_union": 0.81, "activation_threshold": 0.13865, "int8_weight_error": 0.0085,
    },
    "quadratic rgb": {"density": 1.0, "quadratic": "rgb", "neuron": "r, g, b"},
    "fitted, off 0.11%; outputs 0.08%; weights 18944 -> 1280": {
        "fit_error": 0.001095, "output_error": 0.000806, "weights": "18944 -> 1280",
    },
}  # fmt: skip


@pytest.mark.parametrize("text", FOUND)
def test_what_was_found_in_a_layer(text):
    assert report.describe_found(FOUND[text]) == text
