# SPDX-License-Identifier: Apache-2.0
"""Binary architectures with random weights, and their float twins, for tests and benchmarks.

    python tools/zoo_binary.py birealnet18 reactnet quicknet --format pt2,onnx -o models/ [--tiny]

The first convolution, the last dense layer and what changes the number of channels stay real, as in the papers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compiler.nn.binary import BinaryBlock, BinaryConv2d, RPReLU, RSign, sign
from tools import zoo


class Sign(nn.Module):
    """y = sign(x), the rule of `compiler.nn.binary`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sign(x)


class BiRealUnit(nn.Module):
    """y = BN(conv(sign(x))) + shortcut(x): a 3x3 binary convolution with its own real shortcut. arXiv:1808.00278."""

    def __init__(self, channels: int, outputs: int, stride: int):
        super().__init__()
        self.binarize = Sign()
        self.conv = BinaryConv2d(channels, outputs, 3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(outputs)
        self.around = nn.Identity()
        if stride != 1:
            self.around = nn.Sequential(
                nn.AvgPool2d(2), nn.Conv2d(channels, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(self.binarize(x))) + self.around(x)


def stages(widths: list[int], depth: int, make: Callable[[int, int, int], nn.Module]) -> nn.Module:
    """`depth` units per width, the first of each but the first width with stride 2; make(channels, outputs, stride)."""
    units, channels = [], widths[0]
    for width in widths:
        for i in range(depth):
            units.append(make(channels, width, 2 if i == 0 and width != widths[0] else 1))
            channels = width
    return nn.Sequential(*units)


class Classifier(nn.Module):
    """stem, body, mean over the image, dense layer."""

    def __init__(self, stem: nn.Module, body: nn.Module, width: int, classes: int):
        super().__init__()
        self.stem, self.body, self.head = stem, body, nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def birealnet18(tiny: bool) -> nn.Module:
    """Bi-Real net with ResNet-18's widths: 16 binary convolutions of 3x3."""
    widths = [32, 64] if tiny else [64, 128, 256, 512]
    stem = nn.Sequential(
        nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0]), nn.MaxPool2d(3, 2, 1)
    )  # fmt: skip
    return Classifier(stem, stages(widths, 2 if tiny else 4, BiRealUnit), widths[-1], 10 if tiny else 1000)  # fmt: skip


def reactnet(tiny: bool) -> nn.Module:
    """ReActNet-A: MobileNetV1's widths, 3x3 and 1x1 binary convolutions with learned thresholds. arXiv:2003.03488."""
    plan = [(32, 64, 1), (64, 128, 2)] if tiny else [
        (32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2),
        *[(512, 512, 1)] * 5, (512, 1024, 2), (1024, 1024, 1),
    ]  # fmt: skip
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32))
    units = []
    for channels, outputs, stride in plan:
        units += [
            BinaryBlock(channels, channels, 3, stride=stride),
            BinaryBlock(channels, outputs, 1),
        ]
    return Classifier(stem, nn.Sequential(*units), plan[-1][1], 10 if tiny else 1000)


class QuickUnit(nn.Module):
    """y = BN(relu(conv(sign(x)))) + x, padded with +1 (Larq's "same_one"). arXiv:2011.09398."""

    def __init__(self, channels: int):
        super().__init__()
        self.binarize = Sign()
        self.conv = BinaryConv2d(channels, channels, 3, padding=1, scale="none", pad_value=1.0)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(F.relu(self.conv(self.binarize(x)))) + x


def _quick_transition(channels: int, outputs: int) -> nn.Module:
    """Half the size: maximum, blurring depthwise convolution, pointwise convolution."""
    return nn.Sequential(
        nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False),
        nn.Conv2d(channels, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
    )  # fmt: skip


def quicknet(tiny: bool) -> nn.Module:
    """QuickNet: real stem and transitions, binary units of 3x3 between."""
    widths, depth = ([32, 64], 1) if tiny else ([64, 128, 256, 512], 4)
    stem = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.Conv2d(16, widths[0], 1, bias=False), nn.BatchNorm2d(widths[0]),
    )  # fmt: skip
    units: list[nn.Module] = []
    for i, width in enumerate(widths):
        if i:
            units.append(_quick_transition(widths[i - 1], width))
        units += [QuickUnit(width) for _ in range(depth)]
    return Classifier(stem, nn.Sequential(*units, nn.ReLU()), widths[-1], 10 if tiny else 1000)


# name -> (architecture, input extent, tiny input extent)
ZOO: dict[str, tuple[Callable[[bool], nn.Module], int, int]] = {
    "birealnet18": (birealnet18, 224, 32),
    "reactnet": (reactnet, 224, 32),
    "quicknet": (quicknet, 224, 32),
}


def build(
    name: str, *, tiny: bool = False, batch: int = 1, seed: int = 0
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """`(module in eval mode, example inputs)`, images float32 [N, 3, S, S]. Raises KeyError for an unknown name."""
    architecture, extent, tiny_extent = ZOO[name]
    torch.manual_seed(seed)
    module, size = architecture(tiny), tiny_extent if tiny else extent
    zoo.randomise(module)
    with torch.no_grad():
        for each in module.modules():
            if isinstance(each, RPReLU):
                each.slope.uniform_(0.1, 0.4)
    zoo.calibrate_batch_norm(module, torch.randn(4, 3, size, size))
    return module.eval(), (torch.randn(batch, 3, size, size),)


def float_twin(name: str, *, tiny: bool = False) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The float network that a binary one is compared with, as `build` gives it.

    ResNet-18 for Bi-Real-18, which has a shortcut more per unit; else the network itself with ReLU for every sign, and
    ordinary convolutions padded with zeros.
    """
    if name == "birealnet18":
        return zoo.build("resnet18", tiny=tiny)
    module, example = build(name, tiny=tiny)
    for path, each in list(module.named_modules()):
        if isinstance(each, (Sign, RSign)):
            module.set_submodule(path, nn.ReLU())
        elif isinstance(each, BinaryConv2d):
            new = nn.Conv2d(
                each.in_channels, each.out_channels, each.kernel_size, each.stride, each.padding,
                each.dilation, each.groups, bias=False,
            )  # fmt: skip
            module.set_submodule(path, new)
    zoo.randomise(module)
    zoo.calibrate_batch_norm(module, torch.randn(4, *example[0].shape[1:]))
    return module.eval(), example


def main(arguments: list[str] | None = None) -> int:
    return zoo.write_models(__doc__, ZOO, build, arguments)


if __name__ == "__main__":
    sys.exit(main())
