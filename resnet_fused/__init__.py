"""Fused residual networks for PyTorch: `fuse` a model, and it runs the same mathematics with less memory traffic."""

from .backends import use
from .backends.memory import empty_cache
from .backends.precision import precision
from .blocks import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU, FusedDenseBlock, conv_bn_add_relu
from .convert import fuse, report, unfuse
from .plan.tune import tune
from .traffic import explain
from .traffic.warmup import warmup

__version__ = "0.1.0"
__all__ = [
    "FusedBasicBlock",
    "FusedBottleneck",
    "FusedConvBNReLU",
    "FusedDenseBlock",
    "conv_bn_add_relu",
    "empty_cache",
    "explain",
    "fuse",
    "precision",
    "report",
    "tune",
    "unfuse",
    "use",
    "warmup",
]
