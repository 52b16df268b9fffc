# SPDX-License-Identifier: Apache-2.0
"""The `accuracy` section of a manifest in words."""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text

from compiler.accuracy import NO_NOISE

_WORST = 5


def accuracy_lines(document: Mapping | None) -> list[Text]:
    """Top-1, cosine and noise of the outputs, what a limit cost, and the worst tensors."""
    if not document:
        return []
    lines = []
    if document["dense_top1"] is not None:
        lines.append(
            f"top-1 on {document['rows']} labelled rows: dense {document['dense_top1']:.2%}, "
            f"compressed {document['compressed_top1']:.2%}"
        )
    if document["agreement"] is not None:
        lines.append(
            f"dense and compressed agree on {document['agreement']:.2%} of {document['rows']} rows"
        )
    noise = (
        f"cosine {document['cosine']:.6f}, signal to quantization noise {document['sqnr_db']:.1f} dB"
        if document["sqnr_db"] < NO_NOISE
        else "the same as before compression"
    )
    lines.append(f"outputs: {noise}")
    lines += [_stage_line(stage, document) for stage in document.get("stages", ())]
    if (limit := document.get("max_drop")) is not None:
        kept = document["kept_float"]
        lines.append(
            f"lost {document['drop']:.2f} points of at most {limit:g}"
            + (f", with {len(kept)} layers in float32: {', '.join(kept)}" if kept else "")
        )
    for each in document["tensors"][:_WORST]:
        where = ", ".join(each["layers"]) or each["tensor"]
        lines.append(f"noisiest: {each['sqnr_db']:.1f} dB, cosine {each['cosine']:.5f} at {where}")
    return [Text(line) for line in lines]


def _stage_line(stage: Mapping, document: Mapping) -> str:
    """What was lost by then, and what the steps behind it, down to the compressed variant, lose."""
    return (
        f"{stage['name']}, in float32: {_score(stage['top1'], stage)}, {stage['drop']:.2f} points lost; "
        f"then quantized: {_score(document['compressed_top1'], document)}, {document['drop']:.2f} points lost"
    )


def _score(top1: float | None, measured: Mapping) -> str:
    if top1 is not None:
        return f"top-1 {top1:.2%}"
    if measured["agreement"] is not None:
        return f"{measured['agreement']:.2%} as the dense variant"
    return f"cosine {measured['cosine']:.6f}"
