"""The running statistics of a chain's batch norms, all at once.

One batch norm's update is six launches on a GPU, of a few hundred bytes each; with ``torch._foreach_*`` a chain's are
four: the counters, the unbiased variances, and a product and a sum for every mean and variance together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from .batch_norm import silent, update_running
from .spec import Norm, StepTensors

Tensor = torch.Tensor
#: Tensors and settings of a batch norm, and what it saw: mean, variance, values per channel.
Update = tuple[StepTensors, Norm, Tensor, Tensor, int]


def update_running_all(items: Sequence[Update]) -> None:
    """Do :func:`batch_norm.update_running` for each of `items` in turn, to the same bits, in few operations.

    Where two norms share a buffer, order counts: all move one by one, as do norms that :func:`_goes_alone` names.
    """
    if _share_buffers(items):
        for item in items:
            update_running(*item)
        return
    counters, groups = [], {}
    for item in items:
        tensors, norm, *_, count = item
        if _goes_alone(tensors, norm):
            update_running(*item)
            continue
        if tensors.num_batches_tracked is not None:
            counters.append(tensors.num_batches_tracked)
        if tensors.running_mean is not None and count != 0:
            groups.setdefault((norm.momentum, tensors.running_mean.dtype), []).append(item)
    if counters:
        torch._foreach_add_(counters, 1)
    for (momentum, _), group in groups.items():
        _move(group, momentum)


def _move(group: list[Update], momentum: float) -> None:
    """Statistics by one momentum; of one dtype, so that each operation is one launch."""
    factors = [count / max(count - 1, 1) for *_, count in group]
    unbiased = torch._foreach_mul([var for *_, var, _ in group], factors)
    batch = [mean for _, _, mean, _, _ in group] + list(unbiased)
    running = [silent(own.running_mean) for own, *_ in group] + [silent(own.running_var) for own, *_ in group]
    if any(b.dtype != r.dtype for b, r in zip(batch, running, strict=True)):
        wide, batch = batch, [torch.empty_like(r) for r in running]
        torch._foreach_copy_(batch, wide)
    torch._foreach_mul_(running, 1 - momentum)
    torch._foreach_add_(running, batch, alpha=momentum)


def _goes_alone(tensors: StepTensors, norm: Norm) -> bool:
    """A cumulative average has a weight of its own. 16-bit buffers on the CPU: ``_foreach_mul_`` rounds its factor."""
    if not isinstance(norm.momentum, float):
        return True
    running = tensors.running_mean
    return running is not None and running.device.type == "cpu" and running.element_size() == 2


def _share_buffers(items: Sequence[Update]) -> bool:
    """Whether anything is to be moved twice: a buffer of two norms, or memory of two views."""
    buffers = [b for own, *_ in items for b in (own.running_mean, own.running_var, own.num_batches_tracked)]
    found = [b for b in buffers if b is not None]
    if len(set(map(id, found))) < len(found):
        return True
    if torch.compiler.is_compiling():  # without addresses
        return False
    spans = []
    for own, *_ in items:
        if type(own.running_mean) is torch.Tensor and own.running_var is not None:
            size = own.running_mean.nbytes
            spans += (own.running_mean.data_ptr(), size), (own.running_var.data_ptr(), size)
    spans.sort()
    return any(start + size > following for (start, size), (following, _) in itertools.pairwise(spans))
