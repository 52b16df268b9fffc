# SPDX-License-Identifier: Apache-2.0
"""The command `compile-model`: parse, call one function, print. What a command needs is imported
when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from compiler import __version__
from compiler.arrays import check_writable, read_npz, write_npz, write_whole
from compiler.cli_options import (
    Names,
    Numbers,
    Parameter,
    Peers,
    Seconds,
    artifact_argument,
    batch_option,
    calibration_option,
    json_option,
    model_argument,
    preprocess_option,
    recipe_option,
    shapes_option,
    threads_option,
)
from compiler.failures import EXIT_INTERRUPTED, KerfGroup
from compiler.without_torch import import_tvm
from schedules.errors import ModelError, UnsupportedModel


@click.group(
    "compile-model", cls=KerfGroup, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="compile-model")
@click.option(
    "--debug", is_flag=True, help="Show the traceback of a failure (anywhere on the line)."
)
def main(debug: bool) -> None:
    """Compile trained networks into compressed CPU kernels, proven and measured against dense."""


@main.command()
@model_argument
@shapes_option
@batch_option
@calibration_option
@preprocess_option
@json_option
def inspect(model, inputs, batch, calibration, preprocess, json_path):
    """Show a model's layers, what they cost, the zeros they hold, and whatever is unsupported."""
    _check_model(model)
    _check_json(json_path)
    _import_tvm_for(model)
    from compiler import tables
    from compiler.inspect import inspect_model

    found = inspect_model(
        model,
        inputs=dict(inputs) or None,
        batch=batch,
        calibration=calibration,
        preprocess=preprocess,
    )
    _write_json(json_path, found.to_json())
    if found.unsupported:
        raise UnsupportedModel(found.unsupported)
    _print(tables.inspection(found))


@main.command()
@model_argument
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to write."
)
@recipe_option
@click.option("--density", type=float, help="Share of weights to keep, in (0, 1].")
@click.option("--grain", help="Grain of the zeros, for example element or out:4.")
@click.option(
    "--set",
    "parameters",
    type=Parameter(),
    multiple=True,
    help="Another parameter of the recipe's treatment; may be repeated.",
)
@calibration_option
@preprocess_option
@click.option(
    "--eval",
    "evaluation",
    metavar="FILE.npz",
    help="Measure accuracy on these inputs, against their labels if the file has them.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    help="Points of top-1 that may be lost on --eval: layers go back to float32 until it holds.",
)
@click.option(
    "--prune", is_flag=True, default=None, help="Let Kerf set the smallest weights to zero."
)
@click.option(
    "--winograd", type=click.Choice(["auto", "never"]), help="Forbid Winograd convolution."
)
@click.option("--target", default="native", show_default=True, help="native, a name, or JSON.")
@shapes_option
@batch_option
@threads_option
@click.option(
    "--choose",
    type=click.Choice(["measured", "asked"]),
    default="measured",
    show_default=True,
    help="Keep compressed only the layers that prove faster here, or all that the recipe asks.",
)
@click.option("--records", type=click.Path(path_type=Path), help="Directory that `tune` filled.")
@json_option
@click.option("--force", is_flag=True, help="Replace an existing OUT.")
def build(
    model, output, recipe, density, grain, parameters, calibration, preprocess, evaluation, max_drop,
    prune, winograd, target, inputs, batch, threads, choose, records, json_path, force,
):  # fmt: skip
    """Compile MODEL, verify it against the original, and write the artifact."""
    _check_model(model)
    _check_json(json_path)
    from compiler.recipe import load_recipe, validate
    from schedules.target import parse_target

    cpu = parse_target(target, threads)
    given = {"density": density, "grain": grain, **dict(parameters)}
    chosen = load_recipe(recipe, prune=prune, winograd=winograd, **given)
    _import_tvm_for(model)
    validate(chosen)
    from compiler import driver

    built = driver.build(
        model,
        output,
        recipe=chosen,
        target=cpu,
        inputs=dict(inputs) or None,
        batch=batch,
        threads=threads,
        force=force,
        choose=choose,
        records=records,
        calibration=calibration,
        preprocess=preprocess,
        evaluation=evaluation,
        max_drop=max_drop,
        progress=_progress,
    )
    _write_json(json_path, dict(built.manifest))
    from compiler import report

    _print(*report.build(built))


