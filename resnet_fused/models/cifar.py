"""Residual networks for small images (CIFAR: 32x32), as stock PyTorch modules.

Papers: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), section 4.2,
https://arxiv.org/abs/1512.03385, the nets of 6n+2 layers; Xie, Girshick, Dollar, Tu, He, "Aggregated Residual
Transformations for Deep Neural Networks" (2016), section 5.3, https://arxiv.org/abs/1611.05431, ResNeXt-29.

The first have 16, 32 and 64 channels and shortcuts without parameters ("option A"). The paper leaves open where the
zeros of option A stand: here they are the last channels. ResNeXt-29 projects where the shape changes ("option B"), with
the stride on the 3x3 convolution, as the ResNeXt of large images here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .resnet import BasicBlock, Bottleneck
from .stages import NormLayer, Stages, conv3x3, initialise
from .stochastic_depth import HALF

SHORTCUTS = ("A", "B")


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2015: every `stride`-th pixel, and zeros for the channels that the input lacks.

    ``[N, inplanes, H, W]`` -> ``[N, planes, ceil(H/stride), ceil(W/stride)]``, without parameters.

    Raises:
        ValueError: `planes` is below `inplanes`.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        if planes < inplanes:
            raise ValueError(f"PaddedShortcut: planes must be at least inplanes, got {planes} and {inplanes}")
        self.stride = stride
        self.added = planes - inplanes

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, added={self.added}"


class CifarResNet(Stages):
    """A residual network for small images, ``[N, 3, 32, 32]`` -> class scores ``[N, num_classes]``.

    A 3x3 convolution, then three stages at full, half and a quarter of the resolution, global average, linear layer.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`, or a class with their constructor and `expansion`.
        layers: blocks in each of the three stages.
        num_classes: outputs of the last linear layer.
        zero_init_residual: start the last norm of each block at 0, so that each block starts as its shortcut.
        shortcut: where the shape changes, ``"A"``, :class:`PaddedShortcut`, or ``"B"``, a 1x1 convolution and a norm.
        width: channels of the stem and, before the block's `expansion`, of the first stage; each further stage doubles.
        groups, width_per_group: see :class:`Bottleneck`.
        norm_layer: builds a norm layer from a channel count; default ``nn.BatchNorm2d``.
        stochastic_depth_rate, stochastic_depth_mode: see :class:`~resnet_fused.models.ResNet`.

    Raises:
        ValueError: `shortcut` is another word; see also `stochastic_depth_rate`.
    """

    #: As timm's models say what they are meant for; command lines take the size of their input from it.
    default_cfg: ClassVar = {"input_size": (3, 32, 32)}

    def __init__(
        self,
        block: type,
        layers: Sequence[int],
        num_classes: int = 10,
        zero_init_residual: bool = False,
        shortcut: str = "A",
        width: int = 16,
        groups: int = 1,
        width_per_group: int = 64,
        norm_layer: NormLayer | None = None,
        stochastic_depth_rate: float = 0.0,
        stochastic_depth_mode: str = "row",
    ) -> None:
        super().__init__(width, norm_layer, groups, width_per_group)
        if shortcut not in SHORTCUTS:
            raise ValueError(
                f"CifarResNet: shortcut must be one of {', '.join(map(repr, SHORTCUTS))}, got {shortcut!r}"
            )
        self.shortcut = shortcut
        self.conv1 = conv3x3(3, width)
        self.bn1 = self._norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self._make_three(block, layers, width)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        self._drop_paths(stochastic_depth_rate, stochastic_depth_mode)
        initialise(self, zero_init_residual)

    def _projection(self, inputs: int, outputs: int, stride: int) -> nn.Module | None:
        if self.shortcut == "A":
            return PaddedShortcut(inputs, outputs, stride)
        return super()._projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet20(**options) -> CifarResNet:
    """ResNet-20 for CIFAR (He et al. 2015), 0.27 M parameters. `options` are those of :class:`CifarResNet`."""
    return CifarResNet(BasicBlock, (3, 3, 3), **options)


def resnet32(**options) -> CifarResNet:
    """ResNet-32 for CIFAR (He et al. 2015), 0.46 M parameters. `options` are those of :class:`CifarResNet`."""
    return CifarResNet(BasicBlock, (5, 5, 5), **options)


def resnet44(**options) -> CifarResNet:
    """ResNet-44 for CIFAR (He et al. 2015), 0.66 M parameters. `options` are those of :class:`CifarResNet`."""
    return CifarResNet(BasicBlock, (7, 7, 7), **options)


def resnet56(**options) -> CifarResNet:
    """ResNet-56 for CIFAR (He et al. 2015), 0.85 M parameters. `options` are those of :class:`CifarResNet`."""
    return CifarResNet(BasicBlock, (9, 9, 9), **options)


def resnet110(**options) -> CifarResNet:
    """ResNet-110 for CIFAR (He et al. 2015), 1.7 M parameters. `options` are those of :class:`CifarResNet`."""
    return CifarResNet(BasicBlock, (18, 18, 18), **options)


def resnet110_stochastic_depth(**options) -> CifarResNet:
    """ResNet-110 for CIFAR with stochastic depth, linear decay to a survival probability of 0.5 (Huang et al. 2016).

    A draw drops a block for the whole batch, as in the paper. `options` are those of :class:`CifarResNet`.
    """
    return CifarResNet(BasicBlock, (18, 18, 18), **HALF | options)


def resnet1202(**options) -> CifarResNet:
    """ResNet-1202 for CIFAR (He et al. 2015), 19.4 M parameters. `options` are those of :class:`CifarResNet`."""
    return CifarResNet(BasicBlock, (200, 200, 200), **options)


def _resnext29(groups: int, options: dict) -> CifarResNet:
    own = {"shortcut": "B", "width": 64, "groups": groups, "width_per_group": 64}
    return CifarResNet(Bottleneck, (3, 3, 3), **own | options)


def resnext29_8x64d(**options) -> CifarResNet:
    """ResNeXt-29 for CIFAR, 8 groups of width 64 (Xie et al. 2016), 34.4 M. `options` as in :class:`CifarResNet`."""
    return _resnext29(8, options)


def resnext29_16x64d(**options) -> CifarResNet:
    """ResNeXt-29 for CIFAR, 16 groups of width 64 (Xie et al. 2016), 68.2 M. `options` as in :class:`CifarResNet`."""
    return _resnext29(16, options)
