"""What each op means: formula, shapes, dtypes, reference, fake kernel, bytes and FLOPs. Nothing here runs a kernel."""

from . import bn_stats, conv_add_relu, conv_weight_grad, gram, lazy_grad_apply, norm_add_relu, norm_add_relu_backward
from .contract import DATA_DTYPES, OPS, Op, stat_dtype

__all__ = [
    "DATA_DTYPES",
    "OPS",
    "Op",
    "bn_stats",
    "conv_add_relu",
    "conv_weight_grad",
    "gram",
    "lazy_grad_apply",
    "norm_add_relu",
    "norm_add_relu_backward",
    "stat_dtype",
]
