"""Fused blocks as modules, constructed like torchvision's and with its parameter names."""

from __future__ import annotations

from torch import Tensor, nn

from ..models.resnet import BasicBlock, Bottleneck
from .runtime import run_as_stock
from .shape import Shape, remembered, residual_shape
from .site import runnable


@remembered
def _shapes(names: tuple, shortcut: tuple | None, bypassed: tuple, residual: str, relu: bool, add: str) -> tuple[Shape]:
    """The shape of a block of these modules; `add`: as its own forward writes it."""
    options = {"bypassed": bypassed, "residual": residual, "relu": relu, "inplace_add": add == "+="}
    return (residual_shape(names, shortcut, **options),)


class FusedConvBNReLU(nn.Module):
    """``relu(bn(conv(x)) + residual)`` with the parameters of a ``Conv2d`` and a ``BatchNorm2d``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: of ``nn.Conv2d``. `padding`
            None keeps the resolution at stride 1.
        eps, momentum: of ``nn.BatchNorm2d``.
        relu: clamp the result.

    Shapes: x ``[N, in_channels, H, W]``, residual and result ``[N, out_channels, H', W']``; float32, bfloat16, float16
    or float64. The result has stock's layout: channels_last if x or the weight is, else contiguous.
    Errors are stock's. Paper: Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167.
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
        kind, clamps = type(self.relu).__name__, isinstance(self.relu, nn.ReLU)
        shapes = _shapes((("conv", "bn"),), None, (("relu", kind),), "" if residual is None else "tensor", clamps, "+")
        site = runnable(self, shapes, x)
        if site is not None:
            return run_as_stock(site, x, residual)
        y = self.bn(self.conv(x))
        return self.relu(y if residual is None else y + residual)


class FusedResidualBlock(nn.Module):
    """What the two residual blocks share, in front of the stock one: its convolutions, norms and shortcut as one node.

    The result has stock's layout: channels_last if x or a weight of the main branch is, else contiguous.
    """

    _steps: tuple[tuple[str, str], ...]  # names of convolutions and norms

    def forward(self, x: Tensor) -> Tensor:
        projection, shortcut, residual, bypassed = self.downsample, None, "x", (("relu", "ReLU"),)
        if projection is not None:
            residual = "tensor"
            if type(projection) is nn.Sequential and len(projection) == 2 and isinstance(projection[0], nn.Conv2d):
                names = [f"downsample.{name}" for name in projection._modules]
                shortcut, residual, bypassed = tuple(names), "", (*bypassed, ("downsample", "Sequential"))
        site = runnable(self, _shapes(self._steps, shortcut, bypassed, residual, True, "+="), x)
        if site is None:
            return super().forward(x)
        return run_as_stock(site, x, projection(x) if residual == "tensor" else None)


class FusedBasicBlock(FusedResidualBlock, BasicBlock):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``: the block of ResNet-18 and -34, as one autograd node.

    Args, parameter names and errors are torchvision's ``BasicBlock``: `inplanes`, `planes`, `stride`, `downsample`,
    `groups`, `base_width`, `dilation`, `norm_layer`. x: ``[N, inplanes, H, W]``, result ``[N, planes, H/stride,
    W/stride]``; float32, bfloat16, float16 or float64. Paper: He et al., 2015, https://arxiv.org/abs/1512.03385.

    Raises:
        ValueError: `groups` is not 1 or `base_width` not 64.
        NotImplementedError: `dilation` is above 1.
    """

    _steps = (("conv1", "bn1"), ("conv2", "bn2"))


class FusedBottleneck(FusedResidualBlock, Bottleneck):
    """1x1, 3x3, 1x1 and a shortcut: the block of ResNet-50 and deeper, as one autograd node.

    ``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))``; the stride is on the 3x3 convolution.
    Args, parameter names and errors are torchvision's ``Bottleneck``: `inplanes`, `planes`, `stride`, `downsample`,
    `groups` (ResNeXt), `base_width` (Wide ResNet), `dilation`, `norm_layer`. x: ``[N, inplanes, H, W]``, result
    ``[N, 4*planes, H/stride, W/stride]``; float32, bfloat16, float16 or float64. Papers: He et al., 2015,
    https://arxiv.org/abs/1512.03385; Xie et al., 2016, https://arxiv.org/abs/1611.05431; Zagoruyko and Komodakis, 2016,
    https://arxiv.org/abs/1605.07146.
    """

    _steps = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
