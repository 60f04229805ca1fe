"""Pre-activation residual networks, as stock PyTorch modules: norm and ReLU stand before each convolution.

Paper: He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks" (2016), https://arxiv.org/abs/1603.05027.
A block adds its convolutions' result to its input and does nothing to the sum, so that the value on the shortcut runs
through a stage untouched. Where the shape changes, one norm and ReLU serve both paths: the projection, a 1x1
convolution with no norm behind it, reads what the first convolution reads. A last norm and ReLU stand before pooling.

The published implementations differ. These nets follow:

- :class:`PreActResNet` (ImageNet): timm's ``resnetv2_50`` and its like, since weights exist for them. The stem is a
  7x7 convolution and max pooling with no norm in between (the paper's text and fb.resnet.torch activate behind that
  convolution), and the stride is on the 3x3 convolution (the paper's is on the first 1x1). timm's weights load after
  renaming: ``stem.conv`` is `conv1` here, ``stages.0.blocks.1.norm1`` is `layer1.1.bn1`, ``downsample.conv`` is
  `downsample`, ``norm`` is `bn`, ``head.fc`` is `fc` (there a 1x1 convolution: flatten its weight).
- :class:`PreActResNetCifar`: the paper, with the stride on the 3x3 convolution here too. The first block of the net
  activates the stem's output before the paths part (the paper's appendix), whether it projects or not. Where the paper
  leaves the shortcut of ResNet-110 open, it projects as in the deeper nets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .stages import NormLayer, Stages, ThreeConvolutions, TwoConvolutions, conv1x1, conv3x3, initialise


class PreActBasicBlock(TwoConvolutions):
    """Two 3x3 convolutions and a shortcut, norm and ReLU first: the block of the pre-activation ResNet-110.

    ``conv2(relu(bn2(conv1(a)))) + shortcut`` with ``a = relu(bn1(x))``; the shortcut is ``downsample(a)``, or `x`
    itself if `downsample` is None.

    Args:
        inplanes: channels of the input ``[N, inplanes, H, W]``.
        planes: channels of the output ``[N, planes, ceil(H/stride), ceil(W/stride)]``.
        stride: of the first convolution.
        downsample: projection of the activated input; needed where the output's shape differs from the input's.
        groups, base_width, dilation: there for the signature that all blocks share; only 1, 64 and 1 are accepted.
        norm_layer: builds a norm layer from a channel count; default ``nn.BatchNorm2d``.

    Raises:
        ValueError: `groups` is not 1 or `base_width` not 64.
        NotImplementedError: `dilation` is above 1.
    """

    norm_first = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))
        if self.drop_path is not None:
            out = self.drop_path(out)
        return out + identity


class PreActBottleneck(ThreeConvolutions):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, norm and ReLU first: the block of all deeper nets here.

    ``conv3(relu(bn3(conv2(relu(bn2(conv1(a))))))) + shortcut`` with ``a = relu(bn1(x))``; the shortcut is
    ``downsample(a)``, or `x` itself if `downsample` is None. The inner width is
    ``int(planes * base_width / 64) * groups``.

    Args:
        inplanes: channels of the input ``[N, inplanes, H, W]``.
        planes: a quarter of the output's channels, ``[N, 4*planes, ceil(H/stride), ceil(W/stride)]``.
        stride, dilation, groups: of the 3x3 convolution.
        downsample: projection of the activated input; needed where the output's shape differs from the input's.
        base_width: inner width per group at ``planes=64``.
        norm_layer: builds a norm layer from a channel count; default ``nn.BatchNorm2d``.
    """

    norm_first = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        if self.drop_path is not None:
            out = self.drop_path(out)
        return out + identity


class _PreActStages(Stages):
    """What both networks share: a projection with no norm behind it, and what follows the last stage."""

    def _projection(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        return conv1x1(inputs, outputs, stride)

    def _make_head(self, num_classes: int) -> None:
        self.bn = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=not isinstance(self.bn, nn.Identity))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)


