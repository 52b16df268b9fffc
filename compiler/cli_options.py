# SPDX-License-Identifier: Apache-2.0
"""What the commands' arguments and options are: their types, and those that several commands share."""

from __future__ import annotations

import math
from pathlib import Path

import click


class Shape(click.ParamType):
    """NAME=1x3x224x224"""

    name = "NAME=DxDxD"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        name, _, dims = value.rpartition("=")
        try:
            shape = tuple(int(d) for d in dims.split("x"))
        except ValueError:
            shape = ()
        if not name or not shape or min(shape) < 1:
            self.fail(f"{value!r} is not NAME=DxDxD, for example x=1x3x224x224", param, ctx)
        return name, shape


class Parameter(click.ParamType):
    """KEY=VALUE; the value as in TOML, or a word"""

    name = "KEY=VALUE"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        from compiler.recipe import tomllib

        key, equals, text = value.partition("=")
        if not key.isidentifier() or not equals or not text:
            self.fail(f"{value!r} is not KEY=VALUE, for example observer=percentile", param, ctx)
        try:
            return key, tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return key, text


class Seconds(click.FloatRange):
    """A finite number: comparisons with NaN are false, so no range keeps it out."""

    name = "SECONDS"

    def convert(self, value, param, ctx):
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return seconds


_PEERS = ("onnxruntime", "openvino", "torch")


class Peers(click.ParamType):
    """onnxruntime,openvino,torch"""

    name = "NAME,NAME"

    def convert(self, value, param, ctx):
        names = value if isinstance(value, tuple) else tuple(n for n in value.split(",") if n)
        if unknown := [n for n in names if n not in _PEERS]:
            self.fail(f"unknown engine {unknown[0]!r}; known are {', '.join(_PEERS)}", param, ctx)
        return tuple(dict.fromkeys(names))


class Names(click.ParamType):
    """element,row,out:4"""

    name = "NAME,NAME"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        return tuple(dict.fromkeys(n.strip() for n in value.split(",") if n.strip()))


class Numbers(Names):
    """0.05,0.1,0.2"""

    name = "D,D"

    def convert(self, value, param, ctx):
        try:
            return tuple(float(n) for n in super().convert(value, param, ctx))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.05,0.1", param, ctx)


model_argument = click.argument("model", type=click.Path(path_type=Path))
artifact_argument = click.argument("artifact", metavar="OUT", type=click.Path(path_type=Path))
shapes_option = click.option(
    "--input", "inputs", type=Shape(), multiple=True, help="Shape of one input; may be repeated."
)
batch_option = click.option(
    "--batch", type=click.IntRange(1), help="Batch size, where the model leaves it open."
)
json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Write everything to this file as JSON.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads to use."
)
calibration_option = click.option(
    "--calibration",
    metavar="FILE|DIR|random",
    help="Samples of the inputs, for what depends on activations: .npz, or a directory.",
)
preprocess_option = click.option(
    "--preprocess",
    help="How calibration images are prepared: resize=256,crop=224,mean=0.485/0.456/0.406,std=...",
)
recipe_option = click.option(
    "--recipe",
    default="dense",
    show_default=True,
    help="A family for every layer that it takes (sparse, int8, binary, quadratic, activation_sparse; binary+int8 asks one after the other), or a TOML file.",
)
