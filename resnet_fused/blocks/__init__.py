"""Blocks: chains of steps as autograd nodes, as a function and as modules."""

from ..steps.node import run_chain
from .functional import conv_bn_add_relu
from .modules import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU

__all__ = ["FusedBasicBlock", "FusedBottleneck", "FusedConvBNReLU", "conv_bn_add_relu", "run_chain"]
