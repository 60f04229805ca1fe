"""Evaluation by cuDNN's fused operations: convolution, bias and ReLU in one call, and with the residual added in one.

Batch norms are folded into weights of the dtype at hand. It takes this package's own residual networks, whose blocks it
knows by their classes.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ...models import BasicBlock, Bottleneck
from ...models.resnet import ResNet

Tensor = torch.Tensor
PEER = "cuDNN, fused"


def unavailable(device: torch.device) -> str:
    """Why it cannot run on `device`; empty if it can."""
    if device.type != "cuda":
        return "cuDNN needs a GPU"
    if not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    missing = [n for n in ("cudnn_convolution_relu", "cudnn_convolution_add_relu") if not hasattr(torch, n)]
    return f"this PyTorch has no {', '.join(missing)}" if missing else ""


class Folded(nn.Module):
    """A convolution with its batch norm in its weights."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        super().__init__()
        folded = fuse_conv_bn_eval(conv.eval().float(), norm.eval())
        self.weight = folded.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = folded.bias.detach().to(dtype)
        self.places = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def plain(self, x: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.places
        return torch.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)

    def relu(self, x: Tensor) -> Tensor:
        return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.places)

    def add_relu(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, self.bias, *self.places)


class FoldedBlock(nn.Module):
    """A residual block: its last convolution adds the shortcut and clamps."""

    def __init__(self, block: BasicBlock | Bottleneck, dtype: torch.dtype) -> None:
        super().__init__()
        count = 3 if isinstance(block, Bottleneck) else 2
        numbers = range(1, count + 1)
        self.steps = [Folded(getattr(block, f"conv{n}"), getattr(block, f"bn{n}"), dtype) for n in numbers]
        self.shortcut = None if block.downsample is None else Folded(*block.downsample, dtype)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut.plain(x)
        for step in self.steps[:-1]:
            x = step.relu(x)
        return self.steps[-1].add_relu(x, residual)


class FoldedResNet(nn.Module):
    """The whole network."""

    def __init__(self, model: ResNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.stem, self.maxpool = dtype, Folded(model.conv1, model.bn1, dtype), model.maxpool
        stages = (model.layer1, model.layer2, model.layer3, model.layer4)
        self.blocks = nn.Sequential(*(FoldedBlock(block, dtype) for stage in stages for block in stage))
        self.avgpool, self.fc = model.avgpool, model.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.stem.relu(x.to(self.dtype)))
        return self.fc(torch.flatten(self.avgpool(self.blocks(x)), 1))


def prepare(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` folded.

    Raises:
        TypeError: it is none of this package's own.
    """
    if not isinstance(model, ResNet):
        raise TypeError(f"only this package's residual networks are folded here, not {type(model).__name__}")
    return FoldedResNet(model, dtype).eval()
