"""What each op means: formula, shapes, dtypes, reference, fake kernel, bytes and FLOPs. Nothing here runs a kernel."""

from . import (
    bn_affine,
    bn_coefficients,
    bn_stats,
    conv1x1,
    conv1x1_dgrad,
    conv1x1_join,
    conv1x1_wgrad,
    conv_add_relu,
    conv_weight_grad,
    gram,
    gram_grad,
    gram_norm,
    lazy_grad_apply,
    norm_add_relu,
    norm_add_relu_backward,
)
from .contract import DATA_DTYPES, OPS, Op, stat_dtype

__all__ = [
    "DATA_DTYPES",
    "OPS",
    "Op",
    "bn_affine",
    "bn_coefficients",
    "bn_stats",
    "conv1x1",
    "conv1x1_dgrad",
    "conv1x1_join",
    "conv1x1_wgrad",
    "conv_add_relu",
    "conv_weight_grad",
    "gram",
    "gram_grad",
    "gram_norm",
    "lazy_grad_apply",
    "norm_add_relu",
    "norm_add_relu_backward",
    "stat_dtype",
]