@main.command()
@artifact_argument
@click.option(
    "--input",
    "input_path",
    required=True,
    type=click.Path(path_type=Path),
    help=".npz, one array per input.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help=".npz to write.")
@click.option(
    "--variant",
    type=click.Choice(["dense", "compressed"]),
    default="compressed",
    show_default=True,
    help="Which one.",
)
@threads_option
def run(artifact, input_path, output, variant, threads):
    """Run a built model on arrays."""
    check_writable(output)
    arrays = read_npz(input_path)
    import_tvm()
    from compiler.runtime import load

    write_npz(output, load(artifact, variant, threads).run(arrays))


@main.command()
@click.option("--measure/--no-measure", default=True, help="Whether to measure peaks (about 5 s).")
@json_option
def hardware(measure, json_path):
    """Show this CPU: features, caches, measured peaks, and what each family can expect."""
    _check_json(json_path)
    import_tvm()
    from compiler import tables
    from compiler.hardware import describe_hardware

    machine = describe_hardware(measure=measure)
    _write_json(json_path, machine.to_json())
    _print(tables.hardware(machine))


@main.command()
@artifact_argument
@click.option(
    "--input",
    "input_path",
    type=click.Path(path_type=Path),
    help=".npz; default: the inputs of the build.",
)
@json_option
def verify(artifact, input_path, json_path):
    """Compare an artifact's outputs with those of the original model."""
    _check_json(json_path)
    arrays = read_npz(input_path) if input_path else None
    import_tvm()
    from compiler import report
    from compiler.artifact import open_artifact
    from compiler.verify import verify_artifact

    found = verify_artifact(open_artifact(artifact), arrays)
    _write_json(json_path, found.to_json())
    _print(*report.verification(found))


@main.command()
@artifact_argument
@threads_option
@click.option(
    "--against", type=Peers(), default="", help="Other engines, measured in the same run."
)
@click.option(
    "--duration",
    type=Seconds(0.1),
    default=10.0,
    show_default=True,
    help="Seconds to measure.",
)
@json_option
def bench(artifact, threads, against, duration, json_path):
    """Measure the dense and the compressed variant, and other engines, interleaved in one
    process."""
    _check_json(json_path)
    import_tvm()
    from compiler import report
    from compiler.artifact import open_artifact
    from compiler.measure import bench as measure

    opened = open_artifact(artifact)
    found = measure(opened, threads=threads, against=against, duration=duration)
    _write_json(json_path, found.to_json())
    _print(*report.bench(found))


@main.command()
@artifact_argument
@threads_option
@json_option
def profile(artifact, threads, json_path):
    """Show every layer's kernel, time, GFLOP/s and share of the roofline, dense beside
    compressed."""
    _check_json(json_path)
    import_tvm()
    from compiler import report
    from compiler.artifact import open_artifact
    from compiler.measure import default_inputs
    from compiler.profile import profile_artifact

    opened = open_artifact(artifact)
    found = profile_artifact(opened, default_inputs(opened), threads=threads)
    _write_json(json_path, found.to_json())
    _print(*report.profile(found))


@main.command("what-if")
@model_argument
@click.option("--grains", type=Names(), default="element,row,kernel,out:4,out:8,filter", show_default=True, help="Grains to try.")  # fmt: skip
@click.option("--densities", type=Numbers(), default="0.05,0.1,0.2,0.3", show_default=True, help="Shares of weights to keep.")  # fmt: skip
@shapes_option
@batch_option
@click.option("--target", default="native", show_default=True, help="native, a name, or JSON.")
@threads_option
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write everything to this file as JSON, after every point; a run that finds it goes on there.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path), help="Draw latency and size to this .png, .svg or .pdf.")  # fmt: skip
def what_if(model, grains, densities, inputs, batch, target, threads, json_path, plot):
    """Predict latency and size of MODEL at every grain and density of sparsity, before anyone
    trains."""
    _check_model(model)
    _check_json(json_path)
    _import_tvm_for(model)
    from compiler import what_if_report
    from compiler.what_if import what_if as study

    if plot is not None:
        what_if_report.check_plot(plot)
    found = study(
        model,
        grains,
        densities,
        inputs=dict(inputs) or None,
        batch=batch,
        target=target,
        threads=threads,
        state=json_path,
        progress=_progress,
    )
    if plot is not None:
        what_if_report.plot(found, plot)
    _print(*what_if_report.table(found))


@main.command()
@model_argument
@click.option(
    "--trials", type=click.IntRange(1), default=64, show_default=True, help="Kernels to try in all."
)
@click.option(
    "--records", required=True, type=click.Path(path_type=Path), help="Directory for what is found."
)
@recipe_option
@calibration_option
@preprocess_option
@click.option("--target", default="native", show_default=True, help="native, a name, or JSON.")
@shapes_option
@batch_option
@threads_option
@click.option("--seconds", type=Seconds(1), help="Stop searching after this long.")
def tune(
    model, trials, records, recipe, calibration, preprocess, target, inputs, batch, threads, seconds
):
    """Search for better kernel parameters for MODEL; `build --records` uses them."""
    _check_model(model)
    from schedules.target import parse_target

    cpu = parse_target(target, threads)
    _import_tvm_for(model)
    from compiler import tables, tuning

    found = tuning.tune(
        model,
        records,
        trials=trials,
        target=cpu,
        inputs=dict(inputs) or None,
        batch=batch,
        recipe=recipe,
        calibration=calibration,
        preprocess=preprocess,
        time_budget=seconds,
        progress=_progress,
    )
    _print(tables.tuning(found))
    if found.interrupted == "interrupted":
        sys.exit(EXIT_INTERRUPTED)


def _progress(text: str) -> None:
    click.echo(text, err=True)


def _check_model(path: Path) -> None:
    if not path.exists():
        raise ModelError("no such file", where=str(path))
    if path.is_dir():
        raise ModelError("is a directory", where=str(path), wanted="a .onnx or .pt2 file")


def _import_tvm_for(model: Path) -> None:
    if model.suffix != ".pt2":
        import_tvm()


def _check_json(path: Path | None) -> None:
    if path is not None:
        check_writable(path)


def _write_json(path: Path | None, document: dict) -> None:
    if path is not None:
        text = json.dumps(document, indent=1, default=str) + "\n"
        write_whole(path, lambda file: file.write(text.encode()))


def _print(*renderables) -> None:
    from rich.console import Console

    # Without a terminal the width is unlimited: a table in a file is for tools and must not be cut.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    for each in renderables:
        console.print(each)


if __name__ == "__main__":
    main()
