"""Blocks on Triton's kernels called over and over: their tapes start the same kernels, and give the same bits."""

import copy

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.backends import tape
from resnet_fused.backends.selfcheck import judge
from resnet_fused.backends.triton import common
from resnet_fused.models.preact import PreActBottleneck
from resnet_fused.models.resnet import Bottleneck
from resnet_fused.plan import choose, devices
from resnet_fused.steps import directions

pytestmark = pytest.mark.usefixtures("full_float32")
DEVICE = torch.device("cpu" if common.INTERPRETING else "cuda")


def projection():
    return nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))


BLOCKS = {
    "bottleneck": lambda: Bottleneck(16, 4),
    "projected": lambda: Bottleneck(16, 8, 2, projection()),
    "preact": lambda: PreActBottleneck(16, 4),
}


@pytest.fixture
def started(monkeypatch):
    """The kernels that were started."""
    monkeypatch.setattr(judge, "doubt", lambda *call: "")
    monkeypatch.setattr(judge, "objection", lambda *args, **kwargs: "")
    found, start = [], common.start

    def note(kernel, *args, **meta):
        found.append(kernel.fn.__name__)
        start(kernel, *args, **meta)

    monkeypatch.setattr(common, "start", note)
    return found


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_repeated_to_the_bit(name, started, monkeypatch):
    ran = []
    monkeypatch.setattr(tape, "PLAIN", 1)
    for direction in ("forward", "backward"):
        run = getattr(directions, direction)
        monkeypatch.setattr(directions, direction, lambda *args, run=run: ran.append(run) or run(*args))
    torch.manual_seed(0)
    block = BLOCKS[name]().to(DEVICE)
    fused, state = resnet_fused.fuse(block), copy.deepcopy(block.state_dict())
    x = torch.randn(2, 16, 4, 4, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last)
    seen = []
    with choose.planning_for(devices.find("h100")), choose.fusing_all(), resnet_fused.use("triton"):
        for _ in range(4):
            fused.load_state_dict(state)
            started.clear()
            given = x.clone(memory_format=torch.preserve_format).requires_grad_()
            with torch.autocast(DEVICE.type, torch.bfloat16):
                out = fused(given)
            grads = torch.autograd.grad(out, [given, *fused.parameters()], torch.ones_like(out))
            buffers = [t.clone() for t in fused.buffers()]
            seen.append((list(started), [out.detach(), *grads, *buffers]))
    assert len(ran) == 4
    kernels, first = seen[0]
    for again, results in seen[1:]:
        assert again == kernels and len(kernels) > 10
        for result, expected in zip(results, first, strict=True):
            assert result.stride() == expected.stride() and result.equal(expected)
