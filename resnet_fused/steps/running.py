"""The running statistics of a chain's batch norms, all at once.

One batch norm's update is six launches on a GPU, of a few hundred bytes each. A block's norms are one launch by the op
`running_update`; of many norms, four with ``torch._foreach_*``: the counters, the unbiased variances, and a product and
a sum for every mean and variance together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..backends import current, run, soundness, tape
from ..ops import running_update
from .batch_norm import silent, update_running
from .spec import Norm, StepTensors

PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
MOST = 2 * running_update.NORMS  # norms; of more, four operations on all are fewer launches than one for every four
#: Tensors and settings of a batch norm, and what it saw: mean, variance, values per channel.
Update = tuple[StepTensors, Norm, Tensor, Tensor, int]


def update_running_all(items: Sequence[Update]) -> None:
    """Do :func:`batch_norm.update_running` for each of `items` in turn, to the same bits, in few operations.

    Where two norms share a buffer, order counts: all move one by one, as do norms that :func:`_goes_alone` names.
    """
    shared, counters, groups = _share_buffers(items), [], {}
    for item in items:
        tensors, norm, mean, var, count = item
        if shared or _goes_alone(tensors, norm):
            update_running(*item)
        elif tensors.running_mean is None or count == 0:
            counters += [] if tensors.num_batches_tracked is None else [tensors.num_batches_tracked]
        else:
            running = silent(tensors.running_mean), silent(tensors.running_var), tensors.num_batches_tracked
            one = running_update.Update(*running, mean, var, count / max(count - 1, 1))
            groups.setdefault((norm.momentum, tensors.running_mean.dtype), []).append(one)
    if counters:
        torch._foreach_add_(counters, 1)
    for (momentum, _), group in groups.items():
        if not _by_op(group):
            running_update.move(group, momentum)
            continue
        for i in range(0, len(group), running_update.NORMS):
            arguments = running_update.arguments(group[i : i + running_update.NORMS], momentum)
            run("running_update", *arguments, backend=current())
        counters = [t for _, _, t, *_ in group if t is not None]
        tape.noted(torch.autograd.graph.increment_version, counters)  # no kernel of ours does


def _by_op(group: list[running_update.Update]) -> bool:
    """Whether launches count and would be fewer: not on a CPU, nor in a graph, whose compiler fuses the operations.

    A fake tensor stands for one on a GPU. Other subclasses see each operation.
    """
    if torch.compiler.is_compiling() or len(group) > MOST:
        return False
    first = group[0].running_mean
    if first.is_cpu and type(first) is Tensor and current() != "triton":
        return False
    if not first.is_cpu and current() == "auto":
        checks = type(first) is not FakeTensor
        if soundness.lacking(("running_update",), first.dtype, first.device, checks):
            return False
    return all(type(t) in PLAIN for update in group for t in update[:3] if t is not None)


def _goes_alone(tensors: StepTensors, norm: Norm) -> bool:
    """A cumulative average has a weight of its own. 16-bit buffers on the CPU: ``_foreach_mul_`` rounds its factor."""
    if not isinstance(norm.momentum, float):
        return True
    running = tensors.running_mean
    return running is not None and running.is_cpu and running.element_size() == 2


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
        if type(own.running_mean) is Tensor and own.running_var is not None:
            size = own.running_mean.nbytes
            spans += (own.running_mean.data_ptr(), size), (own.running_var.data_ptr(), size)
    spans.sort()
    return any(start + size > following for (start, size), (following, _) in itertools.pairwise(spans))
