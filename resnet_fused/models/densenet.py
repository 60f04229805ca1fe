"""Densely connected networks, as stock PyTorch modules: every layer reads what all layers before it wrote.

Paper: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks" (2017),
https://arxiv.org/abs/1608.06993. A dense layer is norm, ReLU, 1x1 convolution to ``bn_size * growth_rate`` channels,
norm, ReLU, 3x3 convolution to `growth_rate` channels (DenseNet-B); a dense block appends each layer's output to its
input, and a transition halves channels and resolution between two blocks (DenseNet-BC).

:class:`DenseNet` has torchvision's module names and start, so that its weights load; :class:`DenseNetCifar` is the
paper's network for small images: three blocks of ``(depth - 4) / 6`` layers behind a 3x3 convolution to
``2 * growth_rate`` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F


class DenseLayer(nn.Module):
    """``conv2(relu(norm2(conv1(relu(norm1(x))))))`` of the concatenated features ``[N, C, H, W]``.

    Args:
        num_input_features: C.
        growth_rate: channels of the result.
        bn_size: channels between the convolutions, in units of `growth_rate`.
        drop_rate: of the dropout behind it in training.
        memory_efficient: compute what lies before norm2 again in backward, instead of saving it.

    Raises:
        ValueError: `drop_rate` is not in [0, 1].
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"DenseLayer: drop_rate must be in [0, 1], got {drop_rate}")
        self.drop_rate = float(drop_rate)
        self.memory_efficient = memory_efficient

    def bottleneck(self, *features: Tensor) -> Tensor:
        """What norm2 reads."""
        return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))

    def forward(self, features: list[Tensor]) -> Tensor:
        if self.memory_efficient and any(feature.requires_grad for feature in features):
            out = torch.utils.checkpoint.checkpoint(self.bottleneck, *features, use_reentrant=False)
        else:
            out = self.bottleneck(*features)
        out = self.conv2(self.relu2(self.norm2(out)))
        return F.dropout(out, self.drop_rate, self.training) if self.drop_rate > 0 else out


class DenseBlock(nn.ModuleDict):
    """`num_layers` of :class:`DenseLayer`, named denselayer1 and so on, each of which reads all before it.

    ``[N, C, H, W]`` -> ``[N, C + num_layers * growth_rate, H, W]``; args as torchvision's: see :class:`DenseLayer`.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        for i in range(num_layers):
            channels = num_input_features + i * growth_rate
            layer = DenseLayer(channels, growth_rate, bn_size, drop_rate, memory_efficient)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """Norm, ReLU, 1x1 convolution to `num_output_features` channels, 2x2 average pool."""

    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2)


class DenseNet(nn.Module):
    """DenseNet-BC for images ``[N, 3, H, W]`` -> class scores ``[N, num_classes]`` (Huang et al. 2017).

    Args:
        growth_rate: channels that a layer adds.
        block_config: layers of each block.
        num_init_features: channels of the stem.
        bn_size: channels between a layer's convolutions, in units of `growth_rate`.
        drop_rate: of the dropout behind each layer.
        num_classes: outputs of the last linear layer.
        memory_efficient: compute again in backward what is cheap to compute (https://arxiv.org/abs/1707.06990).
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self._make_stem(num_init_features)
        channels = num_init_features
        for i, layers in enumerate(block_config, 1):
            block = DenseBlock(layers, channels, bn_size, growth_rate, drop_rate, memory_efficient)
            self.features.add_module(f"denseblock{i}", block)
            channels += layers * growth_rate
            if i < len(block_config):
                self.features.add_module(f"transition{i}", Transition(channels, channels // 2))
                channels //= 2
        self.features.add_module(f"norm{len(block_config) + 1}", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        self._initialise()

    def _make_stem(self, channels: int) -> None:
        self.features.add_module("conv0", nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(channels))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))

    def _initialise(self) -> None:
        """As torchvision: He's normal convolutions, norms 1 and 0, the classifier's bias 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


class DenseNetCifar(DenseNet):
    """The paper's DenseNet-BC for small images, ``[N, 3, 32, 32]`` -> class scores ``[N, num_classes]``.

    Args:
        depth: 6n + 4; each of the three blocks has n layers of two convolutions.
        growth_rate: channels that a layer adds; the stem has twice as many.
        num_classes, drop_rate, memory_efficient: see :class:`DenseNet`.

    Raises:
        ValueError: there is no DenseNet-BC of that depth.
    """

    #: As timm's models say what they are meant for; command lines take the size of their input from it.
    default_cfg: ClassVar = {"input_size": (3, 32, 32)}

    def __init__(
        self,
        depth: int,
        growth_rate: int,
        num_classes: int = 10,
        drop_rate: float = 0,
        memory_efficient: bool = False,
    ) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"DenseNetCifar: depth is {depth}; pass 6n + 4 for blocks of n layers, e.g. 100 or 190")
        blocks = ((depth - 4) // 6,) * 3
        super().__init__(growth_rate, blocks, 2 * growth_rate, 4, drop_rate, num_classes, memory_efficient)

    def _make_stem(self, channels: int) -> None:
        self.features.add_module("conv0", nn.Conv2d(3, channels, 3, padding=1, bias=False))


def densenet121(**options) -> DenseNet:
    """DenseNet-121, 8.0 M parameters. `options` are those of :class:`DenseNet`."""
    return DenseNet(32, (6, 12, 24, 16), 64, **options)


def densenet161(**options) -> DenseNet:
    """DenseNet-161, 28.7 M parameters. `options` are those of :class:`DenseNet`."""
    return DenseNet(48, (6, 12, 36, 24), 96, **options)


def densenet169(**options) -> DenseNet:
    """DenseNet-169, 14.1 M parameters. `options` are those of :class:`DenseNet`."""
    return DenseNet(32, (6, 12, 32, 32), 64, **options)


def densenet201(**options) -> DenseNet:
    """DenseNet-201, 20.0 M parameters. `options` are those of :class:`DenseNet`."""
    return DenseNet(32, (6, 12, 48, 32), 64, **options)


def densenet_bc100_k12(**options) -> DenseNetCifar:
    """DenseNet-BC of depth 100 and growth rate 12 for CIFAR, 0.8 M parameters. `options`: :class:`DenseNetCifar`."""
    return DenseNetCifar(100, 12, **options)


def densenet_bc190_k40(**options) -> DenseNetCifar:
    """DenseNet-BC of depth 190 and growth rate 40 for CIFAR, 25.6 M parameters. `options`: :class:`DenseNetCifar`."""
    return DenseNetCifar(190, 40, **options)
