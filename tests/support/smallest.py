"""Which of an op's cases takes the least time and still has all that a call can have."""

import torch


def of_the_richest(cases):
    """Of the cases with most arguments the one of fewest elements."""
    return min(cases, key=_size)


def _size(case):
    given = (*case.args, *case.kwargs.values())
    return -sum(value is not None for value in given), sum(t.numel() for t in given if isinstance(t, torch.Tensor))
