"""Branches that run on surviving samples alone: as stock's block on these, with stock's draws."""

import copy
import pickle

import pytest
import torch
from nets import observe
from torch import nn

import resnet_fused
from resnet_fused.models import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, StochasticDepth

F64 = torch.float64
BLOCKS = (BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck)


def block_of(kind, projects=False, drop=None, dtype=F64):
    torch.manual_seed(0)
    inputs, outputs = (6 if projects else 4 * kind.expansion), 4 * kind.expansion
    shortcut = nn.Conv2d(6, outputs, 1, 2, bias=False) if projects else None
    if projects and not kind.norm_first:
        shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))
    block = kind(inputs, 4, 2 if projects else 1, shortcut)
    block.drop_path = StochasticDepth(0.5) if drop is None else drop
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return block.to(dtype).train(), torch.randn(6, inputs, 6, 6, dtype=dtype)


class Reference(nn.Module):
    """What the mode means, in stock operations: `keep` are the samples that survive, `scale` what they are times."""

    def __init__(self, block, keep, scale):
        super().__init__()
        self.block, self.keep, self.scale = block, keep, scale

    def forward(self, x):
        b = self.block
        a = b.relu(b.bn1(x)) if b.norm_first and b.downsample is not None else x
        shortcut = x if b.downsample is None else b.downsample(a)
        kept = self.keep.nonzero().flatten()
        if not len(kept):
            zeros = sum((0 * p).sum() for name, p in b.named_parameters())
            return (shortcut if b.norm_first else shortcut.relu()) + zeros
        h = a[kept]
        last = 3 if hasattr(b, "conv3") else 2
        for i in range(1, last + 1):
            conv, norm = getattr(b, f"conv{i}"), getattr(b, f"bn{i}")
            if b.norm_first:
                h = conv(h if i == 1 and b.downsample is not None else torch.relu(norm(h)))
            else:
                h = norm(conv(h))
                h = torch.relu(h) if i < last else h
        out = shortcut.index_add(0, kept, self.scale * h)
        return out if b.norm_first else out.relu()


def drawn(drop, samples=6):
    """Who survives with the seed that `observe` sets, and the state of the generator behind."""
    torch.manual_seed(0)
    factor = copy.deepcopy(drop)(torch.ones(samples, 1, 1, 1, dtype=F64)).flatten()
    return factor != 0, torch.get_rng_state()


