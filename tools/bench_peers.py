# SPDX-License-Identifier: Apache-2.0
"""Kerf against other engines, and compressed against dense, on whole networks with random weights.

    python tools/bench_peers.py resnet50 vit_s16 --work bench/ --json peers.json --markdown peers.md

Each network is built dense, with 90 % of the weights pruned one by one, and with 90 % pruned in groups of four output
channels; `--builds` names others (`tools/bench_builds.py`): more grains and densities, filters removed beside a dense
network of that shape, int8 beside what ONNX Runtime's quantizer makes of the model, and with `--deepsparse PYTHON` a
pruned network beside DeepSparse. All engines run interleaved in one process, so that a ratio does not depend on the
machine's mood. Results are added to the JSON file network by network: what is there already is skipped, so an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.bench_builds import BUILDS, PRUNED, artifact_of, prepare, pruned_model, quantized

NETWORKS = (
    "resnet50",
    "resnet18",
    "regnet_y",
    "mobilenetv2",
    "efficientnet_b0",
    "convnext_t",
    "vit_s16",
    "bert",
    "bert_token",
)
SHORT = {
    "regnet": "regnet_y",
    "efficientnet": "efficientnet_b0",
    "convnext": "convnext_t",
    "vit": "vit_s16",
}
# Too small or too depthwise for pruned weights to be of interest.
DENSE_ONLY = ("mobilenetv2", "efficientnet_b0", "convnext_t")
PEERS = ("onnxruntime", "openvino")


def measure(
    name: str,
    work: Path,
    *,
    threads: int,
    duration: float,
    builds: list[str],
    deepsparse: Path | None = None,
) -> dict:
    """One network's row: every engine interleaved in this process."""
    import numpy as np

    from compiler import peers
    from compiler.arrays import aligned
    from compiler.artifact import open_artifact
    from compiler.comparison import as_arrays, compare
    from compiler.environment import describe_environment
    from compiler.measure import interleave, pinned, ratio, require_agreement
    from compiler.profile import layer_us
    from compiler.runtime import load_variants
    from tools.deepsparse_peer import DeepSparse

    directory = work / name
    with np.load(directory / f"{name}.npz") as file:
        inputs = [aligned(file[key]) for key in file.files]
    with pinned(threads) as cores:
        engines, models, layers, verify, sizes = {}, {}, {}, {}, {}
        for build in builds:
            artifact = open_artifact(directory / artifact_of(build, builds))
            variant = BUILDS[build].variant
            if variant not in artifact.variants:  # no layer was faster: all of them stayed dense
                variant = "dense"
            model = models[build] = load_variants(artifact, [variant], threads)[variant]
            library = artifact.path / f"{variant}.so"
            sizes[build] = [sum(artifact.variants[variant].stored_bytes), library.stat().st_size]
            engines[build] = lambda model=model: model(*inputs)
            proof = artifact.manifest["verify"]
            verify[build] = {"passed": proof["passed"], **proof["original"][variant]}
            rows = artifact.layers
            layers[build] = [sum(r["treatment"] != "dense" for r in rows), len(rows)]
        versions, refusals = {}, {}
        wanted = engines["dense"]()
        files = {"": directory / f"{name}.onnx"}
        if any(b.startswith("int8") for b in builds):
            files["_int8"] = quantized(files[""])
        others = {}
        for kind, path in files.items():
            for peer in PEERS:
                feed = dict(enumerate(inputs))
                try:
                    opened = peers.OPENERS[peer](importlib.import_module(peer), path, feed, threads)
                except RuntimeError as error:  # how both say that they cannot import the model
                    refusals[peer + kind] = str(error).strip()
                    continue
                if kind:  # another function than the dense one; how far is for the reader to see
                    found = compare([opened.call()], [as_arrays(wanted)])
                    others[peer + kind] = found.to_json()
                else:
                    require_agreement(peer, opened.call(), wanted)
                    versions[peer] = opened.version
                engines[peer + kind] = opened.call
        pruned = [b for b in builds if BUILDS[b].source == PRUNED]
        if deepsparse and pruned:
            engine = DeepSparse(deepsparse, pruned_model(name, work), inputs, threads)
            require_agreement("deepsparse", engine.outputs, engines[pruned[0]]())
            engines["deepsparse"] = engine
        environment = describe_environment(threads, cores)
        latency = interleave(engines, runs=20, seconds=duration)
        alone = layer_us(models, inputs, runs=20, seconds=duration / 4)
        if "deepsparse" in engines:
            engines["deepsparse"].close()
    faster = min(versions, key=lambda peer: latency[peer].median)
    pairs = [("dense", p) for p in versions]
    pairs += [(build, "dense") for build in builds if build != "dense"]
    pairs += [("int8", peer) for peer in others if "int8" in builds]
    pairs += [(b, "int8") for b in builds if b.startswith("int8_") and "int8" in builds]
    pairs += [("filter", "filter_shape")] if {"filter", "filter_shape"} <= set(builds) else []
    pairs += [(b, "deepsparse") for b in pruned if "deepsparse" in engines]
    return {
        "network": name,
        "faster_peer": faster,
        "latency_ms": {n: found.to_json() for n, found in latency.items()},
        "samples_ms": {n: list(found.samples) for n, found in latency.items()},
        "ratios": {f"{a}/{b}": ratio(latency[a], latency[b]).to_json() for a, b in pairs},
        "layers_compressed": layers,
        "layers_alone_us": {build: sum(us.values()) for build, us in alone.items()},
        "bytes": sizes,
        "verify": verify,
        "peers": versions,
        "quantized_peers": others,
        "refusals": refusals,
        "environment": environment,
    }


