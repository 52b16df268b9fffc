# SPDX-License-Identifier: Apache-2.0
"""Real architectures with random weights that behave as if trained, for tests and benchmarks.

    python tools/zoo.py resnet50 vit_s16 --format pt2,onnx -o models/ [--tiny]

Weights are drawn so that activations neither vanish nor explode, batch-norm statistics come from a pass over random
images, and every parameter matters for the output (residual branches are not initialised to zero).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

IMAGE, TOKENS = "image", "tokens"
_RESIDUAL_SCALE = 0.25


class Logits(nn.Module):
    """A `transformers` model that takes one tensor and returns one: its logits, or its last hidden state."""

    def __init__(self, model: nn.Module, **options: Any):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.model(x, **self.options)
        return result.logits if hasattr(result, "logits") else result.last_hidden_state


class Vgg(nn.Module):
    """VGG: 3x3 convolutions with biases, max pooling between stages, three dense layers. arXiv:1409.1556."""

    def __init__(
        self, stages: tuple[tuple[int, ...], ...], hidden: int, classes: int, grid: int = 7
    ):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in stages:
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = nn.Sequential(
            nn.Linear(channels * grid * grid, hidden), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class LstmClassifier(nn.Module):
    """Embedding, stacked LSTM, and a classifier on the last step (`y[:, -1]`)."""

    def __init__(
        self, vocabulary: int, width: int, layers: int, classes: int, bidirectional: bool = False
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(width * (1 + bidirectional), classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embedding(tokens))
        return self.head(states[:, -1])


def _resnet(depths: list[int], widths: list[int], kind: str, stem: int, classes: int) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return Logits(
        ResNetForImageClassification(
            ResNetConfig(
                embedding_size=stem,
                hidden_sizes=widths,
                depths=depths,
                layer_type=kind,
                num_labels=classes,
            )
        )
    )


def resnet18(tiny: bool) -> nn.Module:
    return (
        _resnet([1, 1, 1, 1], [8, 16, 24, 32], "basic", 8, 10)
        if tiny
        else _resnet([2, 2, 2, 2], [64, 128, 256, 512], "basic", 64, 1000)
    )


def resnet50(tiny: bool) -> nn.Module:
    return (
        _resnet([1, 1, 1, 1], [16, 32, 48, 64], "bottleneck", 8, 10)
        if tiny
        else _resnet([3, 4, 6, 3], [256, 512, 1024, 2048], "bottleneck", 64, 1000)
    )


def vgg16(tiny: bool) -> nn.Module:
    if tiny:
        return Vgg(((8,), (16,), (24, 24)), 32, 10, grid=2)
    return Vgg(((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3), 4096, 1000)


def mobilenetv2(tiny: bool) -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    # 0.35 is the narrowest published width; `tf_padding=False` is the symmetric padding of the PyTorch original.
    config = MobileNetV2Config(
        depth_multiplier=0.35 if tiny else 1.0, tf_padding=False, num_labels=10 if tiny else 1000
    )
    return Logits(MobileNetV2ForImageClassification(config))


def regnet_y(tiny: bool) -> nn.Module:
    """RegNetY-400MF (squeeze-and-excitation, grouped convolutions of 8 channels). arXiv:2003.13678."""
    from transformers import RegNetConfig, RegNetForImageClassification

    widths, depths = (
        ([16, 24, 32, 40], [1, 1, 1, 1]) if tiny else ([48, 104, 208, 440], [1, 3, 6, 6])
    )
    config = RegNetConfig(
        embedding_size=16 if tiny else 32,
        hidden_sizes=widths,
        depths=depths,
        groups_width=8,
        layer_type="y",
        num_labels=10 if tiny else 1000,
    )
    return Logits(RegNetForImageClassification(config))


def convnext_t(tiny: bool) -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    widths, depths = (
        ([16, 24, 32, 40], [1, 1, 1, 1]) if tiny else ([96, 192, 384, 768], [3, 3, 9, 3])
    )
    return Logits(
        ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=widths, depths=depths, num_labels=10 if tiny else 1000)
        )
    )


def efficientnet_b0(tiny: bool) -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    size = {
        "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "image_size": 64, "num_labels": 10, "dropout_rate": 0.2,
    } if tiny else {
        "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224, "num_labels": 1000, "dropout_rate": 0.2,
    }  # fmt: skip
    return Logits(EfficientNetForImageClassification(EfficientNetConfig(**size)))


def vit_s16(tiny: bool) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64, "num_labels": 10,
    } if tiny else {
        "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536, "image_size": 224, "num_labels": 1000,
    }  # fmt: skip
    return Logits(
        ViTForImageClassification(ViTConfig(**size, patch_size=16, attn_implementation="sdpa"))
    )


def bert(tiny: bool) -> nn.Module:
    """BERT-base without its pooler."""
    from transformers import BertConfig, BertModel

    size = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100,
        "max_position_embeddings": 32,
    } if tiny else {}  # fmt: skip
    return Logits(
        BertModel(BertConfig(**size, attn_implementation="sdpa"), add_pooling_layer=False)
    )


def gpt2(tiny: bool) -> nn.Module:
    """GPT-2 (124M) as a language model: causal attention, tied embedding and head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = (
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 32}
        if tiny
        else {}
    )
    return Logits(GPT2LMHeadModel(GPT2Config(**size, attn_implementation="sdpa")), use_cache=False)


