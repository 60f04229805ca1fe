"""The fused step as a function on tensors, for people who write their own blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import current
from ..plan import choose
from ..plan.lower import lower
from ..steps import Conv, Norm, StepTensors, stock
from ..steps.layout import arrived, behind, left
from ..steps.program import Call
from ..steps.residual import residual_program
from .kept_evaluation import evaluate, takes
from .layers import pair
from .runtime import needs_grad, train

Pair = int | tuple[int, int]


def conv_bn_add_relu(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    sample_factor: Tensor | None = None,
) -> Tensor:
    """``relu(sample_factor * batch_norm(conv2d(x, weight)) + residual)`` as one autograd node.

    Formula, with z the convolution's output and mean, var its statistics over N, H and W (`training`) or the running
    ones::

        y   = (z - mean) / sqrt(var + eps) * bn_weight + bn_bias
        out = relu(sample_factor[n] * y + residual)

    Batch norm: Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167; residual: He et al., 2015,
    https://arxiv.org/abs/1512.03385; sample_factor: Huang et al., 2016, https://arxiv.org/abs/1603.09382.

    Args:
        x: ``[N, C, H, W]``, float32, bfloat16, float16 or float64. Any layout; channels_last is what is worked on.
        weight: ``[K, C/groups, R, S]``, dtype of x.
        running_mean, running_var: ``[K]``; moved in place with `training`, used without. May be None in training.
        bn_weight, bn_bias: ``[K]`` or None (1 and 0).
        residual: ``[N, K, H', W']``, dtype of x, or None.
        bias: the convolution's, ``[K]`` or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        training, momentum, eps: as in ``torch.nn.functional.batch_norm``.
        relu: clamp the result.
        sample_factor: ``[N]`` or None.

    Returns:
        ``[N, K, H', W']``, dtype of x. In stock's layout: channels_last if x or weight is; else contiguous, by a copy
        of what was computed in channels_last. Differentiable (twice) in x, weight, bias, bn_weight, bn_bias and
        residual.

    Raises:
        ValueError: x is not 4-dimensional; one value per channel in training; running statistics missing without
            `training`; a vector or the residual of the wrong shape.
        RuntimeError: shapes, dtypes or devices that ``conv2d`` refuses, with its text.
    """
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    conv = Conv(pair(stride), pair(padding), pair(dilation), groups)
    if not training and (running_mean is None or running_var is None):
        raise ValueError("Expected running_mean and running_var to be defined when training=False")
    named = {"running_mean": running_mean, "running_var": running_var, "weight": bn_weight, "bias": bn_bias}
    for name, vector in named.items():
        if vector is not None and vector.shape != (weight.shape[0],):
            raise RuntimeError(f"{name} should contain {weight.shape[0]} elements not {vector.numel()}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise RuntimeError(f"conv_bn_add_relu: bias has shape {list(bias.shape)}; pass [{weight.shape[0]}]")
    joins = {"residual": "" if residual is None else "tensor", "sampled": sample_factor is not None}
    program = residual_program([(conv, Norm(eps, momentum, training))], relu=relu, backend=current(), **joins)
    vectors = StepTensors(None, None, bn_weight, bn_bias, running_mean, running_var)
    tensors = [StepTensors(weight, bias), vectors, *[StepTensors(None)] * (residual is not None)]
    call = Call(program, x, tensors, residual, sample_factor)
    fits = weight.dim() == 4 and x.shape[1] == weight.shape[1] * groups
    if not fits or x.dtype != weight.dtype or x.device != weight.device or x.numel() == 0:
        shape = torch.conv2d(x, weight, bias, *conv.args).shape  # or its own error
    else:
        shape = call.shapes()[-1]
    if training and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise ValueError(
            f"conv_bn_add_relu: residual is {residual.dtype} of shape {list(residual.shape)} but the convolution gives "
            f"{x.dtype} of shape {list(shape)}; pass a residual like that"
        )
    if sample_factor is not None and sample_factor.shape != (x.shape[0],):
        raise ValueError(
            f"conv_bn_add_relu: sample_factor has shape {list(sample_factor.shape)}; "
            f"pass [{x.shape[0]}], one for each sample"
        )
    if choose.on_gpu(x) and takes(call) and not needs_grad(call):
        out = evaluate(call)
        out = stock.program_output(call, moves=True) if out is None else out
    else:
        out = train(lower(call), call)
    return left(behind(out, arrived(x), [weight], program))
