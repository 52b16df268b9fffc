# SPDX-License-Identifier: Apache-2.0
"""Quantize an ONNX model with ONNX Runtime's own static quantizer: what the other engines' int8 runs.

    python tools/quantize_onnx.py resnet50.onnx resnet50.int8.onnx

QDQ format, activations uint8, weights int8 per channel, min-max ranges: the quantizer's recommendation for x86 with VNNI,
which OpenVINO reads as well. Calibrated on random inputs, as speed does not depend on values.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def quantize_onnx(source: Path, target: Path, samples: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Write `source` quantized to `target`, ranges from `samples` (inputs by name)."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter(samples)

        def get_next(self):
            return next(self.left, None)

    logging.getLogger().setLevel(logging.ERROR)  # the quantizer's advice to preprocess
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip


def random_samples(source: Path, count: int = 4) -> list[dict[str, np.ndarray]]:
    """Standard normal floats and ones for every input of a model with static shapes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)

    def value(spec) -> np.ndarray:
        if "float" in spec.type:
            return rng.standard_normal(spec.shape).astype("float32")
        return np.ones(spec.shape, "int64" if "64" in spec.type else "int32")

    return [{spec.name: value(spec) for spec in session.get_inputs()} for _ in range(count)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    quantize_onnx(options.source, options.target, random_samples(options.source))
    return 0


if __name__ == "__main__":
    sys.exit(main())
