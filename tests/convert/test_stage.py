"""Stages of a fused model in evaluation: in pieces where images do not meet, whole everywhere else."""

import copy
import pickle

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.backends import onednn
from resnet_fused.convert import fused_module, stage, stock_forward
from resnet_fused.models import resnet18, resnet50
from resnet_fused.models.resnet import Bottleneck
from resnet_fused.plan import choose
from resnet_fused.steps import unfolded, winograd
from resnet_fused.steps.evaluation_flow import Evaluation

needs_levels = pytest.mark.skipif(not winograd.IS_BUILT, reason="no compiled library for AVX2 or AVX-512")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Stages are split from 64 KiB on, into pieces of one to a few images."""
    monkeypatch.setattr(stage, "MAPPED", 64 << 10)
    monkeypatch.setattr(stage, "PIECE", 128 << 10)
    monkeypatch.setattr(stage, "NEAR", (64 << 10, 1 << 30, 128 << 10))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return resnet_fused.fuse(resnet18(num_classes=7)).eval().to(memory_format=torch.channels_last)


def images(n=5):
    return torch.randn(n, 3, 64, 64).contiguous(memory_format=torch.channels_last)


def pieces_seen(model, x):
    """Batch sizes that the first block of layer1 runs fused with, called or not."""
    seen, block = [], model.layer1[0]
    original = fused_module.run_form

    def noted(running, h):
        if running.block is block:
            seen.append((h if isinstance(h, torch.Tensor) else h.value).shape[0])
        return original(running, h)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(fused_module, "run_form", noted)
        model(x)
    return seen


@torch.no_grad()
def test_a_large_batch_runs_in_pieces_with_the_same_result(model):
    x = images()
    assert pieces_seen(model, x) == [2, 2, 1]
    whole = torch.cat([model(image) for image in x.split(1)])
    assert torch.allclose(model(x), whole, atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(model(x), whole, atol=1e-5)
    out = model.layer1(torch.randn(5, 64, 16, 16).contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_nan_stays_in_its_image(model):
    x = images()
    x[3, 0, 10, 10] = torch.nan
    bad = model(x).isnan().any(1)
    assert bad.tolist() == [False, False, False, True, False]


def test_whole_where_images_meet_or_somebody_watches(model):
    x = images()
    model.layer1[1].bn2.train()  # batch statistics: images meet
    assert pieces_seen(model, x) == [5]
    model.eval()
    handle = model.layer1[1].register_forward_hook(lambda *args: None)
    assert pieces_seen(model, x) == [5]
    handle.remove()
    handle = model.layer1[1].conv1.register_forward_hook(lambda *args: None)
    assert pieces_seen(model, x) == [5]
    handle.remove()
    with stock_forward():
        assert pieces_seen(model, x) == []
    assert pieces_seen(model, images(1)) == [1]
    assert pieces_seen(model, x) == [2, 2, 1]


@torch.no_grad()
def test_sizes_are_found_once_while_modules_are_unchanged(model, monkeypatch):
    x, found, original = images(), [], stage._sizes_of
    monkeypatch.setattr(stage, "_sizes_of", lambda *args: found.append(args) or original(*args))
    for inputs, times in ((x, 8), (x, 0), (images(3), 8), (x, 0)):
        found.clear()
        pieces_seen(model, inputs)
        assert len(found) == times
    block = model.layer1[1]
    block.conv1, block.bn1 = nn.Conv2d(64, 128, 3, 1, 1, bias=False), nn.BatchNorm2d(128).eval()
    block.conv2 = nn.Conv2d(128, 64, 3, 1, 1, bias=False)
    assert pieces_seen(model, x) == [1] * 5


def test_gradients_run_whole(model):
    x = images().requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()


@torch.no_grad()
def test_changed_stages_run_as_they_are_now(model):
    model.layer1[1] = nn.Identity()
    assert pieces_seen(model, images()) == [5]
    model.layer1[0] = nn.Flatten(0, 1)  # not a batch of images any more
    assert model.layer1(torch.randn(2, 3, 4, 5)).shape == (6, 4, 5)
    model.layer1.append(TwoResults())
    assert len(model.layer1(torch.randn(2, 3, 4, 5))) == 2


class TwoResults(nn.Module):
    def forward(self, x):
        return x, x


@torch.no_grad()
def test_the_argument_has_stocks_name(model):
    x = torch.randn(1, 64, 16, 16)
    assert torch.equal(model.layer1(input=x), model.layer1(x))


class Doubling(stage.FusedStage):
    def forward(self, input):
        return 2 * super().forward(input)


@torch.no_grad()
def test_replaced_forwards_and_classes_run(model):
    x, stock = torch.randn(5, 64, 16, 16), resnet_fused.unfuse(copy.deepcopy(model))
    block = model.layer1[1]
    block.forward = lambda h: type(block).forward(block, h) * 3
    torch.testing.assert_close(model.layer1(x), 3 * stock.layer1(x), rtol=1e-3, atol=1e-3)
    del block.forward
    model.layer1.__class__ = Doubling
    for each in (model.layer1, copy.deepcopy(model.layer1)):
        assert type(each) is Doubling
        torch.testing.assert_close(each(x), 2 * stock.layer1(x), rtol=1e-3, atol=1e-3)
    model.layer1.__class__ = stage.FusedStage
    model.layer1.forward = lambda input: input + 1
    assert torch.equal(model.layer1(x), x + 1)


def test_a_block_that_is_called_in_its_own_way_is_called(model):
    x, calls = torch.randn(2, 64, 16, 16), []
    block = model.layer1[0]
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
        register = {
            "_forward_hooks": block.register_forward_hook,
            "_forward_pre_hooks": block.register_forward_pre_hook,
            "_backward_hooks": block.register_full_backward_hook,
        }[name]
        handle = register(lambda *args: calls.append(1))
        model.layer1(x.clone().requires_grad_()).sum().backward()
        handle.remove()
    assert len(calls) == 3
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: calls.append(module))
    model.layer1(x)
    handle.remove()
    assert block in calls
    block._compiled_call_impl = lambda h: calls.append("compiled") or type(block).forward(block, h)  # block.compile()
    model.layer1(x)
    assert calls[-1] == "compiled"


def test_wrong_input_gets_stocks_error(model):
    with pytest.raises(RuntimeError, match="channels"), torch.no_grad():
        model.layer1(torch.randn(5, 3, 16, 16))


def test_copies_pickles_and_unfuses(model):
    assert type(model.layer1) is stage.FusedStage
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.layer1) is stage.FusedStage and pieces_seen(other, images()) == [2, 2, 1]
        assert repr(other) == repr(model)
    resnet_fused.unfuse(model)
    assert type(model.layer1) is nn.Sequential


def test_bottlenecks_too():
    torch.manual_seed(0)
    model = resnet_fused.fuse(resnet50(num_classes=3)).eval()
    x = images(3)
    with torch.no_grad():
        assert pieces_seen(model, x) == [1, 1, 1]
        assert torch.allclose(model(x), torch.cat([model(image) for image in x.split(1)]), atol=1e-4)


@pytest.mark.parametrize("unfolds", [False, pytest.param(True, marks=needs_levels)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_in_evaluation_joins_write_over_what_only_they_read(monkeypatch, memory_format, unfolds):
    monkeypatch.setattr(stage, "MAPPED", 1 << 30)  # in one piece
    monkeypatch.setattr(stage, "NEAR", (1 << 30, 1 << 30, 1 << 30))
    torch.manual_seed(0)
    stock = nn.Sequential(*[Bottleneck(64, 16) for _ in range(3)]).eval().to(memory_format=memory_format)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    monkeypatch.setattr(unfolded, "IS_FAST", unfolds)
    monkeypatch.setattr(unfolded, "_LEAST_PIXELS", 1)
    over, packed, run = [], onednn.conv_packed, Evaluation.run

    def watched(x, weight, bias, conv, relu, bound, residual=None, in_place=False, act=None):
        if residual is not None:
            over.append(in_place)
        return packed(x, weight, bias, conv, relu, bound, residual, in_place, act)

    def watched_as_it_is(e, op, *args):
        if op == "conv_norm_add_relu_" or (op == "conv_norm_add_relu" and args[8] is not None):
            over.append(op == "conv_norm_add_relu_")
        return run(e, op, *args)

    monkeypatch.setattr(onednn, "conv_packed", watched)
    monkeypatch.setattr(Evaluation, "run", watched_as_it_is)
    x = torch.randn(4, 64, 28, 28).contiguous(memory_format=memory_format)
    before = x.clone()
    with torch.no_grad(), choose.fusing_all():
        for _ in range(2):
            over.clear()
            out = fused(x)
            assert over == [False, True, True]  # the first input is the caller's
            assert torch.equal(x, before)
            torch.testing.assert_close(out, stock(x))
        kept = []
        fused[1].register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
        over.clear()
        out = fused(x)
        assert torch.equal(*kept[0])  # somebody else has it
        torch.testing.assert_close(out, stock(x))


@needs_levels
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_pieces_write_their_images_into_the_whole(monkeypatch, memory_format):
    monkeypatch.setattr(unfolded, "IS_FAST", True)
    monkeypatch.setattr(unfolded, "_LEAST_PIXELS", 1)
    monkeypatch.setattr(stage, "MAPPED", 1 << 18)
    monkeypatch.setattr(stage, "PIECE", 1 << 18)
    monkeypatch.setattr(stage, "NEAR", (1 << 18, 1 << 30, 1 << 18))
    torch.manual_seed(0)
    stock = nn.Sequential(*[Bottleneck(64, 16) for _ in range(2)]).eval().to(memory_format=memory_format)
    fused, written, run = resnet_fused.fuse(copy.deepcopy(stock)), [], Evaluation.run

    def watched(e, op, *args):
        if e.into is not None and op == "conv_norm_add_relu_" and args[0] is e.into:
            written.append(e.into)
        return run(e, op, *args)

    monkeypatch.setattr(Evaluation, "run", watched)
    x = torch.randn(4, 64, 28, 28).contiguous(memory_format=memory_format)
    before = x.clone()
    with torch.no_grad(), choose.fusing_all():
        for _ in range(2):
            written.clear()
            out = fused(x)
            whole = memory_format == torch.channels_last
            assert [t.data_ptr() for t in written] == ([t.data_ptr() for t in out.split(1)[1:]] if whole else [])
            assert torch.equal(x, before) and out.is_contiguous(memory_format=memory_format)
            torch.testing.assert_close(out, stock(x))
