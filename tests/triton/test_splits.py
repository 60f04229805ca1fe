"""How sums over rows are shared: whole waves on every card, or a reason why not."""

import functools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_fused.backends import cards
from resnet_fused.backends import triton as room
from resnet_fused.backends.triton import splits
from resnet_fused.models import resnet50
from resnet_fused.plan import devices
from resnet_fused.traffic.calls import calls

#: A100, H100 PCIe, RTX 4090, H100 SXM, L40S, B200.
CARDS = [(80, 108), (90, 114), (89, 128), (90, 132), (89, 142), (100, 148)]
SUMS = ("conv1x1_wgrad", "conv1x1_backward", "gram")


@functools.cache
def sums(batch, dtype):
    """Calls of ops that sum over rows in a training step of ResNet-50."""
    x = torch.empty(batch, 3, 224, 224, device="meta")
    found = calls(resnet50(), x, True, devices.find("h100"), dtype)
    return [call for call in found if call.op in SUMS]


@pytest.fixture
def chosen(monkeypatch):
    """(arguments, result) of every choice of splits."""
    noted = []

    def note(rows, tiles, row_bytes, partial_bytes, block_m, sms, per_sm, most_rows=None, busy=splits.BUSY):
        split = choose(rows, tiles, row_bytes, partial_bytes, block_m, sms, per_sm, most_rows, busy)
        noted.append((rows, tiles, row_bytes, partial_bytes, block_m, sms, per_sm, busy, split))
        return split

    choose = splits.choose
    monkeypatch.setattr(splits, "choose", note)
    return noted


@pytest.mark.parametrize(("arch", "sms"), CARDS)
@pytest.mark.parametrize("batch", [256, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_waves_are_whole(chosen, arch, sms, batch, dtype):
    for call in sums(batch, dtype):
        room.kernels()[call.op].launches(call.args, {}, cards.Card(arch, sms))
    assert chosen
    for rows, tiles, row_bytes, partial_bytes, block_m, _, per_sm, busy, split in chosen:
        programs = split.splits * tiles
        where = f"{rows} rows, {tiles} tiles: {programs} programs on {sms} multiprocessors"
        full = splits.utilisation(programs, sms, per_sm) >= 0.85
        assert full or split.bound, where
        share = split.splits * partial_bytes / (rows * row_bytes)
        if not full and splits.utilisation(programs, sms, 1) < 0.85:  # then what it is bound by must be at hand
            if split.bound == "rows":
                assert rows // splits.MIN_ROWS * tiles < 2 * sms, where
            else:
                cheap = share <= splits.CHEAP and programs >= busy * sms
                assert cheap or 6 * split.splits * partial_bytes > splits.L2_BYTES, where
        assert (split.splits - 1) * split.row_tiles * block_m < rows <= split.splits * split.row_tiles * block_m, where
        assert split.splits == 1 or rows >= splits.MIN_ROWS * split.splits, where
        if batch == 256 and rows == 256 * 56 * 56 and dtype == torch.bfloat16:
            assert share <= 0.02, f"{where}, partial sums are {share:.1%} of the reads"
        # partial sums stay within the smallest L2
        assert split.splits * partial_bytes / 2 <= splits.L2_BYTES or share <= splits.CHEAP or split.splits == 1, where


def test_a_second_wave_of_a_few_programs_is_avoided():
    """132 programs on 108 multiprocessors took as long as 216."""
    sizes = (200704, 4, 1280, 8 * 256 * 129, 64)
    for sms in (108, 114, 128, 132, 142, 148):
        split = splits.choose(*sizes, sms, 1)
        assert splits.utilisation(4 * split.splits, sms, 1) >= 0.9, (sms, split)


def test_a_card_is_asked_once(monkeypatch):
    asked = []

    class Told:
        multi_processor_count = 108

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: asked.append(index) or Told)
    cards._card.cache_clear()
    try:
        assert [cards.of(torch.device("cuda", 0)) for _ in range(3)] == [cards.Card(80, 108)] * 3
        assert asked == [0]
        assert cards.of(torch.device("cpu")) == cards.H100
        with cards.assuming(cards.Card(100, 148)):
            assert cards.of(torch.device("cuda", 0)).sms == 148
    finally:
        cards._card.cache_clear()
