"""The counted figures of `explain`, and that it runs nothing."""

import pytest
import torch
from nets import block, small_resnet

import resnet_fused
from resnet_fused.models import resnet50


def test_counts_of_a_known_block():
    """An identity bottleneck, by hand, in units of one narrow activation: 16x16 pixels of 8 channels."""
    explained = resnet_fused.explain(block(32, 8), (2, 32, 16, 16))
    unit = 16 * 16 * 8 * 4 * 2
    entry = explained.model
    stock = 54 + 84  # forward: 2+3+2+2+3+2+5+12+12+8 and so on, one read or write of a narrow tensor each
    weights = sum(p.numel() for p in block(32, 8).parameters()) * 4
    assert entry.stock.bytes == pytest.approx(stock * unit, rel=0.15)
    assert entry.fused.bytes < 0.75 * entry.stock.bytes + 30 * weights
    assert entry.stock_saved == pytest.approx((4 + 12) * unit, rel=0.01)  # x; z, and relu or out, of widths 1, 1, 4
    assert entry.fused_saved == pytest.approx((4 + 1 + 1 + 4) * unit, rel=0.03)  # x, z1, z2, out and vectors


def test_resnet50_saves_and_moves_less():
    explained = resnet_fused.explain(resnet50(), (16, 3, 224, 224))
    assert explained.model.fused_saved <= 0.60 * explained.model.stock_saved
    assert explained.model.fused.bytes <= 0.75 * explained.model.stock.bytes
    assert [b.name for b in explained.blocks][:2] == ["layer1.0", "layer1.1"]
    assert "Gram join" in explained.blocks[1].plan and "plain join" in explained.blocks[-1].plan
    assert "whole model" in str(explained) and "not measured" in str(explained)


def test_nothing_is_run_or_touched():
    model = small_resnet()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    text = str(resnet_fused.explain(model, (2, 3, 64, 64), dtype=torch.bfloat16, training=False))
    assert "folded inference" in text
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not resnet_fused.report(model).fused


def test_bad_input_size():
    with pytest.raises(ValueError, match=r"input_size is \(3, 224, 224\); pass \(N, C, H, W\)"):
        resnet_fused.explain(small_resnet(), (3, 224, 224))
