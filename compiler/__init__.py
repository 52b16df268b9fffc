# SPDX-License-Identifier: Apache-2.0
"""Kerf: compile trained networks into compressed CPU kernels, proven and measured against dense.

`compile_model` builds, `load` opens what was built. Importing this package loads neither TVM nor
torch.
"""

from __future__ import annotations

from schedules.errors import (
    ArtifactError,
    Declined,
    KerfError,
    MeasurementError,
    ModelError,
    RecipeError,
    ScheduleError,
    TargetError,
    UnsupportedModel,
    UserError,
    VerificationError,
)

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "Declined",
    "KerfError",
    "MeasurementError",
    "ModelError",
    "RecipeError",
    "ScheduleError",
    "TargetError",
    "UnsupportedModel",
    "UserError",
    "VerificationError",
    "compile_model",
    "load",
]


def compile_model(model, example=None, *, recipe="dense", target="native", output=None, **options):
    """Compile a model; see `compiler.driver.build` for the further options.

    `model` is a path (.onnx, .pt2), a `torch.export.ExportedProgram`, or an `nn.Module` with
    `example`, a tuple of example inputs. `recipe` is a built-in name, a path to a TOML file or a
    `compiler.recipe.Recipe`; `target` is `native`, a target's name, JSON or a
    `schedules.target.CpuTarget`. The artifact is returned, and written to the directory `output` if
    given. Raises `KerfError`.
    """
    from compiler import driver

    return driver.build(model, output, example=example, recipe=recipe, target=target, **options)


def load(path, variant="compressed", threads=1):
    """The runnable model in an artifact directory; needs neither torch nor onnx.

    `variant="dense"` loads the dense variant that lies beside the compressed one. Raises
    `ArtifactError`.
    """
    from compiler import runtime

    return runtime.load(path, variant=variant, threads=threads)
