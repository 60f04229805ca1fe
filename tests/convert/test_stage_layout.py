"""Layouts of whole models: stock's wherever a value can be seen, channels_last where nobody looks."""

import copy
import threading

import pytest
import torch
from nets import assert_same, block, images, observe, pair, small_resnet
from torch import nn

import resnet_fused
from resnet_fused.convert import fused_module, stage
from resnet_fused.models.resnet import BasicBlock, Bottleneck

CL = torch.channels_last
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": CL}


def strides_seen(model, x, training):
    """Strides of what each child of the model gets and gives, and of the gradients that flow back between them."""
    seen = {}

    def note(name):
        def hook(module, args, out):
            seen[name] = args[0].stride(), out.stride()
            if out.requires_grad:
                out.register_hook(lambda grad: seen.__setitem__(f"{name} gradient", grad.stride()))

        return hook

    handles = [child.register_forward_hook(note(name)) for name, child in model.named_children() if name != "fc"]
    try:
        out = model.train(training)(x)
        if training:
            out.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("x_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_between_stages(x_format, weight_format, training):
    stock, fused = pair(small_resnet().to(memory_format=weight_format))
    x = images(2, 3, 64).to(memory_format=x_format)
    expected, got = strides_seen(stock, x, training), strides_seen(fused, x, training)
    fused_stages = [name for name in got if name.split()[0].startswith("layer")]
    assert len(fused_stages) >= 4
    assert {name: got[name] for name in fused_stages} == {name: expected[name] for name in fused_stages}
    stock, fused = pair(small_resnet().to(memory_format=weight_format))
    with torch.no_grad():
        x = images(2, 3, 64).to(memory_format=x_format)
        assert (
            fused.eval().layer1(fused.maxpool(fused.conv1(x))).stride()
            == stock.eval().layer1(stock.maxpool(stock.conv1(x))).stride()
        )


@pytest.mark.parametrize("training", [True, False])
def test_a_head_that_views(training):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.single = nn.Sequential(block(8, 8), block(32, 8)), block(32, 8)

        def forward(self, x):
            x = self.layer(x)
            return self.single(x.view(x.shape)).view(x.size(0), -1)

    stock, fused = pair(Net().double().train(training))
    assert_same(observe(fused, images().double()), observe(stock, images().double()), 1e-7, 1e-7)


class Gate(nn.Module):
    """Somebody else's module, which views what it is given."""

    def forward(self, x):
        return x * x.view(x.size(0), -1).amax(1).sigmoid().view(-1, 1, 1, 1)


class Gated(Bottleneck):
    """A block in whose middle a chain's result is given to a module that is not ours."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = Gate()

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.gate(self.bn3(self.conv3(out)))
        return self.relu(out + self.downsample(x))


def test_stock_operations_within_a_block_get_stocks_layout():
    stock, fused = pair(nn.Sequential(nn.Sequential(block(8, 8, kind=Gated), block(32, 8))).double())
    assert all(isinstance(b, fused_module.FusedModule) for b in fused[0])
    assert_same(observe(fused, images().double()), observe(stock, images().double()), 1e-7, 1e-7)
    with pytest.raises(RuntimeError, match="view size is not compatible"):  # as in stock
        fused(images().double().contiguous(memory_format=CL))


def test_values_stay_in_channels_last_inside_a_stage(monkeypatch):
    _, fused = pair(nn.Sequential(nn.Sequential(block(8, 8), block(32, 8), block(32, 8))))
    seen, original = [], fused_module.run_form

    def noted(running, x):
        seen.append(x.value.is_contiguous(memory_format=CL) if isinstance(x, fused_module.Placed) else None)
        return original(running, x)

    monkeypatch.setattr(fused_module, "run_form", noted)
    x = torch.randn(2, 8, 64, 64)
    for training in (True, False):
        out = fused.train(training)(x)
        assert out.is_contiguous()
    assert seen == [None, True, True] * 2


def test_an_error_inside_leaves_nothing_behind():
    stock, fused = pair(nn.Sequential(nn.Sequential(block(8, 8), block(32, 8))).eval())
    fused[0][1].conv1.weight.data = torch.randn(8, 7, 1, 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="channels"):
            fused(images())
    with torch.no_grad():
        fused[0][1].conv1.weight.data = stock[0][1].conv1.weight.data.clone()
        torch.testing.assert_close(fused.eval()(images()), stock.eval()(images()), rtol=1e-3, atol=1e-3)


def test_two_threads_do_not_meet():
    """One is inside a stage while the other calls a block by itself, and gets stock's layout."""
    _, fused = pair(nn.Sequential(nn.Sequential(block(8, 8), block(32, 8)), block(32, 8)).eval())
    x, h, strides = images(8, 8, 16), images(8, 32, 16), []

    def alone():
        with torch.no_grad():
            strides.extend(fused[1](h).is_contiguous() for _ in range(20))

    thread = threading.Thread(target=alone)
    with torch.no_grad():
        thread.start()
        outs = [fused[0](x).is_contiguous() for _ in range(20)]
        thread.join()
    assert all(outs) and len(strides) == 20 and all(strides)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph(training):
    torch.compiler.reset()
    blocks = (block(inputs, 16, kind=BasicBlock) for inputs in (8, 16))
    _, fused = pair(nn.Sequential(nn.Sequential(*blocks)).train(training))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    eager = copy.deepcopy(fused)
    got = observe(fused, images(), compiled)
    assert_same(got, observe(eager, images()), 1e-4, 1e-4)
    assert got["out"].is_contiguous()


@torch.no_grad()
@pytest.mark.parametrize("near", [True, False])
def test_pieces_in_both_layouts(monkeypatch, near):
    """Near the cores or not: whether half a piece holds the weights and an image's largest result, of 20 KiB here."""
    monkeypatch.setattr(stage, "NEAR", (1 << 10, 1 << 30, 64 << 10) if near else (1 << 10, 1 << 30, 1 << 10))
    monkeypatch.setattr(stage, "MAPPED", 1 << 30 if near else 1 << 10)
    monkeypatch.setattr(stage, "PIECE", 64 << 10)
    runs, in_pieces = [], stage._in_pieces
    monkeypatch.setattr(
        stage, "_in_pieces", lambda entries, x, images: runs.append(images) or in_pieces(entries, x, images)
    )
    stock, fused = pair(nn.Sequential(nn.Sequential(block(8, 8), block(32, 8))).eval())
    for form in FORMATS.values():
        x = images(7).to(memory_format=form)
        want, got = stock(x), fused(x)
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert runs == [5, 5]
    monkeypatch.setattr(stage, "NEAR", (1 << 10, 1 << 10, 64 << 10))  # the whole is larger
    monkeypatch.setattr(stage, "MAPPED", 1 << 30)
    fused(images(7))
    assert len(runs) == 2


def test_report_still_sees_everything_fused():
    _, fused = pair(small_resnet())
    assert not resnet_fused.report(fused).left