def add_row(path: Path, row: dict) -> list[dict]:
    """Put a network's row into the JSON file, whole or not at all; returns all rows."""
    rows = [r for r in read_rows(path) if r["network"] != row["network"]] + [row]
    rows.sort(key=lambda r: NETWORKS.index(r["network"]))
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(
        json.dumps({"format": "kerf-peers", "format_version": 1, "rows": rows}, indent=1) + "\n"
    )
    os.replace(partial, path)
    return rows


def read_rows(path: Path) -> list[dict]:
    """The rows of an earlier run; none if the file does not exist."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def markdown(rows: list[dict]) -> str:
    """The table, and where it was measured."""
    lines = [
        "| network | Kerf dense ms | ONNX Runtime ms | OpenVINO ms | dense / faster peer "
        "| 90 % element / dense | 90 % out:4 / dense |",
        "| --- | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for row in rows:
        ms = {
            n: f"{v['median']:.2f}{'*' if v['noisy'] else ''}" for n, v in row["latency_ms"].items()
        }
        cells = [
            ms["dense"],
            ms.get("onnxruntime", "cannot import"),
            ms.get("openvino", "cannot import"),
            _ratio(row, f"dense/{row['faster_peer']}"),
        ]
        cells += [_ratio(row, f"{build}/dense") for build in ("element", "out4")]
        lines.append(f"| {row['network']} | " + " | ".join(cells) + " |")
    lines += _int8_table([row for row in rows if "int8" in row["latency_ms"]])
    lines += _builds_table([row for row in rows if "layers_alone_us" in row])
    lines += [
        "",
        "Medians; ratios with their 95 % interval; * interquartile range beyond 10 %.",
    ]
    for row in rows[:1]:
        e = row["environment"]
        lines.append(
            f"{e['cpu']['model']}, {e['threads']} thread(s), commit {e['git_commit']}, {e['date']}."
        )
    return "\n".join(lines) + "\n"


def _int8_table(rows: list[dict]) -> list[str]:
    if not rows:
        return []
    lines = [
        "",
        "| network | Kerf int8 ms | ONNX Runtime int8 ms | OpenVINO int8 ms | int8 / OpenVINO int8 "
        "| int8 / dense | 90 % in:4 / int8 | 90 % block:4x4 / int8 |",
        "| --- | ---: | ---: | ---: | --- | --- | --- | --- |",
    ]
    for row in rows:
        ms = {
            n: f"{v['median']:.2f}{'*' if v['noisy'] else ''}" for n, v in row["latency_ms"].items()
        }
        engines = ("int8", "onnxruntime_int8", "openvino_int8")
        cells = [ms.get(name, "cannot import") for name in engines]
        cells += [_ratio(row, f"int8/{other}") for other in ("openvino_int8", "dense")]
        cells += [_ratio(row, f"{build}/int8") for build in ("int8_in4", "int8_block4")]
        lines.append(f"| {row['network']} | " + " | ".join(cells) + " |")
    return lines


def _builds_table(rows: list[dict]) -> list[str]:
    """Every compressed build: as a whole, its layers alone (without what lies between them), and on disk."""
    lines = [
        "",
        "| network | build | ms | / dense | layers alone / dense | bytes / dense | layers treated | beside |",
        "| --- | --- | ---: | --- | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        alone, size = row["layers_alone_us"], {b: sum(n) for b, n in row["bytes"].items()}
        for build in [b for b in alone if b != "dense"]:
            beside = [
                n for n in row["ratios"] if n.startswith(build + "/") and n != build + "/dense"
            ]
            taken, count = row["layers_compressed"][build]
            cells = [
                row["network"],
                build,
                f"{row['latency_ms'][build]['median']:.2f}",
                _ratio(row, f"{build}/dense"),
                f"{alone[build] / alone['dense']:.3f}",
                f"{size[build] / size['dense']:.3f}",
                f"{taken} of {count}",
                "; ".join(f"{n.partition('/')[2]} {_ratio(row, n)}" for n in beside),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines if len(lines) > 3 else []


def _ratio(row: dict, name: str) -> str:
    found = row["ratios"].get(name)
    return f"{found['median']:.3f} ({found['low']:.3f}-{found['high']:.3f})" if found else ""


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "networks", nargs="*", help=f"{', '.join(NETWORKS)}; all but the last by default"
    )
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="models and artifacts")
    parser.add_argument("--json", type=Path, default=Path("peers.json"), help="results, added to")
    parser.add_argument("--markdown", type=Path, help="the table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--duration", type=float, default=45.0, help="seconds to measure each")
    parser.add_argument("--builds", default="dense,element,out4", help=f"of {', '.join(BUILDS)}")
    parser.add_argument(
        "--deepsparse", type=Path, help="an interpreter with DeepSparse, to run the build pruned"
    )
    parser.add_argument("--keep", action="store_true", help="use artifacts that are there already")
    parser.add_argument("--again", action="store_true", help="measure networks already in --json")
    parser.add_argument("--prepare", action="store_true", help="build only")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # measure one prepared network, print JSON
    options = parser.parse_args(arguments)
    options.networks = [SHORT.get(n, n) for n in options.networks] or list(NETWORKS[:-1])
    options.builds = options.builds.split(",")
    if unknown := [n for n in options.networks if n not in NETWORKS]:
        parser.error(f"unknown network {unknown[0]!r}; known are {', '.join(NETWORKS)}")
    if "dense" not in options.builds or set(options.builds) - set(BUILDS):
        parser.error(f"--builds must hold dense and be of {', '.join(BUILDS)}")
    if "filter_shape" in options.builds and "filter" not in options.builds:
        parser.error("--builds filter_shape is beside filter: name both")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.one:
        row = measure(
            options.one,
            options.work,
            threads=options.threads,
            duration=options.duration,
            builds=options.builds,
            deepsparse=options.deepsparse,
        )
        print(json.dumps(row))
        return 0
    known = set() if options.again else {r["network"] for r in read_rows(options.json)}
    for name in options.networks:
        builds = options.builds
        if name in DENSE_ONLY:
            builds = [b for b in builds if b in ("dense", "int8")]
        if name in known and not options.prepare:
            log(f"{name}: measured already (--again measures it anew)")
            continue
        prepare(
            name,
            options.work,
            threads=options.threads,
            keep=options.keep,
            builds=builds,
            say=log,
        )
        if options.prepare:
            continue
        # A process of its own: no engine inherits another network's memory or threads.
        line = [sys.executable, __file__, "--one", name, "--work", str(options.work)]
        line += ["--threads", str(options.threads), "--duration", str(options.duration)]
        line += ["--deepsparse", str(options.deepsparse)] if options.deepsparse else []
        done = subprocess.run(
            [*line, "--builds", ",".join(builds)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{name}: measuring failed with exit code {done.returncode}")
        rows = add_row(options.json, json.loads(done.stdout.splitlines()[-1]))
        log(markdown([r for r in rows if r["network"] == name]).splitlines()[2])
    rows = read_rows(options.json)
    if options.markdown and rows:
        options.markdown.write_text(markdown(rows))
    if rows:
        print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
