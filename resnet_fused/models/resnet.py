"""Residual networks, as stock PyTorch modules with torchvision's parameter names.

Nothing here is fused: ``resnet_fused.fuse(resnet50())`` is. A ``state_dict`` loads into torchvision's model of the
same name and back with ``strict=True``, and with one seed both start from the same numbers.

Papers: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), https://arxiv.org/abs/1512.03385;
Zagoruyko, Komodakis, "Wide Residual Networks" (2016), https://arxiv.org/abs/1605.07146;
Xie, Girshick, Dollar, Tu, He, "Aggregated Residual Transformations for Deep Neural Networks" (2016),
https://arxiv.org/abs/1611.05431.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .stages import NormLayer, Stages, ThreeConvolutions, TwoConvolutions, initialise
from .stochastic_depth import HALF


class BasicBlock(TwoConvolutions):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and ResNet-34 (He et al. 2015).

    ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``, shortcut = `downsample`, or the identity if that is None.

    Args:
        inplanes: channels of the input ``[N, inplanes, H, W]``.
        planes: channels of the output ``[N, planes, ceil(H/stride), ceil(W/stride)]``.
        stride: of the first convolution.
        downsample: projection shortcut; needed where the output's shape differs from the input's.
        groups, base_width, dilation: there for the signature that both blocks share; only 1, 64 and 1 are accepted.
        norm_layer: builds a norm layer from a channel count; default ``nn.BatchNorm2d``.

    Raises:
        ValueError: `groups` is not 1 or `base_width` not 64.
        NotImplementedError: `dilation` is above 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.drop_path is not None:
            out = self.drop_path(out)
        out += identity
        return self.relu(out)


class Bottleneck(ThreeConvolutions):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: the block of ResNet-50 and deeper, ResNeXt and Wide ResNet.

    ``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))``. The stride is on the 3x3 convolution
    ("v1.5", as in torchvision; the paper put it on the first 1x1). `groups` > 1 is ResNeXt (Xie et al. 2016),
    a larger `base_width` Wide ResNet (Zagoruyko and Komodakis 2016): the inner width is
    ``int(planes * base_width / 64) * groups``.

    Args:
        inplanes: channels of the input ``[N, inplanes, H, W]``.
        planes: a quarter of the output's channels, ``[N, 4*planes, ceil(H/stride), ceil(W/stride)]``.
        stride, dilation, groups: of the 3x3 convolution.
        downsample: projection shortcut; needed where the output's shape differs from the input's.
        base_width: inner width per group at ``planes=64``.
        norm_layer: builds a norm layer from a channel count; default ``nn.BatchNorm2d``.
    """

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.drop_path is not None:
            out = self.drop_path(out)
        out += identity
        return self.relu(out)


class ResNet(Stages):
    """A residual network for images ``[N, 3, H, W]`` -> class scores ``[N, num_classes]`` (He et al. 2015).

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`, or a class with their constructor and `expansion`.
        layers: blocks in each of the four stages.
        num_classes: outputs of the last linear layer.
        zero_init_residual: start the last norm of each block at 0, so that each block starts as its shortcut
            (Goyal et al. 2017, https://arxiv.org/abs/1706.02677).
        groups, width_per_group: see :class:`Bottleneck`.
        replace_stride_with_dilation: for stages 2, 3 and 4, dilate instead of striding (Bottleneck only).
        norm_layer: builds a norm layer from a channel count; default ``nn.BatchNorm2d``.
        stochastic_depth_rate: the probability of dropping the last block's branch in training, 1 - p_L of Huang et
            al. 2016 (https://arxiv.org/abs/1603.09382); that of block l of L is l/L of it.
        stochastic_depth_mode: ``"row"``, a draw for each sample, or ``"batch"``, one for all (the paper's).

    Raises:
        ValueError: `replace_stride_with_dilation` does not have three elements; `stochastic_depth_rate` is not in
            [0, 1], or not 0 for blocks that have no `drop_path`; `stochastic_depth_mode` is another word.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        stochastic_depth_rate: float = 0.0,
        stochastic_depth_mode: str = "row",
    ) -> None:
        super().__init__(64, norm_layer, groups, width_per_group)
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self._make_four(block, layers, replace_stride_with_dilation)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._drop_paths(stochastic_depth_rate, stochastic_depth_mode)
        initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(**options) -> ResNet:
    """ResNet-18 (He et al. 2015), 11.7 M parameters. `options` are those of :class:`ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options) -> ResNet:
    """ResNet-34 (He et al. 2015), 21.8 M parameters. `options` are those of :class:`ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options) -> ResNet:
    """ResNet-50 (He et al. 2015), 25.6 M parameters. `options` are those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet50_stochastic_depth(**options) -> ResNet:
    """ResNet-50 whose last block drops out of every second batch, earlier ones less (Huang et al. 2016).

    That is linear decay to a survival probability of 0.5, as the paper has it. `options` are those of :class:`ResNet`.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), **HALF | options)


def resnet101(**options) -> ResNet:
    """ResNet-101 (He et al. 2015), 44.5 M parameters. `options` are those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def resnet152(**options) -> ResNet:
    """ResNet-152 (He et al. 2015), 60.2 M parameters. `options` are those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


def resnext50_32x4d(**options) -> ResNet:
    """ResNeXt-50, 32 groups of width 4 (Xie et al. 2016), 25.0 M parameters. `options` as in :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **{"groups": 32, "width_per_group": 4} | options)


def resnext101_32x8d(**options) -> ResNet:
    """ResNeXt-101, 32 groups of width 8 (Xie et al. 2016), 88.8 M parameters. `options` as in :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **{"groups": 32, "width_per_group": 8} | options)


def resnext101_64x4d(**options) -> ResNet:
    """ResNeXt-101, 64 groups of width 4 (Xie et al. 2016), 83.5 M parameters. `options` as in :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **{"groups": 64, "width_per_group": 4} | options)


def wide_resnet50_2(**options) -> ResNet:
    """ResNet-50 with twice the inner width (Zagoruyko and Komodakis 2016), 68.9 M. `options` as in :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **{"width_per_group": 128} | options)


def wide_resnet101_2(**options) -> ResNet:
    """ResNet-101 with twice the inner width (Zagoruyko, Komodakis 2016), 126.9 M. `options` as in :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **{"width_per_group": 128} | options)