def assert_as_reference(stock, x, **options):
    keep, state = drawn(stock.drop_path)
    fused = resnet_fused.fuse(copy.deepcopy(stock), drop_path="survivors", **options)
    got = observe(fused, x)
    assert torch.equal(torch.get_rng_state(), state)
    want = observe(Reference(copy.deepcopy(stock), keep, 1 / (1 - stock.drop_path.p) if keep.any() else 0), x)
    want = {name.removeprefix("block."): value for name, value in want.items()}
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    return keep


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("projects", [False, True], ids=["identity", "projection"])
def test_runs_as_stock_on_the_survivors(kind, projects):
    stock, x = block_of(kind, projects)
    keep = assert_as_reference(stock, x)
    assert 0 < keep.sum() < len(keep)
    assert_as_reference(stock, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("kind", [BasicBlock, PreActBasicBlock])
@pytest.mark.parametrize("projects", [False, True], ids=["identity", "projection"])
@pytest.mark.parametrize("survivors", [0, 1, 6])
def test_nobody_one_and_all(kind, projects, survivors):
    drops = [StochasticDepth(percent / 100) for percent in range(1, 100)]
    drop = next(drop for drop in drops if drawn(drop)[0].sum() == survivors)
    stock, x = block_of(kind, projects, drop)
    keep = assert_as_reference(stock, x)
    assert keep.sum() == survivors


def test_nobody_leaves_statistics_and_gives_zeros():
    stock, x = block_of(Bottleneck, drop=StochasticDepth(1.0, "batch"))
    fused = resnet_fused.fuse(copy.deepcopy(stock), drop_path="survivors")
    fused.bn2.bias.data.fill_(torch.inf)  # nothing is computed of it
    out = fused(x)
    assert torch.equal(out, x.relu())
    out.sum().backward()
    assert all(p.grad.eq(0).all() for p in fused.parameters())
    assert all(fused.get_buffer(name).equal(buffer) for name, buffer in stock.named_buffers())


@pytest.mark.parametrize("kind", [BasicBlock, PreActBasicBlock])
@pytest.mark.parametrize("training", [True, False])
def test_what_nobody_added_to_is_a_tensor_of_its_own(kind, training):
    stock, x = block_of(kind, drop=StochasticDepth(1.0))
    fused, before = resnet_fused.fuse(stock, drop_path="survivors"), x.clone()
    with torch.set_grad_enabled(training):
        fused(x).add_(1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("drop", [StochasticDepth(0.6, "batch"), StochasticDepth(0.4)], ids=["batch", "row"])
def test_evaluation_and_the_default_are_stocks(drop):
    stock, x = block_of(BasicBlock, drop=drop)
    every = resnet_fused.fuse(copy.deepcopy(stock))
    fused = resnet_fused.fuse(copy.deepcopy(stock), drop_path="survivors")
    for got, want in ((observe(every, x), observe(stock, x)), (observe(fused.eval(), x), observe(copy_of(fused), x))):
        for name in want:
            torch.testing.assert_close(got[name], want[name])


def copy_of(fused):
    return resnet_fused.unfuse(copy.deepcopy(fused))


def test_the_mode_is_kept_and_can_be_changed():
    stock, x = block_of(BasicBlock)
    fused = resnet_fused.fuse(copy.deepcopy(stock), drop_path="survivors")
    want = observe(copy.deepcopy(fused), x)["out"]
    again = resnet_fused.fuse(pickle.loads(pickle.dumps(copy.deepcopy(fused))))  # None: as before
    assert torch.equal(observe(again, x)["out"], want)
    every = observe(resnet_fused.fuse(copy.deepcopy(fused), drop_path="all"), x)["out"]
    torch.testing.assert_close(every, observe(stock, x)["out"])
    assert not torch.allclose(want, every)


@pytest.mark.plans_small
def test_what_the_plan_leaves_to_stock_runs_on_survivors_too():
    """Blocks too small to gain run stock's operations: on the same samples."""
    torch.manual_seed(0)
    stock, x = block_of(BasicBlock, dtype=torch.float32)
    fused = resnet_fused.fuse(copy.deepcopy(stock), drop_path="survivors")
    fused.drop_path.eval()
    fused(x), fused(x)  # now known to run in stock operations
    fused.drop_path.train()
    fused.load_state_dict(stock.state_dict())
    torch.manual_seed(0)
    got = fused(x)
    torch.manual_seed(0)
    survived = stock.drop_path(torch.ones(6, 1, 1, 1)).flatten() != 0
    want = Reference(stock, survived, 2.0)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_stocks_dtype(dtype):
    stock, x = block_of(BasicBlock, dtype=torch.float32)
    fused = resnet_fused.fuse(copy.deepcopy(stock), drop_path="survivors")
    for p in (0.5, 0.999):
        fused.drop_path.p = stock.drop_path.p = p
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.manual_seed(0)
            got = fused(x.to(dtype))
            torch.manual_seed(0)
            want = stock(x.to(dtype))
        assert got.dtype == want.dtype and got.shape == want.shape


def test_second_derivatives():
    stock, x = block_of(PreActBasicBlock)
    fused = resnet_fused.fuse(copy.deepcopy(stock), drop_path="survivors").eval()
    fused.drop_path.train()

    def output(x):
        torch.manual_seed(0)
        return fused(x)

    x = x[:3, :, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(output, x) and torch.autograd.gradgradcheck(output, x)


def test_a_block_that_cannot_says_so():
    class Opaque(BasicBlock):
        def forward(self, x):
            out = self.relu(self.bn1(self.conv1(x)))
            return self.drop_path(torch.sigmoid(self.bn2(self.conv2(out)))) + x

    block = Opaque(4, 4)
    block.drop_path = StochasticDepth(0.5)
    fused = resnet_fused.fuse(block, drop_path="survivors")
    assert "the branch before drop_path runs on all samples" in str(resnet_fused.report(fused))
    assert "on all samples" not in str(resnet_fused.report(resnet_fused.fuse(fused, drop_path="all")))


def test_unknown_words():
    with pytest.raises(ValueError, match="unknown drop_path 'some'; pass one of 'all', 'survivors'"):
        resnet_fused.fuse(BasicBlock(4, 4), drop_path="some")


def test_a_network_learns_in_the_mode():
    torch.manual_seed(0)
    options = {"stochastic_depth_rate": 0.5, "stochastic_depth_mode": "batch"}
    model = resnet_fused.models.CifarResNet(BasicBlock, (2, 2, 2), **options)
    model = resnet_fused.fuse(model, drop_path="survivors")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x, target = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_a_graph_breaks_at_such_a_block():
    stock, x = block_of(BasicBlock)
    fused = resnet_fused.fuse(copy.deepcopy(stock), drop_path="survivors")
    torch.manual_seed(0)
    want = copy.deepcopy(fused)(x)
    torch.manual_seed(0)
    assert torch.equal(torch.compile(fused, backend="eager")(x), want)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(copy.deepcopy(fused), backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    whole = torch.compile(fused.eval(), backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x), fused(x))
