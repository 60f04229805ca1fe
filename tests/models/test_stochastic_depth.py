"""Stochastic depth draws what torchvision's draws, and decays linearly over the blocks of every network."""

import pytest
import torch
from architectures import meta
from torch import nn

from resnet_fused import models
from resnet_fused.models import BasicBlock, ResNet, StochasticDepth
from resnet_fused.testing.vision import import_torchvision


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("p", [0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_draws_as_torchvision(mode, p, dtype):
    try:
        theirs = import_torchvision().ops.StochasticDepth(p, mode)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not import: {error}")
    x = torch.randn(7, 3, 2, 2, dtype=dtype)
    for training in (True, False):
        results = []
        for module in (StochasticDepth(p, mode), theirs):
            torch.manual_seed(5)
            results.append((module.train(training)(x), torch.get_rng_state()))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_rows_draw_for_themselves_and_batches_together():
    x = torch.ones(64, 2, 1, 1)
    torch.manual_seed(0)
    rows, batch = StochasticDepth(0.5)(x), StochasticDepth(0.5, "batch")(x)
    assert rows.unique().tolist() == [0, 2] and torch.equal(rows[:, 0], rows[:, 1])
    assert len(batch.unique()) == 1


def rates(model):
    blocks = [m for m in model.modules() if hasattr(m, "drop_path")]
    return [None if block.drop_path is None else block.drop_path.p for block in blocks]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet18", 8),
        ("resnet50", 16),
        ("resnet20", 9),
        ("preact_resnet50", 16),
        ("preact_resnet110", 54),
        ("wrn16_8", 6),
    ],
)
def test_linear_decay(name, blocks):
    model = meta(models.BUILDERS[name], stochastic_depth_rate=0.5, stochastic_depth_mode="batch")
    torch.testing.assert_close(rates(model), [0.5 * (i + 1) / blocks for i in range(blocks)])
    assert {m.mode for m in model.modules() if isinstance(m, StochasticDepth)} == {"batch"}
    plain = meta(models.BUILDERS[name])
    assert rates(plain) == [None] * blocks and list(plain.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("builder", [models.resnet18, models.resnet20, models.preact_resnet110])
def test_a_block_that_is_always_dropped_is_its_shortcut(builder):
    model = builder(stochastic_depth_rate=1)
    last = list(model.children())[[name for name, _ in model.named_children()].index("layer3")][-1]
    last.drop_path.p = 1.0
    x = torch.randn(2, last.conv1.in_channels, 3, 3).relu()
    assert torch.equal(last.train()(x), x)


@pytest.mark.parametrize("name", ["resnet20", "plain20", "wrn16_8"])
def test_scripts(name):
    """As stock models do, with what is optional in the blocks and without."""
    options = {} if name == "plain20" else {"stochastic_depth_rate": 0.5}
    for model in (models.BUILDERS[name](), models.BUILDERS[name](**options)):
        torch.jit.script(model.eval())


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_rates_outside(rate):
    with pytest.raises(ValueError, match=f"in \\[0, 1\\].*got {rate}"):
        models.resnet20(stochastic_depth_rate=rate)
    with pytest.raises(ValueError, match=f"in \\[0, 1\\], got {rate}"):
        StochasticDepth(rate)


def test_other_words_and_other_blocks():
    with pytest.raises(ValueError, match="one of 'row', 'batch', got 'column'"):
        models.resnet18(stochastic_depth_mode="column")

    class Other(nn.Module):
        expansion = 1

        def __init__(self, *args, **named):
            super().__init__()

    with pytest.raises(ValueError, match="Other has no drop_path"):
        ResNet(Other, (1, 1, 1, 1), stochastic_depth_rate=0.1)
    assert isinstance(ResNet(BasicBlock, (1, 1, 1, 1)), ResNet)


@pytest.mark.parametrize(("name", "blocks"), [("resnet110_stochastic_depth", 54), ("resnet50_stochastic_depth", 16)])
def test_the_papers_setting(name, blocks):
    model = meta(models.BUILDERS[name])
    torch.testing.assert_close(rates(model), [0.5 * (i + 1) / blocks for i in range(blocks)])
    assert {m.mode for m in model.modules() if isinstance(m, StochasticDepth)} == {"batch"}
    assert rates(meta(models.BUILDERS[name], stochastic_depth_rate=0)) == [None] * blocks
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"survival probabilities are, got {rate}"):
            models.BUILDERS[name](stochastic_depth_rate=rate)