class PreActResNet(_PreActStages):
    """A pre-activation network for images ``[N, 3, H, W]`` -> class scores ``[N, num_classes]`` (He et al. 2016).

    Computes what timm's ``resnetv2`` with batch norm does; the module's docstring says how the names correspond.

    Args:
        block: :class:`PreActBasicBlock`, :class:`PreActBottleneck`, or a class with their constructor and `expansion`.
        layers: blocks in each of the four stages.
        num_classes: outputs of the last linear layer.
        zero_init_residual: start the last convolution of each block at 0, so that each block starts as its shortcut.
        groups, width_per_group: see :class:`PreActBottleneck`.
        replace_stride_with_dilation: for stages 2, 3 and 4, dilate instead of striding (PreActBottleneck only).
        norm_layer: builds a norm layer from a channel count; default ``nn.BatchNorm2d``.
        stochastic_depth_rate, stochastic_depth_mode: see :class:`~resnet_fused.models.ResNet`.

    Raises:
        ValueError: `replace_stride_with_dilation` does not have three elements; see also `stochastic_depth_rate`.
    """

    def __init__(
        self,
        block: type,
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
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self._make_four(block, layers, replace_stride_with_dilation)
        self._make_head(num_classes)
        self._drop_paths(stochastic_depth_rate, stochastic_depth_mode)
        initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn(x))), 1))


class PreActResNetCifar(_PreActStages):
    """The paper's network for small images, ``[N, 3, 32, 32]`` -> class scores ``[N, num_classes]`` (He et al. 2016).

    A 3x3 convolution to 16 channels, then three stages at full, half and a quarter of the resolution.

    Args:
        block: as for :class:`PreActResNet`.
        layers: blocks in each of the three stages.
        num_classes: outputs of the last linear layer.
        zero_init_residual: start the last convolution of each block at 0, so that each block starts as its shortcut.
        norm_layer: builds a norm layer from a channel count; default ``nn.BatchNorm2d``.
        stochastic_depth_rate, stochastic_depth_mode: see :class:`~resnet_fused.models.ResNet`.
        width: channels of the first stage, before the block's `expansion`; each further stage doubles them.
    """

    #: As timm's models say what they are meant for; command lines take the size of their input from it.
    default_cfg: ClassVar = {"input_size": (3, 32, 32)}
    _activates_stem = True  # whether the first block's identity shortcut is the activated stem

    def __init__(
        self,
        block: type,
        layers: Sequence[int],
        num_classes: int = 10,
        zero_init_residual: bool = False,
        norm_layer: NormLayer | None = None,
        stochastic_depth_rate: float = 0.0,
        stochastic_depth_mode: str = "row",
        width: int = 16,
    ) -> None:
        super().__init__(16, norm_layer)
        self.conv1 = conv3x3(3, self.inplanes)
        self._make_three(block, layers, width)
        if self._activates_stem and self.layer1[0].downsample is None:
            self.layer1[0].downsample = nn.Identity()  # of the activated stem
        self._make_head(num_classes)
        self._drop_paths(stochastic_depth_rate, stochastic_depth_mode)
        initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn(x))), 1))


def preact_resnet50(**options) -> PreActResNet:
    """Pre-activation ResNet-50, 25.5 M parameters. `options` are those of :class:`PreActResNet`."""
    return PreActResNet(PreActBottleneck, (3, 4, 6, 3), **options)


def preact_resnet101(**options) -> PreActResNet:
    """Pre-activation ResNet-101, 44.5 M parameters. `options` are those of :class:`PreActResNet`."""
    return PreActResNet(PreActBottleneck, (3, 4, 23, 3), **options)


def preact_resnet152(**options) -> PreActResNet:
    """Pre-activation ResNet-152, 60.2 M parameters. `options` are those of :class:`PreActResNet`."""
    return PreActResNet(PreActBottleneck, (3, 8, 36, 3), **options)


def preact_resnet110(**options) -> PreActResNetCifar:
    """Pre-activation ResNet-110 for CIFAR, 1.7 M parameters. `options` are those of :class:`PreActResNetCifar`."""
    return PreActResNetCifar(PreActBasicBlock, (18, 18, 18), **options)


def preact_resnet164(**options) -> PreActResNetCifar:
    """Pre-activation ResNet-164 for CIFAR, 1.7 M parameters. `options` are those of :class:`PreActResNetCifar`."""
    return PreActResNetCifar(PreActBottleneck, (18, 18, 18), **options)


def preact_resnet1001(**options) -> PreActResNetCifar:
    """Pre-activation ResNet-1001 for CIFAR, 10.3 M parameters. `options` are those of :class:`PreActResNetCifar`."""
    return PreActResNetCifar(PreActBottleneck, (111, 111, 111), **options)
