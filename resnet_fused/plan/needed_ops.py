"""The ops that a chain runs on a GPU, forward and backward: what must have sound kernels for the plan to take it.

So that in `auto` no op over activations is left to the reference there, which would have a step planned for our kernels
move ten times what stock's operations do. A few that a call may turn out not to need are counted in (a weight that
wants no gradient): a plan is for every step.
"""

from __future__ import annotations

import dataclasses

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..backends import soundness
from ..steps import Chain, StepTensors, pointwise

Tensor = torch.Tensor

_BATCH = ("bn_affine", "bn_coefficients")
_PASSES = ("norm_add_relu", "norm_add_relu_backward", "lazy_grad_apply")
_POOL = ("norm_relu_pool", "norm_relu_pool_backward", "norm_relu_pool_apply")


def of(chain: Chain, tensors: list[StepTensors]) -> tuple[str, ...]:
    """The ops of `chain`, in its variant."""
    if chain.stock:
        return ()
    batch = any(step.norm.batch_stats for step in chain.all_steps)
    needed = [*_BATCH] if batch else ["running_affine"]
    if chain.lazy:
        return tuple(dict.fromkeys(needed + _on_values(chain, tensors, batch)))
    needed += ["bn_stats"] if batch else []
    return (*needed, *_PASSES, *(_POOL if chain.pool is not None else ()))


def _on_values(chain: Chain, tensors: list[StepTensors], batch: bool) -> list[str]:
    inner = [pointwise.serves(step, own) for step, own in zip(chain.steps[:-1], tensors, strict=False)]
    needed = ["conv1x1_dgrad", "conv1x1_wgrad", "norm_add_relu_backward"]
    if any(inner) or not chain.gram or (chain.shortcut is not None and not chain.gram_shortcut):
        needed.append("conv1x1")
    if not all(inner):
        needed += [*_PASSES, *(["bn_stats"] if batch else [])]
    if not chain.gram:
        needed.append("norm_add_relu")
    else:
        needed += ["conv1x1_join", *(("bn_stats", "gram", "gram_norm", "gram_grad") if batch else ())]
    return needed + (["conv1x1_backward"] if chain.one_pass else [])


def lacking(chain: Chain, x: Tensor, tensors: list[StepTensors], place: torch.device | None) -> str:
    """An op that `chain`, in its variant, would leave to the reference on a GPU; empty if there is none.

    `place`: see :func:`soundness.lacking`. On a CPU the reference may serve, and who forces a backend has chosen.
    """
    if chain.stock or chain.backend != "auto" or (place is not None and place.type == "cpu"):
        return ""
    return soundness.lacking(of(chain, tensors), x.dtype, place, not isinstance(x, FakeTensor))


def next_sound(chain: Chain, x: Tensor, tensors: list[StepTensors], place: torch.device | None) -> tuple[Chain, str]:
    """`chain`, or its next best variant that leaves nothing to the reference, and what the first lacked."""
    missing = lacking(chain, x, tensors, place)
    if not missing:
        return chain, ""
    plain, two = {"gram": False, "gram_shortcut": False}, {"one_pass": False}
    passes = plain | two | {"lazy": False, "keep": False}
    for less in (two, plain, plain | two, passes) if chain.lazy else ():
        other = dataclasses.replace(chain, **less)
        if not lacking(other, x, tensors, place):
            return other, missing
    return dataclasses.replace(chain, **passes, stock=True), missing
