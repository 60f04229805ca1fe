"""Statistics of a sum reach the next block within a stage, and nobody else: behind anything else they are new."""

import copy

import pytest
import torch
from nets import observe
from preact_blocks import F64, assert_equal, projection
from torch import nn
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import library
from resnet_fused.blocks import runtime
from resnet_fused.convert import fused_module
from resnet_fused.models.preact import PreActBasicBlock, PreActBottleneck
from resnet_fused.plan import lower
from resnet_fused.steps import batch_norm
from resnet_fused.steps.layout import Placed

pytestmark = pytest.mark.skipif(not library.status().cpu.loaded, reason="a kernel of the compiled library")


def stage(*between):
    """Three blocks of 16 channels, with modules after the first."""
    torch.manual_seed(0)
    first = PreActBottleneck(8, 4, 1, projection(8, 16))
    return nn.Sequential(first, *between, PreActBottleneck(16, 4), PreActBasicBlock(16, 16)).double().train()


X = (3, 8, 6, 6)


@pytest.fixture
def reads(monkeypatch):
    """Channels of every tensor that is read for its statistics alone."""
    found, original = [], batch_norm.normalise
    monkeypatch.setattr(batch_norm, "normalise", lambda z, *rest: found.append(z.shape[1]) or original(z, *rest))
    return found


def compared(blocks, change=lambda side: None, run=lambda side, x: side(x)):
    """The fused stage of a copy, which gives what stock gives twice, after `change` to both."""
    fused, x = resnet_fused.fuse(copy.deepcopy(blocks)), torch.randn(X, dtype=F64)
    for side in (fused, blocks):
        change(side)
    for _ in range(2):
        assert_equal(observe(fused, x, lambda h: run(fused, h)), observe(blocks, x, lambda h: run(blocks, h)))
    return fused


INNER = ([4, 4], [4, 4], [16])  # norms of convolutions' outputs in each block
HANDED = [8, *INNER[0], *INNER[1], *INNER[2]]
ANEW = [8, *INNER[0], 16, *INNER[1], 16, *INNER[2]]


def test_within_a_stage_only_the_first_block_reads_its_input_for_statistics(reads):
    fused = compared(stage())
    assert reads == HANDED * 2
    out = fused(torch.randn(X, dtype=F64))
    assert type(out) is torch.Tensor and not vars(out)


def test_blocks_called_one_by_one_read_theirs(reads):
    def run(side, x):
        for block in side:
            x = block(x)
        return x

    compared(stage(), run=run)
    assert reads == ANEW * 2


def test_contiguous_models_hand_them_too(reads):
    x = torch.randn(X, dtype=F64)
    blocks = stage().to(memory_format=torch.contiguous_format)
    fused = resnet_fused.fuse(copy.deepcopy(blocks))
    assert_equal(observe(fused, x), observe(blocks, x))
    assert reads == HANDED


def _writes_before(side):
    def hook(module, args):
        args[0].data.mul_(2)

    side[1].register_forward_pre_hook(hook)


def _replaces_before(side):
    side[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _writes_behind(side):
    def hook(module, args, out):
        out.data.add_(1)

    side[0].register_forward_hook(hook)


def _writes_through_a_view(side):
    def hook(module, args, out):
        out[:, :1].detach().add_(1)

    side[0].register_forward_hook(hook)


def _replaces_behind(side):
    side[0].register_forward_hook(lambda module, args, out: out.detach() * 2 + out)


def _calls_something_else(side):
    block, forward = side[0], type(side[0]).forward
    block.forward = lambda x: forward(block, x) * 2


def _hooks_a_norm(side):
    side[1].bn1.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


CHANGES = (
    _writes_before, _replaces_before, _writes_behind, _writes_through_a_view, _replaces_behind, _calls_something_else,
    _hooks_a_norm,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_whatever_is_in_between_statistics_are_those_of_what_arrives(change):
    compared(stage(), change)


class Doubles(nn.Module):
    """Writes to what it is given, past the version counter."""

    def forward(self, x):
        x.data.mul_(2)
        return x


def test_a_module_between_blocks_that_writes(reads):
    compared(stage(Doubles()))
    assert reads == ANEW * 2


def test_a_global_hook_that_writes():
    handles = []

    def hook(module, args, out):
        if isinstance(module, PreActBottleneck):
            out.data.add_(1)

    def register(side):
        if not handles:
            handles.append(nn.modules.module.register_module_forward_hook(hook))

    try:
        compared(stage(), register)
    finally:
        handles[0].remove()


class Gated(nn.Module):
    """Two programs with a gate between them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.gate = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.conv2, self.bn2, self.relu = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(h * self.gate(h))) + x)


def test_a_block_of_parts_gets_and_gives_none(monkeypatch):
    """What stands between its programs may write to its input, and hand it on."""
    seen, original = [], runtime.run_site
    monkeypatch.setattr(runtime, "run_site", lambda s, h, *rest: seen.append(h) or original(s, h, *rest))
    block = resnet_fused.fuse(Gated()).double()
    x = torch.randn(2, 8, 5, 5, dtype=F64)
    moments = (torch.zeros(8, dtype=F64), torch.ones(8, dtype=F64))
    out = fused_module.run_form(fused_module.runnable(block), Placed(x, True, moments=moments))
    assert len(seen) == 2 and all(h.moments is None for h in seen) and getattr(out, "moments", None) is None


def test_checkpointed_stages_recompute_the_same():
    def run(side, x):
        return checkpoint(side, x, use_reentrant=False)

    compared(stage(), run=run)


def test_two_forwards_before_one_backward(reads):
    def run(side, x):
        return side(x) + side(x * 2)

    compared(stage(), run=run)
    assert reads == HANDED * 4


def test_gradients_of_gradients_do_not_see_them():
    blocks, x = stage(), torch.randn(X, dtype=F64, requires_grad=True)
    fused, found = resnet_fused.fuse(copy.deepcopy(blocks)), []
    for side in (fused, blocks):
        (grad,) = torch.autograd.grad(side(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *side.parameters()]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * want.abs().max().item())


def test_under_autocast_they_are_handed_where_a_stage_stays_in_its_dtype(reads):
    blocks = stage().float()
    fused, x = resnet_fused.fuse(copy.deepcopy(blocks)), torch.randn(X).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fused(x), blocks(x)
    assert reads == HANDED
    assert (got - want).abs().max() <= 0.1 * want.abs().max()
    for mine, theirs in zip(fused.buffers(), blocks.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=2e-2, atol=2e-2)


def test_explain_counts_what_is_not_read(monkeypatch):
    blocks = stage().float()
    handed = resnet_fused.explain(blocks, X)
    assert handed.blocks[0].plan.split(" (")[0].endswith("convolution and sum with its statistics")
    monkeypatch.setattr(lower, "_adds_with_statistics", lambda call: False)
    alone = resnet_fused.explain(blocks, X)
    assert alone.model.fused.bytes - handed.model.fused.bytes == pytest.approx(
        2 * 3 * 16 * 36 * 4, rel=0.1
    )  # two blocks' inputs, less vectors
    assert alone.model.fused_saved == handed.model.fused_saved
