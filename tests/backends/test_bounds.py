"""A NaN that nobody announced comes out as stock's NaN, however it was written; and bounds are noted nowhere else."""

import copy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused
from resnet_fused.backends import bounds
from resnet_fused.models import BasicBlock, Bottleneck


def through_data(t):
    t.data[0, 0, 0, 0] = torch.nan


def through_numpy(t):
    t.detach().numpy()[0, 0, 0, 0] = float("nan")


def through_a_view(t):
    t.data.permute(0, 2, 3, 1)[0, 0].view(-1)[:1].fill_(torch.nan)


def through_shared_memory(t):
    torch.from_numpy(t.detach().numpy()).select(1, 0).fill_(torch.nan)


WRITES = [through_data, through_numpy, through_a_view, through_shared_memory]


def blocks(kind):
    torch.manual_seed(0)
    if kind is Bottleneck:
        return nn.ModuleList([Bottleneck(16, 4), Bottleneck(16, 4)])
    return nn.ModuleList([BasicBlock(8, 8), BasicBlock(8, 8)])


def nan_of(model, x, write):
    """Where a NaN is in what the second block makes of the first's output, written to in between, and of the input."""
    y = model[0](x)
    model[1](y)  # its bound could be noted now
    write(y)
    seen = [model[1](y).isnan()]
    write(x)
    return [*seen, model[0](x).isnan()]


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "train"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", [Bottleneck, BasicBlock])
def test_nan_written_between_blocks_is_stocks_nan(kind, write, mode):
    stock = blocks(kind).train(mode == "train").to(memory_format=torch.channels_last)
    fused = resnet_fused.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 16 if kind is Bottleneck else 8, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(mode == "inference_mode"), torch.set_grad_enabled(mode == "train"):
        wanted, got = (nan_of(model, x.clone(), write) for model in (stock, fused))
    assert all(nan.any() for nan in wanted)
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_left_on_tensors(grad):
    block = resnet_fused.fuse(Bottleneck(16, 4)).train(grad)
    x, packs = torch.randn(2, 16, 6, 6), []
    with torch.set_grad_enabled(grad), torch.autograd.graph.saved_tensors_hooks(lambda t: packs.append(t) or t, id):
        out = block(x)
    for t in (x, out, *packs, *block.parameters(), *block.buffers()):
        assert not [name for name in vars(t) if "fused" in name or "bound" in name]
    assert bool(packs) == grad and bounds._scope.notes is None


def test_notes_are_shared_by_inner_scopes_and_end_with_the_outermost():
    t = torch.ones(4)
    assert not bounds.is_known(bounds.remember(t, 2.0))
    with bounds.private():
        with bounds.private():
            bounds.remember(t, 2.0)
        assert bounds.is_known(t) and bounds.of(t) == 2.0
        assert not bounds.is_known(t.view(2, 2))  # by identity
    assert not bounds.is_known(t) and bounds.of(t) == 1.0


def test_a_note_dies_with_its_tensor():
    with bounds.private():
        t = bounds.remember(torch.ones(4), 2.0)
        note = bounds._scope.notes[id(t)]
        bounds._scope.notes[id(other := torch.ones(4))] = note  # as if at the same address
        del t
        assert not bounds.is_known(other) and note[0]() is None


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "watch", [Watching, Listening, lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)]
)
def test_nothing_is_noted_where_somebody_could_write_in_between(watch):
    t = torch.ones(4)
    with bounds.private():
        bounds.remember(t, 2.0)
        with watch(), bounds.private():
            assert not bounds.is_known(t)
        assert bounds.is_known(t)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_measured_bounds(bad):
    t = torch.randn(3, 5, 4, 4).contiguous(memory_format=torch.channels_last)
    assert bounds.of(t) == t.abs().max().item()
    t[1, 2, 3, 1] = bad
    assert bounds.of(t) == torch.inf and bounds.of_weight(t) == torch.inf
    assert bounds.of(t[:0]) == 0.0
