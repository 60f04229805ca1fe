"""What the networks here are made of: blocks with named convolutions and norms, and how stages are put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from .stochastic_depth import StochasticDepth, linear_decay

NormLayer = Callable[[int], nn.Module]


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias, padded so that stride 1 keeps the resolution."""
    return nn.Conv2d(inplanes, planes, 3, stride=stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False)


class ResidualBlock(nn.Module):
    """What all residual blocks share: convolutions, a norm of each, one ReLU for all, a shortcut, stochastic depth."""

    expansion: int
    depth: int  # convolutions
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
        self.drop_path: nn.Module | None = None  # of the branch, before the addition; networks set it
        self.stride = stride

    def _convolutions(self, inplanes, planes, stride, groups, base_width, dilation) -> list[nn.Conv2d]:
        raise NotImplementedError


class TwoConvolutions(ResidualBlock):
    """Two 3x3 convolutions, the first with the stride."""

    expansion, depth = 1, 2

    def _convolutions(self, inplanes, planes, stride, groups, base_width, dilation) -> list[nn.Conv2d]:
        name = "PreActBasicBlock" if self.norm_first else "BasicBlock"
        if groups != 1 or base_width != 64:
            raise ValueError(f"{name} only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError(f"Dilation > 1 not supported in {name}")
        return [conv3x3(inplanes, planes, stride), conv3x3(planes, planes)]


class ThreeConvolutions(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, the 3x3 with stride, groups and dilation."""

    expansion, depth = 4, 3

    def _convolutions(self, inplanes, planes, stride, groups, base_width, dilation) -> list[nn.Conv2d]:
        width = int(planes * (base_width / 64.0)) * groups
        first, middle = conv1x1(inplanes, width), conv3x3(width, width, stride, groups, dilation)
        return [first, middle, conv1x1(width, planes * self.expansion)]


class Stages(nn.Module):
    """What all networks here share: how stages are made."""

    def __init__(self, inplanes: int, norm_layer: NormLayer | None, groups: int = 1, width_per_group: int = 64) -> None:
        super().__init__()
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = inplanes
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group

    def _projection(self, inputs: int, outputs: int, stride: int) -> nn.Module | None:
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

    def _make_three(self, block: type, layers: Sequence[int], width: int) -> None:
        """The three stages of a network for small images."""
        for i, blocks in enumerate(layers):
            self.add_module(f"layer{i + 1}", self._make_layer(block, width << i, blocks, 1 if i == 0 else 2))

    def _drop_paths(self, rate: float, mode: str) -> None:
        """Stochastic depth in all blocks, up to `rate` in the last; at rate 0 none."""
        stages = [stage for name, stage in self.named_children() if name.startswith("layer")]
        blocks = [block for stage in stages for block in stage]
        for block, probability in zip(blocks, linear_decay(rate, len(blocks)), strict=True):
            drop = StochasticDepth(probability, mode)
            if rate == 0:
                continue
            if not hasattr(block, "drop_path"):
                raise ValueError(
                    f"{type(block).__name__} has no drop_path: stochastic_depth_rate must be 0, got {rate}"
                )
            block.drop_path = drop


def initialise(model: nn.Module, zero_init_residual: bool) -> None:
    """Kaiming-normal convolutions (fan out), unit norms; optionally each residual block's last layer at zero.

    That is the last norm, or, where norms stand first, the last convolution: zeros in the norm before it would zero its
    input and, through the ReLU, the norm's gradient, and such a block never learns.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules() if zero_init_residual else ():
        if isinstance(module, ResidualBlock):
            last = getattr(module, f"{'conv' if module.norm_first else 'bn'}{module.depth}")
            if getattr(last, "weight", None) is not None:
                nn.init.zeros_(last.weight)
