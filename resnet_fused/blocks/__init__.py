"""Blocks: programs of modules as autograd nodes, the fused step as a function, and fused blocks as modules."""

from .dense import FusedDenseBlock
from .functional import conv_bn_add_relu
from .modules import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU

__all__ = ["FusedBasicBlock", "FusedBottleneck", "FusedConvBNReLU", "FusedDenseBlock", "conv_bn_add_relu"]
