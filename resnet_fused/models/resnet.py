"""Residual networks, as stock PyTorch modules with torchvision's parameter names.

Nothing here is fused: ``resnet_fused.fuse(resnet50())`` is. A ``state_dict`` loads into torchvision's model of the
same name and back with ``strict=True``, and with one seed both start from the same numbers.

Papers: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), https://arxiv.org/abs/1512.03385;
Zagoruyko, Komodakis, "Wide Residual Networks" (2016), https://arxiv.org/abs/1605.07146;
Xie, Girshick, Dollar, Tu, He, "Aggregated Residual Transformations for Deep Neural Networks" (2016),
https://arxiv.org/abs/1611.05431.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias, padded so that stride 1 keeps the resolution."""
    return nn.Conv2d(inplanes, planes, 3, stride=stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False)


class ResidualBlock(nn.Module):
    """What all residual blocks share: convolutions, a norm of each, one ReLU for all, a shortcut."""

    expansion: int
    norm_first = False  # whether a norm stands before its convolution

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        convolutions = self._convolutions(inplanes, planes, stride, groups, base_width, dilation)
        for i, conv in enumerate(convolutions, 1):
            named = {f"conv{i}": conv}
            if self.norm_first:
                named = {f"bn{i}": norm_layer(conv.in_channels), **named}
            else:
                named[f"bn{i}"] = norm_layer(conv.out_channels)
            for name, module in named.items():
                self.add_module(name, module)
        # In place, unless what it reads is the very input of a block without norms.
        self.relu = nn.ReLU(inplace=not (self.norm_first and isinstance(self.bn1, nn.Identity)))
        self.downsample = downsample
        self.stride = stride

    def _convolutions(self, inplanes, planes, stride, groups, base_width, dilation) -> list[nn.Conv2d]:
        raise NotImplementedError


class TwoConvolutions(ResidualBlock):
    """Two 3x3 convolutions, the first with the stride."""

    expansion = 1

    def _convolutions(self, inplanes, planes, stride, groups, base_width, dilation) -> list[nn.Conv2d]:
        name = "PreActBasicBlock" if self.norm_first else "BasicBlock"
        if groups != 1 or base_width != 64:
            raise ValueError(f"{name} only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError(f"Dilation > 1 not supported in {name}")
        return [conv3x3(inplanes, planes, stride), conv3x3(planes, planes)]


class ThreeConvolutions(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, the 3x3 with stride, groups and dilation."""

    expansion = 4

    def _convolutions(self, inplanes, planes, stride, groups, base_width, dilation) -> list[nn.Conv2d]:
        width = int(planes * (base_width / 64.0)) * groups
        first, middle = conv1x1(inplanes, width), conv3x3(width, width, stride, groups, dilation)
        return [first, middle, conv1x1(width, planes * self.expansion)]


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
        out += identity
        return self.relu(out)


class Stages(nn.Module):
    """What all networks here share: how stages are made."""

    def __init__(self, inplanes: int, norm_layer: NormLayer | None, groups: int = 1, width_per_group: int = 64) -> None:
        super().__init__()
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = inplanes
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group

    def _projection(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(conv1x1(inputs, outputs, stride), self._norm_layer(outputs))

    def _make_layer(self, block: type, planes: int, blocks: int, stride=1, dilate=False) -> nn.Sequential:
        outplanes = planes * block.expansion
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        reshapes = stride != 1 or self.inplanes != outplanes
        downsample = self._projection(self.inplanes, outplanes, stride) if reshapes else None
        shared = {"groups": self.groups, "base_width": self.base_width, "norm_layer": self._norm_layer}
        stage = [block(self.inplanes, planes, stride, downsample, dilation=first_dilation, **shared)]
        self.inplanes = outplanes
        stage += [block(outplanes, planes, dilation=self.dilation, **shared) for _ in range(1, blocks)]
        return nn.Sequential(*stage)

    def _make_four(self, block: type, layers: Sequence[int], dilate: Sequence[bool] | None) -> None:
        """The four stages of a network for large images."""
        if dilate is not None and len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation should be None or a 3-element tuple, got {dilate}")
        dilates = (False, *(dilate or (False, False, False)))
        for i, (blocks, dilated) in enumerate(zip(layers, dilates, strict=True)):
            stage = self._make_layer(block, 64 << i, blocks, 1 if i == 0 else 2, dilated)
            self.add_module(f"layer{i + 1}", stage)


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

    Raises:
        ValueError: `replace_stride_with_dilation` does not have three elements.
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
    ) -> None:
        super().__init__(64, norm_layer, groups, width_per_group)
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self._make_four(block, layers, replace_stride_with_dilation)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def initialise(model: nn.Module, zero_init_residual: bool) -> None:
    """Kaiming-normal convolutions (fan out), unit norms; optionally zero the last norm of each residual block."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules() if zero_init_residual else ():
        last = module.bn2 if isinstance(module, BasicBlock) else module.bn3 if isinstance(module, Bottleneck) else None
        if getattr(last, "weight", None) is not None:
            nn.init.zeros_(last.weight)


def resnet18(**options) -> ResNet:
    """ResNet-18 (He et al. 2015), 11.7 M parameters. `options` are those of :class:`ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options) -> ResNet:
    """ResNet-34 (He et al. 2015), 21.8 M parameters. `options` are those of :class:`ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options) -> ResNet:
    """ResNet-50 (He et al. 2015), 25.6 M parameters. `options` are those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


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
