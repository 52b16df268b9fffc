# SPDX-License-Identifier: Apache-2.0
"""Images as inputs of a network, prepared as the user says; needs Pillow.

    resize=256,crop=224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225

    resize    the shorter side, bilinear (default: no resizing)
    crop      a square from the middle (default: the whole image)
    mean, std per channel, of values from 0 to 1 (default 0 and 1); one number stands for all channels
    scale     what a byte is multiplied with first, a number or a fraction (default 1/255)
    channels  rgb, bgr or gray (default: by the network's input)

What calibration does to images must be what the network's user will do: it is recorded in the artifact as it stands.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from schedules.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")
_ORDERS = ("rgb", "bgr", "gray")


@dataclass(frozen=True)
class Preprocessing:
    """See the module's docstring."""

    resize: int | None = None
    crop: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    channels: str = ""

    @staticmethod
    def parse(text: str) -> Preprocessing:
        """From `key=value,...`. Raises UserError."""
        found: dict = {}
        for part in filter(None, text.split(",")):
            key, _, value = part.partition("=")
            if key in found:
                raise UserError(f"{key} is given twice", where="--preprocess", found=text)
            try:
                found[key] = _PARSERS[key](value)
            except KeyError:
                raise UserError(
                    f"unknown key {key!r}", where="--preprocess", wanted=", ".join(_PARSERS)
                ) from None
            except ValueError as error:
                raise UserError(str(error), where=f"--preprocess {part}") from None
        return Preprocessing(**found)

    def to_json(self) -> dict:
        return asdict(self)


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError("a number of pixels, 1 or more")
    return int(value)


def _numbers(value: str) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in value.split("/"))
    if not np.isfinite(numbers).all():
        raise ValueError("numbers, one per channel, with / between them")
    return numbers


def _spreads(value: str) -> tuple[float, ...]:
    numbers = _numbers(value)
    if min(numbers) <= 0:
        raise ValueError("a standard deviation is above 0")
    return numbers


def _scale(value: str) -> float:
    above, _, below = value.partition("/")
    scale = float(above) / (float(below or 1) or np.nan)
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError("a number above 0, or a fraction such as 1/255")
    return scale


def _order(value: str) -> str:
    if value not in _ORDERS:
        raise ValueError(f"one of {', '.join(_ORDERS)}")
    return value


_PARSERS = {
    "resize": _positive, "crop": _positive, "mean": _numbers, "std": _spreads, "scale": _scale, "channels": _order,
}  # fmt: skip


def read_image(path: Path, preprocessing: Preprocessing, shape: tuple[int, ...]) -> np.ndarray:
    """float32 [1, C, H, W], the `shape` of one sample. Raises UserError if the file or the result does not fit."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UserError(
            "reading images needs Pillow", where=str(path), todo="pip install Pillow"
        ) from None
    gray = preprocessing.channels == "gray" or (not preprocessing.channels and shape[1] == 1)
    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if gray else "RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        raise UserError("not a readable image", where=str(path)) from None
    if preprocessing.resize:
        ratio = preprocessing.resize / min(image.size)
        size = tuple(max(1, round(side * ratio)) for side in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)
    if preprocessing.crop:
        if preprocessing.crop > min(image.size):
            raise UserError(
                "an image smaller than the crop",
                where=str(path),
                found=f"{image.width}x{image.height}",
                wanted=f"{preprocessing.crop}x{preprocessing.crop} at least",
                todo="Give --preprocess resize=...",
            )
        left, top = ((side - preprocessing.crop) // 2 for side in image.size)
        image = image.crop((left, top, left + preprocessing.crop, top + preprocessing.crop))
    pixels = np.asarray(image, "float32").reshape(image.height, image.width, -1)
    if preprocessing.channels == "bgr":
        pixels = pixels[..., ::-1]
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) not in (1, pixels.shape[-1]):
            raise UserError(
                f"{name} for another number of channels",
                where="--preprocess",
                found=str(len(values)),
                wanted=str(pixels.shape[-1]),
            )
    mean, std = (np.asarray(v, "float32") for v in (preprocessing.mean, preprocessing.std))
    pixels = (pixels * np.float32(preprocessing.scale) - mean) / std
    made = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
    if made.shape[1:] != tuple(shape[1:]):
        raise UserError(
            "an image of another size than the network's input",
            where=str(path),
            found="x".join(map(str, made.shape[1:])),
            wanted="x".join(map(str, shape[1:])),
            todo="Give --preprocess resize=...,crop=...",
        )
    return made
