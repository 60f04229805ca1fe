"""What the tests of measured choices share: blocks, chains, and what the plan says of them."""

import torch
from chains import Chain, call_of, make_step
from torch import nn

import resnet_fused
from resnet_fused.backends import soundness
from resnet_fused.models import Bottleneck
from resnet_fused.plan import choose
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import StepTensors

CPU = torch.device("cpu")
PLAIN, GRAM = Variant(), Variant(gram=True)


def block(**kwargs):
    return nn.Sequential(resnet_fused.fuse(Bottleneck(64, 16, **kwargs)))


def images(n=4, size=8):
    return torch.randn(n, 64, size, size)


def notes(model, x):
    """What the plan says of each chain."""
    with choose.observing() as said:
        model(x)
    return said


def ends(model, x):
    """The last step of each chain, and why."""
    return [said.rpartition("; ")[2] for said in notes(model, x)]


def the_file(cache):
    (file,) = cache.iterdir()
    return file


def single(tensors):
    return [
        StepTensors(*(t if t is None or t.dtype == torch.int64 else t.detach().float() for t in own)) for own in tensors
    ]


def bottleneck(stride=1, kernel=1, projected=True, **kwargs):
    """A chain with its tensors; the last convolution has `kernel`, the projection `stride`."""
    pairs = [make_step(6, 4, **kwargs), make_step(4, 4, 3, stride=stride, **kwargs), make_step(4, 10, kernel, **kwargs)]
    pairs += [make_step(6, 10, stride=stride, **kwargs)] if projected else []
    steps = tuple(step for step, _ in pairs)
    return Chain(steps[:3], steps[3] if projected else None), single(own for _, own in pairs)


def bottleneck_call(x, factor=None, **kwargs):
    """The same, on `x`, as what the plan takes."""
    chain, tensors = bottleneck(**kwargs)
    return call_of(chain, x, tensors, factor=factor)


def unsound(monkeypatch, *ops):
    """Let kernels of `ops` count as failed."""
    monkeypatch.setattr(soundness, "lacking", lambda asked, *where: next((op for op in asked if op in ops), ""))