def lstm(tiny: bool) -> nn.Module:
    return LstmClassifier(100, 16, 2, 10) if tiny else LstmClassifier(10000, 256, 2, 10)


# name -> (architecture, what it reads, input extent, tiny input extent)
ZOO: dict[str, tuple[Callable[[bool], nn.Module], str, int, int]] = {
    "resnet18": (resnet18, IMAGE, 224, 64),
    "resnet50": (resnet50, IMAGE, 224, 64),
    "vgg16": (vgg16, IMAGE, 224, 32),
    "mobilenetv2": (mobilenetv2, IMAGE, 224, 64),
    "regnet_y": (regnet_y, IMAGE, 224, 64),
    "convnext_t": (convnext_t, IMAGE, 224, 64),
    "efficientnet_b0": (efficientnet_b0, IMAGE, 224, 64),
    "vit_s16": (vit_s16, IMAGE, 224, 64),
    "bert": (bert, TOKENS, 128, 12),
    "bert_token": (bert, TOKENS, 1, 1),  # every dense layer a product of a matrix and a vector
    "gpt2": (gpt2, TOKENS, 64, 10),
    "lstm": (lstm, TOKENS, 32, 6),
}


def build(
    name: str, *, tiny: bool = False, batch: int = 1, seed: int = 0
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """`(module in eval mode, example inputs)`: images float32 [N, 3, S, S] of unit variance, or tokens int64 [N, S].

    Raises KeyError for an unknown name.
    """
    architecture, reads, extent, tiny_extent = ZOO[name]
    torch.manual_seed(seed)
    module = architecture(tiny)
    randomise(module)
    size = tiny_extent if tiny else extent
    if reads == IMAGE:
        calibrate_batch_norm(module, torch.randn(4, 3, size, size))
        example = torch.randn(batch, 3, size, size)
    else:
        vocabulary = next(m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding))
        example = torch.randint(vocabulary, (batch, size))
    return module.eval(), (example,)


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Weights as after training: variance-preserving, every bias and scale away from 0 and 1."""
    for name, parameter in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0]) if "." in name else module
        if isinstance(owner, (nn.Conv2d, nn.Linear)) and parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.normal_(
                std=math.sqrt((2.0 if isinstance(owner, nn.Conv2d) else 1.0) / fan_in)
            )
        elif (
            isinstance(owner, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm))
            or "layernorm" in type(owner).__name__.lower()
        ):
            parameter.uniform_(0.7, 1.3) if name.endswith("weight") else parameter.normal_(std=0.1)
        elif isinstance(owner, nn.Embedding):
            parameter.normal_(std=0.5)
        elif isinstance(owner, nn.LSTM):
            parameter.uniform_(-1, 1).mul_(math.sqrt(3.0 / owner.hidden_size))
        elif "layer_scale" in name:
            parameter.uniform_(0.1, 0.4)
        elif parameter.ndim == 2:  # a dense layer that stores its weight [K, O]
            parameter.normal_(std=1.0 / math.sqrt(parameter.shape[0]))
        else:
            parameter.normal_(std=0.1)
    for norm in _last_norms(module):
        norm.weight.mul_(_RESIDUAL_SCALE)


def _last_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch norm that ends each residual branch. Training makes these small; at 1, rounding errors grow from block to block."""
    found = []
    for name, child in module.named_modules():
        if name.endswith(("reduce_1x1.normalization", "project_bn")):
            found.append(child)
        elif name.endswith(".layer") and isinstance(child, nn.Sequential):
            norms = [m for m in child.modules() if isinstance(m, nn.BatchNorm2d)]
            found += norms[-1:]
    return found


@torch.no_grad()
def calibrate_batch_norm(module: nn.Module, images: torch.Tensor) -> None:
    """Running statistics of a pass over `images`, as a trained network has."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    module.train()
    module(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    module.eval()


def save_pt2(module: nn.Module, example: tuple, path: Path) -> None:
    with torch.no_grad():
        torch.export.save(torch.export.export(module, example), path)


def save_onnx(module: nn.Module, example: tuple, path: Path) -> None:
    """By torch's own exporter; weights beside the file if they exceed protobuf's 2 GB."""
    with torch.no_grad():
        torch.onnx.export(
            module, example, str(path), dynamo=True, external_data=False, verbose=False
        )


def main(arguments: list[str] | None = None) -> int:
    return write_models(__doc__, ZOO, build, arguments)


def write_models(
    about: str, names: Iterable[str], make: Callable, arguments: list[str] | None = None
) -> int:
    """The command line of a zoo: writes the architectures asked for, each as `make(name, tiny=, batch=)` gives it."""
    names = list(names)
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument(
        "names", nargs="+", choices=[*names, "all"], metavar="NAME", help=", ".join(["all", *names])
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("."))
    parser.add_argument("--format", default="pt2", help="pt2, onnx or pt2,onnx")
    parser.add_argument("--tiny", action="store_true", help="small widths and inputs, for tests")
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args(arguments)
    formats = options.format.split(",")
    if not set(formats) <= {"pt2", "onnx"}:
        parser.error(f"--format: {options.format!r} is not pt2, onnx or pt2,onnx")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in names if "all" in options.names else options.names:
        module, example = make(name, tiny=options.tiny, batch=options.batch)
        for suffix in formats:
            path = options.output / f"{name}.{suffix}"
            {"pt2": save_pt2, "onnx": save_onnx}[suffix](module, example, path)
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
