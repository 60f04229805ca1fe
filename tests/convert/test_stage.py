"""Stages of a fused model in evaluation: in pieces where images do not meet, whole everywhere else."""

import copy
import pickle

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.convert import stage, stock_forward
from resnet_fused.models import resnet18, resnet50


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Stages are split from 64 KiB on, into pieces of one to a few images."""
    monkeypatch.setattr(stage, "MAPPED", 64 << 10)
    monkeypatch.setattr(stage, "PIECE", 128 << 10)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return resnet_fused.fuse(resnet18(num_classes=7)).eval().to(memory_format=torch.channels_last)


def images(n=5):
    return torch.randn(n, 3, 64, 64).contiguous(memory_format=torch.channels_last)


def pieces_seen(model, x):
    """Batch sizes that the first block of layer1 is called with."""
    seen, block = [], model.layer1[0]
    original = type(block).forward
    block.forward = lambda h: seen.append(h.shape[0]) or original(block, h)
    try:
        with torch.no_grad():
            model(x)
    finally:
        del block.forward
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
        assert pieces_seen(model, x) == [5]
    assert pieces_seen(model, images(1)) == [1]
    assert pieces_seen(model, x) == [2, 2, 1]


def test_gradients_run_whole(model):
    x = images().requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()


@torch.no_grad()
def test_changed_stages_run_as_they_are_now(model):
    model.layer1[1] = nn.Identity()
    assert pieces_seen(model, images()) == [5]


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
