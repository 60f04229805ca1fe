"""Fused blocks as modules, constructed like torchvision's and with its parameter names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .runtime import run_site
from .site import Site, obstacle

Tensor = torch.Tensor
NormLayer = Callable[[int], nn.Module]


class FusedConvBNReLU(nn.Module):
    """``relu(bn(conv(x)) + residual)`` with the parameters of a ``Conv2d`` and a ``BatchNorm2d``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: of ``nn.Conv2d``. `padding`
            None keeps the resolution at stride 1.
        eps, momentum: of ``nn.BatchNorm2d``.
        relu: clamp the result.

    Shapes: x ``[N, in_channels, H, W]``, residual and result ``[N, out_channels, H', W']``; float32, bfloat16, float16
    or float64. Errors are stock's. Paper: Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        relu: bool = True,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        site = Site(((self.conv, self.bn),), relu=isinstance(self.relu, nn.ReLU), bypassed=(self.relu,))
        if not obstacle(x, site):
            return run_site(site, x, residual)
        y = self.bn(self.conv(x))
        return self.relu(y if residual is None else y + residual)


class FusedResidualBlock(nn.Module):
    """What the two residual blocks share: run their steps and shortcut as one chain, or one by one as stock does."""

    downsample: nn.Module | None
    relu: nn.ReLU

    def _steps(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        projection = self.downsample
        paired = type(projection) is nn.Sequential and len(projection) == 2 and isinstance(projection[0], nn.Conv2d)
        site = Site(
            self._steps(),
            shortcut=(projection[0], projection[1]) if paired else None,
            bypassed=(self.relu, projection) if paired else (self.relu,),
        )
        if not obstacle(x, site):
            residual = None if paired else x if projection is None else projection(x)
            return run_site(site, x, residual)
        identity = x if projection is None else projection(x)
        steps, h = self._steps(), x
        for conv, norm in steps[:-1]:
            h = self.relu(norm(conv(h)))
        conv, norm = steps[-1]
        h = norm(conv(h))
        h += identity
        return self.relu(h)


class FusedBasicBlock(FusedResidualBlock):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``: the block of ResNet-18 and -34, as one autograd node.

    Args, parameter names and errors are torchvision's ``BasicBlock``: `inplanes`, `planes`, `stride`, `downsample`,
    `groups`, `base_width`, `dilation`, `norm_layer`. x: ``[N, inplanes, H, W]``, result ``[N, planes, H/stride,
    W/stride]``; float32, bfloat16, float16 or float64. Paper: He et al., 2015, https://arxiv.org/abs/1512.03385.

    Raises:
        ValueError: `groups` is not 1 or `base_width` not 64.
        NotImplementedError: `dilation` is above 1.
    """

    expansion = 1

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
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def _steps(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2)


class FusedBottleneck(FusedResidualBlock):
    """1x1, 3x3, 1x1 and a shortcut: the block of ResNet-50 and deeper, as one autograd node.

    ``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))``; the stride is on the 3x3 convolution.
    Args, parameter names and errors are torchvision's ``Bottleneck``: `inplanes`, `planes`, `stride`, `downsample`,
    `groups` (ResNeXt), `base_width` (Wide ResNet), `dilation`, `norm_layer`. x: ``[N, inplanes, H, W]``, result
    ``[N, 4*planes, H/stride, W/stride]``; float32, bfloat16, float16 or float64. Papers: He et al., 2015,
    https://arxiv.org/abs/1512.03385; Xie et al., 2016, https://arxiv.org/abs/1611.05431; Zagoruyko and Komodakis, 2016,
    https://arxiv.org/abs/1605.07146.
    """

    expansion = 4

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
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def _steps(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)
