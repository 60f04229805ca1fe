"""Where a weight gradient is Winograd's: as exact as stock's, faster, and the same for one gradient and for both."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from resnet_fused.library import status
from resnet_fused.steps import Conv, conv, winograd_wgrad

pytestmark = pytest.mark.skipif(not status().cpu.loaded, reason=f"the compiled library is {status().cpu.reason}")

SAME = Conv(padding=(1, 1))
OP = "winograd_conv3x3_wgrad"


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def arguments(images, inputs, outputs, height, width, geometry=SAME):
    """Gradient, input and weight."""
    torch.manual_seed(0)
    x, weight = channels_last(images, inputs, height, width), channels_last(outputs, inputs, 3, 3)
    return channels_last(*F.conv2d(x, weight, None, *geometry.args).shape), x, weight


@pytest.fixture
def threads(monkeypatch):
    """The number of threads, to be set."""

    def put(number):
        monkeypatch.setattr(torch, "get_num_threads", lambda: number)

    put(2)
    return put


@pytest.fixture
def seen(monkeypatch):
    """Ops that were run."""
    ops = []
    for module in (conv, winograd_wgrad):
        run = module.run
        monkeypatch.setattr(module, "run", lambda op, *args, run=run, **kw: ops.append(op) or run(op, *args, **kw))
    return ops


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("geometry", [SAME, Conv()], ids=["padding 1", "no padding"])
def test_one_gradient_and_both(geometry, layout, threads, seen):
    grad, x, weight = arguments(8, 64, 72, 16, 16, geometry)
    weight = weight.contiguous(memory_format=layout)
    exact_x, exact_w = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.conv2d(exact_x, exact_w, None, *geometry.args)
    grad_x, grad_w = torch.autograd.grad(exact, (exact_x, exact_w), grad.double())
    alone = conv.gradients(grad, x, weight, geometry, "auto", (False, True))[1]
    ours_x, ours_w = conv.gradients(grad, x, weight, geometry, "auto")
    assert seen.count(OP) == 2
    assert torch.equal(alone, ours_w) and ours_w.stride() == weight.stride()
    torch.testing.assert_close(ours_w.double(), grad_w, rtol=1e-5, atol=1e-5 * grad_w.abs().max().item())
    torch.testing.assert_close(ours_x.double(), grad_x, rtol=1e-5, atol=1e-5 * grad_x.abs().max().item())


TAKEN = {
    "layer 1, batch 1": (1, 64, 64, 56, 56),
    "layer 2, batch 4": (4, 128, 128, 28, 28),
    "layer 3, batch 8": (8, 256, 256, 14, 14),
    "layer 4, batch 16": (16, 512, 512, 7, 7),
    "few channels": (32, 32, 32, 16, 16),
    "odd channels": (32, 80, 112, 9, 9),
    "layer 3, batch 4": (4, 256, 256, 14, 14),
    "layer 4, batch 8": (8, 512, 512, 7, 7),
    "layer 2, batch 2: less exact": (2, 128, 128, 28, 28),
    "layer 3, batch 2: less exact": (2, 256, 256, 14, 14),
    "layer 4, batch 4: less exact": (4, 512, 512, 7, 7),
    "few channels, batch 4: less exact": (4, 32, 32, 28, 28),
    "24 channels": (32, 24, 64, 28, 28),
    "24 outputs": (32, 64, 24, 28, 28),
    "half of each tile is missing": (64, 64, 64, 5, 5),
    "a column": (64, 64, 64, 64, 1),
    "no image": (0, 64, 64, 56, 56),
}


#: The same where panels are of 16 channels.
NARROW = {
    "16 channels": (128, 16, 16, 32, 32),
    "24 channels": (32, 24, 64, 28, 28),
    "24 outputs": (32, 64, 24, 28, 28),
    "two panels for 17 channels": (8, 17, 23, 40, 40),
    "8 channels": (128, 8, 16, 32, 32),
    "16 channels, batch 2: less exact": (2, 16, 16, 32, 32),
}


@pytest.mark.parametrize(
    ("panel", "shape", "taken"),
    [pytest.param(32, shape, i < 8, id=name) for i, (name, shape) in enumerate(TAKEN.items())]
    + [pytest.param(16, shape, i < 3, id=f"{name}, narrow") for i, (name, shape) in enumerate(NARROW.items())],
)
def test_where_it_is_taken(panel, shape, taken, threads, monkeypatch):
    monkeypatch.setattr(winograd_wgrad, "_PANEL", panel)
    n, c, k, h, w = shape
    grad, x = (torch.empty(n, h, w, channels).permute(0, 3, 1, 2) for channels in (k, c))
    assert winograd_wgrad.takes(grad, x, torch.empty(k, c, 3, 3), SAME, "auto") is taken


def test_what_else_refuses(threads, monkeypatch):
    grad, x, weight = arguments(8, 64, 64, 16, 16)

    def takes(grad=grad, x=x, weight=weight, geometry=SAME, backend="auto"):
        return winograd_wgrad.takes(grad, x, weight, geometry, backend)

    assert takes() and takes(backend="cpu")
    assert not takes(backend="reference")
    for change in ({"padding": (2, 2)}, {"padding": (1, 0)}, {"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 2}):
        assert not takes(geometry=dataclasses.replace(SAME, **change))
    assert not takes(weight=weight[..., :1])
    assert not takes(x=x.contiguous()) and not takes(grad=grad.contiguous())
    assert not takes(grad.double(), x.double(), weight.double())
    assert not takes(grad.bfloat16(), x.bfloat16(), weight.bfloat16())
    assert not takes(grad.to("meta"), x.to("meta"), weight.to("meta"))
    monkeypatch.setattr(winograd_wgrad, "IS_BUILT", False)
    assert not takes()


@pytest.mark.parametrize(("number", "taken"), [(1, True), (4, True), (5, False)])
def test_threads_that_would_have_nothing_to_do(number, taken, threads):
    """64 channels are 4 pieces, 512 tiles two parts: 8, of which every thread is to have two."""
    threads(number)
    assert winograd_wgrad.takes(*arguments(8, 64, 64, 16, 16), SAME, "auto") is taken


def test_a_compiled_graph_takes_it_too(threads):
    torch.compiler.reset()
    grad, x, weight = arguments(8, 64, 64, 16, 16)
    compiled = torch.compile(
        lambda *args: conv.gradients(*args, SAME, "auto", (False, True))[1], backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(grad, x, weight), conv.gradients(grad, x, weight, SAME, "auto", (False, True))[1])
