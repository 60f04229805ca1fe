"""Plain networks, as stock PyTorch modules: the residual networks of He et al. 2015 without their shortcuts.

Paper: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), https://arxiv.org/abs/1512.03385,
which trains them beside the residual ones: deeper plain nets train worse. Layers, widths and strides are those of
:func:`resnet18` and :func:`resnet34` (ImageNet) and of :func:`resnet20` to :func:`resnet56` (CIFAR); nothing differs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .cifar import CifarResNet
from .resnet import ResNet
from .stages import NormLayer, TwoConvolutions


class PlainBlock(TwoConvolutions):
    """Two 3x3 convolutions, each with its norm and ReLU, and no shortcut.

    ``relu(bn2(conv2(relu(bn1(conv1(x))))))``.

    Args:
        inplanes: channels of the input ``[N, inplanes, H, W]``.
        planes: channels of the output ``[N, planes, ceil(H/stride), ceil(W/stride)]``.
        stride: of the first convolution.
        downsample, groups, base_width, dilation: there for the signature that all blocks share; only None, 1, 64 and 1
            are accepted.
        norm_layer: builds a norm layer from a channel count; default ``nn.BatchNorm2d``.

    Raises:
        ValueError: `downsample` is not None, `groups` not 1 or `base_width` not 64.
        NotImplementedError: `dilation` is above 1.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: None = None, **shared) -> None:
        if downsample is not None:
            raise ValueError("PlainBlock has no shortcut: downsample must be None")
        super().__init__(inplanes, planes, stride, **shared)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class PlainNet(ResNet):
    """A plain network for images ``[N, 3, H, W]`` -> class scores ``[N, num_classes]`` (He et al. 2015).

    Args:
        layers: blocks, of two convolutions each, in each of the four stages.
        num_classes: outputs of the last linear layer.
        norm_layer: builds a norm layer from a channel count; default ``nn.BatchNorm2d``.
    """

    def __init__(self, layers: Sequence[int], num_classes: int = 1000, norm_layer: NormLayer | None = None) -> None:
        super().__init__(PlainBlock, layers, num_classes, norm_layer=norm_layer)

    def _projection(self, inputs: int, outputs: int, stride: int) -> nn.Module | None:
        return None


class CifarPlainNet(CifarResNet):
    """A plain network for small images, ``[N, 3, 32, 32]`` -> class scores ``[N, num_classes]`` (He et al. 2015).

    Args:
        layers: blocks, of two convolutions each, in each of the three stages.
        num_classes: outputs of the last linear layer.
        norm_layer: builds a norm layer from a channel count; default ``nn.BatchNorm2d``.
    """

    def __init__(self, layers: Sequence[int], num_classes: int = 10, norm_layer: NormLayer | None = None) -> None:
        super().__init__(PlainBlock, layers, num_classes, norm_layer=norm_layer)

    def _projection(self, inputs: int, outputs: int, stride: int) -> nn.Module | None:
        return None


def plain18(**options) -> PlainNet:
    """The plain network of 18 layers (He et al. 2015), 11.5 M parameters. `options` are those of :class:`PlainNet`."""
    return PlainNet((2, 2, 2, 2), **options)


def plain34(**options) -> PlainNet:
    """The plain network of 34 layers (He et al. 2015), 21.6 M parameters. `options` are those of :class:`PlainNet`."""
    return PlainNet((3, 4, 6, 3), **options)


def plain20(**options) -> CifarPlainNet:
    """The plain network of 20 layers for CIFAR (He et al. 2015), 0.27 M. `options` as in :class:`CifarPlainNet`."""
    return CifarPlainNet((3, 3, 3), **options)


def plain32(**options) -> CifarPlainNet:
    """The plain network of 32 layers for CIFAR (He et al. 2015), 0.46 M. `options` as in :class:`CifarPlainNet`."""
    return CifarPlainNet((5, 5, 5), **options)


def plain44(**options) -> CifarPlainNet:
    """The plain network of 44 layers for CIFAR (He et al. 2015), 0.66 M. `options` as in :class:`CifarPlainNet`."""
    return CifarPlainNet((7, 7, 7), **options)


def plain56(**options) -> CifarPlainNet:
    """The plain network of 56 layers for CIFAR (He et al. 2015), 0.85 M. `options` as in :class:`CifarPlainNet`."""
    return CifarPlainNet((9, 9, 9), **options)
