"""A fused block called over and over: its tapes give what its steps give, in every state that it can get into."""

import copy

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.backends import tape
from resnet_fused.models.preact import PreActBottleneck
from resnet_fused.models.resnet import BasicBlock, Bottleneck
from resnet_fused.steps import directions

F64 = torch.float64


def projection(inputs, outputs, stride=2):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


BLOCKS = {
    "basic": lambda: BasicBlock(8, 8),
    "projected": lambda: BasicBlock(8, 6, 2, projection(8, 6)),
    "bottleneck": lambda: Bottleneck(8, 2),
    "preact": lambda: PreActBottleneck(8, 2),
}


def pair(make, dtype=F64):
    torch.manual_seed(0)
    stock = make().to(dtype)
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
    return stock, resnet_fused.fuse(copy.deepcopy(stock))


def seen(block, x, **options):
    """Output, gradients and buffers."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = block(x)
    wanted = {name: p for name, p in block.named_parameters() if p.requires_grad}
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, [x, *wanted.values()], cotangent, **options)
    found = {"out": out.detach(), "x": grads[0], **dict(zip(wanted, grads[1:], strict=True))}
    return found | {name: t.clone() for name, t in block.named_buffers()}


def assert_same(blocks, x):
    theirs, ours = (seen(block, x) for block in blocks)
    assert theirs.keys() == ours.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture
def ran(monkeypatch):
    """Directions of programs that ran as steps; the second call of a form is listened to."""
    found = []
    monkeypatch.setattr(tape, "PLAIN", 1)
    for name in ("forward", "backward"):
        original = getattr(directions, name)
        monkeypatch.setattr(directions, name, lambda *args, run=original, name=name: found.append(name) or run(*args))
    return found


def images(n=3, size=6, dtype=F64, layout=torch.channels_last):
    return torch.randn(n, 8, size, size, dtype=dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_repeated(name, layout, ran):
    blocks = pair(BLOCKS[name])
    for i in range(5):
        assert_same(blocks, images(layout=layout))
        assert len(ran) == 2 * min(i + 1, 2), ran


def settled(name, ran, x=None):
    """Blocks that are repeated by now."""
    blocks, x = pair(BLOCKS[name]), images() if x is None else x
    for _ in range(3):
        assert_same(blocks, x)
    assert len(ran) == 4
    return blocks


def norms(block):
    return [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]


def exchange_memory(block):
    for p in block.parameters():
        p.data = p.data + 1


def misalign(block):
    for p in block.parameters():
        room = torch.empty(p.numel() + 1, dtype=p.dtype)[1:].view(p.shape)
        p.data = room.copy_(p.data)


def share_buffers(block):
    norms(block)[-1].running_mean = norms(block)[-2].running_mean


def share_memory(block):
    norms(block)[-1].running_mean.data = norms(block)[-2].running_mean.data


CHANGES = {
    "eps": lambda block: setattr(norms(block)[0], "eps", 0.1),
    "momentum": lambda block: setattr(norms(block)[-1], "momentum", 0.5),
    "cumulative": lambda block: setattr(norms(block)[-1], "momentum", None),
    "frozen norm": lambda block: norms(block)[0].eval(),
    "evaluation": nn.Module.eval,
    "frozen weight": lambda block: block.conv2.weight.requires_grad_(False),
    "all frozen": lambda block: block.requires_grad_(False),
    "values": lambda block: [p.data.mul_(-2) for p in block.parameters()],
    "memory": exchange_memory,
    "misaligned": misalign,
    "shared buffers": share_buffers,
    "shared memory": share_memory,
    "no statistics": lambda block: setattr(norms(block)[0], "track_running_stats", False),
    "layout": lambda block: block.to(memory_format=torch.channels_last),
    "hook": lambda block: block.conv1.register_forward_hook(lambda module, args, out: 2 * out),
    "new weight": lambda block: setattr(block.conv1, "weight", nn.Parameter(block.conv1.weight.detach() * 3)),
    "no bias": lambda block: setattr(norms(block)[0], "bias", None),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["basic", "preact"])
def test_what_changes_between_calls_counts(name, change, ran):
    blocks = settled(name, ran)
    for block in blocks:
        CHANGES[change](block)
    for _ in range(4):
        assert_same(blocks, images())


def test_other_inputs_count(ran):
    blocks = settled("bottleneck", ran)
    for x in (images(2), images(3, 5), images(layout=torch.contiguous_format), images().expand(3, 8, 6, 6)):
        for _ in range(3):
            assert_same(blocks, x)
    odd = torch.empty(3 * 8 * 36 + 1, dtype=F64)[1:].view(3, 6, 6, 8).permute(0, 3, 1, 2).copy_(images())
    for _ in range(3):
        assert_same(blocks, odd)


def test_threads_and_grad_mode_count(ran):
    stock, fused = settled("basic", ran)
    before, x = torch.get_num_threads(), images()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_same((stock, fused), x)
    finally:
        torch.set_num_threads(before)
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(3):
            with mode():
                torch.testing.assert_close(fused(x), stock(x))
    for (name, wanted), own in zip(stock.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(own, wanted, msg=name)


@pytest.mark.parametrize("name", BLOCKS)
def test_other_gradients_count(name, ran):
    """Only some of them, of another form, twice, and of gradients."""
    stock, fused = settled(name, ran)
    for asked in (["conv1.weight"], ["x"], ["x", "bn2.bias"]):
        for _ in range(3):
            found = []
            for block in (stock, fused):
                x = images().copy_(torch.arange(3 * 8 * 36).view(3, 8, 6, 6) % 7).requires_grad_()
                out = block(x)
                leaves = [x if n == "x" else dict(block.named_parameters())[n] for n in asked]
                first = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
                expanded = torch.autograd.grad(out, leaves, out.new_ones(()).expand(out.shape), retain_graph=True)
                odd = torch.autograd.grad(out, leaves, torch.ones_like(out).contiguous(), create_graph=True)
                second = torch.autograd.grad(sum(g.square().sum() for g in odd), x, allow_unused=True)
                found.append([*first, *expanded, *(g.detach() for g in odd), *second])
            for wanted, own in zip(*found, strict=True):
                torch.testing.assert_close(own, wanted, rtol=1e-8, atol=1e-8)


def test_a_gradient_that_is_what_was_saved(ran):
    """The same tensor is input and gradient, in one call and not in the next."""
    stock, fused = settled("basic", ran)
    for same in (True, False, True, True, False):
        found = []
        for block in (stock, fused):
            x = images().copy_(torch.arange(3 * 8 * 36).view(3, 8, 6, 6) % 5).requires_grad_()
            out = block(x)
            grad = x.detach() if same else torch.ones_like(x)
            found.append(torch.autograd.grad(out, [x, *block.parameters()], grad))
        for wanted, own in zip(*found, strict=True):
            torch.testing.assert_close(own, wanted)


def test_writes_are_noticed_as_before(ran):
    _, fused = settled("bottleneck", ran)
    for tensor in (lambda x: x, lambda x: fused.conv2.weight, lambda x: fused.bn1.weight):
        x = images().requires_grad_()
        h = x * 1
        out = fused(h)
        with torch.no_grad():
            tensor(h).add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_saved_tensor_hooks_see_what_is_saved(ran):
    stock, fused = settled("basic", ran)
    for _ in range(3):
        with torch.autograd.graph.save_on_cpu():
            assert_same((stock, fused), images())
        packed: list = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=packed: seen.append(t) or t.clone(), lambda t: t):
            assert_same((stock, fused), images())
        assert packed


def test_a_model_is_copied_and_trained_apart(ran):
    stock, fused = settled("bottleneck", ran)
    blocks = copy.deepcopy(stock), copy.deepcopy(fused)
    for p, q in zip(*(block.parameters() for block in blocks), strict=True):
        p.data.add_(0.5), q.data.add_(0.5)
    for _ in range(3):
        assert_same(blocks, images())
        assert_same((stock, fused), images())


def test_autocast_counts(ran):
    stock, fused = pair(BLOCKS["bottleneck"], torch.float32)
    x = images(dtype=torch.float32)
    for _ in range(3):
        for dtype in (torch.bfloat16, None, torch.float16):
            outs = []
            for block in (stock, fused):
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    outs.append(block(x))
                    assert torch.is_autocast_enabled("cpu") == (dtype is not None)
                outs[-1].float().sum().backward()
            assert outs[0].dtype == outs[1].dtype
            tolerance = 1e-4 if dtype is None else 0.1
            torch.testing.assert_close(outs[1], outs[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BLOCKS)
def test_versions_of_buffers_move_in_every_call(name, ran):
    _, fused = pair(BLOCKS[name])
    seen = []
    for _ in range(5):
        before = [t._version for t in fused.buffers()]
        fused(images()).sum().backward()
        seen.append([t._version - b for t, b in zip(fused.buffers(), before, strict=True)])
    assert seen == [seen[0]] * 5 and any(seen[0])


@pytest.mark.parametrize("name", ["projected", "bottleneck", "preact"])
def test_layouts_that_change_before_backward_count(name, ran):
    blocks = settled(name, ran)
    for layout in (torch.channels_last, torch.contiguous_format) * 2:
        found = []
        for block in blocks:
            x = images().copy_(torch.arange(3 * 8 * 36).view(3, 8, 6, 6) % 5)
            out = block(x)
            block.to(memory_format=layout)
            block.zero_grad()
            out.backward(torch.ones_like(out))
            found.append([p.grad for p in block.parameters()])
        for wanted, own in zip(*found, strict=True):
            torch.testing.assert_close(own, wanted)
            assert own.stride() == wanted.stride()
