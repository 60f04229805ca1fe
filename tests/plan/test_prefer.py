"""Blocks that are to save memory rather than time."""

import copy
import pickle

import pytest
import torch
from nets import assert_same, observe
from tuned import block, ends, images

import resnet_fused
from resnet_fused.models import Bottleneck

WIDE = (4, 512, 6, 6)  # few pixels of many channels, where a Gram join costs more than it saves


def wide(prefer=None, **options):
    torch.manual_seed(0)
    return resnet_fused.fuse(torch.nn.Sequential(Bottleneck(512, 128, **options)), prefer=prefer)


def wide_images():
    return torch.randn(*WIDE, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


def bytes_saved(block, x):
    own, seen = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}, {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return sum(size for place, size in seen.items() if place not in own)


@pytest.fixture(autouse=True)
def nothing_is_too_small():
    with resnet_fused.use("cpu"):
        yield


def test_less_is_saved():
    x, raw = wide_images().requires_grad_(), 4 * 512 * 6 * 6 * 4
    assert [said.partition(" (")[0] for said in ends(wide(), x)] == ["plain join"]
    assert ends(wide("memory"), x) == ["Gram join (memory is preferred)"]
    assert bytes_saved(wide("memory"), x) <= bytes_saved(wide(), x) - raw + 4 * 129 * 128


def test_a_gram_matrix_larger_than_what_it_saves_is_not_kept():
    x = wide_images()[:1, :, :4, :4].contiguous(memory_format=torch.channels_last).requires_grad_()
    assert ends(wide("memory"), x) == ["plain join (memory is preferred)"]
    assert bytes_saved(wide("memory"), x) <= bytes_saved(wide(), x)


@pytest.mark.parametrize("groups", [1, 4])
def test_numbers_are_stocks(groups):
    fused, x = wide("memory", groups=groups), wide_images()
    stock = resnet_fused.unfuse(copy.deepcopy(fused)).double()
    assert_same(observe(fused, x), observe(stock, x.double()))


def test_it_stays_as_it_was_said():
    model, x = wide("memory"), wide_images()
    assert "memory" in ends(resnet_fused.fuse(model), x)[0]
    assert "memory" in ends(pickle.loads(pickle.dumps(model)), x)[0]
    assert "memory" not in ends(resnet_fused.fuse(model, prefer="speed"), x)[0]


def test_what_was_measured_is_not_asked(clock, cache):
    model, x = block(), images()
    resnet_fused.tune(model, x)
    assert ends(model, x) == ["plain join (measured)"]
    assert ends(resnet_fused.fuse(model, prefer="memory"), x) == ["Gram join (memory is preferred)"]
